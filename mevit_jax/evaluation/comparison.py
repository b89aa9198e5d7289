"""Paired comparison of two evaluations of the same videos: differences, significance, changed predictions."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.checkpoint.workdir import read_workdir
from mevit_jax.config.evaluation import Average
from mevit_jax.config.experiment import differences
from mevit_jax.errors import UserError
from mevit_jax.evaluation import metrics
from mevit_jax.evaluation.protocol import Predictions
from mevit_jax.evaluation.results import read_results

_METADATA = ('protocol', 'clip', 'preprocessing', 'checkpoint', 'versions')


def compare_evaluations(a: Path, b: Path, average: Average | None = None) -> dict[str, Any]:
  """Compares two evaluation folders; see `compare` for the statistics.

  Args:
    a: evaluation folder, such as WORKDIR/evaluation/validation-1x3.
    b: evaluation folder to compare with `a`.
    average: 'probabilities' or 'logits': the quantity averaged over views in both; None keeps that of each evaluation.

  Raises:
    UserError: the evaluations have different datasets or splits.
  """
  results, predictions, class_names = read_results(a)
  other_results, other_predictions, _ = read_results(b)
  if results['dataset'] != other_results['dataset']:
    changes = '; '.join(differences(results['dataset'], other_results['dataset']))
    raise UserError(f'{a} and {b} are evaluations of different datasets or splits: {changes}')
  if average:
    predictions = dataclasses.replace(predictions, average=average)
    other_predictions = dataclasses.replace(other_predictions, average=average)
  return {
    'a': str(a),
    'b': str(b),
    'dataset': results['dataset'],
    **compare(predictions, other_predictions, class_names),
    'differences': _config_differences(a, b, results, other_results),
  }


def find_evaluation(path: Path, name: str | None) -> Path:
  """Returns the folder of an evaluation.

  Args:
    path: evaluation folder or workdir.
    name: name of the evaluation, required if the workdir has several.

  Raises:
    UserError: the evaluation does not exist, or there are several and `name` is None.
  """
  if (path / 'results.json').exists():
    return path
  names = sorted(results.parent.name for results in path.glob('evaluation/*/results.json'))
  if not names:
    raise UserError(f'{path} has no evaluation; run: mevit evaluate --workdir={path}')
  if name is None and len(names) > 1:
    raise UserError(f'{path} has several evaluations, choose one with --name: {", ".join(names)}')
  if name is not None and name not in names:
    raise UserError(f'{path} has no evaluation {name}; it has {", ".join(names)}')
  return path / 'evaluation' / (name or names[0])


def compare(a: Predictions, b: Predictions, class_names: tuple[str, ...]) -> dict[str, Any]:
  """Compares two models' predictions on the labeled videos that were readable in both evaluations.

  Differences are `b - a`; their 95 % intervals come from a paired bootstrap over videos.

  Raises:
    UserError: the evaluations have different videos or labels, or no video can be compared.
  """
  b = _reorder(b, a)
  counted = a.readable & b.readable & (a.labels >= 0)
  if not counted.any():
    raise UserError('nothing to compare: no labeled video was readable in both evaluations')
  labels, ids = a.labels[counted], a.ids[counted]
  top_a, top_b = (_Top1.from_probabilities(x.probabilities[counted], labels) for x in (a, b))
  ensemble = _Top1.from_probabilities((a.probabilities + b.probabilities)[counted] / 2, labels)
  correct_a, correct_b = top_a.hits['top1'], top_b.hits['top1']

  def list_videos(mask: np.ndarray, confidence: np.ndarray) -> list[dict[str, Any]]:
    """Lists videos by falling confidence of the wrong model."""
    indices = np.flatnonzero(mask)
    indices = indices[np.argsort(-confidence[indices], kind='stable')]
    return [
      {
        'id': str(ids[i]),
        'label': class_names[labels[i]],
        'a': top_a.describe(i, class_names),
        'b': top_b.describe(i, class_names),
      }
      for i in indices.tolist()
    ]

  return {
    'videos': int(counted.sum()),
    'excluded': int((~counted).sum()),
    **{name: _difference(metric, labels, top_a, top_b) for name, metric in _METRICS.items()},
    'mcnemar_top1': _mcnemar(int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())),
    'same_prediction': float((top_a.classes == top_b.classes).mean()),
    'correct_to_wrong': list_videos(correct_a & ~correct_b, top_b.confidence),
    'wrong_to_correct': list_videos(correct_b & ~correct_a, top_a.confidence),
    'ensemble': {name: metric(labels, ensemble, None) for name, metric in _METRICS.items()},
  }


@dataclasses.dataclass(frozen=True)
class _Top1:
  """Top-1 classes of all videos, `n`, their probabilities, and top-1 and top-5 hits."""

  classes: np.ndarray
  confidence: np.ndarray
  hits: dict[str, np.ndarray]

  @classmethod
  def from_probabilities(cls, probabilities: np.ndarray, labels: np.ndarray) -> '_Top1':
    classes = metrics.ranked(probabilities, 1)[:, 0]
    return cls(classes, probabilities.max(axis=1), metrics.hits(probabilities, labels))

  def describe(self, i: int, class_names: tuple[str, ...]) -> dict[str, Any]:
    return {'prediction': class_names[self.classes[i]], 'confidence': float(self.confidence[i])}


# (labels, predictions, number of times that each video counts) -> accuracy
_Metric = Callable[[np.ndarray, _Top1, np.ndarray | None], float]


def _accuracy(name: str) -> _Metric:
  return lambda labels, top1, counts: float(np.average(top1.hits[name], weights=counts))


_METRICS: dict[str, _Metric] = {
  'top1': _accuracy('top1'),
  'top5': _accuracy('top5'),
  'mean_class': lambda labels, top1, counts: metrics.mean_class_accuracy(labels, top1.hits['top1'], counts),
}


def _difference(metric: _Metric, labels: np.ndarray, a: _Top1, b: _Top1) -> dict[str, Any]:
  """Computes a metric for both models, its difference, and the interval over common resamples of the videos."""

  def difference(counts: np.ndarray | None) -> float:
    return metric(labels, b, counts) - metric(labels, a, counts)

  return {
    'a': metric(labels, a, None),
    'b': metric(labels, b, None),
    'difference': difference(None),
    'interval': metrics.bootstrap_interval(difference, len(labels)),
  }


def _mcnemar(correct_to_wrong: int, wrong_to_correct: int) -> dict[str, Any]:
  """Computes McNemar's exact test; the null hypothesis is that both kinds of change are equally likely."""
  from scipy import stats  # slow to import

  changed = correct_to_wrong + wrong_to_correct
  p = float(stats.binomtest(wrong_to_correct, changed).pvalue) if changed else 1.0
  return {'correct_to_wrong': correct_to_wrong, 'wrong_to_correct': wrong_to_correct, 'p': p}


