"""Evaluation counts the same for any devices, processes and batch sizes, for a model with tied logits."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from mevit_jax import evaluate
from mevit_jax import experiment as runs
from mevit_jax.datasets import reader as datasets
from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import moving_shapes
from mevit_jax.evaluation.results import read_results
from tests.helpers.hosts import wait
from tests.helpers.workdirs import with_checkpoint

pytestmark = pytest.mark.usefixtures('compile_once')

VIDEOS = 71  # not divisible by any batch size
CLASSES = 700  # 8 of these have videos
NAME = 'validation-2x1'
# So wide, and with so many classes, that matrix products of some batch sizes round equal columns differently.
WIDE = {'model.width': 128, 'model.mlp_dim': 64, 'evaluation.views': '2x1'}


class Rotten(moving_shapes.MovingShapes):
  """Moving shapes where every eleventh file is truncated to its first half."""

  @staticmethod
  def make(item):
    example = moving_shapes.MovingShapes.make(item)
    whole = example['video']
    return {**example, 'video': whole[: len(whole) // 2] if item.index % 11 == 3 else whole}


@pytest.fixture(scope='module')
def config(tiny, tmp_path_factory):
  """Function from the number of devices and the batch size to the config of an evaluation."""
  data_dir = tmp_path_factory.mktemp('rotten')
  whole = moving_shapes.build(data_dir, {'train': 8, 'validation': VIDEOS}, frames=8, size=24)
  names = *moving_shapes.CLASS_NAMES, *(f'never seen {i}' for i in range(8, CLASSES))
  shards.write(Rotten(data_dir, 'moving_shapes', names, whole.shards))
  fields = {**WIDE, 'data.data_dir': str(data_dir)}
  return lambda devices, batch, **others: tiny(
    **{**fields, 'mesh.data': devices, 'evaluation.batch_size': batch, **others}
  )


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
  """Workdir whose head has equal weights for the first 8 and the last 8 classes, and small ones for the others."""
  folder = tmp_path_factory.mktemp('runs') / 'ties'
  run = runs.prepare_run(config(1, 8), folder)
  state = run.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32), state.params)
  kernel, bias = (np.array(params['head'][name]) for name in ('kernel', 'bias'))
  kernel[:, 8:] *= 0.1
  kernel[:, -8:], bias[-8:] = kernel[:, :8], bias[:8]
  params['head'] = {'kernel': kernel, 'bias': bias}
  with_checkpoint(run, dataclasses.replace(state, step=state.step + 1, params=params))
  return folder


@pytest.fixture(scope='module')
def evaluated(config, workdir):
  """Function from the number of devices and the batch size to the results and predictions of this process."""
  found = {}

  def get(devices, batch):
    if (devices, batch) not in found:
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, '_write_report', lambda *_: None)  # takes longer than the evaluation
        evaluate.evaluate(config(devices, batch), str(workdir))
      found[devices, batch] = read_results(workdir / 'evaluation' / NAME)[:2]
    return found[devices, batch]

  return get


def counts(results):
  """Returns all counts and the metadata of results, without confidences, which are means of floats."""
  return {
    **{name: value for name, value in results.items() if name not in ('calibration', 'loss')},
    'protocol': {**results['protocol'], 'batch_size': 0},
  }


def assert_same(found, expected):
  """Compares counts and ranks exactly, and logits to 1e-6 of the largest of their video."""
  (results, predictions), (other_results, others) = found, expected
  assert counts(results) == counts(other_results)
  for name in ('ids', 'labels', 'errors'):
    assert getattr(predictions, name).tolist() == getattr(others, name).tolist()
  np.testing.assert_array_equal(predictions.ranked(5), others.ranked(5))
  assert results['loss'] == pytest.approx(other_results['loss'], rel=1e-6)
  scale = np.abs(others.logits).max(axis=(1, 2), keepdims=True)
  assert (np.abs(predictions.logits - others.logits) <= 1e-6 * scale).all()


def test_counts_follow_their_definitions(evaluated, config):
  """Evaluates the definitions for one device and one video at a time."""
  results, predictions = evaluated(1, 1)
  data = config(1, 1).data
  source = datasets.open_split(data.data_dir, data.dataset, 'validation').source
  assert predictions.ids.tolist() == [example['id'] for example in source]
  assert predictions.labels.tolist() == [example['label'] for example in source]
  unreadable = [i for i in range(VIDEOS) if i % 11 == 3]
  assert np.flatnonzero(~predictions.readable).tolist() == unreadable
  assert set(results['unreadable_videos']) == {source[i]['id'] for i in unreadable}
  top1 = top5 = 0
  for i in set(range(VIDEOS)) - set(unreadable):
    views = np.exp(predictions.logits[i].astype(np.float64))
    probabilities = (views / views.sum(1, keepdims=True)).mean(0)
    probabilities[-8:] = probabilities[:8]
    expected = sorted(range(CLASSES), key=lambda k: (-probabilities[k], k))[:5]
    assert predictions.ranked(5)[i].tolist() == expected
    top1 += expected[0] == predictions.labels[i]
    top5 += int(predictions.labels[i]) in expected
  assert 0 < top1 < top5 < VIDEOS - len(unreadable)
  assert (results['videos'], results['unreadable']) == (VIDEOS, len(unreadable)) == (71, 7)
  assert (results['top1_correct'], results['top5_correct']) == (top1, top5)
  assert (results['top1'], results['top5']) == (top1 / 64, top5 / 64)
  assert (results['top1_unreadable_wrong'], results['top5_unreadable_wrong']) == (top1 / 71, top5 / 71)


@pytest.mark.parametrize(('devices', 'batch'), [(1, 7), (1, 64), (8, 1), (8, 7), (8, 64)])
def test_counts_do_not_depend_on_devices_and_batch_size(evaluated, devices, batch):
  assert_same(evaluated(devices, batch), evaluated(1, 1))


def test_logits_are_bitwise_equal_for_equal_batches_per_device(evaluated):
  """With 8 devices, batch sizes 1 and 7 are rounded up to 8, one example per device; 64 is eight per device."""
  one_row = [evaluated(*each) for each in ((1, 1), (8, 1), (8, 7))]
  eight_rows = [evaluated(*each) for each in ((1, 8), (8, 64))]
  for each in (one_row, eight_rows):
    assert len({predictions.logits.tobytes() for _, predictions in each}) == 1
    assert len({json.dumps(counts(results)) for results, _ in each}) == 1
  assert [results['protocol']['batch_size'] for results, _ in one_row] == [1, 8, 8]


# Several processes.


@pytest.mark.slow
@pytest.mark.parametrize(('devices', 'batch'), list(itertools.product((2, 8), (1, 7, 64))))
def test_counts_do_not_depend_on_processes(evaluated, config, workdir, start, tmp_path, devices, batch):
  """Two processes, each with half of the devices; batch size 7 decodes in worker processes."""
  run = tmp_path / 'run'
  shutil.copytree(workdir, run, ignore=shutil.ignore_patterns('evaluation'))
  settings = [config(devices, batch, **{'data.workers': 2 * (batch == 7)})] * 2
  for process in wait(start(settings, run, mode='evaluate', devices=devices // 2)):
    assert process.status == 0, process.errors
  found = read_results(run / 'evaluation' / NAME)[:2]
  assert_same(found, evaluated(1, 1))
  assert_same(found, evaluated(devices, batch))
  assert found[1].logits.tobytes() == evaluated(devices, batch)[1].logits.tobytes()


@pytest.mark.slow
def test_a_signal_to_one_process_ends_an_evaluation(config, workdir, start, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(workdir, run, ignore=shutil.ignore_patterns('evaluation'))
  first, second = wait(start([config(2, 2)] * 2, run, (1, 'slow term', 3), 'evaluate'))
  assert (first.status, second.status) == (143, 143)
  assert 'stopped by SIGTERM: this evaluation has written nothing' in first.output
  assert max(first.time, second.time) - second.fault_time < 60
  assert not (run / 'evaluation').exists()
