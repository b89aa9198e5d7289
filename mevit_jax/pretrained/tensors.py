"""Reading tensors from npz, safetensors and PyTorch files: lazily, without running code, within the file's size.

Files come from others. Everything that a file declares (shapes, sizes, names) is checked before memory is allocated.
"""

import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy)
import numpy as np
from safetensors import SafetensorError, safe_open

from mevit_jax.errors import UserError
from mevit_jax.pretrained.state_dicts import nested_sets

Reader = Callable[[], np.ndarray]

_FLOATS = ('F64', 'F32', 'F16', 'BF16')  # of safetensors
_TORCH_GLOBAL = re.compile(r'GLOBAL:? ([\w.]+)')
_MAX_TENSORS = 100_000
_MAX_BLOCK_DIGITS = 4
_MAX_NPY_HEADER = 2**16
# Compressed files may declare this many times their size: floats hardly compress, zeros do.
_MAX_EXPANSION = 100
_UNREADABLE = (
  SafetensorError, zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, RuntimeError, NotImplementedError,
  TypeError, KeyError, OverflowError, MemoryError, RecursionError, SyntaxError,
  tokenize.TokenError,
)  # fmt: skip


class LazyTensors(Mapping[str, np.ndarray]):
  """Floating-point tensors that are read on access; damage found then is a UserError.

  Attributes:
    path: file or folder.
    readers: tensor name -> function that reads it.
  """

  def __init__(self, path: Path, readers: Mapping[str, Reader]):
    """Checks the names; a UserError if there are too many, or if they cannot be those of a model."""
    self.path, self.readers = path, readers
    if len(readers) > _MAX_TENSORS:
      raise UserError(f'{path} is not a model: it has {len(readers):,} tensors')
    for name in readers:
      if not name.isprintable() or len(name) > 500 or re.search(rf'\d{{{_MAX_BLOCK_DIGITS + 1}}}', name):
        raise UserError(f'{path} is not a model: it has a tensor with the name {name[:80]!r}')

  def __getitem__(self, name: str) -> np.ndarray:
    reader = self.readers[name]
    try:
      array = reader()
    except UserError:  # names its path
      raise
    except _UNREADABLE as error:
      raise damaged(self.path, error) from error
    if not array.size or not _is_floating(array.dtype):
      raise UserError(
        f'{self.path}: {name} has dtype {array.dtype} and shape {array.shape}; weights must be floating-point numbers'
      )
    return array

  def __contains__(self, name: object) -> bool:
    return name in self.readers

  def __iter__(self) -> Iterator[str]:
    return iter(self.readers)

  def __len__(self) -> int:
    return len(self.readers)


def read_tensors(path: Path) -> dict[str, LazyTensors]:
  """Opens a file, whose type is recognized by its first bytes.

  Returns:
    Name of each set of weights in the file ('model', 'model_ema'; '' if there is only one) -> its tensors.

  Raises:
    UserError: not a regular file, damaged, an unknown file type, or a pickle that holds more than weights.
  """
  try:
    if not path.is_file():
      raise UserError(f'{path}: {"not a regular file" if path.exists() else "No such file or directory"}')
    with path.open('rb') as file:
      start = file.read(16)
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from None
  if start[8:9] == b'{':
    return {'': _read_safetensors(path)}
  if start[:2] == b'PK':
    return _read_zip(path)
  if start[:1] == b'\x80':  # a bare pickle, written by old versions of PyTorch
    return _read_torch(path, mmap=False)
  raise UserError(f'{path} is not a weight file: it must be .npz, .safetensors or a PyTorch file (.pth, .bin)')


def damaged(path: Path, error: Exception) -> UserError:
  """Returns the UserError for a file that cannot be read."""
  reason = (str(error).strip() or type(error).__name__).splitlines()[0]
  return UserError(f'{path} is damaged, download it again: {reason}')


def _is_floating(dtype: np.dtype) -> bool:
  return dtype.kind == 'f' or dtype.name == 'bfloat16'


def _read_safetensors(path: Path) -> LazyTensors:
  try:
    file = safe_open(path, framework='np')
  except SafetensorError as error:
    raise damaged(path, error) from error

  def read(name: str) -> np.ndarray:
    if (dtype := file.get_slice(name).get_dtype()) not in _FLOATS:
      raise UserError(f'{path}: {name} has dtype {dtype}; supported are {", ".join(_FLOATS)}')
    return file.get_tensor(name)

  return LazyTensors(path, _readers(read, file.keys()))


