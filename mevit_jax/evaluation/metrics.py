"""Statistics of predictions: accuracy and its intervals, calibration, confusion."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

_Z = 1.959964  # of a normal distribution's 95 %
_RESAMPLES = 1000
_TIE = 1e-5  # of the larger probability
BINS = 15


def ranked(probabilities: np.ndarray, count: int) -> np.ndarray:
  """The `count` likeliest classes, `n count`, of probabilities `n c`; ties go to the lowest class.

  Nearer to each other than 1e-5 is a tie: classes of the same weights (no video of theirs was trained on, say) must be
  one, and float32 rounds them apart, or not, by the size of the batch.
  """
  left, rows = probabilities.copy(), np.arange(len(probabilities))
  order = np.zeros((len(left), min(count, left.shape[1])), int)
  for place in range(order.shape[1]):  # for a few classes of many, a tenth of a sort's time
    tied = left >= (1 - _TIE) * left.max(axis=1, keepdims=True)
    order[:, place] = tied.argmax(axis=1)  # the first one
    left[rows, order[:, place]] = -1
  return order


def hits(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
  """Whether each label is the likeliest class ('top1'), or among the five likeliest ('top5'): bool `n`."""
  found = ranked(probabilities, 5) == labels[:, None]
  return {'top1': found[:, 0], 'top5': found.any(axis=1)}


def wilson(correct: int, total: int) -> tuple[float, float]:
  """Wilson's 95 % interval of a proportion (Wilson 1927); (0, 1) where nothing was counted."""
  if not total:
    return 0.0, 1.0
  share, spread = correct / total, _Z**2 / total
  centre = share + spread / 2
  half = math.sqrt(spread * (share * (1 - share) + spread / 4))
  return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def bootstrap(statistic: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
  """The 95 % percentile interval of a statistic over 1,000 resamples of `count` videos; the same at every call.

  Args:
    statistic: of how often each video was drawn, int `n`.
    count: of videos, at least 1.
  """
  rng = np.random.default_rng(0)
  draws = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(_RESAMPLES))
  low, high = np.percentile([statistic(times) for times in draws], [2.5, 97.5])
  return float(low), float(high)


def mean_class_accuracy(labels: np.ndarray, right: np.ndarray, times: np.ndarray | None = None) -> float:
  """The mean over the classes of what is right of them; a class without videos does not count.

  Args:
    labels: `n`, from 0 on.
    right: `n`, bool.
    times: `n`: how often each video counts; once by default.
  """
  times = np.ones(len(labels)) if times is None else times
  totals = np.bincount(labels, times)
  there = totals > 0
  return float((np.bincount(labels, times * right)[there] / totals[there]).mean()) if there.any() else 0.0


@dataclasses.dataclass(frozen=True)
class Calibration:
  """How often a model is right where it is this sure, in 15 bins of equal width.

  Attributes:
    counts: `bins`: how many predictions have a confidence in (i / 15, (i + 1) / 15].
    confidence: `bins`: their mean confidence; 0 in an empty bin.
    accuracy: `bins`: the share of them that is right; 0 in an empty bin.
  """

  counts: np.ndarray
  confidence: np.ndarray
  accuracy: np.ndarray

  @property
  def error(self) -> float:
    """The expected calibration error (Guo et al. 2017): the mean distance of accuracy from confidence."""
    return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / max(1, self.counts.sum()))


def calibrate(confidence: np.ndarray, right: np.ndarray) -> Calibration:
  """The calibration of predictions: the confidence in each, in 0..1, and whether it is right."""
  index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
  counts = np.bincount(index, minlength=BINS)
  each = np.maximum(counts, 1)
  return Calibration(counts, np.bincount(index, confidence, BINS) / each, np.bincount(index, right, BINS) / each)


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
  """How many videos of each class are taken for each class, int `c c`: label, then prediction."""
  return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)  # c c


def similar_together(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
  """An order of the classes that has those next to each other that are taken for each other, int `c`.

  The leaves of an average-linkage tree; two classes are the nearer the more probability each gets in the other's
  videos.
  """
  from scipy.cluster import hierarchy  # takes a while: only where a picture is drawn
  from scipy.spatial.distance import squareform

  classes = probabilities.shape[1]
  if classes < 3:
    return np.arange(classes)
  sums = np.zeros((classes, classes))
  np.add.at(sums, labels, probabilities)
  means = sums / np.maximum(np.bincount(labels, minlength=classes), 1)[:, None]
  near = means + means.T
  np.fill_diagonal(near, 0)
  far = 1 - near / max(near.max(), 1e-12)
  np.fill_diagonal(far, 0)
  return hierarchy.leaves_list(hierarchy.linkage(squareform(far, checks=False), 'average', optimal_ordering=True))
