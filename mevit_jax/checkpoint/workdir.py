"""The files that describe a workdir: config.json, and the metadata of its checkpoints."""

import json
import platform
from pathlib import Path
from typing import Any

import jax

import mevit_jax
from mevit_jax.errors import UserError
from mevit_jax.files import read_checked_json, write_checked_json

# Version of the files of a workdir and of the metadata of a checkpoint.
FORMAT = 3
SHARED = 'mevit'  # the model_type of an exported model, as in Hugging Face's config.json


class DamagedError(UserError):
  """A file of a workdir whose content is not what was written."""


def read_workdir(workdir: Path) -> dict[str, Any]:
  """Reads the config.json of a workdir: config, class_names, fingerprint, format.

  Raises:
    UserError: not a workdir, or an unsupported format; DamagedError if the file is damaged.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise UserError(f'{workdir} is not a workdir: it has no config.json')
  if is_shared(workdir):  # checksums.json covers it
    return check_metadata(json.loads(path.read_text()), path)
  try:
    return check_metadata(read_checked_json(path), path)
  except ValueError as error:
    _check_format(path)
    raise DamagedError(f'{path} is damaged: {error}') from None


def _check_format(path: Path) -> None:
  """Raises a UserError if a config.json without a valid checksum is one of another format version."""
  try:
    metadata = json.loads(path.read_text())
  except ValueError:
    return
  if isinstance(metadata, dict) and metadata.get('format', FORMAT) != FORMAT:
    check_metadata(metadata, path)


def check_metadata(metadata: Any, path: Path) -> dict[str, Any]:
  """Returns the metadata of a workdir or checkpoint if this version can read it.

  Raises:
    UserError: another format, or not written by this package.
  """
  if isinstance(metadata, dict) and metadata.get('format', FORMAT) != FORMAT:
    raise UserError(
      f'{path} has format {metadata["format"]}; this version of mevit_jax reads format {FORMAT}: train again, or use '
      'the version that wrote it'
    )
  if not isinstance(metadata, dict) or not {'config', 'class_names', 'fingerprint', 'format'} <= metadata.keys():
    raise UserError(f'{path} was not written by mevit_jax, or is damaged')
  return metadata


def versions() -> dict[str, str]:
  """Returns the versions that results and exported models record."""
  return {'mevit_jax': mevit_jax.__version__, 'jax': jax.__version__, 'python': platform.python_version()}


def is_shared(folder: Path) -> bool:
  """Returns whether a folder holds one exported model (`mevit export --to=mevit`) instead of a run."""
  try:
    return json.loads((folder / 'config.json').read_text())['model_type'] == SHARED
  except (OSError, ValueError, LookupError, TypeError, RecursionError):
    return False


def write_workdir(workdir: Path, metadata: dict[str, Any]) -> None:
  """Creates a workdir by writing its config.json."""
  workdir.mkdir(parents=True, exist_ok=True)
  write_checked_json(workdir / 'config.json', {**metadata, 'format': FORMAT})
