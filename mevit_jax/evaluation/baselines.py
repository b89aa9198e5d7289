"""Baselines of a small dataset: the majority class, and a linear classifier on downsampled frames.

They take seconds, and a model that does not beat them has learned less than single pixels say. The linear classifier is
ridge regression onto one-hot labels, on frames of 8x8 pixels and the absolute differences of consecutive ones. Its
regularization is chosen by the exact leave-one-out accuracy on the training videos.
"""

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mevit_jax.config.data import ClipConfig
from mevit_jax.data.threads import map_in_threads
from mevit_jax.datasets.reader import Split, open_split
from mevit_jax.errors import UserError
from mevit_jax.evaluation.metrics import wilson_interval
from mevit_jax.files import write_json
from mevit_jax.parallel.distributed import is_main_process
from mevit_jax.progress import Progress
from mevit_jax.video.clips import crop_resize, view_times
from mevit_jax.video.container import VideoError
from mevit_jax.video.decode import decode

MAX_VIDEOS = 3000  # of each split of a small dataset; the fit takes time in proportion to their number cubed
_CLIP = ClipConfig(frames=8, size=(8, 8), sampling='uniform', short_side=(8, 8))
_STRENGTHS = np.logspace(-5, 2, 22)  # regularization, relative to the mean eigenvalue
_VERSION = 1  # of the cached numbers

_log = logging.getLogger(__name__)


class LinearClassifier(NamedTuple):
  """Ridge regression onto one-hot labels in dual form, with an intercept.

  Attributes:
    features: centered training features, `n d`.
    mean: their mean, `d`.
    coefficients: dual coefficients, `n c`.
    intercept: class frequencies, `c`.
    leave_one_out: accuracy on each training video by the classifier fitted to all others.
  """

  features: np.ndarray
  mean: np.ndarray
  coefficients: np.ndarray
  intercept: np.ndarray
  leave_one_out: float

  def predict(self, features: np.ndarray) -> np.ndarray:
    """Returns the class ids, `n`, of features `n d`."""
    scores = (features - self.mean) @ (self.features.T @ self.coefficients) + self.intercept  # n c
    return scores.argmax(axis=1)


def fit_linear(features: np.ndarray, labels: np.ndarray, classes: int) -> LinearClassifier:
  """Fits a linear classifier to features `n d` and class ids `n`."""
  mean, targets = features.mean(axis=0), np.eye(classes)[labels]  # d, n c
  centered, intercept = features - mean, targets.mean(axis=0)
  values, vectors = np.linalg.eigh(centered @ centered.T)
  values = np.maximum(values, 0)
  projected = vectors.T @ (targets - intercept)  # n c
  best: tuple[float, float, np.ndarray] | None = None
  for strength in _STRENGTHS * max(values.mean(), 1e-12):
    shrinkage = values / (values + strength)
    leverage = (vectors**2 @ shrinkage) + 1 / len(labels)  # diagonal of the hat matrix
    residuals = targets - intercept - vectors @ (shrinkage[:, None] * projected)  # n c
    held_out = targets - residuals / np.maximum(1 - leverage, 1e-9)[:, None]  # predictions without the video itself
    accuracy = float((held_out.argmax(axis=1) == labels).mean())
    if best is None or accuracy >= best[0]:  # of equals the strongest regularization
      best = accuracy, float(strength), held_out
  assert best is not None
  accuracy, strength, _ = best
  coefficients = vectors @ (projected / (values + strength)[:, None])
  return LinearClassifier(centered, mean, coefficients, intercept, accuracy)


def video_features(frames: np.ndarray) -> np.ndarray:
  """Returns the features of frames, uint8 `t h w 3`: pixels, then absolute differences of consecutive frames."""
  pixels = frames.astype(np.float32) / 255
  return np.concatenate([pixels.ravel(), 2 * np.abs(np.diff(pixels, axis=0)).ravel()])


