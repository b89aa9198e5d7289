"""Sampling order of the training videos: every video once per epoch, or rare classes more often.

An epoch has as many draws as the split has videos. Sampling is stateless: draw `i` depends only on `i` and the seed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from mevit_jax.errors import UserError


class Sampling(NamedTuple):
  """Order of the videos in training batches, and number of examples per video.

  Attributes:
    seed: seed of the order and of the random crops.
    repeats: examples per sampled video (repeated augmentation).
    balance: class balance in [0, 1], see `draws`.
    labels: label of every video, int `n`; required if `balance` is not 0.
  """

  seed: int = 0
  repeats: int = 1
  balance: float = 0.0
  labels: np.ndarray | None = None


def draws(length: int, seed: int, balance: float = 0.0, labels: np.ndarray | None = None) -> grain.MapDataset:
  """Returns the endless stream of dataset indices; each epoch has a different order.

  Args:
    length: number of videos in the split.
    seed: seed of the order.
    balance: 0 draws every video once per epoch; 1 draws every class equally often; in between, a class is drawn in
      proportion to its number of videos to the power of 1 - balance. A class repeats no video before all are drawn.
    labels: label of every video, `length`; required if `balance` is not 0.
  """
  stream = grain.MapDataset.range(length).seed(seed).shuffle().repeat()
  if balance == 0:
    return stream
  if labels is None:
    raise ValueError('labels are required if balance is not 0')
  return stream.map_with_index(_BalancedSampler(labels, balance, seed))


def quotas(labels: np.ndarray, balance: float) -> np.ndarray:
  """Number of draws of each class per epoch, int `classes`, summing to len(labels); rounded by largest remainder."""
  if not 0 <= balance <= 1:
    raise UserError(f'data.class_balance must be in [0, 1], not {balance}')
  counts = np.bincount(labels)
  weights = np.where(counts > 0, counts ** (1.0 - balance), 0)
  shares = weights / weights.sum() * len(labels)
  rounded = np.floor(shares + 1e-9).astype(int)
  # Rounded so that the order does not depend on floating-point noise; ties go to the first class.
  by_remainder = np.argsort(-np.round(shares - rounded, 9), kind='stable')
  rounded[by_remainder[: len(labels) - rounded.sum()]] += 1
  return rounded


def describe(labels: np.ndarray, class_names: Sequence[str], balance: float) -> str:
  """Describes in one line how balancing changes the number of draws of the rarest and the most common class."""
  counts, drawn = np.bincount(labels, minlength=len(class_names)), quotas(labels, balance)
  present = np.flatnonzero(counts)
  parts = [
    f'{name} class {class_names[label]!r}: {counts[label]:,} videos, {drawn[label]:,} draws per epoch'
    for name, label in (
      ('rarest', present[np.argmin(counts[present])]),
      ('most common', present[np.argmax(counts[present])]),
    )
  ]
  return f'class balance {balance:g}: {"; ".join(parts)}'


class _BalancedSampler:
  """Maps the shuffled slots of an epoch to videos; each class owns as many slots as its quota."""

  def __init__(self, labels: np.ndarray, balance: float, seed: int):
    self._seed = seed
    self._quotas = quotas(labels, balance)
    self._counts = np.bincount(labels)
    self._ends = np.cumsum(self._quotas)
    self._by_class = np.argsort(labels, kind='stable')  # videos of class 0, then of class 1, ...
    self._starts = np.cumsum(self._counts) - self._counts

  def __call__(self, position: int, slot: int) -> int:
    """Returns the video of the draw at `position` in the stream, which has slot `slot` of its epoch."""
    label = int(np.searchsorted(self._ends, slot, side='right'))
    quota, count = int(self._quotas[label]), int(self._counts[label])
    epoch, rank = position // len(self._by_class), slot - int(self._ends[label]) + quota
    cycle, offset = divmod(epoch * quota + rank, count)  # each cycle is a permutation of the class's videos
    order = np.random.default_rng((self._seed, label, cycle)).permutation(count)
    return int(self._by_class[self._starts[label] + order[offset]])
