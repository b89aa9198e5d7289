"""Conversion of pretrained weights into a workdir."""

import contextlib
from pathlib import Path

from mevit_jax import experiment
from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.reader import saved_steps
from mevit_jax.checkpoint.workdir import write_workdir
from mevit_jax.config.experiment import Config
from mevit_jax.errors import UserError


def convert(config: Config, workdir: str) -> Path:
  """Writes a workdir with one checkpoint, of step 0, from the weights `config.init_from`; returns its path.

  A conversion that was interrupted leaves no complete checkpoint: the same command then writes it.

  Raises:
    UserError: the weights, the config, its dataset or the workdir are invalid; then nothing is written.
  """
  folder = Path(workdir).expanduser()
  _check_no_checkpoints(folder)
  run = experiment.prepare_run(config, folder)
  experiment.check_workdir(run)
  state = experiment.initial_state(run)
  with experiment.lock_workdir(folder, new=not experiment.is_started(folder)):
    _check_no_checkpoints(folder)
    write_workdir(folder, run.metadata)
    with contextlib.closing(CheckpointManager(folder, run.config.training.keep)) as checkpoints:
      checkpoints.save(state, run.metadata)
  return folder


def _check_no_checkpoints(folder: Path) -> None:
  if saved_steps(folder):
    raise UserError(f'{folder} already has checkpoints: choose another --workdir')
