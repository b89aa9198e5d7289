"""Damaged and unsupported weight files: one clear line each."""

import json
import pickle
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mevit_jax.config.data import Normalization
from mevit_jax.errors import UserError
from mevit_jax.pretrained.export import export
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.source import open_source
from tests.pretrained.conftest import config_of, model_of, random_params

CONFIG = config_of(3, 0, frames=1)
HALF = Normalization((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def weights(rng, tmp_path):
  """An intact safetensors file with timm's names, written by export."""
  export(tmp_path / 'out', random_params(CONFIG, rng), CONFIG, 'timm', class_names='abcde', normalization=HALF)
  return (tmp_path / 'out' / 'model.safetensors').rename(tmp_path / 'weights')


def refused(path, config=CONFIG):
  """Returns the error message, which is one line."""
  with pytest.raises(UserError) as error:
    load(path, model_of(config)[0], head='keep')
  message = str(error.value)
  assert '\n' not in message
  return message


def changed(weights, change):
  tensors = load_file(weights)
  change(tensors)
  save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, weights)
  return weights


def test_missing_path_is_reported(tmp_path):
  assert 'no weights at' in refused(tmp_path / 'nowhere')


def test_files_without_weights_are_refused(tmp_path):
  (tmp_path / 'text').write_text('weights, honestly')
  assert 'is not a weight file' in refused(tmp_path / 'text')
  assert 'has no weights' in refused(tmp_path)
  save_file({'conv1.weight': np.zeros((3, 3))}, tmp_path / 'resnet')
  assert 'unknown checkpoint format' in refused(tmp_path / 'resnet')


@pytest.mark.parametrize('cut', [1, 1000, 30_000])
def test_truncated_safetensors_is_reported(weights, cut):
  weights.write_bytes(weights.read_bytes()[:-cut])
  assert 'is damaged' in refused(weights)


@pytest.mark.parametrize('cut', [1, 1000, 30_000])
def test_truncated_npz_is_reported(weights, tmp_path, cut):
  np.savez(tmp_path / 'whole.npz', **load_file(weights))
  (tmp_path / 'cut').write_bytes((tmp_path / 'whole.npz').read_bytes()[:-cut])
  assert 'is damaged' in refused(tmp_path / 'cut')


def test_flipped_byte_in_an_npz_is_reported(weights, tmp_path):
  np.savez(tmp_path / 'flipped.npz', **load_file(weights))
  content = bytearray((tmp_path / 'flipped.npz').read_bytes())
  content[len(content) // 2] ^= 1
  (tmp_path / 'flipped.npz').write_bytes(content)
  assert 'is damaged' in refused(tmp_path / 'flipped.npz')


@pytest.mark.parametrize('zipped', [True, False])
def test_truncated_pickle_is_reported(weights, tmp_path, torch, zipped):
  state = {name: torch.tensor(array) for name, array in load_file(weights).items()}
  torch.save(state, tmp_path / 'whole', _use_new_zipfile_serialization=zipped)
  for cut in (1, 1000, 30_000):
    (tmp_path / 'cut').write_bytes((tmp_path / 'whole').read_bytes()[:-cut])
    assert 'is damaged' in refused(tmp_path / 'cut')


class Code:
  """Malicious object: unpickling it would create a file."""

  def __init__(self, trace):
    self.trace = trace

  def __reduce__(self):
    return open, (str(self.trace), 'w')


@pytest.mark.parametrize('how', ['zip', 'old', 'plain'])
def test_a_pickle_with_code_is_refused(tmp_path, torch, how):
  content = {'state_dict': {'cls_token': torch.zeros(1, 1, 32)}, 'more': Code(tmp_path / 'trace')}
  if how == 'plain':
    (tmp_path / 'weights').write_bytes(pickle.dumps(content['more']))
  else:
    torch.save(content, tmp_path / 'weights', _use_new_zipfile_serialization=how == 'zip')
  assert 'could run code' in refused(tmp_path / 'weights')
  assert not (tmp_path / 'trace').exists()


def test_a_pickle_without_weights_is_refused(tmp_path, torch):
  torch.save({'epoch': 3, 'lr': [0.1]}, tmp_path / 'weights')
  assert 'no dict of weights' in refused(tmp_path / 'weights')


def test_an_npz_with_objects_is_refused(tmp_path):
  np.savez(tmp_path / 'weights.npz', cls=np.array([{}], dtype=object))
  assert refused(tmp_path / 'weights.npz')


def test_missing_block_is_reported(weights):
  message = refused(changed(weights, lambda x: [x.pop(name) for name in list(x) if name.startswith('blocks.1.')]))
  assert "'blocks.1." in message
  assert 'missing' in message


def test_missing_last_block_is_reported(weights):
  message = refused(changed(weights, lambda x: [x.pop(name) for name in list(x) if name.startswith('blocks.2.')]))
  assert '2 blocks -> 3 (config.model.space_blocks' in message


def test_renamed_key_is_reported(weights):
  message = refused(changed(weights, lambda x: x.update({'blocks.1.norm3.bias': x.pop('blocks.1.norm2.bias')})))
  assert message.endswith("'blocks.1.norm3.bias'; the nearest known name is 'blocks.1.norm2.bias', which is missing")


def test_unknown_key_is_refused(weights):
  message = refused(changed(weights, lambda x: x.update({'blocks.1.attn.scale': x['norm.bias']})))
  assert "'blocks.1.attn.scale'" in message


def test_layer_scale_of_some_blocks(weights):
  """LayerScale is folded where all blocks have it; a file that lacks some of its tensors is incomplete."""
  message = refused(changed(weights, lambda x: x.update({'blocks.1.ls1.gamma': x['norm.bias']})))
  assert 'LayerScale is incomplete' in message
  assert "'blocks.0.ls1.gamma'" in message


@pytest.mark.parametrize(
  ('name', 'feature'),
  [
    ('blocks.1.attn.q_norm.weight', 'query and key norms'),
    ('blocks.1.attn.relative_position_bias_table', 'relative positions'),
    ('blocks.1.mlp.w12.weight', 'SwiGLU'),
    ('rope.freqs', 'rotary positions'),
  ],
)
def test_features_that_are_not_supported_are_named(weights, name, feature):
  message = refused(changed(weights, lambda x: x.update({name: x['norm.bias']})))
  assert feature in message
  assert name in message
  assert 'damaged' not in message


def test_a_missing_class_token(weights):
  """The positions show that there was one."""
  assert 'class token' in refused(changed(weights, lambda x: x.pop('cls_token')))


def test_two_sets_of_weights_are_refused(weights):
  """For example raw and EMA weights: the choice between them would be undefined."""
  message = refused(changed(weights, lambda x: x.update({'model.cls_token': x['cls_token']})))
  assert "'cls_token' and 'model.cls_token' differ only in their prefix" in message


def test_head_without_bias_is_refused(weights):
  assert "'head.bias'" in refused(changed(weights, lambda x: x.pop('head.bias')))


@pytest.mark.parametrize('name', ['blocks.1.mlp.fc2.weight', 'blocks.2.attn.qkv.weight', 'head.weight'])
def test_transposed_matrix_is_refused(weights, name):
  message = refused(changed(weights, lambda x: x.update({name: x[name].T})))
  assert name in message


def test_non_finite_values_are_refused(weights):
  changed(weights, lambda x: x['blocks.0.mlp.fc1.bias'].__setitem__(3, np.nan))
  assert 'blocks.0.mlp.fc1.bias has values that are not finite' in refused(weights)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'patch_size': 16}, 'patch_size 8x8 -> 16x16 (config.model.patch_size)'),
    ({'width': 64}, 'width 32 -> 64 (config.model.width)'),
    ({'mlp_dim': 128}, 'mlp_dim 64 -> 128 (config.model.mlp_dim)'),
  ],
)
def test_different_width_is_refused(weights, change, message):
  assert message in refused(weights, config_of(3, 0, frames=1, **change))


