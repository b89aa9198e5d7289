"""Workdirs as a source: different head, frames, grid, block size and stages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.workdir import read_workdir, write_workdir
from mevit_jax.config import experiment
from mevit_jax.errors import UserError
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.positions import resize_space, resize_time
from mevit_jax.pretrained.source import open_source
from mevit_jax.training.state import TrainState
from tests.pretrained.conftest import config_of, model_of, random_params

CONFIG = config_of(1, 1, 1, layer_norm_eps=1e-12)
NAMES = tuple('abcde')


def save(folder, step, params, ema, about):
  checkpoints = CheckpointManager(folder, keep=1)
  params, ema = jax.tree.map(jnp.asarray, (params, ema))
  checkpoints.save(TrainState(jnp.asarray(step), params, {'momentum': jnp.zeros(1)}, ema, jnp.asarray(0)), about)
  checkpoints.close()


@pytest.fixture
def workdir(rng, tmp_path):
  """A workdir of random params, and the params."""
  params = random_params(CONFIG, rng)
  config = experiment.Config(model=CONFIG, data=experiment.DataConfig(mean=(0.1, 0.2, 0.3)))
  about = {'config': experiment.to_dict(config), 'class_names': list(NAMES), 'fingerprint': 'of a dataset'}
  folder = tmp_path / 'workdir'
  write_workdir(folder, about)
  save(folder, 7, params, None, about)
  return folder, params


def loaded(folder, **changes):
  model = model_of(dataclasses.replace(CONFIG, **changes))[0]
  return load(folder, model, class_names=NAMES)


def test_the_same_model_loads_unchanged(workdir):
  folder, params = workdir
  result = loaded(folder)
  jax.tree.map(np.testing.assert_array_equal, result.params, params)
  assert {row.status for row in result.table} == {'loaded'}
  info = open_source(folder).info
  assert (info.kind, info.normalization.mean, info.layer_norm_eps) == ('MEViT of step 7', (0.1, 0.2, 0.3), 1e-12)


def test_ema_parameters_are_preferred(workdir):
  folder, params = workdir
  save(folder, 8, jax.tree.map(np.zeros_like, params), params, read_workdir(folder))
  jax.tree.map(np.testing.assert_array_equal, loaded(folder).params, params)
  assert open_source(folder).info.kind == 'MEViT of step 8 (EMA)'


def test_bgr_weights(workdir):
  """The normalization and the patch embedding are reordered to RGB."""
  folder, params = workdir
  source = open_source(folder, channel_order='bgr')
  assert source.info.normalization.mean == (0.3, 0.2, 0.1)
  kernel = load(source, model_of(CONFIG)[0]).params['embedding']['kernel']
  np.testing.assert_array_equal(kernel, params['embedding']['kernel'][:, :, ::-1])


def test_different_frames_grid_and_block_size(workdir):
  """Positions are resized; everything else is unchanged."""
  folder, params = workdir
  result = loaded(folder, frames=5, image_size=(40, 24), block_size=3)
  assert {row.name for row in result.table if row.status == 'resized'} == {'embedding/space', 'embedding/time'}
  space, time = params['embedding']['space'], params['embedding']['time']
  expected = {**params['embedding'], 'space': resize_space(space, (5, 3), antialias=True), 'time': resize_time(time, 5)}
  jax.tree.map(np.testing.assert_array_equal, result.params, {**params, 'embedding': expected})


def test_head_of_different_classes(workdir):
  folder, params = workdir
  other = load(folder, model_of(dataclasses.replace(CONFIG, classes=3))[0], class_names=tuple('abc'))
  assert not np.any(other.params['head']['kernel'])
  assert other.params['head']['kernel'].shape == (32, 3)
  reordered = load(folder, model_of(CONFIG)[0], class_names=NAMES[::-1])
  np.testing.assert_array_equal(reordered.params['head']['bias'], params['head']['bias'][::-1])


def test_blocks_of_different_stages(workdir):
  """Blocks keep their index in the model; a motion block without motion attention in the source initializes it."""
  folder, params = workdir
  result = loaded(folder, space_blocks=0, motion_blocks=2, class_blocks=2)
  blocks, theirs = result.params['motion']['blocks'], params['motion']['blocks']
  np.testing.assert_array_equal(blocks['mlp']['up']['bias'][0], params['space']['blocks']['mlp']['up']['bias'][0])
  np.testing.assert_array_equal(blocks['mlp']['up']['bias'][1], theirs['mlp']['up']['bias'][0])
  motion = blocks['motion_attention']
  np.testing.assert_array_equal(motion['query']['bias'][0], blocks['space_attention']['query']['bias'][0])
  assert not np.any(motion['out']['kernel'][0])
  np.testing.assert_array_equal(motion['out']['kernel'][1], theirs['motion_attention']['out']['kernel'][0])
  classify = result.params['class']['blocks']['class_attention']['out']['kernel']
  for i in range(2):  # its own, and a copy
    np.testing.assert_array_equal(classify[i], params['class']['blocks']['class_attention']['out']['kernel'][0])
  rows = {row.name: (row.status, row.note) for row in result.table}
  assert rows['class/blocks/class_attention/out/kernel'][0] == 'copied'
  assert rows['motion/blocks/motion_attention/out/kernel'][1].endswith('; blocks 1 are loaded')


def test_unused_parameters_are_listed(workdir):
  folder, _ = workdir
  result = loaded(folder, space_blocks=1, motion_blocks=0, class_blocks=0)
  unused = [row for row in result.table if row.status == 'unused']
  assert len(unused) == 26 + 16  # of the motion block, of the class block
  assert {row.note for row in unused} == {'the model has fewer blocks'}


def test_too_few_blocks_are_refused(workdir):
  folder, _ = workdir
  with pytest.raises(UserError, match=r'2 blocks -> 3 \(config\.model\.space_blocks'):
    loaded(folder, motion_blocks=2)


def test_workdir_without_checkpoint_is_refused(workdir, tmp_path):
  (tmp_path / 'empty' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(UserError, match=r'no config\.json'):
    loaded(tmp_path / 'empty')
