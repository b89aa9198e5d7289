"""Writing files atomically: a file or folder is complete or absent, also after a crash or on a full disk; locks."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mevit_jax.errors import UserError

_log = logging.getLogger(__name__)

LOCK = '.lock'  # a file in a locked folder; it stays there, and locks nothing once its process has ended
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
  """Yields a temporary path beside `path` that replaces it on success and is deleted on failure.

  The temporary name is unique, so that two processes can write the same file. A pipe or device, such as /dev/stdout, is
  written directly.

  Raises:
    UserError: the file cannot be written, for example because the disk is full.
  """
  target = Path(path)
  if target.is_fifo() or target.is_char_device():
    with writing(target):
      yield target
    return
  temporary = target.with_name(f'.{target.name}.{uuid.uuid4().hex}.tmp')
  try:
    yield temporary
    temporary.replace(target)
  except OSError as error:
    if error.filename not in (None, str(temporary), str(target)):
      raise  # reading something else failed
    raise UserError(f'{target} cannot be written: {error.strerror or error}') from error
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Turns an OSError, such as that of a full disk, into a UserError that names the file that is written."""
  try:
    yield
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from error


def append_line(path: str | os.PathLike, line: str) -> None:
  """Appends a line to a UTF-8 text file, without its end; on a full disk the file stays as it was.

  Raises:
    UserError: the file cannot be written.
  """
  data = memoryview(f'{line}\n'.encode())
  with writing(path), open(path, 'ab', buffering=0) as file:
    size = file.tell()
    try:
      while data:
        data = data[file.write(data) :]
    except OSError:
      file.truncate(size)
      raise


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a UTF-8 text file atomically."""
  with atomic_path(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_json(path: str | os.PathLike, content: Any, indent: int | None = 2) -> None:
  """Writes a JSON file atomically."""
  write_text(path, json.dumps(content, indent=indent) + '\n')


def write_checked_json(path: str | os.PathLike, content: dict[str, Any], indent: int | None = 2) -> None:
  """Writes a JSON object atomically, with a checksum of its content in the field 'sha256'."""
  write_json(path, {**content, 'sha256': _checksum(content)}, indent)


def read_checked_json(path: str | os.PathLike) -> dict[str, Any]:
  """Reads what `write_checked_json` wrote.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: the file is damaged; the message says how.
  """
  content = json.loads(Path(path).read_bytes().decode())
  if not isinstance(content, dict) or 'sha256' not in content:
    raise ValueError('it has no checksum')
  if content.pop('sha256') != _checksum(content):
    raise ValueError('its content does not match its checksum')
  return content


def read_json_lines(path: str | os.PathLike, valid: Callable[[Any], bool] = lambda _: True) -> list[dict[str, Any]]:
  """Reads a file of JSON objects, one per line; logs how many damaged lines it skipped. A missing file is empty.

  Args:
    path: file to read.
    valid: returns whether an object is undamaged.
  """
  objects, damaged = [], 0
  for line in Path(path).read_bytes().splitlines() if Path(path).exists() else ():
    try:
      content = json.loads(line.decode())
    except (ValueError, RecursionError):
      content = None
    if isinstance(content, dict) and valid(content):
      objects.append(content)
    else:
      damaged += 1
  if damaged:
    _log.warning('%s: skipped %d damaged lines', path, damaged)
  return objects


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads the lines of a metrics.jsonl: step, and numbers by name, None for those that were not finite.

  Logs how many damaged lines it skipped.
  """

  def is_valid(line: dict[str, Any]) -> bool:
    return type(line.get('step')) is int and {type(value) for value in line.values()} <= {int, float, type(None)}

  return read_json_lines(path, is_valid)


def _checksum(content: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
  """Yields a temporary folder whose files move to `folder`, new or empty, when all are written.

  Raises:
    UserError: the folder is not empty (hidden files, such as Git's, do not count), or cannot be written.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith('.') for path in folder.iterdir()):
      raise UserError(f'{folder} is not empty: choose another folder')
    with tempfile.TemporaryDirectory(prefix='.export-', dir=folder) as name:
      temporary = Path(name)
      yield temporary
      for path in sorted(temporary.iterdir()):
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files that only their owner may read
        path.rename(folder / path.name)
  except OSError as error:
    raise UserError(f'{folder} cannot be written: {error}') from error


@contextlib.contextmanager
def lock_folder(folder: Path, busy: str, *, wait: bool = False) -> Iterator[None]:
  """Locks a folder, which is created if needed, against other processes; the lock ends with this process.

  Local file systems hold it between processes, NFS and Lustre (mounted with `flock`) also between machines. Elsewhere,
  such as on mounted buckets, it may hold on one machine only; without any locks, a warning says so.

  Args:
    folder: folder to lock, with a file `.lock` that names the process that holds the lock.
    busy: start of the error message: 'another command is preparing data/mine'.
    wait: waits for the lock instead of raising an error.

  Raises:
    UserError: another process holds the lock, or the folder cannot be written.
  """
  path = folder / LOCK
  with writing(path):
    folder.mkdir(parents=True, exist_ok=True)
    file = path.open('a+')
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      file.seek(0)
      holder = file.read().strip()
      raise UserError(f'{busy}; wait for it, or stop it' + (f': {holder}' if holder else '')) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise UserError(f'{path} cannot be locked: {error.strerror}') from error
      _log.warning('%s: this file system has no locks; start only one command at a time', folder)
    with contextlib.suppress(OSError):  # on a full disk the lock still holds
      file.truncate(0)
      file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
      file.flush()
    yield