def test_different_layer_norm_eps_is_refused(weights):
  assert '--config.model.layer_norm_eps=1e-06' in refused(weights, config_of(3, 0, frames=1, layer_norm_eps=1e-12))


def test_different_number_of_classes_is_refused(weights):
  assert 'has 5 classes and the model has 6' in refused(weights, config_of(3, 0, frames=1, classes=6))


def test_half_precision_is_read(weights):
  """float16 and bfloat16 files become float32."""
  import ml_dtypes

  for dtype in (np.float16, ml_dtypes.bfloat16):
    changed(weights, lambda x, dtype=dtype: x.update({name: array.astype(dtype) for name, array in x.items()}))
    loaded = load(weights, model_of(CONFIG)[0], head='keep')
    assert loaded.params['norm']['bias'].dtype == np.float32


def test_missing_shard_is_reported(weights, tmp_path):
  tensors = load_file(weights)
  folder = tmp_path / 'folder'
  folder.mkdir()
  names = sorted(tensors)
  parts = {'a.safetensors': names[:20], 'b.safetensors': names[20:]}
  for part, some in parts.items():
    save_file({name: tensors[name] for name in some}, folder / part)
  index = {'weight_map': {name: part for part, some in parts.items() for name in some}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  assert load(folder, model_of(CONFIG)[0], head='keep').info.depth == 3
  (folder / 'b.safetensors').unlink()
  assert 'b.safetensors' in refused(folder)
  save_file({name: tensors[name] for name in names[21:]}, folder / 'b.safetensors')
  assert 'lacks' in refused(folder)
  (folder / 'model.safetensors.index.json').write_text('{')
  assert 'is damaged' in refused(folder)


@pytest.fixture
def beside(weights, tmp_path):
  """Writes a config.json of timm or Hugging Face beside the weights."""

  def write(**config):
    (tmp_path / 'config.json').write_text(json.dumps({'architecture': 'vit_base_patch16_224', **config}))
    return weights

  return write


def test_empty_config_fields_are_ignored(beside):
  """Nulls and labels without ids are ignored."""
  assert open_source(beside(pretrained_cfg=None, model_args=None, id2label=None)).info.normalization is None
  assert open_source(beside(id2label={'cat': 0, 'dog': 1})).info.class_names is None
  assert open_source(beside(id2label=['cat', 'dog'])).info.class_names is None


def test_the_grid_follows_the_config(beside):
  """16 patches; the input size of timm's config is the default of the architecture, which may differ."""
  assert open_source(beside(pretrained_cfg={'input_size': [3, 224, 224]})).info.grid == (4, 4)
  assert open_source(beside(pretrained_cfg={'input_size': [3, 16, 64]})).info.grid == (2, 8)
  assert open_source(
    beside(pretrained_cfg={'input_size': [3, 32, 32]}, model_args={'img_size': [64, 16]})
  ).info.grid == (8, 2)
  assert 'which is not a 28x28 grid' in refused(beside(model_args={'img_size': 224}))
  assert "not a height and width: 'large'" in refused(beside(image_size='large'))


def test_pytorch_files_need_torch(tmp_path, monkeypatch):
  """Other formats do not need torch."""
  monkeypatch.setitem(sys.modules, 'torch', None)
  (tmp_path / 'old').write_bytes(pickle.dumps({}, protocol=2))
  assert 'pip install torch' in refused(tmp_path / 'old')
