"""Weight files made to harm: one clear line each, and no more memory than the file is large."""

import io
import json
import os
import pathlib
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mevit_jax.checkpoint.checksums import verify_checksums
from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.config.data import Normalization
from mevit_jax.errors import UserError
from mevit_jax.inference.export import export_checkpoint
from mevit_jax.pretrained import tensors
from mevit_jax.pretrained.export import export
from mevit_jax.pretrained.files import read_files
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.models import open_model
from mevit_jax.pretrained.source import open_source
from tests.pretrained.conftest import config_of, model_of, random_params

CONFIG = config_of(3, 0, frames=1)
NAMES = tuple('abcde')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A ViT with its config."""
  folder = tmp_path_factory.mktemp('vit') / 'out'
  params = random_params(CONFIG, np.random.default_rng(0))
  export(folder, params, CONFIG, 'hf_vit', class_names=NAMES, normalization=Normalization())
  return folder


@pytest.fixture
def copy(folder, tmp_path):
  """A copy of it, to change."""
  (tmp_path / 'copy').mkdir()
  for path in folder.iterdir():
    (tmp_path / 'copy' / path.name).write_bytes(path.read_bytes())
  return tmp_path / 'copy'


@pytest.fixture
def little_memory():
  """Limits the address space to 2 GB more than is in use: an allocation of more fails instead of filling the memory."""
  used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
  before = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_AS, before)


def refused(path, action=open_source):
  def use():
    source = action(path)
    for tensor in getattr(source, 'tensors', {}):
      source.tensors[tensor]

  with pytest.raises(UserError) as error:
    use()
  message = str(error.value)
  assert message.isprintable()
  return message


def safetensors(header, data=b''):
  header = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(header).to_bytes(8, 'little') + header + data


def tensor(dtype='F32', shape=(1,), size=4):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [0, size]}


@pytest.mark.parametrize(
  ('header', 'words'),
  [
    ({'a': tensor(shape=[10**12])}, 'is damaged'),
    ({'a': tensor(shape=[10**12], size=4 * 10**12)}, 'is damaged'),
    ({'a': tensor(shape=[2**40, 2**40])}, 'is damaged'),
    ({'a': tensor(shape=[0, 10**15], size=0)}, 'must be floating-point numbers'),
    ({'a': tensor('I8', [4])}, 'has dtype I8'),
    ({'a': tensor('F8_E4M3', [4])}, 'has dtype F8_E4M3'),
    ({'a': tensor('F4', [8])}, 'has dtype F4'),
    ({'a': tensor('BOOL', [4])}, 'has dtype BOOL'),
    (b'{"a":' + b'[' * 100_000, 'is damaged'),
    (b'{"a":' + b'{"b":' * 100_000, 'is damaged'),
    ({f'blocks.{10**12}.norm1.weight': tensor()}, 'a tensor with the name'),
    ({'a\x1b[31m\n': tensor()}, 'a tensor with the name'),
    ({'a' * 100_000: tensor()}, 'a tensor with the name'),
  ],
  ids=range(13),
)
def test_safetensors(tmp_path, little_memory, header, words):
  is_empty = isinstance(header, dict) and header.get('a', {}).get('data_offsets') == [0, 0]
  (tmp_path / 'weights').write_bytes(safetensors(header, b'' if is_empty else b'1234'))
  assert words in refused(tmp_path / 'weights', read_files)


def test_too_many_tensors(tmp_path, monkeypatch):
  monkeypatch.setattr(tensors, '_MAX_TENSORS', 3)
  save_file({str(i): np.zeros(1, np.float32) for i in range(4)}, tmp_path / 'weights')
  assert 'it has 4 tensors' in refused(tmp_path / 'weights', read_files)


def npy(header, data=b''):
  header = header.encode()
  return b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header + data


def npz(path, content, compression=zipfile.ZIP_STORED, name='a.npy'):
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr(name, content)


def array_file(array, **options):
  file = io.BytesIO()
  np.save(file, array, **options)
  return file.getvalue()


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}", b'1234'), 'in 4 bytes'),
    (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", b'1234'), 'in 4 bytes'),
    (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}", b''), 'in 0 bytes'),
    (npy('(' * 9000), 'is damaged'),
    (npy("{'descr': '<f4'}"), 'is damaged'),
    (b'\x93NUMPY\x02\x00\xff\xff\xff\xff', 'header of a is too long'),
    (b'\x93NUMPY\x09\x00\x00\x00', 'is damaged'),
    (array_file(np.array([{}], object), allow_pickle=True), 'has dtype object'),
    (array_file(np.array(['a', 'b'])), 'has dtype <U1'),
    (array_file(np.array([b'a'])), 'has dtype |S1'),
    (array_file(np.array([1, 2])), 'has dtype int64'),
    (array_file(np.zeros(2, [('x', 'f4')])), 'has dtype'),
    (b'', 'is damaged'),
  ],
  ids=range(13),
)
def test_npz(tmp_path, little_memory, content, words):
  npz(tmp_path / 'weights.npz', content)
  assert words in refused(tmp_path / 'weights.npz', read_files)


def test_zip_bombs(tmp_path, little_memory):
  """An array of 64 MiB of zeros is a file of 64 KiB."""
  header = npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**24},)}}")
  npz(tmp_path / 'weights.npz', header + bytes(2**26), zipfile.ZIP_DEFLATED)
  assert f'bytes would become {2**26 + len(header):,}' in refused(tmp_path / 'weights.npz', read_files)


def test_arrays_that_compress_well_are_read(tmp_path):
  np.savez_compressed(tmp_path / 'weights.npz', a=np.zeros((100, 100), np.float32), b=np.ones(3, 'bfloat16'))
  arrays = read_files(tmp_path / 'weights.npz').tensors
  assert arrays['a'].shape == (100, 100)
  assert arrays['b'].tolist() == [1, 1, 1]  # NumPy has no bfloat16: it is saved as two bytes of any kind


@pytest.mark.filterwarnings('ignore')  # torch's own, on unusual tensors
def test_pickles(tmp_path, torch, little_memory):
  """Tensors that are larger than the file, or have no values; the refused global is named."""

  one = torch.zeros(1)
  for content, words in (
    ({'a': one.expand(10**12)}, 'would become 4,000,000,000,000'),
    ({'a': torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), one, (10**12,))}, 'would become'),
    ({'a': torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), one, (4,))}, 'torch.sparse_coo'),
    ({'a': torch.zeros(3, device='meta')}, 'is a meta tensor'),
    ({'a': torch.arange(3)}, 'has dtype torch.int64'),
    ({'a': one, 'args': pathlib.PurePosixPath('x')}, 'its pickle holds pathlib.PurePosixPath, not only weights'),
    ({'a': one, 'best': np.float64(1)}, 'multiarray.scalar, not only weights'),
    ({'a': torch.nn.Linear(1, 1)}, 'its pickle holds torch.nn.modules.linear.Linear, not only weights'),
    ([{'a': one}], 'has no dict of weights'),
    ({1: one}, 'has no dict of weights'),
  ):
    torch.save(content, tmp_path / 'weights')
    assert words in refused(tmp_path / 'weights', read_files)


def test_a_namespace_in_a_pickle_is_harmless(tmp_path, torch):
  """The arguments of a training script, beside the weights; objects within it are refused as elsewhere."""
  import argparse

  for new in (True, False):
    content = {'model': {'a': torch.ones(2)}, 'args': argparse.Namespace(lr=0.1, layers=[1, 2])}
    torch.save(content, tmp_path / 'weights', _use_new_zipfile_serialization=new)
    assert read_files(tmp_path / 'weights').tensors['a'].tolist() == [1, 1]
  torch.save({'a': torch.ones(2), 'args': argparse.Namespace(call=os.system)}, tmp_path / 'weights')
  assert 'its pickle holds posix.system' in refused(tmp_path / 'weights', read_files)


@pytest.mark.parametrize(
  ('index', 'words'),
  [
    ({'weight_map': {'a': '../weights'}}, "lists '../weights', which is not a file name"),
    ({'weight_map': {'a': '/etc/passwd'}}, "lists '/etc/passwd', which is not a file name"),
    ({'weight_map': {'a': ['x']}}, 'which is not a file name'),
    ({'weight_map': {'a': None}}, 'which is not a file name'),
    ({'weight_map': {}}, 'it has no weight_map'),
    ({'weight_map': ['a']}, 'it has no weight_map'),
    ({'metadata': {}, 'format': 'of another library'}, 'it has no weight_map'),
    ([], 'it has no weight_map'),
    ({'weight_map': {'a': 'model.safetensors.index.json'}}, 'is not a weight file'),
  ],
)
def test_foreign_index_files(tmp_path, index, words):
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  assert words in refused(tmp_path)


def test_files_that_are_not_regular(tmp_path):
  os.mkfifo(tmp_path / 'fifo')
  assert 'not a regular file' in refused(tmp_path / 'fifo')
  assert 'not a regular file' in refused('/dev/zero')


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (b'[' * 10**6, 'nested too deeply'),
    (b'{"model_type": ' * 10**5, 'nested too deeply'),
    ({'num_attention_heads': 'many'}, "num_attention_heads = 'many'"),
    ({'num_attention_heads': -3}, 'num_attention_heads = -3'),
    ({'layer_norm_eps': 'small'}, 'layer_norm_eps'),
    ({'layer_norm_eps': float('nan')}, 'layer_norm_eps'),
    ({'num_hidden_layers': 10**12}, 'num_hidden_layers'),
    ({'image_size': 'large'}, 'not a height and width'),
    ({'image_size': 10**12}, 'grid'),
    ({'id2label': {'0': {}}}, 'does not name its 5 classes'),
    ({'id2label': {'0': 'a'}}, 'does not name its 5 classes'),
  ],
)
def test_configs(copy, change, words):
  path = copy / 'config.json'
  path.write_bytes(change if isinstance(change, bytes) else json.dumps(json.loads(path.read_text()) | change).encode())
  assert words in refused(copy, open_model)


@pytest.mark.parametrize('mean', ['gray', [0.5], [0.5, 0.5, 'x'], [float('inf')] * 3, {}])
def test_preprocessor_configs(copy, mean):
  (copy / 'preprocessor_config.json').write_text(json.dumps({'image_mean': mean, 'image_std': [1, 1, 1]}))
  if mean:
    assert 'invalid pixel mean' in refused(copy)
  else:
    assert open_source(copy).info.normalization == Normalization()


@pytest.mark.parametrize('kind', ['safetensors', 'npz', 'config.json'])
def test_flipped_bytes(copy, kind):
  """Any byte of the first 2,000 may be anything: the file is refused in one line, or it is read."""
  path = copy / ('config.json' if kind == 'config.json' else 'model.safetensors')
  if kind == 'npz':
    np.savez(copy / 'weights.npz', **load_file(path))
    path = copy / 'weights.npz'
  source = copy if kind == 'config.json' else path
  content, rng, refusals = path.read_bytes(), np.random.default_rng(0), list[str]()
  for _ in range(10 if kind == 'npz' else 60):
    mutated = bytearray(content)
    for position in rng.integers(0, min(2000, len(content)), 3):
      mutated[position] = rng.integers(256)
    path.write_bytes(mutated)
    try:
      opened = open_source(source)
      for name in opened.arrays:
        opened.arrays[name]
    except UserError as error:
      refusals.append(str(error))
  assert refusals
  assert not any('\n' in message for message in refusals)


@pytest.fixture
def shared(folder, tmp_path):
  export_checkpoint(folder, 'mevit', tmp_path / 'shared')
  return tmp_path / 'shared'


def with_checksums(folder):
  from mevit_jax.checkpoint.checksums import write_checksums

  (folder / 'checksums.json').unlink()
  write_checksums(folder)


@pytest.mark.parametrize(
  ('files', 'words'),
  [
    ({}, 'lists no files'),
    ({'README.md': [1, 'x']}, 'does not list config.json'),
    ({'../x': [1, 'x']}, "lists '../x', which is outside"),
    ({'/dev/zero': [0, 'x']}, "lists '/dev/zero', which is outside"),
    ([], 'lists no files'),
    ({'config.json': None, 'model.safetensors': 3}, 'is damaged'),
  ],
)
def test_a_list_of_checksums_that_does_not_cover_the_model(shared, files, words):
  (shared / 'checksums.json').write_text(json.dumps({'files': files}))
  assert words in verify_checksums(shared, required=('config.json', 'model.safetensors'))
  assert words in refused(shared, load_checkpoint)


def test_weights_that_do_not_fit_the_config(shared):
  """Valid checksums, but another shape, dtype or name."""
  path, params = shared / 'model.safetensors', load_file(shared / 'model.safetensors')
  for change, words in (
    ({'head/bias': np.zeros(7, np.float32)}, 'head/bias is (7,) of F32, and (5,) in its config'),
    ({'head/bias': np.zeros(5, np.float16)}, 'head/bias is (5,) of F16, and (5,) in its config'),
    ({'head/more': np.zeros(5, np.float32)}, 'head/more is (5,) of F32, and not in its config'),
    ({'head/bias': None}, 'head/bias is absent, and (5,) in its config'),
  ):
    save_file({name: array for name, array in (params | change).items() if array is not None}, path)
    with_checksums(shared)
    assert words in refused(shared, lambda path: load_checkpoint(path).params)
    assert words in refused(shared, lambda path: load(path, model_of(CONFIG)[0]))
  path.write_bytes(b'nothing')
  with_checksums(shared)
  assert 'is damaged' in refused(shared, lambda path: load_checkpoint(path).params)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'class_names': ['a']}, '1 class names for 5 classes'),
    ({'checkpoint': None}, 'does not state its checkpoint'),
    ({'checkpoint': {'step': 'last', 'weights': 'raw'}}, 'does not state its checkpoint'),
  ],
)
def test_configs_of_shared_models(shared, change, words):
  path = shared / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with_checksums(shared)
  assert words in refused(shared, load_checkpoint)


@pytest.mark.slow
def test_a_command_ends_with_one_line(tmp_path):
  (tmp_path / 'weights').write_bytes(safetensors({'a': tensor(shape=[10**12])}, b'1234'))
  command = [sys.executable, '-m', 'mevit_jax', 'predict', 'clip.mp4', f'--model={tmp_path / "weights"}']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 1
  assert len(done.stderr.splitlines()) == 1
