"""Checksums of a checkpoint's files: written before it gets its name, compared before it is read."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# In every checkpoint: {'files': {path: [bytes, SHA-256]}}.
CHECKSUMS = 'checksums.json'
# Orbax writes the other two when all else is there; nothing that is restored stands in them.
_NOT_IN_IT = {CHECKSUMS, '_CHECKPOINT_METADATA', 'commit_success.txt'}


def write_checksums(folder: Path) -> None:
  """Writes the checksums of all files of a folder into it; reads every byte, a file a thread."""
  paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob('*')) if path.is_file()}
  paths = {name: path for name, path in paths.items() if name not in _NOT_IN_IT}
  with ThreadPoolExecutor() as pool:
    sums = pool.map(_checksum, paths.values())
    files = {name: [path.stat().st_size, found] for (name, path), found in zip(paths.items(), sums, strict=True)}
  (folder / CHECKSUMS).write_text(json.dumps({'files': files}, indent=1) + '\n')


def verify_checksums(folder: Path) -> str:
  """What is wrong with a sealed folder, '' if it is what was written: '5/params/d/x has 10 bytes, and not 20'."""
  try:
    files = json.loads((folder / CHECKSUMS).read_text())['files'].items()
    with ThreadPoolExecutor() as pool:
      found = [*pool.map(lambda file: _damage_of(folder / file[0], *file[1]), files)]
  except FileNotFoundError:
    return f'{CHECKSUMS} is missing: it was not written to its end'
  except (ValueError, KeyError, TypeError, AttributeError):
    return f'{CHECKSUMS} is damaged'
  wrong = [f'{name} {what}' for (name, _), what in zip(files, found, strict=True) if what]
  return '' if not wrong else wrong[0] if len(wrong) == 1 else f'{wrong[0]}; and {len(wrong) - 1} more files'


def _damage_of(path: Path, size: int, checksum: str) -> str:
  try:
    if path.stat().st_size != size:
      return f'has {path.stat().st_size} bytes, and not {size}'
    return '' if _checksum(path) == checksum else 'is not what was written: its checksum is another'
  except FileNotFoundError:
    return 'is missing'
  except OSError as error:
    return f'cannot be read: {error.strerror}'


def _checksum(path: Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
