"""Evaluates a checkpoint on a dataset split; every video counts exactly once.

  mevit evaluate --config=configs/demo.py --workdir=runs/demo
  mevit evaluate --config=configs/k400.py --workdir=runs/k400 --config.evaluation.views=4x3

Writes WORKDIR/evaluation/NAME/: results.json, predictions.csv, logits.npz, report.html.
"""

from collections.abc import Sequence

from mevit_jax import evaluate
from mevit_jax.cli.train import REQUIRED, define_flags, run

__all__ = ['REQUIRED', 'define_flags', 'main']


def main(argv: Sequence[str]) -> None:
  """Evaluates the checkpoint that the config names."""
  run(evaluate.evaluate, argv)
