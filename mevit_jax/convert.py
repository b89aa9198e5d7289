"""Conversion of pretrained weights into a workdir."""

from pathlib import Path

from mevit_jax import experiment
from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.workdir import write_workdir
from mevit_jax.config.experiment import Config
from mevit_jax.errors import UserError


def convert(config: Config, workdir: str) -> Path:
  """Writes a workdir with one checkpoint, of step 0, from the weights `config.init_from`; returns its path.

  Raises:
    UserError: the weights, the config, its dataset or the workdir are invalid; then nothing is written.
  """
  folder = Path(workdir).expanduser()
  if any(folder.glob('checkpoints/*')):
    raise UserError(f'{folder} already has checkpoints: choose another --workdir')
  run = experiment.prepare_run(config, folder)
  experiment.check_workdir(run)  # a workdir without checkpoints is from an interrupted conversion
  state = experiment.initial_state(run)
  write_workdir(folder, run.metadata)
  checkpoints = CheckpointManager(folder, run.config.training.keep)
  try:
    checkpoints.save(state, run.metadata)
  finally:
    checkpoints.close()
  return folder
