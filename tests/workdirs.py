"""Workdirs as runs leave them: what tests of whole commands share."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np

from mevit_jax import runs
from mevit_jax.recipes import Recipe
from mevit_jax.training.checkpoint import Checkpoints
from mevit_jax.training.state import TrainState

MEASURED = ('train/clips_per_second', 'train/data_wait')  # differ from run to run
NAME = 'validation-1x1'


def after(step: int, workdir: Path, to: Path) -> Path:
  """A copy of a workdir as a run that ended with this checkpoint leaves it at the worst: evaluated nothing since."""
  shutil.copytree(workdir, to, ignore=shutil.ignore_patterns('evaluation'))
  for path in (to / 'checkpoints').iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  return to


def of_format_1(workdir: Path, to: Path) -> Path:
  """A copy of a workdir as an older version of this package would have written it."""
  shutil.copytree(workdir, to, ignore=shutil.ignore_patterns('evaluation'))
  about = json.loads((to / 'config.json').read_text())
  (to / 'config.json').write_text(json.dumps({**about, 'format': 1}))
  return to


def with_checkpoint(run: runs.Run, state: TrainState) -> None:
  """Writes the run's workdir with this state as its only checkpoint."""
  runs.begin_workdir(run)
  with contextlib.closing(Checkpoints(run.workdir, 1)) as checkpoints:
    checkpoints.save(state, run.about)


def random_run(recipe: Recipe, folder: Path) -> Path:
  """A run whose params are random enough for classes to differ, and whose running mean is something else."""
  run = runs.prepare_run(recipe, folder)
  state = runs.fresh_state(run)
  rng = np.random.default_rng(0)

  def noise(x):
    return jax.numpy.asarray(rng.normal(0, 0.5, x.shape).astype(np.float32))

  params, mean = (jax.tree.map(noise, state.params) for _ in range(2))
  with_checkpoint(run, dataclasses.replace(state, params=params, ema=mean))
  return folder
