"""RandAugment: operations equal PIL's frame by frame, and are drawn with the documented probabilities."""

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from mevit_jax.augment.randaugment import OPERATIONS, operate, randaugment

pytestmark = pytest.mark.usefixtures('compile_once')

GREY = (128, 128, 128)


def pictures(smooth=2, h=43, w=57):
  """Returns smooth, noisy, few-valued and constant pictures: uint8 `t h w 3`, with odd sides."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:h, :w]
  waves = np.stack([128 + 70 * np.sin(x / 7 + y / 11), 110 + 60 * np.cos(y / 5), 90 + 60 * np.sin((x + y) / 9)], -1)
  noisy = [waves + 9 * i + rng.normal(0, 8, waves.shape) for i in range(smooth)]
  few = np.stack([rng.choice([10, 90, 200], (h, w)), np.full((h, w), 77), rng.integers(0, 256, (h, w))], -1)
  return np.clip([*noisy, few], 0, 255).astype(np.uint8)


def in_pil(frame, name, level, sign):
  """Applies the operation with PIL, with timm's arguments for a level ('inc1')."""
  share, width, height = level / 10, *frame.size
  factor = max(0.1, 1 + 0.9 * sign * share)

  def affine(*matrix):
    return frame.transform(frame.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)

  return {
    'identity': lambda: frame,
    'autocontrast': lambda: ImageOps.autocontrast(frame),
    'equalize': lambda: ImageOps.equalize(frame),
    'solarize': lambda: ImageOps.solarize(frame, 256 - int(256 * share)),
    'posterize': lambda: ImageOps.posterize(frame, max(1, 4 - int(4 * share))),
    'color': lambda: ImageEnhance.Color(frame).enhance(factor),
    'contrast': lambda: ImageEnhance.Contrast(frame).enhance(factor),
    'brightness': lambda: ImageEnhance.Brightness(frame).enhance(factor),
    'sharpness': lambda: ImageEnhance.Sharpness(frame).enhance(factor),
    'rotate': lambda: frame.rotate(sign * share * 30, Image.Resampling.BILINEAR, fillcolor=GREY),
    'shear_x': lambda: affine(1, sign * share * 0.3, 0, 0, 1, 0),
    'shear_y': lambda: affine(1, 0, 0, sign * share * 0.3, 1, 0),
    'translate_x': lambda: affine(1, 0, sign * share * 0.45 * width, 0, 1, 0),
    'translate_y': lambda: affine(1, 0, 0, 0, 1, sign * share * 0.45 * height),
  }[name]()


operate_once = jax.jit(operate)


@pytest.mark.parametrize('name', OPERATIONS)
def test_operations_equal_those_of_pil(name):
  """Up to one gray level in a few pixels: PIL truncates float64 numbers, some of them just below an integer."""
  clip = pictures()
  exact = name in ('identity', 'equalize', 'solarize', 'posterize', 'sharpness')
  for level in (0.0, 3.3, 7.0, 9.4, 10.0, 19.3):
    for sign in (1, -1):
      output = np.asarray(operate_once(clip, OPERATIONS.index(name), level, sign), np.int32)
      expected = np.stack([np.asarray(in_pil(Image.fromarray(frame), name, level, sign)) for frame in clip])
      difference = np.abs(output - expected)
      assert difference.max() <= (0 if exact else 1), (level, sign)
      assert (difference > 0).mean() <= 0.03, (level, sign)


PICTURE = pictures(1, 20, 21)[:1]
FRAMES = np.repeat(PICTURE, 2, axis=0)
draw = jax.jit(jax.vmap(randaugment, (None, 0, None, None, None, None)), static_argnums=2)
operate_each = jax.jit(jax.vmap(operate, (None, 0, None, 0)))


def candidates(level):
  """Returns the result of each operation and sign at a level, `o h w 3`, and the operations' indices `o`."""
  operations, signs = np.stack(np.meshgrid(range(len(OPERATIONS)), (1, -1), indexing='ij')).reshape(2, -1)
  return np.asarray(operate_each(PICTURE, operations, level, signs))[:, 0], operations


def drawn(operations, std, probability):
  """Applies RandAugment to a clip of two equal frames with 300 keys: `k h w 3`."""
  outputs = draw(FRAMES, jax.random.split(jax.random.key(0), 300), operations, 9.0, std, probability)
  outputs = np.asarray(outputs)  # k t h w 3
  np.testing.assert_array_equal(outputs[:, 0], outputs[:, 1])  # frames get the same draw
  return outputs[:, 0]


def found_in(outputs, level):
  """Returns for each output the indices of the operations that can have produced it."""
  made, operations = candidates(level)
  same = (outputs[:, None] == made).all((2, 3, 4))
  return [set(operations[row]) for row in same]


def test_every_operation_is_drawn():
  found = found_in(drawn(1, 0.0, 1.0), 9.0)
  assert all(found)
  counts = np.bincount([min(operations) for operations in found], minlength=len(OPERATIONS))
  assert counts.min() >= 9  # of 300, 21.4 each
  assert counts.max() <= 38


def test_operations_are_applied_with_probability_one_half():
  found = found_in(drawn(1, 0.0, 0.5), 9.0)
  assert 125 <= sum(0 not in operations for operations in found) <= 155  # of 300, of which 13/28


def test_levels_are_clipped_to_their_range():
  """With this standard deviation nearly every level is clipped."""
  outputs = drawn(1, 1e5, 1.0)
  lowest, highest = (np.asarray([bool(found) for found in found_in(outputs, level)]) for level in (0.0, 10.0))
  assert (lowest | highest).all()
  assert min(lowest.sum(), (~lowest).sum()) > 100


def test_two_operations_are_composed():
  """Two operations rarely equal a single one; if neither is applied the clip is unchanged."""
  assert np.mean([not operations for operations in found_in(drawn(2, 0.0, 1.0), 9.0)]) > 0.5
  assert (drawn(2, 0.0, 0.0) == PICTURE[0]).all()
