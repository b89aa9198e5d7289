"""RandAugment of clips (Cubuk et al. 2020): PIL's operations on uint8 pictures, with one draw for all frames."""

import math

import jax
import jax.numpy as jnp

OPERATIONS = (
  'identity', 'autocontrast', 'equalize', 'solarize', 'posterize', 'color', 'contrast', 'brightness', 'sharpness',
  'rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y',
)  # fmt: skip
_FIRST_WARP = OPERATIONS.index('rotate')
_FILL = 128  # of what a warp brings in from outside, as timm has it


def randaugment(
  clip: jax.Array, key: jax.Array, operations: int, magnitude: float, std: float, probability: float
) -> jax.Array:
  """Applies `operations` operations drawn from OPERATIONS, with replacement, each with this probability.

  The level of each is drawn from a normal distribution about `magnitude` and kept in [0, 10], or up to a larger
  `magnitude`. The clip is uint8 `t h w 3`, before and after.
  """

  def layer(clip: jax.Array, key: jax.Array):
    choice_key, level_key, sign_key, use_key = jax.random.split(key, 4)
    operation = jax.random.randint(choice_key, (), 0, len(OPERATIONS))
    used = jax.random.bernoulli(use_key, probability)
    level = jnp.clip(magnitude + std * jax.random.normal(level_key), 0, jnp.maximum(10, magnitude))
    return operate(clip, jnp.where(used, operation, 0), level, jax.random.rademacher(sign_key)), None

  return jax.lax.scan(layer, clip, jax.random.split(key, operations))[0]


def operate(clip: jax.Array, operation: jax.Array | int, level: jax.Array | float, sign: jax.Array | int) -> jax.Array:
  """Applies one operation to a clip.

  Levels mean what they mean in timm's RandAugment that grows with the magnitude ('rand-...-inc1'): 0 does nothing but
  to posterize (4 bits are left), 10 is the strongest, and what is beyond goes on along the same lines.

  Args:
    clip: uint8 `t h w 3`.
    operation: an index into OPERATIONS. Only what is chosen is computed, unless this is under vmap.
    level: how strong, in [0, 30].
    sign: 1 or -1, the direction of what has one.

  Returns:
    The clip, uint8.
  """
  share = level / 10
  factor = jnp.maximum(0.1, 1 + 0.9 * sign * share)
  branches = (
    lambda clip: clip,
    autocontrast,
    equalize,
    lambda clip: solarize(clip, 256 - jnp.floor(256 * share)),
    lambda clip: posterize(clip, jnp.maximum(1, 4 - jnp.floor(4 * share))),  # PIL keeps at least one bit
    lambda clip: color(clip, factor),
    lambda clip: contrast(clip, factor),
    lambda clip: brightness(clip, factor),
    lambda clip: sharpness(clip, factor),
    lambda clip: warp(clip, warp_matrix(operation - _FIRST_WARP, sign * share, *clip.shape[1:3])),
  )
  return jax.lax.switch(jnp.minimum(operation, _FIRST_WARP), branches, clip)


def warp_matrix(kind: jax.Array | int, share: jax.Array | float, height: int, width: int) -> jax.Array:
  """What takes an output's `x y 1` to its source, `2 3`: of the kind-th of OPERATIONS that warp, at most at share 1."""
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
  """Image.transform(AFFINE, BILINEAR) with a matrix `2 3`: grey where the source is outside, edges repeated."""
  t, h, w, c = clip.shape
  y, x = jnp.meshgrid(jnp.arange(h) + 0.5, jnp.arange(w) + 0.5, indexing='ij')  # h w, of the pixels' centres
  source_x, source_y = (row[0] * x + row[1] * y + row[2] for row in matrix)
  inside = (source_x >= 0) & (source_x < w) & (source_y >= 0) & (source_y < h)
  left, x_share = _pixel_and_share(source_x, w)
  top, y_share = _pixel_and_share(source_y, h)
  # A pixel of all frames is one row of a table: four look-ups an output pixel, whatever the number of frames.
  table = clip.transpose(1, 2, 0, 3).reshape(h * w, t * c)  # hw tc

  def look_up(y: jax.Array, x: jax.Array) -> jax.Array:
    rows = jnp.minimum(y, h - 1) * w + jnp.minimum(x, w - 1)
    return jnp.take(table, rows, axis=0, mode='clip').astype(jnp.float32)  # h w tc

  upper = _between(look_up(top, left), look_up(top, left + 1), x_share)
  lower = _between(look_up(top + 1, left), look_up(top + 1, left + 1), x_share)
  # PIL computes in float64 and cuts off: what float32 leaves just below a whole number is that number.
  warped = jnp.floor(_between(upper, lower, y_share) + 1e-3)
  warped = jnp.where(inside[..., None], warped, _FILL).astype(jnp.uint8)
  return warped.reshape(h, w, t, c).transpose(2, 0, 1, 3)  # t h w 3


