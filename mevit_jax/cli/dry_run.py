"""Runs one batch through training and evaluation, without writing anything.

  mevit dry-run --config=configs/k400.py

Prints the model's parameters, compile times and the first losses. With --workdir it also checks that the run there can
be resumed with this config.
"""

import tempfile
from collections.abc import Sequence

from absl import flags

from mevit_jax import train
from mevit_jax.cli.train import define_flags, run

__all__ = ['REQUIRED', 'define_flags', 'main']

REQUIRED = ('config',)


def main(argv: Sequence[str]) -> None:
  """Runs two training steps and one evaluation step."""
  if flags.FLAGS.workdir:
    run(train.dry_run, argv)
    return
  with tempfile.TemporaryDirectory() as folder:  # the workdir of a new run
    run(lambda config, _: train.dry_run(config, folder), argv)
