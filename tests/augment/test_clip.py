"""Augmentation of batches: flips swap labels, and clips are augmented independently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.augment.clip import augment, mirror_labels, normalize
from mevit_jax.config.augment import AugmentConfig
from mevit_jax.config.data import Normalization
from mevit_jax.datasets.builders.moving_shapes import CLASS_NAMES
from mevit_jax.errors import UserError

pytestmark = pytest.mark.usefixtures('compile_once')

FLIP = AugmentConfig(flip=True)
NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_normalize(dtype):
  video = np.random.default_rng(0).integers(0, 256, (2, 1, 4, 4, 3), np.uint8)
  expected = (video / 255 - np.asarray(NORMALIZATION.mean)) / np.asarray(NORMALIZATION.std)
  output = normalize(jnp.asarray(video), NORMALIZATION, dtype)
  assert output.dtype == dtype
  np.testing.assert_allclose(np.float64(output), expected, rtol=2**-8 if dtype == jnp.bfloat16 else 0, atol=1e-6)


def mirrored(*names):
  """Returns {class: its mirror image, or None}, by name."""
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
    'Pushing [something] from right to left',
    'Pushing [something] from left to right',
    'Pushing something so that it slightly moves',
    'Lifting up one end of something without letting it drop down',
  ) == {
    'Pulling something from left to right': 'Pulling something from right to left',
    'Pulling something from right to left': 'Pulling something from left to right',
    'Turning the camera left while filming something': 'Turning the camera right while filming something',
    'Turning the camera right while filming something': 'Turning the camera left while filming something',
    'Pushing [something] from right to left': 'Pushing [something] from left to right',
    'Pushing [something] from left to right': 'Pushing [something] from right to left',
    'Pushing something so that it slightly moves': 'Pushing something so that it slightly moves',
    'Lifting up one end of something without letting it drop down': (
      'Lifting up one end of something without letting it drop down'
    ),
  }


def test_a_directional_class_without_an_opposite_has_no_mirror_image():
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
def test_mirror_images_for_every_spelling_of_class_names(one, other):
  assert mirrored(one, other) == {one: other, other: one}


def test_two_directions_are_mirrored_together():
  names = [f'roll {side} {turn}' for side in ('left', 'right') for turn in ('clockwise', 'anticlockwise')]
  assert mirror_labels(names) == (3, 2, 1, 0)


def test_words_that_contain_left_or_right_are_not_directions():
  names = ('bright', 'uprightness', 'cleft', 'lefty', 'otherwise')
  assert mirrored(*names) == {name: name for name in names}


NAMES = ('swipe left', 'swipe right', 'jump', 'turn left')  # the last without a mirror image
MIRRORS = mirror_labels(NAMES)


def batch(size=64):
  video = np.random.default_rng(1).integers(0, 256, (size, 2, 8, 9, 3), np.uint8)
  return video, np.arange(size, dtype=np.int32) % len(NAMES), jax.random.split(jax.random.key(3), size)


augment_once = jax.jit(augment, static_argnums=range(3, 6))


def augmented(config, video, labels, keys):
  """Returns the augmented clips and labels of a batch."""
  return jax.tree.map(np.asarray, augment_once(video, labels, keys, config, MIRRORS, NORMALIZATION))


def test_a_flip_mirrors_all_frames_and_swaps_the_label():
  video, labels, keys = batch()
  outputs, others = augmented(FLIP, video, labels, keys)
  mirror = video[:, :, :, ::-1]
  flipped = (outputs == mirror).all((1, 2, 3, 4))
  np.testing.assert_array_equal(outputs[~flipped], video[~flipped])
  np.testing.assert_array_equal(others, np.where(flipped, np.asarray(MIRRORS)[labels], labels))
  for label in (0, 1, 2):
    assert 2 <= flipped[labels == label].sum() <= 14  # of 16
  assert not flipped[labels == 3].any()


def test_default_config_changes_nothing():
  video, labels, keys = batch(4)
  outputs, others = augmented(AugmentConfig(), video, labels, keys)
  np.testing.assert_array_equal(outputs, video)
  np.testing.assert_array_equal(others, labels)


ALL = AugmentConfig(
  flip=True, randaugment=2, color_jitter=0.8, grayscale=0.2, blur=0.5, blur_sigma=(0.5, 1.0), erase=0.5,
  erase_fill='mean',
)  # fmt: skip


def test_frames_are_augmented_alike_and_clips_independently():
  """Frames of a still clip stay equal; equal clips with different keys become different."""
  frame = batch(1)[0][:, :1]
  video = np.broadcast_to(frame, (16, 2, *frame.shape[2:]))
  outputs, _ = augmented(ALL, video, np.full(16, 2, np.int32), jax.random.split(jax.random.key(0), 16))
  assert outputs.dtype == np.float32
  np.testing.assert_allclose(outputs, np.broadcast_to(outputs[:, :1], outputs.shape), atol=1e-4)
  assert outputs.min() >= 0
  assert outputs.max() <= 255
  assert len({output.tobytes() for output in outputs}) >= 15


def test_an_example_does_not_depend_on_the_rest_of_the_batch():
  video, labels, keys = batch(16)
  order = np.random.default_rng(0).permutation(16)
  moved = augmented(ALL, video[order], labels[order], keys[order])
  for row, whole in zip(moved, augmented(ALL, video, labels, keys), strict=True):
    np.testing.assert_array_equal(row, whole[order])


def test_operations_with_probability_zero_change_no_pixel():
  config = AugmentConfig(randaugment=1, randaugment_probability=0.0)
  video, labels, keys = batch(16)
  np.testing.assert_array_equal(augmented(config, video, labels, keys)[0], video)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'color_jitter': 1.5}, r'augment.color_jitter must be in \[0, 1\], not 1.5'),
    ({'hue': 0.6}, r'augment.hue must be in \[0, 0.5\], not 0.6'),
    ({'randaugment_magnitude': 31.0}, r'augment.randaugment_magnitude must be in \[0, 30\], not 31.0'),
    ({'randaugment': -1}, r'augment.randaugment must be in \[0, 100\], not -1'),
    ({'mixup': -0.1}, r'augment.mixup must be in \[0, 1e\+12\], not -0.1'),
    ({'erase_area': (0.4, 0.2)}, r'augment.erase_area must be a minimum and a maximum, positive and at most 1'),
    ({'erase_aspect': (0.0, 2.0)}, r'augment.erase_aspect must be a minimum and a maximum, positive, not \(0.0'),
    ({'blur_sigma': (1.0,)}, r'augment.blur_sigma must be a minimum and a maximum'),
    ({'erase_fill': 'black'}, r"augment.erase_fill must be one of .*'noise', 'mean'.*, not 'black'"),
  ],
)
def test_invalid_config_is_refused_by_field_name(fields, message):
  with pytest.raises(UserError, match=message):
    AugmentConfig(**fields)
