"""Workdirs as runs leave them: what tests of resuming share."""

import shutil
from pathlib import Path

MEASURED = ('train/clips_per_second', 'train/data_wait')  # differ from run to run
NAME = 'validation-1x1'


def after(step: int, workdir: Path, to: Path) -> Path:
  """A copy of a workdir as a run that ended with this checkpoint leaves it at the worst: evaluated nothing since."""
  shutil.copytree(workdir, to, ignore=shutil.ignore_patterns('evaluation'))
  for path in (to / 'checkpoints').iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  return to
