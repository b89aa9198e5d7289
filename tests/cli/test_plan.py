"""Plans for a small model, on CPU devices and, with libtpu installed, on abstract TPUs."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mevit_jax import plan
from mevit_jax.config.mesh import MeshConfig
from mevit_jax.config.model import count_flops
from mevit_jax.errors import UserError
from mevit_jax.planning import chips, report
from mevit_jax.planning.estimate import StepPlan

pytestmark = pytest.mark.usefixtures('compile_once')

ROOT = Path(__file__).parents[2]
GPUS = chips.parse('h200:8')  # its compiler has no cycle estimates, like the CPU's


def small_config(tiny, **changes):
  return tiny(**{'data.dataset': 'kinetics400', 'training.batch_size': 6, 'evaluation.batch_size': 3, **changes})


def test_plan_of_the_training_and_evaluation_steps(tiny):
  config = dataclasses.replace(small_config(tiny), mesh=MeshConfig(fsdp=4))
  sharded = plan.plan(config, GPUS, jax.devices())
  train, evaluation = sharded.train, sharded.evaluation
  assert (sharded.batch_size, sharded.requested_batch_size, sharded.evaluation_batch_size) == (8, 6, 8)
  assert sharded.mesh == {'data': 2, 'fsdp': 4}
  assert sharded.learning_rate == pytest.approx(0.1 * 8 / 64)
  assert sharded.steps == round(2 * 246_245 / 8)
  model = dataclasses.replace(config.model, classes=400)
  assert train.flops == 3 * 8 * count_flops(model)
  assert evaluation.flops == 8 * count_flops(model)
  assert train.memory['batch'] == 1 * (2 * 16 * 16 * 3 + 4)  # one clip per device
  assert train.memory['optimizer state'] == train.memory['parameters'] + 4  # momentum and step count
  replicated = plan.plan(small_config(tiny), GPUS, jax.devices(), 16, evaluation=False)
  assert replicated.train.memory['parameters'] > 2 * train.memory['parameters']
  assert replicated.evaluation is None
  assert {row.kind for row in replicated.train.traffic} == {'all-reduce'}
  assert {('all-gather', 4)} <= {(row.kind, row.devices) for row in train.traffic}
  text = report.describe(sharded, GPUS.chip)
  assert 'batch size 8 (6 rounded up to a multiple of the batch shards), 1 per chip' in text
  assert 'fits' in text
  assert json.loads(json.dumps(report.to_dict(sharded)))['train']['fits'] is True
  assert report.table([sharded, replicated]).count('\n') == 3


@pytest.mark.parametrize('limit', [1, 13])
def test_largest_batch_is_found_by_search(tiny, monkeypatch, limit):
  compiled = []

  def plan_train(run, topology):
    units = run.config.training.batch_size // 8
    compiled.append(units)
    return StepPlan({}, units, limit, 1.0, 1.0)

  monkeypatch.setattr(plan, 'plan_train', plan_train)
  assert plan.find_largest_batch(small_config(tiny), GPUS, jax.devices()) == 8 * limit
  assert {limit, limit + 1} <= set(compiled)
  assert len(compiled) == len(set(compiled)) <= 8


def test_invalid_configs_are_refused(tiny, monkeypatch):
  with pytest.raises(UserError, match=r"data\.dataset 'mine' is not in .*, and its size is unknown"):
    plan.plan(small_config(tiny, **{'data.dataset': 'mine'}), GPUS, jax.devices())
  with pytest.raises(UserError, match=r'training\.batch_size 12 is not divisible by the 8 devices'):
    plan.plan(small_config(tiny), GPUS, jax.devices(), 12)
  with pytest.raises(UserError, match=r"model\.classes is 5, but the dataset 'kinetics400' has 400"):
    plan.plan(small_config(tiny, **{'model.classes': 5}), GPUS, jax.devices())
  monkeypatch.setattr(plan, 'plan_train', lambda run, topology: StepPlan({}, 2, 1, 1.0, 1.0))
  with pytest.raises(UserError, match='batch_size 8, the smallest for this mesh, does not fit on h200:8'):
    plan.find_largest_batch(small_config(tiny), GPUS, jax.devices())


def test_size_of_a_prepared_dataset(tiny):
  run = plan._build_run(tiny(), jax.devices(), 8)
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
def test_plan_for_a_tpu(tmp_path):
  """Batch size 256 has about four times the compute of 64, and the same bytes in collectives."""
  (tmp_path / 'small.py').write_text(SMALL.format(unroll=0))
  command = [sys.executable, '-m', 'mevit_jax', 'plan', f'--config={tmp_path}/small.py', '--topology=v5e:2x2', '--json']
  process = subprocess.run([*command, '--batch=64,256'], cwd=ROOT, capture_output=True, text=True)
  assert process.returncode == 0, process.stderr
  small, large = json.loads(process.stdout)
  assert small['train']['fits']
  assert 2 < large['train']['compute'] / small['train']['compute'] < 6
  np.testing.assert_allclose(large['train']['collective'], small['train']['collective'], rtol=0.01)
  assert 0 < small['train']['mfu'][1] < 1


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs requirements-plan.txt')
def test_plan_for_two_tpu_slices(tmp_path):
  """All gradients are reduced between slices in float32; each of four chips sends a quarter."""
  (tmp_path / 'small.py').write_text(SMALL.format(unroll=0))
  command = [sys.executable, '-m', 'mevit_jax', 'plan', f'--config={tmp_path}/small.py', '--topology=v5e:2x2', '--json']
  wanted = ['--config.mesh.slice=2', '--noevaluation', '--batch=64']
  process = subprocess.run([*command, *wanted], cwd=ROOT, capture_output=True, text=True)
  assert process.returncode == 0, process.stderr
  (result,) = json.loads(process.stdout)
  (across,) = (row for row in result['train']['traffic'] if row['across_slices'])
  assert (across['kind'], across['devices']) == ('all-reduce', 2)
  assert result['train']['memory']['parameters'] / 4 == pytest.approx(across['bytes'], rel=0.1)  # padded tiles
