"""Compares two evaluations of the same videos: differences with their intervals, the videos that changed, the configs.

  mevit compare runs/a runs/b
  mevit compare runs/a runs/a/evaluation/validation-4x3 --name=validation-1x3 --json

Each is a workdir, or a folder of its evaluation/. Nothing is computed anew: the logits of every view are there.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mevit_jax.checkpoint.workdir import read_workdir
from mevit_jax.config import experiment
from mevit_jax.config.evaluation import Average
from mevit_jax.errors import UserError
from mevit_jax.evaluation.comparison import compare
from mevit_jax.evaluation.results import read_results

REQUIRED = ()  # flags

_ABOUT = ('protocol', 'clip', 'preprocessing', 'checkpoint', 'versions')
_MEASURES = {'top1': 'top-1', 'top5': 'top-5', 'mean_class': 'mean class'}


def compare_evaluations(one: Path, other: Path, average: Average | None = None) -> dict[str, Any]:
  """Compares two folders of evaluations; see `comparison.compare` for what is added here.

  Args:
    one: such as WORKDIR/evaluation/validation-1x3.
    other: likewise.
    average: 'probabilities' or 'logits' over the views, of both; None is what each was evaluated with.

  Raises:
    UserError: the evaluations are not of the same dataset and split.
  """
  (about, predictions, names), (others_about, others_predictions, _) = read_results(one), read_results(other)
  if about['dataset'] != others_about['dataset']:
    found = experiment.differences(about['dataset'], others_about['dataset'])
    raise UserError(f'{one} and {other} are not of the same videos: {"; ".join(found)}')
  if average:
    predictions, others_predictions = (
      dataclasses.replace(each, average=average) for each in (predictions, others_predictions)
    )
  return {
    'one': str(one),
    'other': str(other),
    'dataset': about['dataset'],
    **compare(predictions, others_predictions, names),
    'differing': _differing(one, other, about, others_about),
  }


def find_evaluation(path: Path, name: str | None) -> Path:
  """The folder of an evaluation, given itself or its workdir; `name` says which where a workdir has several."""
  if (path / 'results.json').exists():
    return path
  there = sorted(found.parent.name for found in path.glob('evaluation/*/results.json'))
  if not there:
    raise UserError(f'{path} holds no evaluation: python main.py --config=... --workdir={path} --mode=evaluate')
  if name is None and len(there) > 1:
    raise UserError(f'{path} holds several evaluations, choose one by --name: {", ".join(there)}')
  if name is not None and name not in there:
    raise UserError(f'{path} holds no evaluation {name}; there: {", ".join(there)}')
  return path / 'evaluation' / (name or there[0])


def in_words(found: dict[str, Any], videos: int) -> str:
  """The comparison as text; of the videos that changed, so many each way."""
  dataset = found['dataset']
  lines = [
    f'A  {found["one"]}',
    f'B  {found["other"]}',
    f'{found["videos"]:,} videos of {dataset["name"]}/{dataset["split"]}, fingerprint {dataset["fingerprint"][:12]}; '
    f'{found["left_out"]} left out: unreadable in one of them, or without a label',
    '',
    f'{"":12}{"A":>10}{"B":>10}{"B - A":>10}   95 % (paired bootstrap over videos)',
  ]
  for key, name in _MEASURES.items():
    one, other, difference = (100 * found[key][of] for of in ('one', 'other', 'difference'))
    low, high = (100 * x for x in found[key]['interval'])
    lines.append(f'{name:12}{one:8.2f} %{other:8.2f} %{difference:+10.2f}   {low:+.2f} to {high:+.2f}')
  together = ', '.join(f'{name} {100 * found["ensemble"][key]:.2f} %' for key, name in _MEASURES.items())
  counts = found['mcnemar_top1']
  lines += [
    '',
    f'A and B together (probabilities averaged): {together}',
    f'{100 * found["same_prediction"]:.1f} % have the same prediction; {counts["right_to_wrong"]} right in A alone, '
    f'{counts["wrong_to_right"]} right in B alone (McNemar, exact: p = {counts["p"]:.2g})',
  ]
  for key, title in (('right_to_wrong', 'right in A alone'), ('wrong_to_right', 'right in B alone')):
    lines += ['', f'{title}:'] if found[key][:videos] else []
    for video in found[key][:videos]:
      says = '; '.join(
        f'{letter} {video[of]["prediction"]} {100 * video[of]["confidence"]:.0f} %'
        for letter, of in (('A', 'one'), ('B', 'other'))
      )
      lines.append(f'  {video["id"]}  {video["label"]}: {says}')
  return '\n'.join(
    [*lines, '', 'what differs (in A, and in B):', *(f'  {line}' for line in found['differing'] or ['-'])]
  )


def _differing(one: Path, other: Path, about: dict, others_about: dict) -> list[str]:
  """How the evaluations and the recipes of the runs differ: 'recipe.training.seed: 0, and 1'."""
  found = experiment.differences(
    {name: about.get(name) for name in _ABOUT}, {name: others_about.get(name) for name in _ABOUT}
  )
  workdirs = [folder.resolve().parent.parent for folder in (one, other)]
  if all((workdir / 'config.json').exists() for workdir in workdirs):
    ours, theirs = ({**read_workdir(workdir)['config'], 'evaluation': None} for workdir in workdirs)
    found += experiment.differences(ours, theirs, 'config.')
  return found


def main(argv: Sequence[str]) -> None:
  """Compares what the arguments name."""
  if len(argv) != 3:
    raise UserError(f'two workdirs or evaluations are compared, not {len(argv) - 1}: see --help')
  one, other = (find_evaluation(Path(path).expanduser(), flags.FLAGS.name) for path in argv[1:])
  found = compare_evaluations(one, other, flags.FLAGS.average)
  print(json.dumps(found, indent=2) if flags.FLAGS.json else in_words(found, flags.FLAGS.videos))


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string('name', None, 'Which evaluation of a workdir that has several: validation-1x3.')
  flags.DEFINE_enum(
    'average', None, ['probabilities', 'logits'], 'Over the views; what each evaluation had if not set.'
  )
  flags.DEFINE_integer('videos', 10, 'How many of the videos that changed are shown, each way.', lower_bound=0)
  flags.DEFINE_bool('json', False, 'Everything as JSON: all videos that changed too.')
