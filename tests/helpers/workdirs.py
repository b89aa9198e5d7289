"""Training runs and their workdirs, for tests of complete commands."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mevit_jax import experiment as runs
from mevit_jax import train
from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.config.experiment import Config
from mevit_jax.data import pipeline
from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError
from mevit_jax.evaluation.results import read_results
from mevit_jax.models.functional import parameter_shapes
from mevit_jax.training.state import TrainState
from mevit_jax.workdirs import create_workdir

MEASURED = ('train/clips_per_second', 'train/data_wait')  # these differ between runs
NAME = 'validation-1x1'
# An evaluation with two clips of two crops, on one device, of EMA parameters.
VIEWS = {'mesh.data': 1, 'evaluation.clips': 2, 'evaluation.crops': 2, 'training.ema': 0.9}


def after(step: int, workdir: Path, to: Path) -> Path:
  """Copies a workdir in the state of a run killed right after this checkpoint, before any evaluation."""
  shutil.copytree(workdir, to, ignore=shutil.ignore_patterns('evaluation'))
  for path in (to / 'checkpoints').iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  return to


def of_format_1(workdir: Path, to: Path) -> Path:
  """Copies a workdir in the format of an older version of this package."""
  shutil.copytree(workdir, to, ignore=shutil.ignore_patterns('evaluation'))
  about = json.loads((to / 'config.json').read_text())
  (to / 'config.json').write_text(json.dumps({**about, 'format': 1}))
  return to


def with_checkpoint(run: runs.Run, state: TrainState) -> None:
  """Writes a workdir with this state as its only checkpoint."""
  create_workdir(run)
  with contextlib.closing(CheckpointManager(run.workdir, 1)) as checkpoints:
    checkpoints.save(state, run.metadata)


def random_run(config: Config, folder: Path) -> Path:
  """Writes a workdir of random params, large enough for predictions to differ, and different EMA parameters."""
  run = runs.prepare_run(config, folder)
  state = runs.initial_state(run)
  rng = np.random.default_rng(0)

  def noise(x):
    return jax.numpy.asarray(rng.normal(0, 0.5, x.shape).astype(np.float32))

  params, mean = (jax.tree.map(noise, state.params) for _ in range(2))
  with_checkpoint(run, dataclasses.replace(state, params=params, ema=mean))
  return folder


class KilledError(Exception):
  pass


class Recorder:
  """Iterator of training batches that records each in `seen` and raises at step `stop`."""

  def __init__(self, made, step, seen, stop=None):
    self.made, self.step, self.seen, self.stop = made, step, seen, stop

  def __next__(self):
    self.step += 1
    if self.step == self.stop:
      raise KilledError
    batch = next(self.made)
    self.seen.append((self.step, batch['index'].tolist(), batch['label'].tolist(), batch['video'].tobytes()))
    return batch

  def close(self):
    self.made.close()


def recorded(config, workdir, stop=None):
  """Trains and returns the batches, as (step, index, label, pixels)."""
  original, seen = pipeline.train_batches, []

  def train_batches(*arguments, start_step, **options):
    return Recorder(original(*arguments, start_step=start_step, **options), start_step, seen, stop)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, 'train_batches', train_batches)
    try:
      train.train(config, str(workdir))
    except KilledError:
      assert stop
  return seen


def stored(workdir):
  """Returns the newest checkpoint's step and its parameters by name."""
  saved = load_checkpoint(workdir, weights='raw')
  params = saved.params
  return saved.step, {
    name: np.asarray(x) for name, x in zip(parameter_shapes(params), jax.tree.leaves(params), strict=True)
  }


def assert_same_bits(workdir, other):
  (step, params), (other_step, others) = stored(workdir), stored(other)
  assert (step, params.keys()) == (other_step, others.keys())
  for name, x in params.items():
    assert x.tobytes() == others[name].tobytes(), name


def metrics(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def results(workdir, name=NAME):
  return json.loads((workdir / 'evaluation' / name / 'results.json').read_text())


def probabilities(workdir, name=NAME):
  _, predictions, _ = read_results(workdir / 'evaluation' / name)
  return dict(zip(predictions.ids.tolist(), predictions.probabilities, strict=True))


def validation_videos(data_dir: Path) -> dict[str, bytes]:
  """Returns the bytes of the evaluated videos by id."""
  source = datasets.open_split(data_dir, 'moving_shapes', 'validation').source
  return {example['id']: example['video'] for example in source}


def without_labels(monkeypatch):
  """Removes the labels of all splits, like a benchmark's test split."""
  opened = datasets.open_split

  def open_split(*arguments):
    split = opened(*arguments)
    return dataclasses.replace(split, source=[{**example, 'label': -1} for example in split.source])

  monkeypatch.setattr(datasets, 'open_split', open_split)
  monkeypatch.setattr(datasets.Split, 'labels', property(lambda split: np.full(len(split), -1)))


def refused(config, workdir, match):
  """Checks that training is refused before it starts, with a one-line error."""
  with pytest.raises(UserError, match=match) as raised:
    train.train(config, str(workdir))
  assert '\n' not in str(raised.value)
