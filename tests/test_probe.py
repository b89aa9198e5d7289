"""Probes: a pretrained image encoder becomes the space encoder of a model, whose sizes it determines."""

import dataclasses

import jax
import numpy as np
import pytest

from mevit_jax import evaluate, train
from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.config.data import Normalization
from mevit_jax.convert import convert
from mevit_jax.errors import UserError
from mevit_jax.models.functional import build_model
from mevit_jax.pretrained.export import export
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.source import open_source

pytestmark = pytest.mark.usefixtures('compile_once')

NORMALIZATION = Normalization((0.25, 0.5, 0.75), (0.5, 0.25, 0.5))
PROBE = {
  'model.space_encoder': True, 'model.space_blocks': 12, 'model.motion_blocks': 1, 'model.class_blocks': 1,
  'model.width': 384, 'model.heads': 6, 'model.mlp_dim': 1536, 'model.frame_tokens': 0,
  'optimizer.freeze': '^(embedding|frame_tokens|pre_norm|space)', 'training.cache_features': 1, 'training.epochs': 1.0,
}  # fmt: skip


@pytest.fixture(scope='module')
def encoder(tiny, tmp_path_factory):
  """A Hugging Face ViT with two blocks of width 16: its model config, parameters and folder."""
  folder = tmp_path_factory.mktemp('encoder') / 'vit'
  config = dataclasses.replace(
    tiny().model, classes=5, frames=1, width=32, space_blocks=3, motion_blocks=0, layer_norm_eps=1e-12
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), build_model(config).abstract)
  export(folder, params, config, 'hf_vit', class_names='abcde', normalization=NORMALIZATION)
  return config, params, folder


@pytest.fixture
def probe(tiny, encoder):
  """The config of a probe of the encoder, which states other sizes."""
  return dataclasses.replace(tiny(**PROBE), init_from=str(encoder[2]))


def test_features_are_the_normalized_tokens_of_the_encoder(probe, encoder, tmp_path, capsys):
  config, params, _ = encoder
  checkpoint = load_checkpoint(convert(probe, str(tmp_path / 'run')))
  assert 'config.model.width: 384 -> 32' in (output := capsys.readouterr().out)
  assert 'fresh' in output
  ours = checkpoint.config.model
  assert (ours.width, ours.space_blocks, ours.heads, ours.frame_tokens) == (32, 3, config.heads, 1)
  video = np.random.default_rng(1).standard_normal((1, 2, 16, 16, 3), np.float32)
  features = np.asarray(jax.jit(build_model(ours).encode)(checkpoint.params, video))[0]  # t n+1 d
  patches, token = jax.jit(build_model(config).tokens)(params, video[0][:, None])  # t 1 n d, t d
  expected = np.concatenate([patches[:, 0], token[:, None]], axis=1)
  mean, variance = expected.mean(-1, keepdims=True), expected.var(-1, keepdims=True)
  expected = (expected - mean) / np.sqrt(variance) * params['norm']['scale'] + params['norm']['bias']
  np.testing.assert_allclose(features, expected, atol=1e-4)


def test_new_motion_blocks_add_nothing_and_the_rest_behind_the_encoder_is_random(probe, tmp_path):
  params = load_checkpoint(convert(probe, str(tmp_path / 'run'))).params
  motion = params['motion']['blocks']
  for layer in (motion['space_attention']['out'], motion['motion_attention']['out'], motion['mlp']['down']):
    assert not np.any(layer['kernel'])
  for kernel in (motion['mlp']['up'], params['class']['blocks']['class_attention']['query']):
    assert np.std(kernel['kernel']) > 0
  assert np.std(params['time_position']) > 0
  assert not np.any(params['head']['kernel'])


@pytest.mark.slow
def test_a_probe_trains_evaluates_and_starts_a_fine_tuning(probe, tiny, tmp_path):
  workdir = tmp_path / 'probe'
  train.train(probe, str(workdir))
  trained = load_checkpoint(workdir)
  initial = load_checkpoint(convert(probe, str(tmp_path / 'initial')))
  jax.tree.map(np.testing.assert_array_equal, trained.params['space'], initial.params['space'])
  assert np.any(trained.params['head']['kernel'])
  assert evaluate.evaluate(probe, str(workdir))['videos'] == 11  # the config states other sizes than the encoder
  fields = {f'model.{name}': getattr(trained.config.model, name) for name in ('width', 'mlp_dim', 'space_blocks')}
  heads = {'model.heads': trained.config.model.heads, 'model.frame_tokens': 1}
  changes = {**fields, **heads, 'optimizer.freeze': '', 'training.cache_features': 0}
  tuning = dataclasses.replace(tiny(**{**PROBE, **changes}), init_from=str(workdir))
  start = load_checkpoint(convert(tuning, str(tmp_path / 'tuned')))
  jax.tree.map(np.testing.assert_array_equal, start.params, trained.params)
  train.train(tuning, str(tmp_path / 'tuned'))
  assert np.any(load_checkpoint(tmp_path / 'tuned').params['space']['blocks']['mlp']['up']['kernel'] != 0)


def loaded_norm(encoder, changes):
  """Returns the norm behind the encoder, for a source whose last norm has other names (None: it has none)."""
  source = open_source(encoder[2])

  def renamed(mapping):
    return {changes.get(name, name): mapping[name] for name in mapping if changes.get(name, name)}

  source = dataclasses.replace(source, arrays=renamed(source.arrays), origin=renamed(source.origin))
  fields = {**source.info.encoder_fields, **source.info.model_fields, 'space_encoder': True, 'class_blocks': 1}
  config = dataclasses.replace(encoder[0], classes=5, motion_blocks=0, **fields)
  return load(source, build_model(config), head='fresh').params['space_norm']


def test_the_last_norm_of_an_encoder_may_be_that_of_its_attention_pool(encoder):
  expected = encoder[1]['norm']
  pool = {f'norm/{part}': f'class_blocks/0/class_attention/norm/{part}' for part in ('scale', 'bias')}
  for changes in ({}, pool):
    jax.tree.map(np.testing.assert_array_equal, loaded_norm(encoder, changes), dict(expected))
  absent = loaded_norm(encoder, dict.fromkeys(('norm/scale', 'norm/bias')))
  assert (absent['scale'] == 1).all()
  assert not absent['bias'].any()


def test_time_positions_of_a_probe_are_resized(probe, encoder, tmp_path):
  convert(probe, str(tmp_path / 'run'))
  config = load_checkpoint(tmp_path / 'run').config.model
  source = open_source(tmp_path / 'run')
  model = build_model(dataclasses.replace(config, frames=4))
  (row,) = (row for row in load(source, model, head='keep').table if row.name == 'time_position')
  assert (row.status, row.shape) == ('resized', (4, 32))
  with pytest.raises(UserError, match=r'use config\.model\.space_encoder=True'):
    load(source, build_model(dataclasses.replace(config, space_encoder=False)), head='keep')


def test_a_video_model_is_not_an_encoder_of_frames(tiny, probe, tmp_path):
  train.train(tiny(**{'training.epochs': 1.0}), str(tmp_path / 'video'))
  with pytest.raises(UserError, match='a video model -> an encoder of single frames'):
    convert(dataclasses.replace(probe, init_from=str(tmp_path / 'video')), str(tmp_path / 'run'))
