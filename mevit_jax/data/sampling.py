"""Which video each draw of the endless training stream is: every one once an epoch, or rare classes more often.

An epoch has as many draws as the split has videos. Nothing is remembered from draw to draw: what draw `i` is follows
from `i` and the seed alone.
"""

from collections.abc import Sequence

import grain
import numpy as np

from mevit_jax.errors import UserError


def draws(length: int, seed: int, balance: float = 0.0, labels: np.ndarray | None = None) -> grain.MapDataset:
  """The endless stream of dataset indices; each epoch is in another order.

  Args:
    length: videos of the split.
    seed: of the order.
    balance: 0 draws every video once an epoch; 1 draws every class equally often; between, as often as its number of
      videos to the power of 1 - balance. A class's videos are all drawn before one comes again.
    labels: `length`, of the videos; needed where `balance` is not 0.
  """
  stream = grain.MapDataset.range(length).seed(seed).shuffle().repeat()
  if balance == 0:
    return stream
  if labels is None:
    raise ValueError('balance needs the labels')
  return stream.map_with_index(_Balanced(labels, balance, seed))


def quotas(labels: np.ndarray, balance: float) -> np.ndarray:
  """How often an epoch draws each class, `classes`: whole numbers with the sum len(labels), by largest remainder."""
  if not 0 <= balance <= 1:
    raise UserError(f'data.class_balance must be in [0, 1], not {balance}')
  counts = np.bincount(labels)
  weights = np.where(counts > 0, counts ** (1.0 - balance), 0)
  shares = weights / weights.sum() * len(labels)
  whole = np.floor(shares + 1e-9).astype(int)
  # Rounded, so that a machine's last digit does not decide; ties go to the first class.
  first = np.argsort(-np.round(shares - whole, 9), kind='stable')
  whole[first[: len(labels) - whole.sum()]] += 1
  return whole


def describe(labels: np.ndarray, class_names: Sequence[str], balance: float) -> str:
  """One line: what balance does to the rarest and to the commonest class."""
  counts, drawn = np.bincount(labels, minlength=len(class_names)), quotas(labels, balance)
  there = np.flatnonzero(counts)
  parts = [
    f'{what} class {class_names[label]!r}: {counts[label]:,} videos, {drawn[label]:,} draws an epoch'
    for what, label in (
      ('rarest', there[np.argmin(counts[there])]),
      ('commonest', there[np.argmax(counts[there])]),
    )
  ]
  return f'balance {balance:g}: {"; ".join(parts)}'


class _Balanced:
  """Turns the shuffled slots of an epoch into videos: slots belong to classes, as many as the class's quota."""

  def __init__(self, labels: np.ndarray, balance: float, seed: int):
    self._seed = seed
    self._quotas = quotas(labels, balance)
    self._counts = np.bincount(labels)
    self._ends = np.cumsum(self._quotas)
    self._by_class = np.argsort(labels, kind='stable')  # the videos of class 0, of class 1, ...
    self._starts = np.cumsum(self._counts) - self._counts

  def __call__(self, position: int, slot: int) -> int:
    """The video of the draw at `position` in the stream, which has this slot of its epoch."""
    label = int(np.searchsorted(self._ends, slot, side='right'))
    quota, count = int(self._quotas[label]), int(self._counts[label])
    epoch, rank = position // len(self._by_class), slot - int(self._ends[label]) + quota
    turn, place = divmod(epoch * quota + rank, count)  # each turn is all of the class's videos, in another order
    order = np.random.default_rng((self._seed, label, turn)).permutation(count)
    return int(self._by_class[self._starts[label] + order[place]])
