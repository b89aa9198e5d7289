"""Block order: the patches of a frame sorted by block, so that a block is a contiguous slice."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from mevit_jax.config.model import MEViTConfig


def to_block_order(grid: jax.Array, config: MEViTConfig) -> jax.Array:
  """Sorts the patches of a grid by block; within a block they are in raster order.

  Blocks of equal size form a region of the grid (a single region if the block size divides the grid). A region is a
  slice and its blocks are a reshape: no gather, no padding.

  Args:
    grid: `... rows columns c`.
    config: model config with the grid and the block size.

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
  """Inverts `to_block_order`: `... n c` -> `... rows columns c`."""
  lead, channels = patches.shape[:-2], patches.shape[-1]
  grid, start = jnp.zeros((*lead, *config.grid, channels), patches.dtype), 0
  for nh, nw, mh, mw, top, left in _regions(config):
    region = patches[..., start : start + nh * nw * mh * mw, :]
    region = region.reshape(*lead, nh, nw, mh, mw, channels)  # ... nh nw mh mw c
    region = jnp.swapaxes(region, -4, -3).reshape(*lead, nh * mh, nw * mw, channels)  # ... rows columns c
    grid = grid.at[..., top : top + nh * mh, left : left + nw * mw, :].set(region)
    start += nh * nw * mh * mw
  return grid


def _regions(config: MEViTConfig) -> Iterator[tuple[int, int, int, int, int, int]]:
  """Yields each region of equal blocks with its first row and column."""
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
