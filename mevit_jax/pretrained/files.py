"""Weight files and the configs beside them: one file, or a folder of Hugging Face or timm (shards too)."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mevit_jax.errors import UserError
from mevit_jax.pretrained.state_dicts import choose, split_by_name
from mevit_jax.pretrained.tensors import LazyTensors, read_tensors

# Files of weights in a folder, in order of preference: an index of shards, or a single file.
_WEIGHT_FILES = (
  'model.safetensors.index.json', 'model.safetensors', 'pytorch_model.bin.index.json', 'pytorch_model.bin',
)  # fmt: skip
_MAX_JSON_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class WeightFiles:
  """Weights and the configs beside them.

  Attributes:
    tensors: name -> array.
    config: content of `config.json` (Hugging Face, timm), or {}.
    preprocessor: content of `preprocessor_config.json`, or {}.
    weights: 'ema' or 'raw' parameters.
    key: name of this set of weights in the file; '' if there is only one.
    unused: names of the other sets of weights -> reason.
  """

  tensors: Mapping[str, np.ndarray]
  config: dict[str, Any]
  preprocessor: dict[str, Any]
  weights: Literal['raw', 'ema'] = 'raw'
  key: str = ''
  unused: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_files(path: Path, weights: str = 'auto') -> WeightFiles:
  """Opens a weight file, or a folder of Hugging Face or timm.

  Args:
    path: file or folder.
    weights: parameters to read, where there are several sets: 'raw', 'ema', or 'auto' (EMA if there is any).

  Raises:
    UserError: no such file, damaged, an unknown file type, a pickle that holds more than weights, or no such weights.
  """
  folder = path if path.is_dir() else path.parent
  config = _read_json(folder / 'config.json')
  sets = _read_folder(path) if path.is_dir() else read_tensors(path)
  # A single file may be in any folder: a config.json that does not describe a model is ignored.
  is_model = path.is_dir() or bool({'model_type', 'architecture'} & set(config))
  preprocessor = _read_json(folder / 'preprocessor_config.json') if is_model else {}
  split = split_by_name(sets)
  choice = choose(path, {key: len(names) for key, names in split.items()}, weights)
  tensors = LazyTensors(path, {name: sets[key].readers[full] for name, (key, full) in split[choice.key].items()})
  return WeightFiles(tensors, config if is_model else {}, preprocessor, choice.weights, choice.key, choice.unused)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
  """Writes a safetensors file; an OSError if it cannot be written."""
  try:
    save_file(tensors, path, metadata)
  except SafetensorError as error:
    raise OSError(str(error)) from error


def has_weights(folder: Path) -> bool:
  """Returns whether a folder has weights in a file of a usual name."""
  return _find_weights(folder) is not None


def _find_weights(folder: Path) -> Path | None:
  return next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)


def _read_folder(folder: Path) -> dict[str, LazyTensors]:
  file = _find_weights(folder)
  if file is None:
    raise UserError(f'{folder} has no weights: neither checkpoints of a workdir, nor any of {", ".join(_WEIGHT_FILES)}')
  if file.suffix != '.json':
    return read_tensors(file)
  shards = _read_json(file).get('weight_map')
  if not isinstance(shards, dict) or not shards:
    raise UserError(f'{file} is damaged, download it again: it has no weight_map')
  for shard in shards.values():
    if not isinstance(shard, str) or Path(shard).name != shard or shard.startswith('.'):
      raise UserError(f'{file} lists {str(shard)[:80]!r}, which is not a file name: shards must be in the same folder')
  files = {shard: _read_shard(folder / shard) for shard in sorted(set(shards.values()))}
  for name, shard in shards.items():
    if name not in files[shard]:
      raise UserError(f'{folder / shard} lacks {name!r}, which is listed in {file.name}: download it again')
  return {'': LazyTensors(folder, {name: partial(files[shard].__getitem__, name) for name, shard in shards.items()})}


def _read_shard(path: Path) -> LazyTensors:
  sets = read_tensors(path)
  if set(sets) != {''}:
    raise UserError(f'{path} is a shard and has several sets of weights: {", ".join(sets)}')
  return sets['']


def _read_json(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    if path.stat().st_size > _MAX_JSON_BYTES:
      raise ValueError(f'it has {path.stat().st_size:,} bytes')
    content = json.loads(path.read_text())
  except RecursionError:
    raise UserError(f'{path} is damaged: it is nested too deeply') from None
  except ValueError as error:
    raise UserError(f'{path} is damaged: {error}') from None
  return content if isinstance(content, dict) else {}
