"""What a workdir says of itself, and of its checkpoints; files and folders that are whole or not there."""

import json
import platform
from pathlib import Path
from typing import Any

import jax

import mevit_jax
from mevit_jax.errors import UserError
from mevit_jax.files import write_json

# Of the workdir: its files, and what stands in a checkpoint.
FORMAT = 3
SHARED = 'mevit'  # the model_type of a folder that is shared, as Hugging Face's configs have one


def read_workdir(workdir: Path) -> dict[str, Any]:
  """What `config.json` of a workdir holds: recipe, class_names, fingerprint, format."""
  path = workdir / 'config.json'
  if not path.exists():
    raise UserError(f'{workdir} is no workdir: it has no config.json')
  try:
    about = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise UserError(f'{path} is damaged: {error}') from None
  return checked(about, path)


def checked(about: Any, where: Path) -> dict[str, Any]:
  """What a workdir or a checkpoint says of itself; a UserError if that is of another version, or nothing of ours."""
  if not isinstance(about, dict) or not {'config', 'class_names', 'fingerprint'} <= about.keys():
    raise UserError(f'{where} is not of a workdir of mevit_jax, or damaged')
  if about.get('format') != FORMAT:
    raise UserError(f'{where} has format {about.get("format")}, this version of mevit_jax reads {FORMAT}')
  return about


def versions() -> dict[str, str]:
  """Of what computes here; results and exports say them."""
  return {'mevit_jax': mevit_jax.__version__, 'jax': jax.__version__, 'python': platform.python_version()}


def is_shared(folder: Path) -> bool:
  """Whether a folder holds one set of params as `mevit export --to=mevit` writes them: it is no run."""
  try:
    return json.loads((folder / 'config.json').read_text())['model_type'] == SHARED
  except (OSError, ValueError, LookupError, TypeError):
    return False


def write_workdir(workdir: Path, about: dict[str, Any]) -> None:
  """Makes a workdir: writes its `config.json`."""
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(workdir / 'config.json', {**about, 'format': FORMAT})
