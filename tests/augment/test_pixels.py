"""Color jitter, blur and erasing against their definitions; the same in all frames."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from mevit_jax.augment.pixels import blur, drop_color, erase, in_box, jitter_color

pytestmark = pytest.mark.usefixtures('compile_once')

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
CLIP = np.random.default_rng(0).uniform(80, 150, (3, 6, 7, 3)).astype(np.float32)  # no value is clipped
jitter = jax.jit(jitter_color)
in_hsv = np.vectorize(colorsys.rgb_to_hsv, signature='(),(),()->(),(),()')


def jittered(seed, **largest):
  zeros = dict.fromkeys(('brightness', 'contrast', 'saturation', 'hue'), 0.0)
  return np.asarray(jitter(CLIP, jax.random.key(seed), **{**zeros, **largest}), np.float64)


def hsv(clip):
  return np.stack(in_hsv(*np.moveaxis(np.float64(clip) / 255, -1, 0)))


def draws(measure, largest):
  """Returns the draws of 20 keys; checks that each is equal for all pixels and frames, and that they fill the range."""
  found = []
  for seed in range(20):
    change = measure(seed)
    np.testing.assert_allclose(change, change.flat[0], atol=2e-4)
    found.append(change.flat[0])
  assert -largest <= min(found) < -0.5 * largest
  assert 0.5 * largest < max(found) <= largest


def test_brightness_adds_an_offset():
  draws(lambda seed: (jittered(seed, brightness=0.2) - CLIP) / 255, 0.2)


def test_contrast_scales_about_the_mean_of_frame_and_channel():
  about = CLIP - CLIP.mean((1, 2), keepdims=True)
  far = np.abs(about) > 10
  draws(lambda seed: ((jittered(seed, contrast=0.4) - CLIP) / about)[far], 0.4)


def test_saturation_scales_about_the_gray_value():
  def measure(seed):
    before, after = hsv(CLIP), hsv(jittered(seed, saturation=0.4))
    np.testing.assert_allclose(after[2], before[2], atol=1e-5)
    return after[1] / before[1] - 1

  draws(measure, 0.4)


def test_hue_is_shifted():
  def measure(seed):
    before, after = hsv(CLIP), hsv(jittered(seed, hue=0.2))
    np.testing.assert_allclose(after[1:], before[1:], atol=1e-5)
    return (after[0] - before[0] + 0.5) % 1 - 0.5

  draws(measure, 0.2)


def test_jitter_stays_in_range():
  bright = np.asarray(jitter(np.full_like(CLIP, 250), jax.random.key(0), 1.0, 0.0, 0.0, 0.0))
  dark = np.asarray(jitter(np.full_like(CLIP, 5), jax.random.key(1), 1.0, 1.0, 1.0, 0.5))
  assert min(bright.min(), dark.min()) >= 0
  assert max(bright.max(), dark.max()) <= 255


def test_grayscale_is_luma():
  clip = np.random.default_rng(1).integers(0, 256, (2, 9, 9, 3), np.uint8)
  expected = np.stack([np.asarray(Image.fromarray(frame).convert('L').convert('RGB')) for frame in clip])
  np.testing.assert_allclose(drop_color(jnp.float32(clip)), expected, atol=0.51)  # PIL rounds


@pytest.mark.parametrize('sigma', [0.1, 1.3])
def test_blur_is_gaussian(sigma):
  output = blur(jnp.asarray(CLIP), jax.random.key(0), (sigma, sigma))
  radius = int(np.ceil(3 * sigma))
  expected = ndimage.gaussian_filter(np.float64(CLIP), sigma, mode='mirror', axes=(1, 2), radius=radius)
  np.testing.assert_allclose(output, expected, atol=1e-3)


AREAS, ASPECTS, SIZE = (0.05, 0.3), (0.4, 2.5), 48


@jax.jit
def erased(areas, std):
  clip = jnp.full((2, SIZE, SIZE, 3), -1000.0)
  keys = jax.random.split(jax.random.key(0), 200)
  return jax.vmap(lambda key: erase(clip, key, areas, ASPECTS, MEAN, std))(keys)


def test_the_same_box_is_erased_in_all_frames():
  outputs = np.asarray(erased(AREAS, STD))
  changed = (outputs != -1000).any(-1)  # b t h w
  assert (changed[:, 0] == changed[:, 1]).all()
  heights, widths = changed[:, 0].any(2).sum(1), changed[:, 0].any(1).sum(1)
  assert (changed[:, 0].sum((1, 2)) == heights * widths).all()  # a box
  areas, aspects = heights * widths / SIZE**2, heights / widths
  half = 0.5 / np.minimum(heights, widths)  # a side is rounded by half a pixel
  assert (areas >= AREAS[0] * (1 - 2 * half)).all()
  assert (areas <= AREAS[1] * (1 + 2 * half)).all()
  assert (aspects >= ASPECTS[0] * (1 - 2 * half)).all()
  assert (aspects <= ASPECTS[1] * (1 + 2 * half)).all()
  for values, (low, high) in ((areas, AREAS), (aspects, ASPECTS)):
    assert values.min() < 1.3 * low
    assert values.max() > 0.8 * high
  assert changed[:, 0].any(0).mean() > 0.95  # at any position
  boxes = outputs[changed] / 255  # p 3
  np.testing.assert_allclose(boxes.mean(0), MEAN, atol=5e-3)
  np.testing.assert_allclose(boxes.std(0), STD, atol=5e-3)
  assert (outputs[:, 0][changed[:, 0]] != outputs[:, 1][changed[:, 1]]).mean() > 0.99  # fresh noise in each frame


def test_erased_box_can_have_a_constant_value():
  outputs = np.asarray(erased(AREAS, (0.0, 0.0, 0.0)))
  changed = (outputs != -1000).any(-1)
  np.testing.assert_allclose(outputs[changed] / 255, np.broadcast_to(MEAN, (changed.sum(), 3)), rtol=1e-6)


def test_a_box_that_does_not_fit_is_not_erased():
  assert (erased((1.0, 1.0), STD) == -1000).all()


def test_in_box():
  box = np.asarray(in_box(4, 5, -1, 2, 3, 9))
  assert box.sum() == 4
  assert box[:2, 3:].all()
