"""Evaluates a checkpoint on a dataset split; every video counts exactly once.

  mevit evaluate --workdir=runs/demo
  mevit evaluate --workdir=runs/k400 --config.evaluation.views=4x3 --config.data.data_dir=/data
  mevit evaluate --workdir=runs/demo --config=configs/demo.py

The config is the workdir's, unless --config names another; its fields are flags in both cases. Writes
WORKDIR/evaluation/NAME/: results.json, predictions.csv, logits.npz, report.html.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mevit_jax import evaluate
from mevit_jax.checkpoint.reader import read_run
from mevit_jax.cli import command, train
from mevit_jax.config import flags as config_flags

REQUIRED = ('workdir',)


def define_flags() -> None:
  """Defines the flags of this command; without --config, its default is the config of --workdir."""
  workdir = command.find_flag('workdir')
  if workdir and command.find_flag('config') is None:
    config_flags.define_saved_config_flag(read_run(Path(workdir).expanduser())['config'])
  else:
    config_flags.define_config_flag()
  train.define_run_flags()
  flags.adopt_module_key_flags(train)  # for --help


def main(argv: Sequence[str]) -> None:
  """Evaluates the checkpoint that the config names."""
  train.run(evaluate.evaluate, argv)
