"""The plan, of a small model on this machine's own devices as if they were chips, and on a TPU's where libtpu is."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mevit_jax.cli import plan as planner
from mevit_jax.config.mesh import MeshConfig
from mevit_jax.config.model import count_flops
from mevit_jax.errors import UserError
from mevit_jax.planning import chips, report
from mevit_jax.planning.estimate import StepPlan

pytestmark = pytest.mark.usefixtures('compile_once')

ROOT = Path(__file__).parents[2]
GPUS = chips.parse('h200:8')  # whose compiler counts no cycles either


def small(tiny, **changes):
  return tiny(**{'data.dataset': 'kinetics400', 'training.batch_size': 6, 'evaluation.batch_size': 3, **changes})


def test_a_plan_of_the_real_steps(tiny):
  recipe = dataclasses.replace(small(tiny), mesh=MeshConfig(fsdp=4))
  found = planner.plan(recipe, GPUS, jax.devices())
  train, evaluation = found.train, found.evaluation
  assert (found.batch, found.asked, found.evaluation_batch, found.mesh) == (8, 6, 8, {'data': 2, 'fsdp': 4})
  assert found.learning_rate == pytest.approx(0.1 * 8 / 64)
  assert found.steps == round(2 * 246_245 / 8)
  model = dataclasses.replace(recipe.model, classes=400)
  assert train.flops == 3 * 8 * count_flops(model)
  assert evaluation.flops == 8 * count_flops(model)
  assert train.memory['batch'] == 1 * (2 * 16 * 16 * 3 + 4)  # a row a device
  assert train.memory['optimiser'] == train.memory['parameters'] + 4  # momentum, and a count
  whole = planner.plan(small(tiny), GPUS, jax.devices(), 16, evaluation=False)
  assert whole.train.memory['parameters'] > 2 * train.memory['parameters']
  assert whole.evaluation is None
  assert {row.kind for row in whole.train.traffic} == {'all-reduce'}
  assert {('all-gather', 4)} <= {(row.kind, row.devices) for row in train.traffic}
  text = report.describe(found, GPUS.chip)
  assert "batch 8 (the recipe's 6 raised to what the chips divide)" in text
  assert 'fits' in text
  assert json.loads(json.dumps(report.to_dict(found)))['train']['fits'] is True
  assert report.table([found, whole]).count('\n') == 3


@pytest.mark.parametrize('limit', [1, 13])
def test_the_largest_batch_is_searched(tiny, monkeypatch, limit):
  asked = []

  def plan_train(run, topology):
    units = run.config.training.batch_size // 8
    asked.append(units)
    return StepPlan({}, units, limit, 1.0, 1.0)

  monkeypatch.setattr(planner, 'plan_train', plan_train)
  assert planner.largest_batch(small(tiny), GPUS, jax.devices()) == 8 * limit
  assert {limit, limit + 1} <= set(asked)
  assert len(asked) == len(set(asked)) <= 8


def test_what_cannot_be_planned(tiny, monkeypatch):
  with pytest.raises(UserError, match="how many videos 'mine' has is not known"):
    planner.plan(small(tiny, **{'data.dataset': 'mine'}), GPUS, jax.devices())
  with pytest.raises(UserError, match=r'training\.batch_size 12 is not divisible by the 8 devices'):
    planner.plan(small(tiny), GPUS, jax.devices(), 12)
  with pytest.raises(UserError, match=r"model\.classes is 5, but the dataset 'kinetics400' has 400"):
    planner.plan(small(tiny, **{'model.classes': 5}), GPUS, jax.devices())
  monkeypatch.setattr(planner, 'plan_train', lambda run, topology: StepPlan({}, 2, 1, 1.0, 1.0))
  with pytest.raises(UserError, match='not even a batch of 8 fits on h200:8'):
    planner.largest_batch(small(tiny), GPUS, jax.devices())


def test_a_prepared_dataset_says_its_own_size(tiny):
  run = planner._run_on(tiny(), jax.devices(), 8)
  assert (len(run.split), run.steps) == (24, 6)


SMALL = """
from configs import k400
def get_config():
  config = k400.get_config('Ti/16')
  config.model.update(image_size=(96, 96), frames=4, space_blocks=1, motion_blocks=1, class_blocks=0, unroll={unroll})
  config.evaluation.crops = 1
  return config
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs requirements-plan.txt')
def test_a_tpu_that_is_not_there(tmp_path):
  """The command itself; batch 64 has about four times the arithmetic of 16, and as many bytes in collectives."""
  (tmp_path / 'small.py').write_text(SMALL.format(unroll=0))
  command = [sys.executable, '-m', 'mevit_jax', 'plan', f'--config={tmp_path}/small.py', '--topology=v5e:2x2', '--json']
  done = subprocess.run([*command, '--batch=64,256'], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  few, many = json.loads(done.stdout)
  assert few['train']['fits']
  assert 2 < many['train']['compute'] / few['train']['compute'] < 6
  np.testing.assert_allclose(many['train']['collective'], few['train']['collective'], rtol=0.01)
  assert 0 < few['train']['share_of_peak'][1] < 1


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs requirements-plan.txt')
def test_two_slices_that_are_not_there(tmp_path):
  """Gradients go between slices: all of them, in float32, each of four chips its quarter."""
  (tmp_path / 'small.py').write_text(SMALL.format(unroll=0))
  command = [sys.executable, '-m', 'mevit_jax', 'plan', f'--config={tmp_path}/small.py', '--topology=v5e:2x2', '--json']
  wanted = ['--config.mesh.slice=2', '--noevaluation', '--batch=64']
  done = subprocess.run([*command, *wanted], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  (found,) = json.loads(done.stdout)
  (across,) = (row for row in found['train']['traffic'] if row['across_slices'])
  assert (across['kind'], across['devices']) == ('all-reduce', 2)
  assert found['train']['memory']['parameters'] / 4 == pytest.approx(across['bytes'], rel=0.1)  # whole tiles
