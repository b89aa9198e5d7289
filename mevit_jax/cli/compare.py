"""Compares two evaluations of the same videos: differences with confidence intervals, changed videos, settings.

  mevit compare runs/a runs/b
  mevit compare runs/a runs/a/evaluation/validation-4x3 --name=validation-1x3 --json

Each argument is a workdir or a folder of its evaluation/. The comparison uses the saved logits and needs no model.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mevit_jax.errors import UserError
from mevit_jax.evaluation.comparison import compare_evaluations, find_evaluation
from mevit_jax.report.comparison import format_comparison

REQUIRED = ()  # flags


def main(argv: Sequence[str]) -> None:
  """Compares the two evaluations that the arguments name."""
  if len(argv) != 3:
    raise UserError(f'give two workdirs or evaluation folders, not {len(argv) - 1}; see --help')
  a, b = (find_evaluation(Path(path).expanduser(), flags.FLAGS.name) for path in argv[1:])
  comparison = compare_evaluations(a, b, flags.FLAGS.average)
  print(json.dumps(comparison, indent=2) if flags.FLAGS.json else format_comparison(comparison, flags.FLAGS.videos))


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string('name', None, 'Name of the evaluation in a workdir that has several: validation-1x3.')
  flags.DEFINE_enum(
    'average', None, ['probabilities', 'logits'], 'Quantity averaged over views; default: that of each evaluation.'
  )
  flags.DEFINE_integer('videos', 10, 'Maximum number of changed videos to list in each direction.', lower_bound=0)
  flags.DEFINE_bool('json', False, 'Print everything as JSON, including all changed videos.')
