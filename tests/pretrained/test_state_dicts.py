"""Several sets of weights in a file, and prefixes of wrappers."""

import jax
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
LIBRARIES = ('timm', 'hf_vit')
WRAPPERS = (
  '_orig_mod.', 'module.', 'backbone.', 'encoder.', 'net.', 'model.', 'module._orig_mod.', '_orig_mod.module.',
  'model.backbone.', 'net.encoder.', 'module.model.encoder.backbone.net._orig_mod.',
)  # fmt: skip


@pytest.fixture(scope='module')
def states(tmp_path_factory):
  """Library -> (parameters, tensors) of random models; and of another one, as 'other'."""
  states = {}
  for seed, name in enumerate((*LIBRARIES, 'other')):
    params = random_params(CONFIG, np.random.default_rng(seed))
    params['embedding']['time'][:] = 0  # which an image model does not have
    folder = tmp_path_factory.mktemp(name) / 'out'
    library = name if name in LIBRARIES else 'timm'
    export(folder, params, CONFIG, library, class_names='abcde', normalization=Normalization())
    states[name] = params, load_file(folder / 'model.safetensors')
  return states


def assert_loads(path, params, **options):
  config = CONFIG if options.pop('eps', None) is None else config_of(3, 0, frames=1, layer_norm_eps=1e-12)
  source = open_source(path, CONFIG.heads, **options)
  loaded = load(source, model_of(config)[0], head='keep')
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  return loaded


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('library', LIBRARIES)
def test_prefixes_of_wrappers(states, tmp_path, library, wrapper):
  params, tensors = states[library]
  save_file({wrapper + name: tensor for name, tensor in tensors.items()}, tmp_path / 'weights')
  loaded = assert_loads(tmp_path / 'weights', params, eps=1e-12 if library == 'hf_vit' else None)
  assert any(wrapper in row.note for row in loaded.table)  # the table has the names in the file


def test_a_head_outside_of_the_wrapper(states, tmp_path):
  """A classifier that holds a backbone."""
  params, tensors = states['timm']
  wrapped = {name if name.startswith('head.') else f'backbone.{name}': tensor for name, tensor in tensors.items()}
  save_file(wrapped, tmp_path / 'weights')
  assert_loads(tmp_path / 'weights', params)


def test_an_unknown_name_is_compared_without_its_prefix(states, tmp_path):
  _, tensors = states['timm']
  wrapped = {f'module.backbone.{name}': tensor for name, tensor in tensors.items()}
  wrapped['module.backbone.blocks.1.norm3.bias'] = wrapped.pop('module.backbone.blocks.1.norm2.bias')
  save_file(wrapped, tmp_path / 'weights')
  with pytest.raises(UserError, match=r"nearest known name is 'blocks\.1\.norm2\.bias', which is missing"):
    open_source(tmp_path / 'weights')


@pytest.mark.parametrize(
  ('raw', 'ema'),
  [
    ('model', 'model_ema'),
    ('state_dict', 'state_dict_ema'),
    ('model_state', 'ema_state_dict'),
    ('student', 'teacher'),
    ('encoder', 'target_encoder'),
  ],
)
def test_init_weights_chooses_in_pickles(states, tmp_path, torch, raw, ema):
  """auto takes the EMA parameters; the table names those that are not used, and how to take them."""
  (params, tensors), (average, averages) = states['timm'], states['other']
  content = {
    raw: {name: torch.tensor(tensor) for name, tensor in tensors.items()},
    ema: {name: torch.tensor(tensor) for name, tensor in averages.items()},
    'optimizer': {'state': {0: {'exp_avg': torch.zeros(3)}}, 'param_groups': []},
    'epoch': 9,
  }
  torch.save(content, tmp_path / 'weights.pth')
  report = assert_loads(tmp_path / 'weights.pth', average).report()
  assert f"EMA parameters '{ema}'" in report
  assert 'init_weights=raw' in report
  assert_loads(tmp_path / 'weights.pth', average, weights='ema')
  report = assert_loads(tmp_path / 'weights.pth', params, weights='raw').report()
  assert 'init_weights=ema' in report


@pytest.mark.parametrize('prefixes', [('model.', 'model_ema.module.'), ('student.backbone.', 'teacher.backbone.')])
def test_init_weights_chooses_by_the_names_of_tensors(states, tmp_path, prefixes):
  """In one flat state dict, such as Lightning's."""
  (params, tensors), (average, averages) = states['timm'], states['other']
  raw, ema = prefixes
  flat = {raw + name: tensor for name, tensor in tensors.items()}
  save_file({**flat, **{ema + name: tensor for name, tensor in averages.items()}}, tmp_path / 'weights')
  assert_loads(tmp_path / 'weights', average)
  assert_loads(tmp_path / 'weights', params, weights='raw')


def test_weights_that_a_file_does_not_have(states, tmp_path):
  _, tensors = states['timm']
  save_file(tensors, tmp_path / 'raw')
  with pytest.raises(UserError, match='only raw parameters, no EMA ones'):
    open_source(tmp_path / 'raw', weights='ema')
  save_file({f'teacher.{name}': tensor for name, tensor in tensors.items()}, tmp_path / 'teacher')
  with pytest.raises(UserError, match='only EMA parameters, no raw ones'):
    open_source(tmp_path / 'teacher', weights='raw')


def test_a_checkpoint_of_dino(states, tmp_path, torch):
  """Student and teacher, each with its projection head, and the arguments of the script beside them."""
  import argparse

  average, averages = states['other']
  without_head = {name: torch.tensor(x) for name, x in averages.items() if not name.startswith('head.')}
  heads = {'head.mlp.0.weight': torch.ones(3, 3), 'head.last_layer.weight_g': torch.ones(3)}
  state = {**{f'backbone.{name}': x for name, x in without_head.items()}, **heads}
  content = {
    'student': {f'module.{name}': x for name, x in state.items()},
    'teacher': state,
    'args': argparse.Namespace(arch='vit_small', lr=0.1),
  }
  torch.save(content, tmp_path / 'dino.pth')
  loaded = load(tmp_path / 'dino.pth', model_of(CONFIG)[0])
  np.testing.assert_array_equal(loaded.params['embedding']['kernel'], average['embedding']['kernel'])
  reasons = {row.name: row.note for row in loaded.table if row.status == 'unused'}
  assert reasons['head.mlp.0.weight'] == 'projection head of self-supervised training'
  assert 'init_weights=raw' in reasons['student']
