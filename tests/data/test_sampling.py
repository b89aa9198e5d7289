"""Sampling order: frequency of classes and videos, determined by seed and position only."""

import numpy as np
import pytest

from mevit_jax.data import sampling
from mevit_jax.errors import UserError

COUNTS = (50, 0, 7, 3)  # videos of each class
LABELS = np.random.default_rng(0).permutation(np.repeat(range(4), COUNTS))


def epochs(count, balance, seed=3):
  stream = sampling.draws(60, seed, balance, LABELS)
  return np.array([stream[i] for i in range(60 * count)]).reshape(count, 60)  # epochs draws


@pytest.mark.parametrize(('balance', 'expected'), [(0.0, [50, 0, 7, 3]), (0.5, [37, 0, 14, 9]), (1.0, [20, 0, 20, 20])])
def test_every_epoch_has_the_same_class_counts(balance, expected):
  assert sampling.quotas(LABELS, balance).tolist() == expected
  for epoch in epochs(4, balance):
    assert np.bincount(LABELS[epoch], minlength=4).tolist() == expected


@pytest.mark.parametrize('balance', np.linspace(0, 1, 6))
@pytest.mark.parametrize('classes', [1, 2, 11])
def test_class_counts_are_within_one_of_their_exact_share(balance, classes):
  counts = np.random.default_rng(classes).integers(1, 90, classes)
  labels = np.repeat(range(classes), counts)
  shares = counts ** (1 - balance) / (counts ** (1 - balance)).sum() * len(labels)
  quotas = sampling.quotas(labels, balance)
  assert quotas.sum() == len(labels)
  assert np.abs(quotas - shares).max() < 1
  assert quotas.min() >= 1


@pytest.mark.parametrize('balance', [0.0, 0.4, 1.0])
def test_all_videos_of_a_class_are_drawn_before_one_repeats(balance):
  drawn = epochs(9, balance)
  for last in range(1, 10):
    times = np.bincount(drawn[:last].ravel(), minlength=60)
    for videos in (np.flatnonzero(label == LABELS) for label in (0, 2, 3)):
      assert np.ptp(times[videos]) <= 1


def test_epochs_cycles_and_seeds_have_different_orders():
  """Compares the orders of epochs, of cycles through a class, and of seeds."""
  drawn = epochs(4, 1.0)
  assert len({tuple(LABELS[epoch]) for epoch in drawn}) == 4
  small = np.array([i for i in drawn.ravel() if LABELS[i] == 3])
  assert len({tuple(turn) for turn in small[: len(small) // 3 * 3].reshape(-1, 3)}) > 1
  assert not np.array_equal(drawn, epochs(4, 1.0, seed=4))
  np.testing.assert_array_equal(drawn, epochs(4, 1.0))


def test_description_lists_draws_per_class():
  assert sampling.describe(LABELS, ('walk', 'none', 'run', 'sit'), 0.5) == (
    "class balance 0.5: rarest class 'sit': 3 videos, 9 draws per epoch; "
    "most common class 'walk': 50 videos, 37 draws per epoch"
  )


@pytest.mark.parametrize('balance', [-0.1, 1.1])
def test_invalid_class_balance_is_refused(balance):
  with pytest.raises(UserError, match=r'data\.class_balance must be in \[0, 1\], not'):
    sampling.draws(60, 0, balance, LABELS)
