"""Two evaluations of the same videos: how much better one is, whether that is more than chance, and where."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mevit_jax.errors import UserError
from mevit_jax.evaluation import metrics
from mevit_jax.evaluation.protocol import Predictions


def compare(one: Predictions, other: Predictions, class_names: tuple[str, ...]) -> dict[str, Any]:
  """Compares what two models say of the same videos: those that both could read, and that have a label.

  Differences are `other` - `one`; their 95 % intervals are of a paired bootstrap over the videos.

  Raises:
    UserError: the videos or their labels are not the same, or none can be compared.
  """
  other = _in_the_order_of(one, other)
  counted = one.readable & other.readable & (one.labels >= 0)
  if not counted.any():
    raise UserError('no video has a label and was readable in both evaluations: there is nothing to compare')
  labels, ids = one.labels[counted], one.ids[counted]
  said = [_Said.of(predictions.probabilities[counted], labels) for predictions in (one, other)]
  ensemble = _Said.of((one.probabilities + other.probabilities)[counted] / 2, labels)
  first, second = (each.hits['top1'] for each in said)

  def videos(which: np.ndarray, wrong: _Said) -> list[dict[str, Any]]:
    """Those of which the model that is wrong is surest come first."""
    indices = np.flatnonzero(which)
    indices = indices[np.argsort(-wrong.confidence[indices], kind='stable')]
    return [
      {'id': str(ids[i]), 'label': class_names[labels[i]]}
      | {name: each.of_video(i, class_names) for name, each in zip(('one', 'other'), said, strict=True)}
      for i in indices.tolist()
    ]

  return {
    'videos': int(counted.sum()),
    'left_out': int((~counted).sum()),
    **{name: _difference(measure, labels, *said) for name, measure in _MEASURES.items()},
    'mcnemar_top1': _mcnemar(int((first & ~second).sum()), int((second & ~first).sum())),
    'same_prediction': float((said[0].best == said[1].best).mean()),
    'right_to_wrong': videos(first & ~second, said[1]),
    'wrong_to_right': videos(second & ~first, said[0]),
    'ensemble': {name: measure(labels, ensemble, None) for name, measure in _MEASURES.items()},
  }


@dataclasses.dataclass(frozen=True)
class _Said:
  """The likeliest class of every video, `n`, its probability, and whether that hits."""

  best: np.ndarray
  confidence: np.ndarray
  hits: dict[str, np.ndarray]

  @classmethod
  def of(cls, probabilities: np.ndarray, labels: np.ndarray) -> '_Said':
    best = metrics.ranked(probabilities, 1)[:, 0]
    return cls(best, probabilities.max(axis=1), metrics.hits(probabilities, labels))

  def of_video(self, i: int, class_names: tuple[str, ...]) -> dict[str, Any]:
    return {'prediction': class_names[self.best[i]], 'confidence': float(self.confidence[i])}


def _share(name: str) -> Callable[[np.ndarray, _Said, np.ndarray | None], float]:
  return lambda labels, said, times: float(np.average(said.hits[name], weights=times))


# (labels, what is said of them, how often each video counts) -> accuracy
_MEASURES = {
  'top1': _share('top1'),
  'top5': _share('top5'),
  'mean_class': lambda labels, said, times: metrics.mean_class_accuracy(labels, said.hits['top1'], times),
}


def _difference(measure: Callable, labels: np.ndarray, one: _Said, other: _Said) -> dict[str, Any]:
  """A measure of both, their difference, and its interval: both are measured on the same resample of videos."""

  def difference(times: np.ndarray | None) -> float:
    return measure(labels, other, times) - measure(labels, one, times)

  return {
    'one': measure(labels, one, None),
    'other': measure(labels, other, None),
    'difference': difference(None),
    'interval': metrics.bootstrap(difference, len(labels)),
  }


def _mcnemar(lost: int, won: int) -> dict[str, Any]:
  """McNemar's exact test: how likely so uneven a change is if a video is as likely to be lost as won."""
  from scipy import stats  # takes a while

  p = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
  return {'right_to_wrong': lost, 'wrong_to_right': won, 'p': p}


def _in_the_order_of(one: Predictions, other: Predictions) -> Predictions:
  """The other predictions in the first's order of videos."""
  if one.probabilities.shape != other.probabilities.shape or set(one.ids.tolist()) != set(other.ids.tolist()):
    raise UserError('the two evaluations are not of the same videos and classes')
  place = {video: i for i, video in enumerate(other.ids.tolist())}
  order = [place[video] for video in one.ids.tolist()]
  if (other.labels[order] != one.labels).any():
    raise UserError('the two evaluations have other labels for the same videos')
  return Predictions(other.ids[order], other.labels[order], other.logits[order], other.errors[order], other.average)
