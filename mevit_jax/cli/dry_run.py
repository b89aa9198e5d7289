"""Runs one batch through training and evaluation, without writing anything.

  mevit dry-run --config=configs/k400.py --workdir=runs/k400

Prints the model's parameters, compile times and the first losses.
"""

from collections.abc import Sequence

from mevit_jax import train
from mevit_jax.cli.train import REQUIRED, define_flags, run

__all__ = ['REQUIRED', 'define_flags', 'main']


def main(argv: Sequence[str]) -> None:
  """Runs two training steps and one evaluation step."""
  run(train.dry_run, argv)
