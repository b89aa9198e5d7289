"""A Hugging Face Hub on 127.0.0.1: the requests that downloads and uploads make, and their failures."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from urllib.parse import unquote, urlparse

import pytest


class Hub:
  """Repositories of models, and the server's behavior.

  Attributes:
    url: endpoint of the server.
    commits: repository -> commit -> file name -> content.
    branches: (repository, revision) -> commit.
    gated: repositories whose files need an accepted license.
    token: token that uploads and private repositories need.
    cut: number of downloads to cut off in the middle; the connection is closed.
    corrupt: names of files whose content differs from their checksum.
    short: names of files that are announced with another size.
    requests: method and path of each request, and the size that a download starts from.
  """

  def __init__(self) -> None:
    self.url = ''
    self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
    self.branches: dict[tuple[str, str], str] = {}
    self.gated, self.corrupt, self.short = set[str](), set[str](), set[str]()
    self.token, self.cut = 'hf_secret', 0
    self.requests: list[tuple[str, str, int]] = []
    self.uploads: dict[str, bytes] = {}

  def add(self, repository: str, files: dict[str, bytes], branch: str = 'main') -> str:
    """Adds a commit; returns its hash."""
    commits = self.commits.setdefault(repository, {})
    content = b''.join(name.encode() + data for name, data in sorted(files.items()))
    commit = hashlib.sha1(content + str(len(commits)).encode()).hexdigest()
    commits[commit] = files
    self.branches[repository, branch] = commit
    return commit

  def downloads(self) -> list[str]:
    """Returns the names of the files whose content was requested."""
    return [path.rpartition('/')[2] for method, path, _ in self.requests if method == 'GET' and '/resolve/' in path]


def blob_id(name: str, content: bytes) -> str:
  """Returns the checksum by which the hub names a file's content: SHA-256 of large files, Git's of others."""
  if name.endswith(('.safetensors', '.bin')):
    return hashlib.sha256(content).hexdigest()
  return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers one request."""

  protocol_version = 'HTTP/1.1'
  hub: Hub

  def log_message(self, *arguments) -> None:
    pass

  def _answer(self, status: int, content: bytes | dict | list = b'', **headers: str) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    self.send_header('Content-Length', headers.pop('size', str(len(body))))
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def _refuse(self, status: int, code: str) -> None:
    self._answer(status, {'error': code}, X_Error_Code=code, X_Error_Message=code)

  def do_GET(self) -> None:
    start = int(self.headers.get('Range', 'bytes=0-')[6:].partition('-')[0])
    path = unquote(urlparse(self.path).path)
    self.hub.requests.append((self.command, path, start))
    parts = path.strip('/').split('/')
    is_api = parts[:2] == ['api', 'models']
    repository = '/'.join(parts[2:4] if is_api else parts[:2])
    if repository not in self.hub.commits:
      self._refuse(404 if self.headers.get('Authorization') else 401, 'RepoNotFound')
      return
    revision = parts[5 if is_api else 3] if len(parts) > 4 else 'main'
    commit = self.hub.branches.get((repository, revision), revision)
    files = self.hub.commits[repository].get(commit)
    if files is None:
      self._refuse(404, 'RevisionNotFound')
    elif is_api:
      self._answer_api(repository, commit, files, is_tree='tree' in parts)
    elif repository in self.hub.gated:
      self._refuse(403, 'GatedRepo')
    elif parts[-1] not in files:
      self._refuse(404, 'EntryNotFound')
    else:
      self._send_file(parts[-1], files[parts[-1]], commit, start)

  do_HEAD = do_GET  # noqa: N815

  def _answer_api(self, repository: str, commit: str, files: dict[str, bytes], *, is_tree: bool) -> None:
    if not is_tree:
      siblings = [{'rfilename': name} for name in files]
      self._answer(
        200, {'id': repository, 'modelId': repository, 'sha': commit, 'siblings': siblings, 'private': False}
      )
      return
    tree = []
    for name, content in files.items():
      oid, size = blob_id(name, content), len(content)
      entry = {'type': 'file', 'path': name, 'size': size, 'oid': oid[:40]}
      tree.append(entry | ({'lfs': {'oid': oid, 'size': size, 'pointerSize': 100}} if len(oid) == 64 else {}))
    self._answer(200, tree)

  def _send_file(self, name: str, content: bytes, commit: str, start: int) -> None:
    headers = {'X-Repo-Commit': commit, 'ETag': f'"{blob_id(name, content)}"', 'Accept-Ranges': 'bytes'}
    if name in self.hub.corrupt:
      content = content[:-1] + bytes([content[-1] ^ 1])
    if self.command == 'HEAD':
      size = len(content) + 7 if name in self.hub.short else len(content)
      self._answer(200, size=str(size), **headers)
      return
    if start:
      headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
    rest = content[start:]
    if self.hub.cut and len(content) > 1000:
      self.hub.cut -= 1
      self._answer(206 if start else 200, rest[: len(rest) // 2], size=str(len(rest)), **headers)
      self.wfile.flush()
      self.close_connection = True
      return
    self._answer(206 if start else 200, rest, **headers)

  def do_POST(self) -> None:
    body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    path = unquote(urlparse(self.path).path)
    self.hub.requests.append((self.command, path, 0))
    if self.headers.get('Authorization') != f'Bearer {self.hub.token}':
      self._refuse(401, 'Unauthorized')
    elif path == '/api/repos/create':
      asked = json.loads(body)
      repository = f'{asked["organization"]}/{asked["name"]}'
      self.hub.commits.setdefault(repository, {})
      self._answer(200, {'url': f'{self.hub.url}/{repository}', 'id': repository})
    elif path == '/api/validate-yaml':
      self._answer(200, {'errors': [], 'warnings': []})
    elif '/preupload/' in path:
      names = [file['path'] for file in json.loads(body)['files']]
      modes = {name: 'lfs' if name.endswith('.safetensors') else 'regular' for name in names}
      self._answer(200, {'files': [{'path': n, 'uploadMode': m, 'shouldIgnore': False} for n, m in modes.items()]})
    elif path.endswith('/info/lfs/objects/batch'):
      objects = [
        {**o, 'actions': {'upload': {'href': f'{self.hub.url}/lfs/{o["oid"]}'}}} for o in json.loads(body)['objects']
      ]
      self._answer(200, {'transfer': 'basic', 'objects': objects})
    elif '/commit/' in path:
      self._commit('/'.join(path.split('/')[3:5]), [json.loads(line) for line in body.splitlines()])
    else:
      self._refuse(404, 'EntryNotFound')

  def _commit(self, repository: str, lines: list[dict]) -> None:
    files = {}
    for line in lines:
      value = line['value']
      if line['key'] == 'file':
        files[value['path']] = base64.b64decode(value['content'])
      elif line['key'] == 'lfsFile':
        files[value['path']] = self.hub.uploads[value['oid']]
    commit = self.hub.add(repository, files)
    url = f'{self.hub.url}/{repository}/commit/{commit}'
    self._answer(200, {'success': True, 'commitOid': commit, 'commitUrl': url})

  def do_PUT(self) -> None:
    content = self.rfile.read(int(self.headers['Content-Length']))
    self.hub.uploads[self.path.rpartition('/')[2]] = content
    self._answer(200)


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
  """Serves an empty hub in a thread."""
  hub = Hub()
  handler = type('Handler', (_Handler,), {'hub': hub})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  server.daemon_threads = True
  hub.url = f'http://127.0.0.1:{server.server_address[1]}'
  thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
  thread.start()
  try:
    yield hub
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def use(hub: Hub, cache, patch: pytest.MonkeyPatch) -> None:
  """Lets huggingface_hub use this server and an empty cache, as HF_ENDPOINT and HF_HUB_CACHE do in a new process."""
  from huggingface_hub import constants, file_download

  patch.setattr(constants, 'ENDPOINT', hub.url)
  patch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', hub.url + '/{repo_id}/resolve/{revision}/{filename}')
  patch.setattr(constants, 'HF_HUB_CACHE', str(cache))
  patch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
  patch.setattr(constants, 'HF_TOKEN_PATH', str(cache / 'no token'))
  patch.setattr(file_download.time, 'sleep', lambda seconds: None)
  patch.setenv('HF_HUB_DISABLE_PROGRESS_BARS', '1')
  patch.delenv('HF_TOKEN', raising=False)
