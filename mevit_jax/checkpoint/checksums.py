"""SHA-256 checksums of a checkpoint's files: written before the checkpoint gets its name, verified before reading."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mevit_jax.files import write_json

# In every checkpoint: {'files': {path: [bytes, SHA-256]}}.
CHECKSUMS = 'checksums.json'
# Orbax adds the other two after all else is written; nothing is restored from them.
_EXCLUDED = {CHECKSUMS, '_CHECKPOINT_METADATA', 'commit_success.txt'}


def write_checksums(folder: Path) -> None:
  """Writes the checksums of all files of a folder into it; reads every byte, one file per thread."""
  paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob('*')) if path.is_file()}
  paths = {name: path for name, path in paths.items() if name not in _EXCLUDED}
  with ThreadPoolExecutor() as pool:
    checksums = pool.map(_checksum, paths.values())
    files = {name: [path.stat().st_size, value] for (name, path), value in zip(paths.items(), checksums, strict=True)}
  write_json(folder / CHECKSUMS, {'files': files}, indent=1)


def verify_checksums(folder: Path, required: Sequence[str] = ()) -> str:
  """Compares a folder with its checksums.

  Args:
    folder: folder with a file of checksums.
    required: files whose checksums it must list.

  Returns:
    A description of the damage, such as '5/params/d/x has 10 bytes instead of 20'; '' if the folder is intact.
  """
  try:
    files = json.loads((folder / CHECKSUMS).read_text())['files']
    if not files:
      return f'{CHECKSUMS} lists no files'
    if outside := [name for name in files if Path(name).is_absolute() or '..' in Path(name).parts]:
      return f'{CHECKSUMS} lists {outside[0]!r}, which is outside of the folder'
    if unlisted := [name for name in required if name not in files]:
      return f'{CHECKSUMS} does not list {unlisted[0]}'
    with ThreadPoolExecutor() as pool:
      problems = [*pool.map(lambda file: _verify(folder / file[0], *file[1]), files.items())]
  except FileNotFoundError:
    return f'{CHECKSUMS} is missing: writing it was interrupted'
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return f'{CHECKSUMS} is damaged'
  damaged = [f'{name} {problem}' for name, problem in zip(files, problems, strict=True) if problem]
  if len(damaged) > 1:
    return f'{damaged[0]}; and {len(damaged) - 1} more files'
  return ''.join(damaged)


def _verify(path: Path, size: int, checksum: str) -> str:
  try:
    if path.stat().st_size != size:
      return f'has {path.stat().st_size} bytes instead of {size}'
    return '' if _checksum(path) == checksum else 'has a different checksum'
  except FileNotFoundError:
    return 'is missing'
  except OSError as error:
    return f'cannot be read: {error.strerror}'


def _checksum(path: Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
