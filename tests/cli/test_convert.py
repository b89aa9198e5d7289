"""The convert command: writes weights as a workdir for training and evaluation."""

import dataclasses

import jax
import numpy as np
import pytest

from mevit_jax import evaluate, train
from mevit_jax import experiment as runs
from mevit_jax.checkpoint import reader
from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.checkpoint.workdir import read_workdir
from mevit_jax.cli import convert as command
from mevit_jax.config.data import Normalization
from mevit_jax.convert import convert
from mevit_jax.errors import UserError
from mevit_jax.models.functional import build_model
from mevit_jax.parallel.hosts import global_batch
from mevit_jax.parallel.placement import batch_sharding
from mevit_jax.pretrained.export import export
from tests.helpers.workdirs import random_run

# Without motion attention the model of the config is a ViT; it has its own normalization.
CLASSES = 5
NORMALIZATION = Normalization((0.25, 0.5, 0.75), (0.5, 0.25, 0.5))


@pytest.fixture
def config(tiny, compile_once):
  return tiny(**{'training.epochs': 1.0})


@pytest.fixture
def vit(config, tmp_path):
  """Hugging Face ViT with a non-default layer_norm_eps."""
  model_config = dataclasses.replace(
    config.model, classes=CLASSES, frames=1, space_blocks=2, motion_blocks=0, layer_norm_eps=1e-12
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), build_model(model_config).abstract)
  export(tmp_path / 'vit', params, model_config, 'hf_vit', class_names='abcde', normalization=NORMALIZATION)
  return tmp_path / 'vit'


def test_a_converted_workdir_evaluates_and_trains(config, vit, tmp_path, capsys):
  """Uses the source's layer_norm_eps and normalization, which need not be given again."""
  workdir = str(tmp_path / 'run')
  convert(dataclasses.replace(config, init_from=str(vit)), workdir)
  assert 'resized' not in (table := capsys.readouterr().out)
  assert 'vit.encoder.layer.1.intermediate.dense.weight' in table
  written = read_workdir(tmp_path / 'run')['config']
  assert written['model']['layer_norm_eps'] == 1e-12
  assert (tuple(written['data']['mean']), tuple(written['data']['std'])) == NORMALIZATION
  before = evaluate.evaluate(config, workdir)
  assert before['checkpoint']['step'] == 0
  after = train.train(config, workdir)
  assert after['checkpoint']['step'] == 3
  assert 'resuming from step 0' in capsys.readouterr().out
  assert load_checkpoint(tmp_path / 'run').step == 3


@pytest.mark.parametrize('devices', [1, 8])
def test_a_converted_model_trains_with_its_shardings(config, tiny, vit, tmp_path, devices):
  """Steps on one batch lower its loss, and every array keeps its sharding."""
  config = tiny(**{'mesh.data': devices, 'optimizer.name': 'adamw', 'optimizer.learning_rate': 0.08})
  run = runs.prepare_run(dataclasses.replace(config, init_from=str(vit)), tmp_path / 'run')
  state = runs.initial_state(run)
  rng = np.random.default_rng(0)
  batch = {
    'video': rng.integers(0, 256, (8, *(run.model.config.frames, 16, 16, 3)), np.uint8),
    'label': np.arange(8, dtype=np.int32) % run.model.config.classes,
  }
  shardings = jax.tree.map(lambda x: x.sharding, state)
  losses = []
  for _ in range(5):
    state, metrics = run.step(state, global_batch(batch, batch_sharding(run.mesh)))
    losses.append(float(metrics['loss']))
  assert losses[-1] < losses[0] - 0.01
  assert all(len(x.sharding.device_set) == devices for x in jax.tree.leaves(state))
  assert jax.tree.map(lambda x: x.sharding, state) == shardings


def test_an_existing_workdir_is_not_overwritten(config, vit, tmp_path):
  (tmp_path / 'run' / 'checkpoints' / '0').mkdir(parents=True)
  with pytest.raises(UserError, match='already has checkpoints'):
    convert(dataclasses.replace(config, init_from=str(vit)), str(tmp_path / 'run'))


def test_missing_weights_create_no_workdir(config, tmp_path):
  with pytest.raises(UserError, match='no weights at'):
    convert(dataclasses.replace(config, init_from=str(tmp_path / 'nowhere')), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_convert_takes_one_source(config):
  with pytest.raises(UserError, match='one file or folder'):
    command.main(['convert'])


def test_a_source_workdir_is_verified_and_read_once(config, tmp_path, monkeypatch):
  random_run(dataclasses.replace(config, training=dataclasses.replace(config.training, ema=0.9)), tmp_path / 'source')
  calls = []
  for name in ('verify_checksums', 'restore_item'):
    original = getattr(reader, name)
    monkeypatch.setattr(reader, name, lambda *args, f=original, name=name: (calls.append(name), f(*args))[1])
  run = runs.prepare_run(dataclasses.replace(config, init_from=str(tmp_path / 'source')), tmp_path / 'run')
  runs.initial_state(run)
  assert calls == ['verify_checksums', 'restore_item']
