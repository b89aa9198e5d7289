"""Models of the Hugging Face Hub by name: `hf://ORG/NAME[@REVISION]`; `timm/NAME` is short for `hf://timm/NAME`.

`huggingface_hub` does the work, with its environment variables: HF_HOME (cache), HF_TOKEN, HF_ENDPOINT (mirror),
HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS.
"""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mevit_jax.errors import UserError

_NAME = re.compile(r'(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?')
_CONFIGS = ('config.json', 'preprocessor_config.json', 'checksums.json')
# File name patterns of weights. Pickles are downloaded only where there is nothing else.
_SAFETENSORS = ('model.safetensors', 'model.safetensors.index.json', 'model-*-of-*.safetensors')
_PICKLES = ('pytorch_model.bin', 'pytorch_model.bin.index.json', 'pytorch_model-*-of-*.bin')
_SHARED = ('model.safetensors', 'config.json', 'checksums.json', 'README.md')  # of a shared model
_LOGIN = 'log in with `hf auth login`, or set HF_TOKEN'


class Located(NamedTuple):
  """Weights on this machine.

  Attributes:
    path: file or folder.
    name: the path as given, or the model's name on the hub with the commit: 'hf://ORG/NAME@COMMIT'.
  """

  path: Path
  name: str


class _Repository(NamedTuple):
  id: str
  revision: str | None


def is_hub_name(name: str | os.PathLike) -> bool:
  """Returns whether a string names a model of the hub instead of a local path."""
  return str(name).startswith('hf://') or (str(name).startswith('timm/') and not Path(name).exists())


def hub_id(name: str) -> str:
  """Returns the repository of a name: 'ORG/NAME'."""
  return _parse(name).id


def same_model(name: str, pinned: str) -> bool:
  """Returns whether two names are of one model of the hub, and the first one's revision is none or the same."""
  if not (is_hub_name(name) and is_hub_name(pinned)):
    return name == pinned
  one, other = _parse(name), _parse(pinned)
  return one.id == other.id and one.revision in (None, other.revision)


def locate(name: str | os.PathLike) -> Located:
  """Returns the local files of weights; a model of the hub is downloaded unless it is in the cache.

  Only the configs and the weights are downloaded: safetensors, or PyTorch files if there is nothing else. A download
  goes on where the connection broke; every file is verified with the hub's checksum.

  Raises:
    UserError: no such file, folder or model; or the download failed.
  """
  if is_hub_name(name):
    return _download(str(name))
  path = Path(name).expanduser()
  if not path.exists():
    raise UserError(f'no weights at {path}: no such file or folder')
  return Located(path, str(name))


def push(folder: Path, name: str, *, private: bool = False) -> str:
  """Uploads a shared model (`mevit export --to=mevit`) and its model card as one commit.

  Args:
    folder: folder of the shared model.
    name: 'hf://ME/NAME'; the repository is made if it does not exist.
    private: whether a new repository is private.

  Returns:
    The model's name with the commit.

  Raises:
    UserError: the upload failed.
  """
  repository = _parse(name)
  if repository.revision:
    raise UserError(f'{name}: models are pushed to the main branch; leave out @{repository.revision}')
  from huggingface_hub import HfApi

  api = HfApi(library_name='mevit_jax')
  with _one_line_errors(name, repository, 'upload'):
    api.create_repo(repository.id, private=private, exist_ok=True)
    commit = api.upload_folder(
      repo_id=repository.id, folder_path=folder, allow_patterns=list(_SHARED), commit_message='Upload with mevit push'
    )
  return f'hf://{repository.id}@{commit.oid}'


def _parse(name: str) -> _Repository:
  match = _NAME.fullmatch(name)
  if not match:
    raise UserError(f'{name} is not the name of a model: write hf://ORG/NAME or hf://ORG/NAME@REVISION')
  return _Repository(match[1], match[2])


def _download(name: str) -> Located:
  """Downloads a model of the hub into its cache, or finds it there."""
  repository = _parse(name)
  from huggingface_hub import snapshot_download

  revision = repository.revision
  for patterns in (_SAFETENSORS, _PICKLES):
    with _one_line_errors(name, repository, 'download'):
      folder = Path(
        snapshot_download(
          repository.id, revision=revision, allow_patterns=[*_CONFIGS, *patterns], library_name='mevit_jax'
        )
      )
    revision = folder.name  # the commit: of one revision even if it moves in between
    weights = [file for pattern in patterns for file in folder.glob(pattern)]
    if any(file.suffix != '.json' for file in weights):
      for file in (*weights, *map(folder.joinpath, _CONFIGS)):
        _verify(name, file)
      return Located(folder, f'hf://{repository.id}@{folder.name}')
  raise UserError(
    f'{name} has no weights that can be read: neither {_SAFETENSORS[0]} nor {_PICKLES[0]}, or their shards'
  )


def _verify(name: str, file: Path) -> None:
  """Compares a downloaded file with its checksum, which is the name of its blob in the cache; deletes a damaged one."""
  if not file.is_file():
    return
  blob = file.resolve()
  with blob.open('rb') as stream:
    if re.fullmatch('[0-9a-f]{64}', blob.name):  # large files
      checksum = hashlib.file_digest(stream, 'sha256').hexdigest()
    elif re.fullmatch('[0-9a-f]{40}', blob.name):  # other files: Git's
      content = stream.read()
      checksum = hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False).hexdigest()
    else:  # a cache without symbolic links
      return
  if checksum != blob.name:
    file.unlink()
    blob.unlink(missing_ok=True)
    raise UserError(
      f"{name}: {file.name} does not match the hub's checksum; it was deleted from the cache: run the same command "
      'again to download it'
    )


@contextlib.contextmanager
def _one_line_errors(name: str, repository: _Repository, action: str) -> Iterator[None]:
  """Turns the errors of huggingface_hub into a UserError of one line, and hides its messages on each retry."""
  logger = logging.getLogger('huggingface_hub')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # HTTP and network errors of any library below
    raise UserError(_explain(name, repository, action, error)) from error
  finally:
    logger.setLevel(level)


def _explain(name: str, repository: _Repository, action: str, error: Exception) -> str:
  from huggingface_hub import constants, errors

  hub = constants.ENDPOINT
  status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
  if isinstance(error, errors.GatedRepoError):
    return f'{name} is gated: accept its terms at {hub}/{repository.id}, then {_LOGIN}'
  if isinstance(error, errors.RevisionNotFoundError):
    return f'{name}: no such revision at {hub}'
  if action == 'upload' and status in (401, 403):
    return f'{name}: {hub} does not let you write there: {_LOGIN} (a token with write access)'
  if isinstance(error, errors.RepositoryNotFoundError):
    return f'no model {repository.id} at {hub}: check the name; if it is private, {_LOGIN}'
  if isinstance(error, errors.LocalEntryNotFoundError):
    if constants.HF_HUB_OFFLINE:
      return f'{name} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to download it'
    cause = _first_line(error.__cause__ or error)
    return f'{name} is not in the cache, and {hub} cannot be reached: {cause}; check the network, or set HF_ENDPOINT'
  reason = _first_line(error) + (f' ({_first_line(error.__cause__)})' if error.__cause__ else '')
  return f'{name}: the {action} failed: {reason}; run the same command again'


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')
