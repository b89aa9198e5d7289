"""RandAugment of clips (Cubuk et al. 2020): PIL's operations on uint8 images, with the same draw for all frames."""

import math

import jax
import jax.numpy as jnp

OPERATIONS = (
  'identity', 'autocontrast', 'equalize', 'solarize', 'posterize', 'color', 'contrast', 'brightness', 'sharpness',
  'rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y',
)  # fmt: skip
_FIRST_WARP = OPERATIONS.index('rotate')
_FILL = 128  # value of pixels from outside the frame in warps, as in timm


def randaugment(
  clip: jax.Array, key: jax.Array, operations: int, magnitude: float, std: float, probability: float
) -> jax.Array:
  """Applies `operations` operations drawn from OPERATIONS with replacement, each with the given probability.

  Levels are drawn from a normal distribution with mean `magnitude` and clipped to [0, max(10, magnitude)]. Input and
  output are uint8 `t h w 3`.
  """

  def layer(clip: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
    choice_key, level_key, sign_key, use_key = jax.random.split(key, 4)
    operation = jax.random.randint(choice_key, (), 0, len(OPERATIONS))
    used = jax.random.bernoulli(use_key, probability)
    level = jnp.clip(magnitude + std * jax.random.normal(level_key), 0, jnp.maximum(10, magnitude))
    return operate(clip, jnp.where(used, operation, 0), level, jax.random.rademacher(sign_key)), None

  return jax.lax.scan(layer, clip, jax.random.split(key, operations))[0]


def operate(clip: jax.Array, operation: jax.Array | int, level: jax.Array | float, sign: jax.Array | int) -> jax.Array:
  """Applies one operation to a clip.

  Levels are those of timm's increasing RandAugment ('rand-...-inc1'): 0 is the identity (except for posterize, which
  keeps 4 bits), 10 is timm's maximum, and larger levels extrapolate.

  Args:
    clip: uint8 `t h w 3`.
    operation: index into OPERATIONS. Only this operation is computed, except under vmap.
    level: strength in [0, 30].
    sign: direction, 1 or -1, of operations that have one.

  Returns:
    Augmented clip, uint8.
  """
  share = level / 10
  factor = jnp.maximum(0.1, 1 + 0.9 * sign * share)
  branches = (
    lambda clip: clip,
    autocontrast,
    equalize,
    lambda clip: solarize(clip, 256 - jnp.floor(256 * share)),
    lambda clip: posterize(clip, jnp.maximum(1, 4 - jnp.floor(4 * share))),  # at least one bit, as in PIL
    lambda clip: color(clip, factor),
    lambda clip: contrast(clip, factor),
    lambda clip: brightness(clip, factor),
    lambda clip: sharpness(clip, factor),
    lambda clip: warp(clip, warp_matrix(operation - _FIRST_WARP, sign * share, *clip.shape[1:3])),
  )
  return jax.lax.switch(jnp.minimum(operation, _FIRST_WARP), branches, clip)


def warp_matrix(kind: jax.Array | int, share: jax.Array | float, height: int, width: int) -> jax.Array:
  """Returns the matrix `2 3` from output to input coordinates; `kind` counts from rotate, `share` is at most 1."""
  angle = -math.radians(30) * share
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  zero, one = jnp.zeros_like(cos), jnp.ones_like(cos)
  x, y = width / 2, height / 2
  rotate = ((cos, sin, x - cos * x - sin * y), (-sin, cos, y + sin * x - cos * y))
  shear_x = ((one, 0.3 * share, zero), (zero, one, zero))
  shear_y = ((one, zero, zero), (0.3 * share, one, zero))
  translate_x = ((one, zero, 0.45 * share * width), (zero, one, zero))
  translate_y = ((one, zero, zero), (zero, one, 0.45 * share * height))
  return jnp.asarray([rotate, shear_x, shear_y, translate_x, translate_y], jnp.float32)[kind]


def warp(clip: jax.Array, matrix: jax.Array) -> jax.Array:
  """Applies Image.transform(AFFINE, BILINEAR) with a matrix `2 3`: gray outside the frame, edges repeated."""
  t, h, w, c = clip.shape
  y, x = jnp.meshgrid(jnp.arange(h) + 0.5, jnp.arange(w) + 0.5, indexing='ij')  # pixel centers, h w
  source_x, source_y = (row[0] * x + row[1] * y + row[2] for row in matrix)
  inside = (source_x >= 0) & (source_x < w) & (source_y >= 0) & (source_y < h)
  left, x_weight = _pixel_and_weight(source_x, w)
  top, y_weight = _pixel_and_weight(source_y, h)
  # A table row holds one pixel of all frames: four gathers per output pixel, for any number of frames.
  table = clip.transpose(1, 2, 0, 3).reshape(h * w, t * c)  # hw tc

  def gather(y: jax.Array, x: jax.Array) -> jax.Array:
    rows = jnp.minimum(y, h - 1) * w + jnp.minimum(x, w - 1)
    return jnp.take(table, rows, axis=0, mode='clip').astype(jnp.float32)  # h w tc

  upper = _interpolate(gather(top, left), gather(top, left + 1), x_weight)
  lower = _interpolate(gather(top + 1, left), gather(top + 1, left + 1), x_weight)
  # PIL truncates float64 results; the offset compensates for float32 results just below an integer.
  warped = jnp.floor(_interpolate(upper, lower, y_weight) + 1e-3)
  warped = jnp.where(inside[..., None], warped, _FILL).astype(jnp.uint8)
  return warped.reshape(h, w, t, c).transpose(2, 0, 1, 3)  # t h w 3


def _pixel_and_weight(position: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Returns the pixel whose center is at or before a position, and the weight `... 1` of the next pixel."""
  position = jnp.clip(position - 0.5, 0, size - 1)
  pixel = jnp.floor(position)
  return pixel.astype(jnp.int32), (position - pixel)[..., None]


def _interpolate(first: jax.Array, second: jax.Array, weight: jax.Array) -> jax.Array:
  """Interpolates linearly."""
  return first + (second - first) * weight


def autocontrast(clip: jax.Array) -> jax.Array:
  """Applies ImageOps.autocontrast: stretches each channel of each frame to [0, 255]."""
  pixels = clip.astype(jnp.int32)
  lowest, highest = pixels.min((1, 2), keepdims=True), pixels.max((1, 2), keepdims=True)  # t 1 1 3
  stretched = (pixels - lowest) * 255 // jnp.maximum(highest - lowest, 1)
  return jnp.where(highest > lowest, stretched, pixels).astype(jnp.uint8)


def equalize(clip: jax.Array) -> jax.Array:
  """Applies ImageOps.equalize: equalizes the histogram of each channel of each frame."""
  t, h, w, c = clip.shape
  planes = clip.transpose(0, 3, 1, 2).reshape(t * c, h * w)  # tc hw
  return jax.lax.map(_equalize, planes).reshape(t, c, h, w).transpose(0, 2, 3, 1)  # t h w 3


def _equalize(plane: jax.Array) -> jax.Array:
  """Equalizes one channel of one frame, uint8 `p`."""
  # Values are split into two base-16 digits, one-hot encoded: histogram and table lookup are matrix products, exact in
  # any precision. Scatter and gather are faster on a CPU (6 instead of 55 ms per clip of 8x224x224), but slow on a TPU.
  high, low = (jax.nn.one_hot(digit, 16, dtype=jnp.bfloat16) for digit in (plane // 16, plane % 16))  # p 16
  counts = jnp.einsum('pi,pj->ij', high, low, preferred_element_type=jnp.float32).astype(jnp.int32).reshape(256)
  step = (plane.size - counts[plane.max()]) // 255
  below = jnp.cumsum(counts) - counts
  table = jnp.where(step > 0, (step // 2 + below) // jnp.maximum(step, 1), jnp.arange(256))
  rows = high @ jnp.minimum(table, 255).reshape(16, 16).astype(jnp.bfloat16)  # p 16
  return (rows * low).sum(-1).astype(jnp.uint8)


def solarize(clip: jax.Array, threshold: jax.Array | float) -> jax.Array:
  """Applies ImageOps.solarize: inverts values at or above the threshold."""
  return jnp.where(clip < threshold, clip, 255 - clip)


def posterize(clip: jax.Array, bits: jax.Array | float) -> jax.Array:
  """Applies ImageOps.posterize: keeps the most significant bits."""
  step = jnp.exp2(8 - jnp.asarray(bits, jnp.float32)).astype(jnp.int32)
  return (clip - clip % step).astype(jnp.uint8)


def color(clip: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Applies ImageEnhance.Color: 0 is grayscale, 1 the identity."""
  return _blend(_gray(clip), clip, factor)


def contrast(clip: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Applies ImageEnhance.Contrast: 0 is the mean gray of the frame, 1 the identity."""
  gray = _gray(clip)
  pixels = gray.shape[1] * gray.shape[2]
  mean = (2 * gray.sum((1, 2), keepdims=True) + pixels) // (2 * pixels)  # t 1 1 1
  return _blend(mean, clip, factor)


def brightness(clip: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Applies ImageEnhance.Brightness: 0 is black, 1 the identity."""
  return _blend(jnp.zeros((), jnp.int32), clip, factor)


def sharpness(clip: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Applies ImageEnhance.Sharpness: 0 is ImageFilter.SMOOTH, 1 the identity; border pixels do not change."""
  pixels = clip.astype(jnp.int32)
  h, w = pixels.shape[1:3]
  neighborhood = sum(pixels[:, y : h - 2 + y, x : w - 2 + x] for y in range(3) for x in range(3))
  inner = pixels[:, 1:-1, 1:-1]
  smooth = pixels.at[:, 1:-1, 1:-1].set((2 * (neighborhood + 4 * inner) + 13) // 26)
  return _blend(smooth, clip, factor)


def _gray(clip: jax.Array) -> jax.Array:
  """Computes PIL's luma (ITU-R 601-2) in fixed-point arithmetic: int32 `t h w 1`."""
  weights = jnp.asarray([19595, 38470, 7471])
  return ((clip.astype(jnp.int32) * weights).sum(-1, keepdims=True) + 32768) // 65536


def _blend(first: jax.Array, second: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Applies Image.blend: interpolates or extrapolates by `factor`, clipped to uint8."""
  first = first.astype(jnp.float32)
  return jnp.clip(first + factor * (second.astype(jnp.float32) - first), 0, 255).astype(jnp.uint8)
