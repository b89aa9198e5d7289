"""Resizing of position embeddings to another grid or number of frames, in NumPy and float64."""

import numpy as np


def resize_space(grid: np.ndarray, size: tuple[int, int], *, antialias: bool) -> np.ndarray:
  """Resizes the positions of a grid of patches bicubically: `rows columns d` -> `*size d` float32.

  Libraries differ in their bicubic kernel by far more than rounding. `antialias=True` is timm's and
  jax.image.resize's: Keys' kernel with a = -0.5, widened when the grid shrinks. `antialias=False` is Hugging Face's:
  a = -0.75 and never widened (torch's bicubic, align_corners=False).
  """
  if grid.shape[:2] == size:
    return grid
  rows, columns = (_interpolation_matrix(old, new, antialias) for old, new in zip(grid.shape[:2], size, strict=True))
  return np.einsum('ih,hwd,jw->ijd', rows, grid.astype(np.float64), columns, optimize=True).astype(np.float32)


def resize_time(times: np.ndarray, frames: int) -> np.ndarray:
  """Resizes the positions of frames linearly between the centers of the frames: `t d` -> `frames d` float32."""
  old = times.shape[0]
  if old == frames:
    return times
  centers = np.clip((np.arange(frames) + 0.5) * old / frames - 0.5, 0, old - 1)
  low = np.minimum(np.floor(centers).astype(int), max(old - 2, 0))
  share = (centers - low)[:, None]
  return ((1 - share) * times[low] + share * times[np.minimum(low + 1, old - 1)]).astype(np.float32)


def _interpolation_matrix(old: int, new: int, antialias: bool) -> np.ndarray:
  """Returns the interpolation matrix of one axis: `new old`, rows sum to 1."""
  scale = old / new
  centers = (np.arange(new) + 0.5) * scale - 0.5
  if antialias:
    width = max(scale, 1.0)
    weights = _cubic((np.arange(old) - centers[:, None]) / width, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)
  weights = np.zeros((new, old))
  for tap in range(-1, 3):  # beyond the edge the outermost patch is repeated
    index = np.floor(centers).astype(int) + tap
    np.add.at(weights, (np.arange(new), np.clip(index, 0, old - 1)), _cubic(centers - index, -0.75))
  return weights


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Returns the cubic convolution kernel of Keys (1981), zero beyond a distance of 2."""
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
