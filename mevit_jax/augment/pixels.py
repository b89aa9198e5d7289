"""Color jitter, blur and random erasing of one clip, float32 `t h w 3` in [0, 255]; the same draw for all frames."""

import math
from collections.abc import Sequence

import dm_pix as pix
import jax
import jax.numpy as jnp

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2
_MAX_DRAWS = 10  # maximum number of boxes drawn until one fits, as in timm


def jitter_color(
  clip: jax.Array, key: jax.Array, brightness: float, contrast: float, saturation: float, hue: float
) -> jax.Array:
  """Jitters brightness, saturation, contrast and hue, in this order (as DMVR does, with TensorFlow's operations).

  Args:
    clip: `t h w 3`.
    key: PRNG key.
    brightness: maximum shift, for pixels in [0, 1].
    contrast: maximum deviation from 1 of the factor about each frame's and channel's mean.
    saturation: maximum deviation from 1 of the factor.
    hue: maximum shift as a fraction of the color circle.
  """
  maximum = jnp.asarray([brightness, contrast, saturation, hue])
  brightness_delta, contrast_delta, saturation_delta, hue_delta = jax.random.uniform(key, (4,), minval=-1) * maximum
  clip = pix.adjust_brightness(clip / 255, brightness_delta)
  clip = pix.adjust_saturation(clip, 1 + saturation_delta)
  clip = pix.adjust_contrast(clip, 1 + contrast_delta)
  clip = pix.adjust_hue(clip, hue_delta)
  return 255 * jnp.clip(clip, 0, 1)


def drop_color(clip: jax.Array) -> jax.Array:
  """Converts to grayscale (luma), with three channels."""
  gray = (clip * jnp.asarray(_LUMA)).sum(-1, keepdims=True)
  return jnp.broadcast_to(gray, clip.shape)


def blur(clip: jax.Array, key: jax.Array, sigmas: Sequence[float]) -> jax.Array:
  """Applies a Gaussian blur with a random standard deviation between two values, in pixels; reflects at edges."""
  radius = math.ceil(3 * sigmas[1])
  sigma = jax.random.uniform(key, minval=sigmas[0], maxval=sigmas[1])
  padding = ((0, 0), (radius, radius), (radius, radius), (0, 0))
  return pix.gaussian_blur(jnp.pad(clip, padding, 'reflect'), sigma, 2 * radius + 1, padding='VALID')


def erase(
  clip: jax.Array,
  key: jax.Array,
  areas: Sequence[float],
  aspects: Sequence[float],
  mean: Sequence[float],
  std: Sequence[float],
) -> jax.Array:
  """Fills the same box of all frames with noise: random erasing (Zhong et al. 2020; boxes drawn as in timm).

  Args:
    clip: `t h w 3`.
    key: PRNG key.
    areas: minimum and maximum area of the box, as a fraction of the frame.
    aspects: minimum and maximum aspect ratio (height over width), uniform in the logarithm.
    mean: mean of the noise per channel, for pixels in [0, 1].
    std: standard deviation of the noise per channel, for pixels in [0, 1]; 0 fills the box with the mean.
  """
  h, w = clip.shape[1:3]
  area_key, aspect_key, y_key, x_key, noise_key = jax.random.split(key, 5)
  area = h * w * jax.random.uniform(area_key, (_MAX_DRAWS,), minval=areas[0], maxval=areas[1])
  low, high = (math.log(aspect) for aspect in aspects)
  aspect = jnp.exp(jax.random.uniform(aspect_key, (_MAX_DRAWS,), minval=low, maxval=high))
  heights, widths = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
  fits = (heights < h) & (widths < w)
  first = jnp.argmax(fits)
  height, width = heights[first].astype(jnp.int32), widths[first].astype(jnp.int32)
  top = jax.random.randint(y_key, (), 0, jnp.maximum(h - height, 0) + 1)
  left = jax.random.randint(x_key, (), 0, jnp.maximum(w - width, 0) + 1)
  box = in_box(h, w, top, top + height, left, left + width) & fits[first]
  noise = jnp.asarray(mean) + jnp.asarray(std) * jax.random.normal(noise_key, clip.shape)
  return jnp.where(box[..., None], 255 * noise, clip)


def in_box(h: int, w: int, top: jax.Array, bottom: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
  """Returns a mask `h w` of the box of rows [top, bottom) and columns [left, right)."""
  y, x = jnp.arange(h)[:, None], jnp.arange(w)
  return (y >= top) & (y < bottom) & (x >= left) & (x < right)
