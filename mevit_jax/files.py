"""Writing files atomically: a file or folder is complete or absent, also after a crash or on a full disk."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mevit_jax.errors import UserError

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
  """Yields a temporary path beside `path` that replaces it on success and is deleted on failure.

  The temporary name is unique, so that two processes can write the same file.

  Raises:
    UserError: the file cannot be written, for example because the disk is full.
  """
  target = Path(path)
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


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads a file of JSON objects, one per line; logs how many damaged lines it skipped. A missing file is empty."""
  objects, damaged = [], 0
  for line in Path(path).read_bytes().splitlines() if Path(path).exists() else ():
    try:
      objects.append(json.loads(line.decode()))
    except ValueError:
      damaged += 1
  if damaged:
    _log.warning('%s: skipped %d damaged lines', path, damaged)
  return objects


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
