"""Metrics against scipy, their definitions and their properties."""

import numpy as np
import pytest
from scipy import stats

from mevit_jax.evaluation import metrics


@pytest.mark.parametrize(('correct', 'total'), [(0, 7), (7, 7), (3, 10), (16000, 20000), (1, 1)])
def test_wilson_interval_follows_the_formula(correct, total):
  z, p = stats.norm.ppf(0.975), correct / total
  center = p + z**2 / (2 * total)
  half = z * np.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
  expected = (center - half) / (1 + z**2 / total), (center + half) / (1 + z**2 / total)
  np.testing.assert_allclose(metrics.wilson_interval(correct, total), expected, rtol=1e-6, atol=1e-12)


def test_wilson_interval_of_no_videos():
  assert metrics.wilson_interval(0, 0) == (0.0, 1.0)


def test_bootstrap_interval_of_a_mean_has_the_theoretical_width():
  values = np.random.default_rng(1).random(400)
  low, high = metrics.bootstrap_interval(lambda times: np.average(values, weights=times), 400)
  error = values.std() / 20
  np.testing.assert_allclose((low, high), values.mean() + np.array([-1.96, 1.96]) * error, atol=0.25 * error)
  assert metrics.bootstrap_interval(lambda times: np.average(values, weights=times), 400) == (low, high)


def test_mean_class_accuracy():
  labels = np.array([0, 0, 0, 0, 2, 2])  # no video of class 1
  right = np.array([True, False, False, False, True, True])
  assert metrics.mean_class_accuracy(labels, right) == (1 / 4 + 1) / 2
  assert metrics.mean_class_accuracy(labels, right, np.array([1, 1, 0, 0, 0, 0])) == 1 / 2
  assert metrics.mean_class_accuracy(labels[:0], right[:0]) == 0


def test_the_interval_of_one_class_is_wilsons():
  right = np.arange(20) < 13
  found = metrics.mean_class_interval(np.zeros(20, int), right)
  np.testing.assert_allclose(found, metrics.wilson_interval(13, 20), rtol=1e-12)


def test_a_constant_predictor_has_an_interval_with_a_width():
  labels = np.repeat(np.arange(6), 20)
  low, high = metrics.mean_class_interval(labels, labels == 2)
  assert 0.1 < low < 1 / 6 - 0.005
  assert 1 / 6 + 0.02 < high < 0.3
  assert metrics.mean_class_interval(labels[:0], labels[:0] == 0) == (0.0, 1.0)


def test_the_interval_of_the_mean_class_accuracy_covers_it():
  """At least 92 of 100 samples of unequal classes, and no wider than twice what theory says."""
  rng = np.random.default_rng(0)
  labels, true = np.repeat(np.arange(4), (15, 30, 60, 120)), np.array([0.9, 0.5, 0.7, 0.2])
  width = 2 * 1.96 * np.sqrt((true * (1 - true) / np.bincount(labels)).sum()) / 4
  inside = 0
  for _ in range(100):
    low, high = metrics.mean_class_interval(labels, rng.random(225) < true[labels])
    inside += low <= true.mean() <= high
    assert high - low < 2 * width
  assert inside >= 92


def test_cross_entropy():
  probabilities = np.array([[0.25, 0.75], [1.0, 0.0]])
  assert metrics.cross_entropy(probabilities, np.array([0, 0])) == pytest.approx(np.log(4) / 2)
  assert metrics.cross_entropy(probabilities, np.array([1, 1])) < 20  # finite
  assert metrics.cross_entropy(probabilities[:0], np.array([], int)) == 0


def test_calibration_error_follows_guo_et_al():
  rng = np.random.default_rng(0)
  confidence = np.concatenate([rng.random(60), np.arange(1, 16) / 15])
  right = rng.random(75) < 0.5  # some bins overconfident, some underconfident
  error = 0.0
  for m in range(1, 16):  # bin m is ((m - 1) / 15, m / 15]
    inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
    error += inside.sum() / 75 * abs(right[inside].mean() - confidence[inside].mean())
  found = metrics.calibrate(confidence, right)
  assert found.error == pytest.approx(error, rel=1e-12)
  assert found.counts.sum() == 75


def test_calibration_error_of_no_videos():
  assert metrics.calibrate(np.zeros(0), np.zeros(0, bool)).error == 0


def test_probabilities_that_differ_by_rounding_are_ties():
  even = np.array([[0.2, 0.3, 0.3, 0.2]])
  for broken in (even, even * [[1 - 2e-6, 1, 1 + 2e-6, 1]], even * [[1, 1 - 2e-6, 1, 1 + 2e-6]]):
    assert metrics.ranked(broken, 4).tolist() == [[1, 2, 0, 3]]
  assert metrics.ranked(even * [[1, 1 - 2e-5, 1, 1]], 2).tolist() == [[2, 1]]


def test_confusion_matrix_counts_label_and_prediction():
  found = metrics.confusion_matrix(np.array([0, 0, 2, 1]), np.array([1, 1, 2, 0]), 3)
  assert found.tolist() == [[0, 2, 0], [1, 0, 0], [0, 0, 1]]


def test_confused_classes_are_adjacent():
  """Three shuffled groups of four: the order makes each group contiguous."""
  groups = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 4))
  labels = np.repeat(np.arange(12), 5)
  scores = np.exp(3.0 * (groups[labels][:, None] == groups[None]) + np.random.default_rng(1).random((60, 12)))
  order = metrics.cluster_classes(labels, scores / scores.sum(1, keepdims=True))
  assert sorted(order) == list(range(12))
  assert np.count_nonzero(np.diff(groups[order])) == 2


@pytest.mark.parametrize('classes', [1, 2, 3])
def test_order_of_one_and_two_classes(classes):
  found = metrics.cluster_classes(np.zeros(4, int), np.full((4, classes), 1 / classes))
  assert sorted(found) == list(range(classes))