def _readers(read: Callable[[str], np.ndarray], names: Iterable[str]) -> dict[str, Reader]:
  return {name: partial(read, name) for name in names}


def _read_zip(path: Path) -> dict[str, LazyTensors]:
  """Returns the tensors of an npz, or of a PyTorch file (a zip with a pickle)."""
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.infolist()
  except _UNREADABLE as error:
    raise damaged(path, error) from error
  _check_expansion(path, sum(member.file_size for member in members))
  names = [member.filename for member in members]
  if any(name.endswith('data.pkl') for name in names):
    return _read_torch(path, mmap=True)
  if not any(name.endswith('.npy') for name in names):
    raise UserError(f'{path} is a zip without weights: neither an .npz nor a PyTorch file')
  arrays = (name.removesuffix('.npy') for name in names if name.endswith('.npy'))
  return {'': LazyTensors(path, _readers(partial(_read_npy, path), arrays))}


def _check_expansion(path: Path, size: int) -> None:
  """Raises a UserError if a file declares much more data than it has bytes."""
  if size > _MAX_EXPANSION * path.stat().st_size + 2**20:
    raise UserError(f'{path} is not a model: its {path.stat().st_size:,} bytes would become {size:,}')


def _read_npy(path: Path, name: str) -> np.ndarray:
  """Reads an array of an npz, whose header must declare as many bytes as there are; objects (pickles) are an error."""
  with zipfile.ZipFile(path) as archive, archive.open(f'{name}.npy') as file:
    start = file.read(12)
    if int.from_bytes(start[8:10] if start[6:7] == b'\1' else start[8:12], 'little') > _MAX_NPY_HEADER:
      raise ValueError(f'the header of {name} is too long')
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
      raise ValueError(f'{name} has the unknown version {version}')
    shape, _, dtype = read_header[version](file)
    if not (_is_floating(dtype) or dtype == np.dtype('V2')):
      raise UserError(f'{path}: {name} has dtype {dtype}; weights must be floating-point numbers')
    size = archive.getinfo(f'{name}.npy').file_size - file.tell()
    if math.prod(shape) * dtype.itemsize != size or any(side < 0 for side in shape):
      raise ValueError(f'{name} has the shape {shape} in {size} bytes')
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    return array.view('bfloat16') if dtype.kind == 'V' else array  # as big_vision saves it


def _read_torch(path: Path, *, mmap: bool) -> dict[str, LazyTensors]:
  """Returns the tensors of a PyTorch pickle; one that could run code is an error. Only this needs torch."""
  try:
    import torch
  except ImportError:
    raise UserError(
      f'{path} is a PyTorch file and torch is not installed: pip install torch (the CPU build suffices), '
      'or use the same weights as .safetensors'
    ) from None
  import argparse
  import pickle
  import warnings

  try:
    # Training scripts save their arguments beside the weights. A Namespace is only a dict of attributes.
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
      warnings.simplefilter('ignore')  # about the pickle's protocol
      content = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
  except pickle.UnpicklingError as error:
    _raise_unpickling_error(path, error)
  except (*_UNREADABLE, AssertionError, AttributeError, IndexError) as error:
    raise damaged(path, error) from error
  sets = nested_sets(content, torch.is_tensor)
  if not sets:
    raise UserError(f'{path} has no dict of weights, neither at its top level nor under a usual key such as "model"')
  _check_expansion(path, sum(t.numel() * t.element_size() for tensors in sets.values() for t in tensors.values()))
  return {
    key: LazyTensors(path, {name: partial(_to_numpy, path, name, tensor) for name, tensor in tensors.items()})
    for key, tensors in sets.items()
  }


def _raise_unpickling_error(path: Path, error: Exception) -> NoReturn:
  text = str(error)
  refused = _TORCH_GLOBAL.search(text)
  if not refused and 'unsupported' not in text.lower():
    raise damaged(path, error) from error
  content = f'{refused[1]}, not only weights' if refused else 'more than weights'
  raise UserError(f'{path} could run code: its pickle holds {content}; save the weights alone') from None


def _to_numpy(path: Path, name: str, tensor: Any) -> np.ndarray:
  import torch

  if tensor.layout != torch.strided or tensor.device.type != 'cpu' or tensor.is_quantized:
    raise UserError(f'{path}: {name} is a {tensor.device.type} tensor of layout {tensor.layout}, {tensor.dtype}')
  if not tensor.dtype.is_floating_point:
    raise UserError(f'{path}: {name} has dtype {tensor.dtype}; weights must be floating-point numbers')
  return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
