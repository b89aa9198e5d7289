"""Mixup and CutMix: pixels and targets are mixed in the same proportion, in pairs of neighbors."""

import jax
import numpy as np
import pytest

from mevit_jax.augment.mixing import mix

pytestmark = pytest.mark.usefixtures('compile_once')

ROWS, SIZE, CLASSES = 400, 16, 5
ONE, OTHER = 10.0, 210.0  # the pixels of even and of odd examples
PIXELS = np.float32([ONE, OTHER])[np.arange(ROWS) % 2, None, None, None, None]
VIDEO = np.broadcast_to(PIXELS, (ROWS, 2, SIZE, 20, 3))
LABELS = np.arange(ROWS) % CLASSES
KEYS = jax.random.split(jax.random.key(0), ROWS)
mix_once = jax.jit(mix, static_argnames=('mixup', 'cutmix', 'probability', 'cutmix_share'))


def mixed(mixup, cutmix, probability=1.0, cutmix_share=0.5, rows=slice(None)):
  """Returns the example's own share of each pixel, `b h w`, and the mixed targets."""
  targets = np.eye(CLASSES, dtype=np.float32)[LABELS[rows]]
  video, targets = mix_once(VIDEO[rows], targets, KEYS[rows], mixup, cutmix, probability, cutmix_share)
  own = (np.asarray(video, np.float64) - ONE) / (OTHER - ONE)  # of the odd examples
  own[::2] = 1 - own[::2]
  assert (own == own[:, :1, :, :, :1]).all()  # the same in all frames and channels
  return own[:, 0, :, :, 0], np.asarray(targets)


def check_targets(own, targets):
  """Checks that targets are mixed by the share of the pixels, which is the same for both examples of a pair."""
  share = own.mean((1, 2))
  np.testing.assert_allclose(share[::2], share[1::2], atol=1e-6)
  neighbours = LABELS.reshape(-1, 2)[:, ::-1].ravel()
  expected = share[:, None] * np.eye(CLASSES)[LABELS] + (1 - share)[:, None] * np.eye(CLASSES)[neighbours]
  np.testing.assert_allclose(targets, expected, atol=1e-6)
  return share


def test_mixup_blends_pairs_with_a_beta_distributed_weight():
  own, targets = mixed(mixup=0.3, cutmix=0.0)
  np.testing.assert_allclose(own, np.broadcast_to(own[:, :1, :1], own.shape), atol=1e-6)
  share = check_targets(own, targets)
  assert share.min() > -1e-6
  assert abs(share.mean() - 0.5) < 0.05
  np.testing.assert_allclose(share.std(), 0.5 / np.sqrt(2 * 0.3 + 1), rtol=0.1)  # CDF of Beta(0.3, 0.3)


def test_cutmix_exchanges_one_box_in_all_frames():
  own, targets = mixed(mixup=0.0, cutmix=1.0)
  assert ((own == 0) | (own == 1)).all()
  check_targets(own, targets)
  box = own == 0
  np.testing.assert_array_equal(box[::2], box[1::2])
  heights, widths = box.any(2).sum(1), box.any(1).sum(1)
  np.testing.assert_array_equal(box.sum((1, 2)), heights * widths)  # a box
  assert box.any(0).all()  # at any position
  assert box.mean(0).max() < 0.75
  inside = ~(box[:, 0].any(1) | box[:, -1].any(1) | box[:, :, 0].any(1) | box[:, :, -1].any(1))
  assert inside.sum() > 50
  # Unclipped boxes have the aspect ratio of the frame.
  assert (np.abs(heights / SIZE - widths / 20)[inside] <= 2 / SIZE).all()


def test_each_pair_gets_mixup_cutmix_or_nothing():
  own, targets = mixed(mixup=0.8, cutmix=1.0, probability=0.6, cutmix_share=0.3)
  check_targets(own, targets)
  alone = (own == 1).all((1, 2))
  cut = ((own == 0) | (own == 1)).all((1, 2)) & ~alone
  assert 0.3 < alone.mean() < 0.5
  assert 0.2 < cut.mean() / (1 - alone.mean()) < 0.4
  np.testing.assert_array_equal(targets[alone], np.eye(CLASSES)[LABELS[alone]])


def test_a_pair_does_not_depend_on_the_rest_of_the_batch():
  how = {'mixup': 0.8, 'cutmix': 1.0, 'probability': 0.6, 'cutmix_share': 0.3}
  rows = np.random.default_rng(0).permutation(ROWS // 2)[:, None] * 2 + [0, 1]
  for moved, whole in zip(mixed(**how, rows=rows.ravel()), mixed(**how), strict=True):
    np.testing.assert_array_equal(moved, whole[rows.ravel()])
