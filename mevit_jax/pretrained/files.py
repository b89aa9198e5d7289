"""Files of weights become names and arrays, by what is in them: npz, safetensors (folders too), PyTorch's pickles."""

import dataclasses
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (makes NumPy know bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from mevit_jax.errors import UserError

# Where training scripts put the weights within a pickled dict: timm, DeiT, TimeSformer, Lightning.
_STATE_KEYS = ('model_state', 'state_dict', 'model', 'module')
# What a folder of weights holds, the first that is there: an index of shards, or all in one file.
_IN_FOLDERS = (
  'model.safetensors.index.json', 'model.safetensors', 'pytorch_model.bin.index.json', 'pytorch_model.bin',
)  # fmt: skip
_TORCH_CODE = re.compile(r'GLOBAL:? ([\w.]+)|Unsupported')


class Lazy(Mapping[str, np.ndarray]):
  """Names whose arrays are read when asked for; what is damaged then is one line."""

  def __init__(self, path: Path, readers: Mapping[str, Callable[[str], np.ndarray]]):
    self._path, self._readers = path, readers

  def __getitem__(self, name: str) -> np.ndarray:
    try:
      return self._readers[name](name)
    except UserError:  # of a shard, which knows its own path
      raise
    except (SafetensorError, zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
      raise _damaged(self._path, error) from error

  def __iter__(self) -> Iterator[str]:
    return iter(self._readers)

  def __len__(self) -> int:
    return len(self._readers)


@dataclasses.dataclass(frozen=True)
class Files:
  """What was read.

  Attributes:
    tensors: name -> array.
    config: of `config.json` beside the weights (Hugging Face, timm), or {}.
    preprocessor: of `preprocessor_config.json`, or {}.
  """

  tensors: Mapping[str, np.ndarray]
  config: dict[str, Any]
  preprocessor: dict[str, Any]


def read(path: Path) -> Files:
  """Opens a file, or a folder as Hugging Face and timm write them.

  Raises:
    UserError: nothing there, damaged, of an unknown kind, or a pickle with more in it than weights.
  """
  folder = path if path.is_dir() else path.parent
  config = _read_json(folder / 'config.json')
  if path.is_dir():
    return Files(_read_folder(path), config, _read_json(folder / 'preprocessor_config.json'))
  # A file that is given by itself may lie in any folder: only a config of a model counts.
  if not {'model_type', 'architecture'} & set(config):
    return Files(_read_file(path), {}, {})
  return Files(_read_file(path), config, _read_json(folder / 'preprocessor_config.json'))


def _read_folder(folder: Path) -> Mapping[str, np.ndarray]:
  found = next((folder / name for name in _IN_FOLDERS if (folder / name).is_file()), None)
  if found is None:
    raise UserError(f'{folder} holds no weights: neither checkpoints of ours, nor any of {", ".join(_IN_FOLDERS)}')
  if found.suffix != '.json':
    return _read_file(found)
  shards = _read_json(found).get('weight_map')
  if not isinstance(shards, dict):
    raise UserError(f'{found} is damaged: it has no weight_map')
  files = {shard: _read_file(folder / shard) for shard in sorted(set(shards.values()))}
  for name, shard in shards.items():
    if name not in files[shard]:
      raise UserError(f'{folder / shard} lacks {name!r}, which {found.name} says is there: download it again')
  return Lazy(folder, {name: files[shard].__getitem__ for name, shard in shards.items()})


def _read_file(path: Path) -> Mapping[str, np.ndarray]:
  """A file's tensors; its first bytes say what it is."""
  try:
    with path.open('rb') as file:
      start = file.read(16)
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from None
  if start[8:9] == b'{':
    return _read_safetensors(path)
  if start[:2] == b'PK':
    return _read_zip(path)
  if start[:1] == b'\x80':  # a pickle, as old PyTorch writes them
    return _read_torch(path, mmap=False)
  raise UserError(f'{path} is no file of weights: it must be .npz, .safetensors, or of PyTorch (.pth, .bin)')


def _read_safetensors(path: Path) -> Mapping[str, np.ndarray]:
  try:
    file = safe_open(path, framework='np')
  except SafetensorError as error:
    raise _damaged(path, error) from error
  return Lazy(path, dict.fromkeys(file.keys(), file.get_tensor))


def _read_zip(path: Path) -> Mapping[str, np.ndarray]:
  """An npz, or PyTorch's zip of a pickle."""
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except zipfile.BadZipFile as error:
    raise _damaged(path, error) from error
  if any(name.endswith('data.pkl') for name in names):
    return _read_torch(path, mmap=True)
  if not any(name.endswith('.npy') for name in names):
    raise UserError(f'{path} is a zip without weights: neither an .npz nor of PyTorch')
  return Lazy(path, dict.fromkeys((name.removesuffix('.npy') for name in names), _read_npy(path)))


def _read_npy(path: Path) -> Callable[[str], np.ndarray]:
  """Reads one array of an npz, which is open only meanwhile; objects, which would be pickled, are refused."""

  def read_one(name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
      return arrays[name]

  return read_one


def _read_torch(path: Path, *, mmap: bool) -> Mapping[str, np.ndarray]:
  """PyTorch's pickle of tensors; anything in it that would run code is refused. The one place that needs torch."""
  try:
    import torch
  except ImportError:
    raise UserError(
      f'{path} is a file of PyTorch, and torch is not installed: pip install torch (for CPUs will do), '
      'or take the same weights as .safetensors'
    ) from None
  import pickle
  import warnings

  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of the pickle's protocol: it is read, or refused
      content = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
  except pickle.UnpicklingError as error:
    found = _TORCH_CODE.search(str(error))
    if not found:
      raise _damaged(path, error) from error
    what = f'{found[1]}, not only weights' if found[1] else 'more than weights'
    raise UserError(f'{path} is refused: its pickle holds {what}, and could run code; save the weights alone') from None
  except (RuntimeError, EOFError, ValueError, KeyError, AssertionError) as error:
    raise _damaged(path, error) from error
  return {name: _to_numpy(tensor) for name, tensor in _state_dict(path, content).items()}


def _state_dict(path: Path, content: Any) -> dict[str, Any]:
  """The dict of tensors, wherever a training script has put it."""
  for key in _STATE_KEYS:
    if isinstance(content, dict) and isinstance(content.get(key), dict):
      content = content[key]
      break
  if not isinstance(content, dict) or not content or not all(hasattr(x, 'detach') for x in content.values()):
    raise UserError(f'{path} holds no dict of weights: neither by itself, nor under {", ".join(_STATE_KEYS)}')
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
