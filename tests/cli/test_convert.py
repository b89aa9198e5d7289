"""The command: weights become a workdir that evaluates, and trains on."""

import dataclasses

import jax
import numpy as np
import pytest

from mevit_jax import evaluate, train
from mevit_jax import experiment as runs
from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.checkpoint.workdir import read_workdir
from mevit_jax.cli import convert
from mevit_jax.errors import UserError
from mevit_jax.models.functional import build_model
from mevit_jax.parallel.hosts import global_batch
from mevit_jax.parallel.placement import batch_sharding
from mevit_jax.pretrained.export import export

# The model of the recipe without its motion attention: a ViT, whose pixels had a mean of their own.
CLASSES = 5
PIXELS = {'mean': (0.25, 0.5, 0.75), 'std': (0.5, 0.25, 0.5)}


@pytest.fixture
def recipe(tiny, compile_once):
  return tiny(**{'training.epochs': 1.0})


@pytest.fixture
def vit(recipe, tmp_path):
  """A ViT as Hugging Face keeps it, whose LayerNorms have an eps of their own."""
  config = dataclasses.replace(
    recipe.model, classes=CLASSES, frames=1, space_blocks=2, motion_blocks=0, layer_norm_eps=1e-12
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), build_model(config).abstract)
  export(tmp_path / 'vit', params, config, 'hf_vit', class_names='abcde', **PIXELS)
  return tmp_path / 'vit'


def test_weights_become_a_workdir_that_goes_on(recipe, vit, tmp_path, capsys):
  """With the source's eps, mean and std, without saying so again."""
  workdir = str(tmp_path / 'run')
  convert.convert(dataclasses.replace(recipe, init_from=str(vit)), workdir)
  assert 'resized' not in (table := capsys.readouterr().out)
  assert 'vit.encoder.layer.1.intermediate.dense.weight' in table
  written = read_workdir(tmp_path / 'run')['config']
  assert written['model']['layer_norm_eps'] == 1e-12
  assert (tuple(written['data']['mean']), tuple(written['data']['std'])) == (PIXELS['mean'], PIXELS['std'])
  before = evaluate.evaluate(recipe, workdir)
  assert before['checkpoint']['step'] == 0
  after = train.train(recipe, workdir)
  assert after['checkpoint']['step'] == 3
  assert 'resuming from step 0' in capsys.readouterr().out
  assert load_checkpoint(tmp_path / 'run').step == 3


@pytest.mark.parametrize('devices', [1, 8])
def test_a_converted_model_learns_where_it_is_placed(recipe, tiny, vit, tmp_path, devices):
  """Steps on one batch lower its loss, and every array stays where it was."""
  recipe = tiny(**{'mesh.data': devices, 'optimizer.name': 'adamw', 'optimizer.learning_rate': 0.08})
  run = runs.prepare_run(dataclasses.replace(recipe, init_from=str(vit)), tmp_path / 'run')
  state = runs.initial_state(run)
  rng = np.random.default_rng(0)
  batch = {
    'video': rng.integers(0, 256, (8, *(run.model.config.frames, 16, 16, 3)), np.uint8),
    'label': np.arange(8, dtype=np.int32) % run.model.config.classes,
  }
  places = jax.tree.map(lambda x: x.sharding, state)
  losses = []
  for _ in range(5):
    state, metrics = run.step(state, global_batch(batch, batch_sharding(run.mesh)))
    losses.append(float(metrics['loss']))
  assert losses[-1] < losses[0] - 0.01
  assert all(len(x.sharding.device_set) == devices for x in jax.tree.leaves(state))
  assert jax.tree.map(lambda x: x.sharding, state) == places


def test_a_workdir_is_not_written_over(recipe, vit, tmp_path):
  (tmp_path / 'run' / 'checkpoints' / '0').mkdir(parents=True)
  with pytest.raises(UserError, match='holds a run already'):
    convert.convert(dataclasses.replace(recipe, init_from=str(vit)), str(tmp_path / 'run'))


def test_weights_that_are_not_there_leave_no_workdir(recipe, tmp_path):
  with pytest.raises(UserError, match='no weights at'):
    convert.convert(dataclasses.replace(recipe, init_from=str(tmp_path / 'nowhere')), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_one_argument(recipe):
  with pytest.raises(UserError, match='one file or folder'):
    convert.main(['convert'])
