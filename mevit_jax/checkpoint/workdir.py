"""The files that describe a workdir: config.json, and the metadata of its checkpoints."""

import json
import platform
from pathlib import Path
from typing import Any

import jax

import mevit_jax
from mevit_jax.errors import UserError
from mevit_jax.files import write_json

# Version of the files of a workdir and of the metadata of a checkpoint.
FORMAT = 3
SHARED = 'mevit'  # the model_type of an exported model, as in Hugging Face's config.json


def read_workdir(workdir: Path) -> dict[str, Any]:
  """Reads the config.json of a workdir: config, class_names, fingerprint, format.

  Raises:
    UserError: not a workdir, an unsupported format, or a damaged file.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise UserError(f'{workdir} is not a workdir: it has no config.json')
  try:
    metadata = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f'{path} is damaged: {error}') from None
  return check_metadata(metadata, path)


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
  except (OSError, ValueError, LookupError, TypeError):
    return False


def write_workdir(workdir: Path, metadata: dict[str, Any]) -> None:
  """Creates a workdir by writing its config.json."""
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(workdir / 'config.json', {**metadata, 'format': FORMAT})
