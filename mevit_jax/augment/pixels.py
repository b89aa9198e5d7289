"""Colour, blur and erasing of one clip, float32 `t h w 3` in [0, 255]: one draw for all frames."""

import math
from collections.abc import Sequence

import dm_pix as pix
import jax
import jax.numpy as jnp

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2
_TRIES = 10  # boxes drawn for an erased one to fit, as timm


def jitter_color(
  clip: jax.Array, key: jax.Array, brightness: float, contrast: float, saturation: float, hue: float
) -> jax.Array:
  """Adds to brightness, scales saturation and contrast, and turns the hue, in this order (DMVR's, TF's operations).

  Args:
    clip: `t h w 3`.
    key: of the draw.
    brightness: the largest change, of pixels in [0, 1].
    contrast: the largest change of the factor 1 about each frame's and channel's mean.
    saturation: the largest change of the factor 1.
    hue: the largest change, in turns.
  """
  largest = jnp.asarray([brightness, contrast, saturation, hue])
  brighter, contrasted, saturated, turned = jax.random.uniform(key, (4,), minval=-1) * largest
  clip = pix.adjust_brightness(clip / 255, brighter)
  clip = pix.adjust_saturation(clip, 1 + saturated)
  clip = pix.adjust_contrast(clip, 1 + contrasted)
  clip = pix.adjust_hue(clip, turned)
  return 255 * jnp.clip(clip, 0, 1)


def drop_color(clip: jax.Array) -> jax.Array:
  """The luma in all three channels."""
  grey = (clip * jnp.asarray(_LUMA)).sum(-1, keepdims=True)
  return jnp.broadcast_to(grey, clip.shape)


def blur(clip: jax.Array, key: jax.Array, sigmas: Sequence[float]) -> jax.Array:
  """Gaussian blur with a standard deviation drawn between two, in pixels; frames are mirrored at their edges."""
  radius = math.ceil(3 * sigmas[1])
  sigma = jax.random.uniform(key, minval=sigmas[0], maxval=sigmas[1])
  around = ((0, 0), (radius, radius), (radius, radius), (0, 0))
  return pix.gaussian_blur(jnp.pad(clip, around, 'reflect'), sigma, 2 * radius + 1, padding='VALID')


def erase(
  clip: jax.Array,
  key: jax.Array,
  areas: Sequence[float],
  aspects: Sequence[float],
  mean: Sequence[float],
  std: Sequence[float],
) -> jax.Array:
  """Puts noise into one box of all frames (Zhong et al. 2020; the box as timm draws it).

  Args:
    clip: `t h w 3`.
    key: of the draw.
    areas: the box's smallest and largest share of the frame.
    aspects: its smallest and largest height over width, drawn evenly in the logarithm.
    mean: of the noise, for pixels in [0, 1], by channel.
    std: likewise. All 0 fills the box with the mean.
  """
  h, w = clip.shape[1:3]
  area_key, aspect_key, y_key, x_key, noise_key = jax.random.split(key, 5)
  area = h * w * jax.random.uniform(area_key, (_TRIES,), minval=areas[0], maxval=areas[1])
  low, high = (math.log(aspect) for aspect in aspects)
  aspect = jnp.exp(jax.random.uniform(aspect_key, (_TRIES,), minval=low, maxval=high))
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
  """Which pixels `h w` are in the box of rows [top, bottom) and columns [left, right)."""
  y, x = jnp.arange(h)[:, None], jnp.arange(w)
  return (y >= top) & (y < bottom) & (x >= left) & (x < right)
