"""Google's npz files, written here by NumPy with their published names."""

import jax
import numpy as np
import pytest

from mevit_jax.errors import UserError
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.source import open_source
from tests.pretrained.conftest import CLASSES, HEADS, WIDTH, config_of, model_of, random_params

CONFIG = config_of(3, 0, frames=1)


@pytest.fixture
def params(rng):
  params = random_params(CONFIG, rng)
  params['embedding']['time'][:] = 0
  return params


def google(params):
  """Names and shapes of vision_transformer's and AugReg's files."""
  blocks = params['space']['blocks']
  positions = [params['class_position'][None], params['embedding']['space'].reshape(-1, WIDTH)]
  arrays = {
    'cls': params['class_token'][None, None],
    'embedding/kernel': params['embedding']['kernel'],
    'embedding/bias': params['embedding']['bias'],
    'Transformer/posembed_input/pos_embedding': np.concatenate(positions)[None],
    'Transformer/encoder_norm/scale': params['norm']['scale'],
    'Transformer/encoder_norm/bias': params['norm']['bias'],
    'head/kernel': params['head']['kernel'],
    'head/bias': params['head']['bias'],
  }
  for i in range(3):
    block = f'Transformer/encoderblock_{i}'
    attention, mlp = blocks['space_attention'], blocks['mlp']
    for kind in ('scale', 'bias'):
      arrays[f'{block}/LayerNorm_0/{kind}'] = attention['norm'][kind][i]
      arrays[f'{block}/LayerNorm_2/{kind}'] = mlp['norm'][kind][i]
    for kind in ('kernel', 'bias'):
      arrays[f'{block}/MlpBlock_3/Dense_0/{kind}'] = mlp['up'][kind][i]
      arrays[f'{block}/MlpBlock_3/Dense_1/{kind}'] = mlp['down'][kind][i]
      for name in ('query', 'key', 'value', 'out'):
        arrays[f'{block}/MultiHeadDotProductAttention_1/{name}/{kind}'] = attention[name][kind][i]
  return arrays


def big_vision(params):
  """Names of big_vision: modules are numbered by kind, and only patches have positions."""
  renamed = {'DotProductAttention_1': 'DotProductAttention_0', 'LayerNorm_2': 'LayerNorm_1', 'MlpBlock_3': 'MlpBlock_0'}
  arrays = {}
  for name, array in google(params).items():
    for old, new in renamed.items():
      name = name.replace(old, new)
    arrays[name] = array
  arrays['pos_embedding'] = arrays.pop('Transformer/posembed_input/pos_embedding')[:, 1:]
  return arrays


def loaded(path, arrays, **options):
  np.savez(path, **arrays)
  return load(path, model_of(CONFIG)[0], **{'head': 'keep', **options})


def test_google_npz_is_loaded(params, tmp_path):
  result = loaded(tmp_path / 'weights.npz', google(params))
  jax.tree.map(np.testing.assert_array_equal, result.params, params)
  assert {row.status for row in result.table} == {'loaded', 'fresh'}  # initialized: the position in time
  info = open_source(tmp_path / 'weights.npz').info
  assert info == result.info
  assert (info.kind, info.heads, info.classes, info.normalization.mean) == (
    "Google's ViT",
    HEADS,
    CLASSES,
    (0.5, 0.5, 0.5),
  )


def test_google_npz_without_a_head(params, tmp_path):
  arrays = {name: array for name, array in google(params).items() if not name.startswith('head')}
  result = loaded(tmp_path / 'weights.npz', arrays, head='auto')
  assert not np.any(result.params['head']['kernel'])
  with pytest.raises(UserError, match='cannot be kept: the source has no head'):
    loaded(tmp_path / 'weights.npz', arrays)


def test_google_npz_with_pre_logits(params, tmp_path, rng):
  """The head follows a layer that MEViT does not have: it is initialized, and both are listed as unused."""
  pre_logits = {'pre_logits/kernel': np.eye(WIDTH), 'pre_logits/bias': np.zeros(WIDTH)}
  result = loaded(tmp_path / 'weights.npz', google(params) | pre_logits, head='auto')
  assert not np.any(result.params['head']['kernel'])
  unused = {row.name for row in result.table if row.status == 'unused'}
  assert unused == {'pre_logits/kernel', 'pre_logits/bias', 'head/kernel', 'head/bias'}
  with pytest.raises(UserError, match='behind pre_logits'):
    loaded(tmp_path / 'weights.npz', google(params) | pre_logits)


@pytest.mark.parametrize('prefix', ['', 'params/', 'opt/target/'])
def test_big_vision_npz_is_loaded(params, tmp_path, prefix):
  """With or without optimizer state; its class token has no position."""
  arrays = {f'{prefix}{name}': array for name, array in big_vision(params).items()}
  if prefix:
    arrays |= {f'opt/state/{name}': array for name, array in big_vision(params).items()}
  result = loaded(tmp_path / 'weights.npz', arrays)
  expected = {**params, 'class_position': np.zeros(WIDTH, np.float32)}
  jax.tree.map(np.testing.assert_array_equal, result.params, expected)
  assert result.info.kind == 'big_vision ViT'
