"""Positions for another grid and another number of frames; NumPy in float64, since this happens once."""

import numpy as np


def resize_space(grid: np.ndarray, size: tuple[int, int], *, antialias: bool) -> np.ndarray:
  """Positions of a grid of patches, resized bicubically: `rows columns d` -> `*size d` float32.

  Libraries differ in what they call bicubic, by far more than rounding. `antialias=True` is timm's and
  jax.image.resize's: Keys' kernel with a = -0.5, widened when the grid shrinks. `antialias=False` is Hugging Face's:
  a = -0.75 and never widened (torch's bicubic, align_corners=False).
  """
  if grid.shape[:2] == size:
    return grid
  rows, columns = (_matrix(old, new, antialias) for old, new in zip(grid.shape[:2], size, strict=True))
  return np.einsum('ih,hwd,jw->ijd', rows, grid.astype(np.float64), columns, optimize=True).astype(np.float32)


def resize_time(times: np.ndarray, frames: int) -> np.ndarray:
  """Positions of frames, resized linearly between the frames' centres: `t d` -> `frames d` float32."""
  old = times.shape[0]
  if old == frames:
    return times
  centres = np.clip((np.arange(frames) + 0.5) * old / frames - 0.5, 0, old - 1)
  low = np.minimum(np.floor(centres).astype(int), max(old - 2, 0))
  share = (centres - low)[:, None]
  return ((1 - share) * times[low] + share * times[np.minimum(low + 1, old - 1)]).astype(np.float32)


def _matrix(old: int, new: int, antialias: bool) -> np.ndarray:
  """What one axis is multiplied with: `new old`, rows sum to 1."""
  scale = old / new
  centres = (np.arange(new) + 0.5) * scale - 0.5
  if antialias:
    width = max(scale, 1.0)
    weights = _cubic((np.arange(old) - centres[:, None]) / width, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)
  weights = np.zeros((new, old))
  for tap in range(-1, 3):  # beyond the edge the outermost patch is read again
    index = np.floor(centres).astype(int) + tap
    np.add.at(weights, (np.arange(new), np.clip(index, 0, old - 1)), _cubic(centres - index, -0.75))
  return weights


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel (1981), zero beyond a distance of 2."""
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