def _pixel_and_share(position: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """The pixel at or before a position, whose centre is half a pixel on, and the share `... 1` of the pixel after."""
  position = jnp.clip(position - 0.5, 0, size - 1)
  pixel = jnp.floor(position)
  return pixel.astype(jnp.int32), (position - pixel)[..., None]


def _between(one: jax.Array, other: jax.Array, share: jax.Array) -> jax.Array:
  return one + (other - one) * share


def autocontrast(clip: jax.Array) -> jax.Array:
  """ImageOps.autocontrast: each channel of each frame is stretched to [0, 255]."""
  pixels = clip.astype(jnp.int32)
  lowest, highest = pixels.min((1, 2), keepdims=True), pixels.max((1, 2), keepdims=True)  # t 1 1 3
  stretched = (pixels - lowest) * 255 // jnp.maximum(highest - lowest, 1)
  return jnp.where(highest > lowest, stretched, pixels).astype(jnp.uint8)


def equalize(clip: jax.Array) -> jax.Array:
  """ImageOps.equalize: each channel of each frame gets as even a histogram as it can."""
  t, h, w, c = clip.shape
  planes = clip.transpose(0, 3, 1, 2).reshape(t * c, h * w)  # tc hw
  return jax.lax.map(_equalize, planes).reshape(t, c, h, w).transpose(0, 2, 3, 1)  # t h w 3


def _equalize(plane: jax.Array) -> jax.Array:
  """One channel of one frame, uint8 `p`."""
  # A value as two digits of 16, each one-hot: histogram and table are matrix products, exact in any precision. A
  # scatter and a gather of single pixels are faster on a CPU (6 against 55 ms a clip of 8x224x224), and slow on a TPU.
  high, low = (jax.nn.one_hot(digit, 16, dtype=jnp.bfloat16) for digit in (plane // 16, plane % 16))  # p 16
  counts = jnp.einsum('pi,pj->ij', high, low, preferred_element_type=jnp.float32).astype(jnp.int32).reshape(256)
  step = (plane.size - counts[plane.max()]) // 255
  below = jnp.cumsum(counts) - counts
  table = jnp.where(step > 0, (step // 2 + below) // jnp.maximum(step, 1), jnp.arange(256))
  rows = high @ jnp.minimum(table, 255).reshape(16, 16).astype(jnp.bfloat16)  # p 16
  return (rows * low).sum(-1).astype(jnp.uint8)


def solarize(clip: jax.Array, threshold: jax.Array | float) -> jax.Array:
  """ImageOps.solarize: values from the threshold on are inverted."""
  return jnp.where(clip < threshold, clip, 255 - clip)


def posterize(clip: jax.Array, bits: jax.Array | float) -> jax.Array:
  """ImageOps.posterize: only the first bits stay."""
  step = jnp.exp2(8 - jnp.asarray(bits, jnp.float32)).astype(jnp.int32)
  return (clip - clip % step).astype(jnp.uint8)


def color(clip: jax.Array, factor: jax.Array | float) -> jax.Array:
  """ImageEnhance.Color: from grey (0) over the clip (1) to more colour."""
  return _blend(_grey(clip), clip, factor)


def contrast(clip: jax.Array, factor: jax.Array | float) -> jax.Array:
  """ImageEnhance.Contrast: from a frame's mean grey (0) over the frame (1) to more contrast."""
  grey = _grey(clip)
  pixels = grey.shape[1] * grey.shape[2]
  mean = (2 * grey.sum((1, 2), keepdims=True) + pixels) // (2 * pixels)  # t 1 1 1
  return _blend(mean, clip, factor)


def brightness(clip: jax.Array, factor: jax.Array | float) -> jax.Array:
  """ImageEnhance.Brightness: from black (0) over the clip (1) to more light."""
  return _blend(jnp.zeros((), jnp.int32), clip, factor)


def sharpness(clip: jax.Array, factor: jax.Array | float) -> jax.Array:
  """ImageEnhance.Sharpness: from ImageFilter.SMOOTH (0) over the clip (1) to sharper; the outermost pixels stay."""
  pixels = clip.astype(jnp.int32)
  h, w = pixels.shape[1:3]
  around = sum(pixels[:, y : h - 2 + y, x : w - 2 + x] for y in range(3) for x in range(3))
  inner = pixels[:, 1:-1, 1:-1]
  smooth = pixels.at[:, 1:-1, 1:-1].set((2 * (around + 4 * inner) + 13) // 26)
  return _blend(smooth, clip, factor)


def _grey(clip: jax.Array) -> jax.Array:
  """PIL's luma (ITU-R 601-2) in its fixed-point arithmetic: int32 `t h w 1`."""
  weights = jnp.asarray([19595, 38470, 7471])
  return ((clip.astype(jnp.int32) * weights).sum(-1, keepdims=True) + 32768) // 65536


def _blend(one: jax.Array, other: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Image.blend: `factor` of the way from one to the other and beyond, cut off to uint8."""
  one = one.astype(jnp.float32)
  return jnp.clip(one + factor * (other.astype(jnp.float32) - one), 0, 255).astype(jnp.uint8)
