"""Rotary 2-D positions, as in DINOv3 (Siméoni et al. 2025): queries and keys of patches are rotated by their place."""

import jax
import jax.numpy as jnp
import numpy as np

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.attention import Heads
from mevit_jax.models.order import to_block_order


def rotate_patches(heads: Heads, config: MEViTConfig) -> Heads:
  """Rotates the queries and keys of a frame's patches; frame tokens behind them are not rotated.

  Args:
    heads: `b t n d`, or `b t n+f d` with frame tokens; patches in block order, heads concatenated.
    config: model config; without `rotary_theta` nothing changes.
  """
  if not config.rotary_theta:
    return heads
  query, key, value = heads
  return Heads(rotate(query, config), rotate(key, config), value)


def rotate(x: jax.Array, config: MEViTConfig) -> jax.Array:
  """Rotates queries or keys `b t n d` (or `n+f`) in at least float32; a half of each head is the real part."""
  cos, sin = _rotations(config, x.shape[2])  # s 1 k/2
  parts = x.reshape(*x.shape[:-1], config.heads, 2, -1)  # b t s h 2 k/2
  real, imaginary = parts[..., 0, :], parts[..., 1, :]
  rotated = jnp.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-2)  # b t s h 2 k/2
  return rotated.astype(x.dtype).reshape(x.shape)


def _rotations(config: MEViTConfig, tokens: int) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines of the angles of the first `tokens` tokens of a frame, `s 1 k/2`.

  Rows and columns have a quarter of the head's width each. Coordinates are -1 to 1 over the image, whatever the grid;
  angles are 2 pi times them, times theta to the power of -j / (k/4).
  """
  quarter = config.width // config.heads // 4
  frequencies = config.rotary_theta ** -(np.arange(quarter) / quarter)  # k/4
  axes = [2 * (np.arange(size) + 0.5) / size - 1 for size in config.grid]
  coordinates = np.stack(np.meshgrid(*axes, indexing='ij'), axis=-1)  # rows columns 2
  angles = 2 * np.pi * coordinates[..., None] * frequencies  # rows columns 2 k/4
  dtype = jnp.promote_types(config.dtype, jnp.float32)
  patches = to_block_order(jnp.asarray(angles.reshape(*config.grid, -1), dtype), config)  # n k/2
  all_angles = jnp.pad(patches, ((0, tokens - config.patches), (0, 0)))[:, None]  # s 1 k/2; frame tokens have angle 0
  return jnp.cos(all_angles), jnp.sin(all_angles)
