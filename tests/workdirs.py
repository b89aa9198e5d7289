"""Workdirs as runs leave them: what tests of resuming share."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

from mevit_jax import runs
from mevit_jax.training.checkpoint import Checkpoints

MEASURED = ('train/clips_per_second', 'train/data_wait')  # differ from run to run
NAME = 'validation-1x1'


def after(step: int, workdir: Path, to: Path) -> Path:
  """A copy of a workdir as a run that ended with this checkpoint leaves it at the worst: evaluated nothing since."""
  shutil.copytree(workdir, to, ignore=shutil.ignore_patterns('evaluation'))
  for path in (to / 'checkpoints').iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  return to


def with_checkpoint(run, state, params) -> None:
  """Writes the run's workdir as if these params had come out of its first step."""
  runs.begin_workdir(run)
  with contextlib.closing(Checkpoints(run.workdir, 1)) as checkpoints:
    checkpoints.save(dataclasses.replace(state, step=state.step + 1, params=params), run.about)
