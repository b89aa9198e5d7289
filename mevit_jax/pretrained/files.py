"""Reading weight files: npz, safetensors (also sharded folders) and PyTorch pickles, recognized by their content."""

import dataclasses
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mevit_jax.errors import UserError

# Keys under which training scripts save the weights: timm, DeiT, TimeSformer, Lightning.
_STATE_KEYS = ('model_state', 'state_dict', 'model', 'module')
# Files of weights in a folder, in order of preference: an index of shards, or a single file.
_WEIGHT_FILES = (
  'model.safetensors.index.json', 'model.safetensors', 'pytorch_model.bin.index.json', 'pytorch_model.bin',
)  # fmt: skip
_TORCH_CODE = re.compile(r'GLOBAL:? ([\w.]+)|Unsupported')


class LazyTensors(Mapping[str, np.ndarray]):
  """Tensors that are read on access; damage found then is a UserError."""

  def __init__(self, path: Path, readers: Mapping[str, Callable[[str], np.ndarray]]):
    self._path, self._readers = path, readers

  def __getitem__(self, name: str) -> np.ndarray:
    try:
      return self._readers[name](name)
    except UserError:  # raised by a shard, names its path
      raise
    except (SafetensorError, zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
      raise _damaged(self._path, error) from error

  def __iter__(self) -> Iterator[str]:
    return iter(self._readers)

  def __len__(self) -> int:
    return len(self._readers)


@dataclasses.dataclass(frozen=True)
class WeightFiles:
  """Weights and the configs beside them.

  Attributes:
    tensors: name -> array.
    config: content of `config.json` (Hugging Face, timm), or {}.
    preprocessor: content of `preprocessor_config.json`, or {}.
  """

  tensors: Mapping[str, np.ndarray]
  config: dict[str, Any]
  preprocessor: dict[str, Any]


def read_files(path: Path) -> WeightFiles:
  """Opens a weight file, or a folder of Hugging Face or timm.

  Raises:
    UserError: no such file, damaged, an unknown file type, or a pickle that holds more than weights.
  """
  folder = path if path.is_dir() else path.parent
  config = _read_json(folder / 'config.json')
  if path.is_dir():
    return WeightFiles(_read_folder(path), config, _read_json(folder / 'preprocessor_config.json'))
  # A single file may be in any folder: a config.json that does not describe a model is ignored.
  if not {'model_type', 'architecture'} & set(config):
    return WeightFiles(_read_file(path), {}, {})
  return WeightFiles(_read_file(path), config, _read_json(folder / 'preprocessor_config.json'))


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
  """Writes a safetensors file; an OSError if it cannot be written."""
  try:
    save_file(tensors, path, metadata)
  except SafetensorError as error:
    raise OSError(str(error)) from error


def _read_folder(folder: Path) -> Mapping[str, np.ndarray]:
  file = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
  if file is None:
    raise UserError(f'{folder} has no weights: neither checkpoints of a workdir, nor any of {", ".join(_WEIGHT_FILES)}')
  if file.suffix != '.json':
    return _read_file(file)
  shards = _read_json(file).get('weight_map')
  if not isinstance(shards, dict):
    raise UserError(f'{file} is damaged, download it again: it has no weight_map')
  files = {shard: _read_file(folder / shard) for shard in sorted(set(shards.values()))}
  for name, shard in shards.items():
    if name not in files[shard]:
      raise UserError(f'{folder / shard} lacks {name!r}, which is listed in {file.name}: download it again')
  return LazyTensors(folder, {name: files[shard].__getitem__ for name, shard in shards.items()})


def _read_file(path: Path) -> Mapping[str, np.ndarray]:
  """Returns the tensors of a file, whose type is recognized by its first bytes."""
  try:
    with path.open('rb') as file:
      start = file.read(16)
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from None
  if start[8:9] == b'{':
    return _read_safetensors(path)
  if start[:2] == b'PK':
    return _read_zip(path)
  if start[:1] == b'\x80':  # a bare pickle, written by old versions of PyTorch
    return _read_torch(path, mmap=False)
  raise UserError(f'{path} is not a weight file: it must be .npz, .safetensors or a PyTorch file (.pth, .bin)')


def _read_safetensors(path: Path) -> Mapping[str, np.ndarray]:
  try:
    file = safe_open(path, framework='np')
  except SafetensorError as error:
    raise _damaged(path, error) from error
  return LazyTensors(path, dict.fromkeys(file.keys(), file.get_tensor))


def _read_zip(path: Path) -> Mapping[str, np.ndarray]:
  """Returns the tensors of an npz, or of a PyTorch file (a zip with a pickle)."""
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except zipfile.BadZipFile as error:
    raise _damaged(path, error) from error
  if any(name.endswith('data.pkl') for name in names):
    return _read_torch(path, mmap=True)
  if not any(name.endswith('.npy') for name in names):
    raise UserError(f'{path} is a zip without weights: neither an .npz nor a PyTorch file')
  return LazyTensors(path, dict.fromkeys((name.removesuffix('.npy') for name in names), _read_npy(path)))


def _read_npy(path: Path) -> Callable[[str], np.ndarray]:
  """Returns a reader of single arrays, which opens the npz for each; object arrays (pickles) are an error."""

  def read_array(name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
      return arrays[name]

  return read_array


def _read_torch(path: Path, *, mmap: bool) -> Mapping[str, np.ndarray]:
  """Returns the tensors of a PyTorch pickle; one that could run code is an error. Only this needs torch."""
  try:
    import torch
  except ImportError:
    raise UserError(
      f'{path} is a PyTorch file and torch is not installed: pip install torch (the CPU build suffices), '
      'or use the same weights as .safetensors'
    ) from None
  import pickle
  import warnings

  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # about the pickle's protocol
      content = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
  except pickle.UnpicklingError as error:
    match = _TORCH_CODE.search(str(error))
    if not match:
      raise _damaged(path, error) from error
    content = f'{match[1]}, not only weights' if match[1] else 'more than weights'
    raise UserError(f'{path} could run code: its pickle holds {content}; save the weights alone') from None
  except (RuntimeError, EOFError, ValueError, KeyError, AssertionError) as error:
    raise _damaged(path, error) from error
  return {name: _to_numpy(tensor) for name, tensor in _state_dict(path, content).items()}


def _state_dict(path: Path, content: Any) -> dict[str, Any]:
  """Returns the dict of tensors in the content of a PyTorch file."""
  for key in _STATE_KEYS:
    if isinstance(content, dict) and isinstance(content.get(key), dict):
      content = content[key]
      break
  if not isinstance(content, dict) or not content or not all(hasattr(x, 'detach') for x in content.values()):
    raise UserError(f'{path} has no dict of weights, neither at its top level nor under {", ".join(_STATE_KEYS)}')
  return content


def _to_numpy(tensor: Any) -> np.ndarray:
  import torch

  return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def _read_json(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f'{path} is damaged: {error}') from None
  return content if isinstance(content, dict) else {}


def _damaged(path: Path, error: Exception) -> UserError:
  reason = (str(error).strip() or type(error).__name__).splitlines()[0]
  return UserError(f'{path} is damaged, download it again: {reason}')