def _reorder(predictions: Predictions, reference: Predictions) -> Predictions:
  """Returns predictions in the order of the reference's videos."""
  ids, reference_ids = predictions.ids.tolist(), reference.ids.tolist()
  if reference.probabilities.shape != predictions.probabilities.shape or set(reference_ids) != set(ids):
    raise UserError('the two evaluations have different videos or classes')
  index = {video: i for i, video in enumerate(ids)}
  order = [index[video] for video in reference_ids]
  if (predictions.labels[order] != reference.labels).any():
    raise UserError('the two evaluations have different labels for the same videos')
  columns = {name: getattr(predictions, name)[order] for name in ('ids', 'labels', 'logits', 'errors')}
  return dataclasses.replace(predictions, **columns)


def _config_differences(a: Path, b: Path, results: dict[str, Any], other_results: dict[str, Any]) -> list[str]:
  """Lists differences of the evaluations and of the runs' configs: 'config.training.seed: 0 -> 1'."""
  changes = differences(
    {name: results.get(name) for name in _METADATA}, {name: other_results.get(name) for name in _METADATA}
  )
  workdirs = [folder.resolve().parent.parent for folder in (a, b)]
  if all((workdir / 'config.json').exists() for workdir in workdirs):
    config, other_config = ({**read_workdir(workdir)['config'], 'evaluation': None} for workdir in workdirs)
    changes += differences(config, other_config, 'config.')
  return changes
