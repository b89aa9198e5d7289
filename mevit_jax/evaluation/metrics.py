"""Classification metrics: accuracy, confidence intervals, calibration, confusion matrix."""

import dataclasses
from collections.abc import Callable

import numpy as np

_RESAMPLES = 1000
_TIE_TOLERANCE = 1e-5  # relative to the larger probability
BINS = 15


def ranked(probabilities: np.ndarray, count: int) -> np.ndarray:
  """Returns the `count` most probable classes, `n count`, of probabilities `n c`; ties go to the lowest class id.

  Probabilities within a relative 1e-5 are ties: classes with equal weights (such as classes without training videos)
  have equal probabilities, but float32 rounding separates them or not depending on the batch size.
  """
  remaining, rows = probabilities.copy(), np.arange(len(probabilities))
  order = np.zeros((len(remaining), min(count, remaining.shape[1])), int)
  for rank in range(order.shape[1]):  # for the top 5 of many classes, ten times as fast as sorting
    tied = remaining >= (1 - _TIE_TOLERANCE) * remaining.max(axis=1, keepdims=True)
    order[:, rank] = tied.argmax(axis=1)  # lowest class id
    remaining[rows, order[:, rank]] = -1
  return order


def hits(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
  """Marks the videos whose label is the top-1 prediction ('top1') or among the top 5 ('top5'): bool `n`."""
  correct = ranked(probabilities, 5) == labels[:, None]
  return {'top1': correct[:, 0], 'top5': correct.any(axis=1)}


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
  """Returns Wilson's 95 % confidence interval of a proportion (Wilson 1927); (0, 1) if `total` is 0."""
  from scipy import stats  # slow to import

  if not total:
    return 0.0, 1.0
  interval = stats.binomtest(correct, total).proportion_ci(0.95, method='wilson')
  return float(interval.low), float(interval.high)


def bootstrap_interval(statistic: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
  """Returns the 95 % percentile bootstrap interval of a statistic, over 1,000 resamples from a fixed seed.

  Args:
    statistic: function of the number of times that each video was drawn, int `n`.
    count: number of videos, at least 1.
  """
  rng = np.random.default_rng(0)
  draws = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(_RESAMPLES))
  low, high = np.percentile([statistic(counts) for counts in draws], [2.5, 97.5])
  return float(low), float(high)


def mean_class_accuracy(labels: np.ndarray, correct: np.ndarray, counts: np.ndarray | None = None) -> float:
  """Returns top-1 accuracy averaged over classes; classes without videos are left out.

  Args:
    labels: class ids, int `n`.
    correct: correct predictions, bool `n`.
    counts: number of times that each video counts, `n`; None counts each once.
  """
  counts = np.ones(len(labels)) if counts is None else counts
  totals = np.bincount(labels, counts)
  present = totals > 0
  return float((np.bincount(labels, counts * correct)[present] / totals[present]).mean()) if present.any() else 0.0


def mean_class_interval(labels: np.ndarray, correct: np.ndarray) -> tuple[float, float]:
  """Returns the 95 % interval of `mean_class_accuracy`; (0, 1) without videos.

  The Wilson intervals of the classes' accuracies are combined by MOVER (Zou and Donner 2008, Statistics in Medicine
  27), so that the interval has a width also where every class is entirely right or wrong, unlike the bootstrap's.
  """
  totals = np.bincount(labels)
  present = np.flatnonzero(totals)
  if not len(present):
    return 0.0, 1.0
  rights = np.bincount(labels, correct).astype(int)
  low, high = np.array([wilson_interval(int(rights[i]), int(totals[i])) for i in present]).T
  accuracies = rights[present] / totals[present]
  below, above = (float(np.sqrt(np.square(x - accuracies).sum())) / len(present) for x in (low, high))
  return float(accuracies.mean()) - below, float(accuracies.mean()) + above


def cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean cross-entropy of probabilities `n c` (at least 1e-12), in nats; 0 without videos."""
  if not len(labels):
    return 0.0
  return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12)).mean())


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Accuracy by confidence, in 15 bins of equal width.

  Attributes:
    counts: `bins`: number of predictions with a confidence in (i / 15, (i + 1) / 15].
    confidence: `bins`: their mean confidence; 0 in an empty bin.
    accuracy: `bins`: their accuracy; 0 in an empty bin.
  """

  counts: np.ndarray
  confidence: np.ndarray
  accuracy: np.ndarray

  @property
  def error(self) -> float:
    """Expected calibration error (Guo et al. 2017): mean absolute difference of accuracy and confidence."""
    return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / max(1, self.counts.sum()))


def calibrate(confidence: np.ndarray, correct: np.ndarray) -> Calibration:
  """Bins predictions by confidence.

  Args:
    confidence: probability of the predicted class, in 0..1, `n`.
    correct: correct predictions, bool `n`.
  """
  index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
  counts = np.bincount(index, minlength=BINS)
  totals = np.maximum(counts, 1)
  return Calibration(counts, np.bincount(index, confidence, BINS) / totals, np.bincount(index, correct, BINS) / totals)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
  """Counts videos by label (row) and predicted class (column), int `c c`."""
  return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)  # c c


def cluster_classes(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
  """Orders the classes such that those confused with each other are neighbors, int `c`.

  The order is that of the leaves of an average-linkage tree; the distance of two classes falls with the probability
  that each receives in videos of the other.
  """
  from scipy.cluster import hierarchy  # slow to import
  from scipy.spatial.distance import squareform

  classes = probabilities.shape[1]
  if classes < 3:
    return np.arange(classes)
  sums = np.zeros((classes, classes))
  np.add.at(sums, labels, probabilities)
  means = sums / np.maximum(np.bincount(labels, minlength=classes), 1)[:, None]
  similarity = means + means.T
  np.fill_diagonal(similarity, 0)
  distance = 1 - similarity / max(similarity.max(), 1e-12)
  np.fill_diagonal(distance, 0)
  return hierarchy.leaves_list(hierarchy.linkage(squareform(distance, checks=False), 'average', optimal_ordering=True))
