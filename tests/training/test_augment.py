"""Augmentation: what a flip does to pixels and to labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.data.builders.moving_shapes import CLASS_NAMES
from mevit_jax.training.augment import AugmentConfig, augment, mirror_labels, normalise

FLIP = AugmentConfig(flip=True)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_normalise(dtype):
  video = np.random.default_rng(0).integers(0, 256, (2, 1, 4, 4, 3), np.uint8)
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  expected = (video / 255 - np.asarray(mean)) / np.asarray(std)
  output = normalise(jnp.asarray(video), mean, std, dtype)
  assert output.dtype == dtype
  np.testing.assert_allclose(np.float64(output), expected, rtol=2**-8 if dtype == jnp.bfloat16 else 0, atol=1e-6)


def mirrored(*names):
  """Each class's mirror image by name, None where there is none."""
  return {name: names[label] if label >= 0 else None for name, label in zip(names, mirror_labels(names), strict=True)}


def test_mirror_images_of_moving_shapes():
  assert mirrored(*CLASS_NAMES) == {
    'moves_left': 'moves_right',
    'moves_right': 'moves_left',
    'turns_clockwise': 'turns_anticlockwise',
    'turns_anticlockwise': 'turns_clockwise',
    **{name: name for name in ('moves_up', 'moves_down', 'grows', 'shrinks')},
  }


def test_mirror_images_of_something_something():
  assert mirrored(
    'Pulling something from left to right',
    'Pulling something from right to left',
    'Turning the camera left while filming something',
    'Turning the camera right while filming something',
    'Pushing something so that it slightly moves',
  ) == {
    'Pulling something from left to right': 'Pulling something from right to left',
    'Pulling something from right to left': 'Pulling something from left to right',
    'Turning the camera left while filming something': 'Turning the camera right while filming something',
    'Turning the camera right while filming something': 'Turning the camera left while filming something',
    'Pushing something so that it slightly moves': 'Pushing something so that it slightly moves',
  }


def test_a_direction_without_its_mirror_image_has_none():
  names = ('swipe left', 'turn clockwise', 'anticlockwise', 'go leftwards', 'turnRight', 'LEFT')
  assert mirrored(*names) == dict.fromkeys(names)


@pytest.mark.parametrize(
  ('one', 'other'),
  [
    ('Swipe Left', 'Swipe Right'),
    ('SWIPE_LEFT', 'SWIPE_RIGHT'),
    ('swipe-left-2', 'swipe-right-2'),
    ('swipeLeft', 'swipeRight'),
    ('LeftTurn', 'RightTurn'),
    ('go leftwards', 'go rightwards'),
    ('clockwise', 'counterclockwise'),
    ('Clockwise', 'Anticlockwise'),
  ],
)
def test_spellings(one, other):
  assert mirrored(one, other) == {one: other, other: one}


def test_two_directions_are_mirrored_together():
  names = [f'roll {side} {turn}' for side in ('left', 'right') for turn in ('clockwise', 'anticlockwise')]
  assert mirror_labels(names) == (3, 2, 1, 0)


def test_words_that_hold_a_direction_are_none():
  names = ('bright', 'uprightness', 'cleft', 'lefty', 'otherwise')
  assert mirrored(*names) == {name: name for name in names}


NAMES = ('swipe left', 'swipe right', 'jump', 'turn left')  # the last without a mirror image
MIRRORS = mirror_labels(NAMES)


def batch(size=64):
  video = np.random.default_rng(1).integers(0, 256, (size, 2, 4, 5, 3), np.uint8)
  return video, np.arange(size, dtype=np.int32) % len(NAMES), jax.random.split(jax.random.key(3), size)


def test_flips_swap_labels_and_whole_clips():
  video, labels, keys = batch()
  outputs, others = jax.tree.map(np.asarray, augment(video, labels, keys, FLIP, MIRRORS))
  mirror = video[:, :, :, ::-1]
  flipped = (outputs == mirror).all((1, 2, 3, 4))
  np.testing.assert_array_equal(outputs[~flipped], video[~flipped])
  np.testing.assert_array_equal(others, np.where(flipped, np.asarray(MIRRORS)[labels], labels))
  for label in (0, 1, 2):
    assert 2 <= flipped[labels == label].sum() <= 14  # of 16
  assert not flipped[labels == 3].any()


def test_without_flips_nothing_changes():
  video, labels, keys = batch(4)
  outputs, others = augment(video, labels, keys, AugmentConfig(), MIRRORS)
  np.testing.assert_array_equal(outputs, video)
  np.testing.assert_array_equal(others, labels)


def test_a_row_does_not_depend_on_the_others():
  video, labels, keys = batch(16)
  whole = augment(video, labels, keys, FLIP, MIRRORS)
  some = np.asarray([9, 2, 5])
  for part, one in zip(augment(video[some], labels[some], keys[some], FLIP, MIRRORS), whole, strict=True):
    np.testing.assert_array_equal(part, one[some])