def measure_baselines(
  split: Split, data_dir: str | Path, train_split: str, check: Callable[[], None] = lambda: None
) -> dict[str, Any] | None:
  """Returns the accuracy of the baselines on a split, from the cache beside the dataset if they were measured before.

  Args:
    split: split to evaluate.
    data_dir: folder of the dataset.
    train_split: split to fit.
    check: callback after every video, which may raise.

  Returns:
    `majority` and `linear`, each with `top1`, `interval` (95 %, Wilson) and details; None for a dataset that is not
    small, has no such training split or labels, or is evaluated on that split itself.
  """
  counts = split.videos.get(train_split, 0), len(split)
  if split.name == train_split or not all(0 < count <= MAX_VIDEOS for count in counts):
    return None
  if not (split.labels >= 0).any():
    return None
  path = split.directory / f'baselines-{train_split}-{split.name}.json'
  key = {'version': _VERSION, 'fingerprint': split.fingerprint, 'train_split': train_split}
  cached = _read_cache(path)
  if cached.get('key') == key:
    return cached['baselines']
  train = open_split(data_dir, split.dataset, train_split)
  baselines = _measure(train, split, check)
  if baselines:
    try:
      write_json(path, {'key': key, 'baselines': baselines})
    except UserError as error:  # such as a dataset on a read-only disk
      _log.warning('the baselines are not cached: %s', error)
  return baselines


def _measure(train: Split, split: Split, check: Callable[[], None]) -> dict[str, Any] | None:
  """Fits the baselines to one split and evaluates them on the other; None if either has no readable labeled video."""
  progress = Progress('linear baseline, videos')
  total = len(train) + len(split)

  def report(done: int) -> None:
    check()
    if is_main_process():
      progress(done, total)

  features, labels = _read_features(train, report)
  others, other_labels = _read_features(split, lambda done: report(len(train) + done))
  if not len(labels) or not len(other_labels):
    return None
  linear = fit_linear(features, labels, len(split.class_names))
  majority = int(np.bincount(labels).argmax())
  return {
    'majority': {**_accuracy(other_labels == majority), 'class': split.class_names[majority]},
    'linear': {
      **_accuracy(linear.predict(others) == other_labels),
      'leave_one_out': linear.leave_one_out,
      'features': f'{_CLIP.frames} frames of {_CLIP.size[0]}x{_CLIP.size[1]} pixels and their absolute differences',
    },
  }


def _accuracy(correct: np.ndarray) -> dict[str, Any]:
  return {'top1': float(correct.mean()), 'interval': wilson_interval(int(correct.sum()), len(correct))}


def _read_features(split: Split, report: Callable[[int], Any]) -> tuple[np.ndarray, np.ndarray]:
  """Returns features `n d` and labels `n` of the labeled readable videos, in order; `report` receives their count."""
  labels, rows = split.labels, dict[int, np.ndarray]()
  read = functools.partial(_read_video, split)
  threads = len(os.sched_getaffinity(0))
  for done, (i, features) in enumerate(map_in_threads(read, range(len(split)), threads, 4 * threads), 1):
    report(done)
    if features is not None and labels[i] >= 0:
      rows[i] = features
  order = sorted(rows)
  return np.stack([rows[i] for i in order]) if order else np.zeros((0, 1)), labels[order]


def _read_video(split: Split, index: int) -> list[tuple[int, np.ndarray | None]]:
  """Returns the index and features of a video; None if it is unreadable."""
  example: Mapping[str, Any] = split.source[index]
  try:
    frames = decode(example['video'], view_times(_CLIP, example['duration'], example['num_frames'])[0])
  except VideoError:
    return [(index, None)]
  small = [crop_resize(frame, (0, 0, frame.shape[1], frame.shape[0]), _CLIP.size) for frame in frames]
  return [(index, video_features(np.stack(small)))]  # t h w 3


def _read_cache(path: Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}
