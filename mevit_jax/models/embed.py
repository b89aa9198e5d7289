"""A clip becomes tokens: patches in block order, their positions, and the order itself."""

import jax
import jax.numpy as jnp
from flax import nnx

from mevit_jax.models.config import MEViTConfig


def to_block_order(grid: jax.Array, config: MEViTConfig) -> jax.Array:
  """Patches of a raster grid, block by block; each block's patches stand together in raster order.

  Blocks of one size form a region of the grid (one region where the block size divides it), and regions follow each
  other, so that a region is a slice and its blocks are a reshape: no gather, no padding.

  Args:
    grid: `... rows columns c`.
    config: its grid and block size.

  Returns:
    `... n c`.
  """
  lead, channels = grid.shape[:-3], grid.shape[-1]
  regions = []
  for nh, nw, mh, mw, top, left in _regions(config):
    region = grid[..., top : top + nh * mh, left : left + nw * mw, :]
    region = region.reshape(*lead, nh, mh, nw, mw, channels)  # ... nh mh nw mw c
    region = jnp.swapaxes(region, -4, -3)  # ... nh nw mh mw c
    regions.append(region.reshape(*lead, nh * nw * mh * mw, channels))  # ... g·m c
  return regions[0] if len(regions) == 1 else jnp.concatenate(regions, axis=-2)  # ... n c


def from_block_order(patches: jax.Array, config: MEViTConfig) -> jax.Array:
  """The inverse of `to_block_order`: `... n c` -> `... rows columns c`."""
  lead, channels = patches.shape[:-2], patches.shape[-1]
  grid, start = jnp.zeros((*lead, *config.grid, channels), patches.dtype), 0
  for nh, nw, mh, mw, top, left in _regions(config):
    region = patches[..., start : start + nh * nw * mh * mw, :]
    region = region.reshape(*lead, nh, nw, mh, mw, channels)  # ... nh nw mh mw c
    region = jnp.swapaxes(region, -4, -3).reshape(*lead, nh * mh, nw * mw, channels)  # ... rows columns c
    grid = grid.at[..., top : top + nh * mh, left : left + nw * mw, :].set(region)
    start += nh * nw * mh * mw
  return grid


def _regions(config: MEViTConfig):
  """Yields each region of equal blocks with the row and the column where it starts."""
  for nh, nw, mh, mw in config.blocks:
    full_height, full_width = (
      mh == min(config.block_size, config.grid[0]),
      mw == min(config.block_size, config.grid[1]),
    )
    yield (
      nh,
      nw,
      mh,
      mw,
      0 if full_height else config.grid[0] - mh,
      0 if full_width else config.grid[1] - mw,
    )


class Embedding(nnx.Module):
  """Patch embedding and positions, eq. 1: z(p, t) = E x(p, t) + e_space(p) + e_time(t), patches in block order."""

  def __init__(self, config: MEViTConfig, rngs: nnx.Rngs):
    self.config = config
    ph, pw = config.patch_size
    # A patch's embedding has unit scale for pixels of unit scale, and so have positions: smaller ones are not noticed.
    unit = jax.nn.initializers.normal(1.0)
    lecun = jax.nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
    self.kernel = nnx.Param(lecun(rngs.params(), (ph, pw, 3, config.width)))
    self.bias = nnx.Param(jnp.zeros(config.width))
    self.space = nnx.Param(unit(rngs.params(), (*config.grid, config.width)))
    self.time = nnx.Param(unit(rngs.params(), (config.frames, config.width)))

  def __call__(self, video: jax.Array) -> jax.Array:
    """Embeds `b t h w 3` as tokens `b t n d`."""
    (rows, columns), (ph, pw) = self.config.grid, self.config.patch_size
    dtype = jnp.dtype(self.config.dtype)
    b, t = video.shape[:2]
    pixels = video.astype(dtype).reshape(b, t, rows, ph, columns, pw, 3)  # b t rows ph columns pw 3
    pixels = pixels.transpose(0, 1, 2, 4, 3, 5, 6)  # b t rows columns ph pw 3
    pixels = pixels.reshape(b, t, rows, columns, ph * pw * 3)  # b t rows columns ph·pw·3
    kernel = self.kernel[...].astype(dtype).reshape(ph * pw * 3, -1)
    tokens = to_block_order(pixels, self.config) @ kernel  # b t n d
    space = to_block_order(self.space[...], self.config)  # n d
    positions = self.bias[...] + space + self.time[...][:, None]  # t n d
    return tokens + positions.astype(dtype)
