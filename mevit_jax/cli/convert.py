"""Converts weights of another library, or of another workdir, into a workdir that trains on and evaluates.

  mevit convert vit_base/ --workdir=runs/k400 --config=configs/k400.py
  mevit convert B_16.npz --workdir=runs/k400 --config=configs/k400.py --config.data.data_dir=/data
  mevit convert timesformer/ --workdir=runs/timesformer --config=configs/timesformer.py

WEIGHTS is an .npz, .safetensors or PyTorch file, a folder of Hugging Face's or timm's, or a workdir of ours; what is in
it says what it is (docs/weights.md lists all). A table says where every parameter is from, and what is not used.
--config.init_head=keep keeps a head whose classes have no names in the source. Go on with
python main.py --config=... --workdir=...: with the same config it trains, with --mode=evaluate it evaluates.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mevit_jax import experiment as runs
from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.workdir import write_workdir
from mevit_jax.config import experiment
from mevit_jax.config import flags as config_flags
from mevit_jax.config.experiment import Config
from mevit_jax.errors import UserError

REQUIRED = ('config', 'workdir')  # flags


def convert(recipe: Config, workdir: str) -> None:
  """Writes a workdir with one checkpoint, of step 0, from the weights that the recipe starts from.

  Raises:
    UserError: for what the weights, the recipe, its dataset or the workdir can have wrong; nothing is written then.
  """
  folder = Path(workdir).expanduser()
  if any(folder.glob('checkpoints/*')):
    raise UserError(f'{folder} holds a run already: take another --workdir')
  run = runs.prepare_run(recipe, folder)
  runs.check_workdir(run)  # one that was begun and not finished goes on
  state = runs.initial_state(run)
  write_workdir(folder, run.metadata)
  checkpoints = CheckpointManager(folder, recipe.training.keep)
  try:
    checkpoints.save(state, run.metadata)
  finally:
    checkpoints.close()
  print(f'written to {folder}; to train on: python main.py --config=... --workdir={folder}')


def main(argv: Sequence[str]) -> None:
  """Converts the one argument."""
  if len(argv) != 2:
    raise UserError('name the weights to convert, one file or folder (--help tells all)')
  recipe = dataclasses.replace(experiment.from_dict(flags.FLAGS.config), init_from=argv[1])
  convert(recipe, flags.FLAGS.workdir)


def define_flags() -> None:
  """Defines the flags of this command."""
  config_flags.define_config_flag()
  flags.DEFINE_string('workdir', None, 'Where the checkpoint goes; it must be new.')
