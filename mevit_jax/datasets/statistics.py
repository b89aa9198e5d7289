"""Pixel mean and standard deviation of a prepared dataset's training videos."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from mevit_jax.video.container import VideoError
from mevit_jax.video.decode import decode

MAX_VIDEOS, FRAMES = 256, 4  # evenly spaced videos of the split, and frames of each


class _Source(Protocol):
  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def measure_pixels(source: _Source) -> dict[str, list[float]] | None:
  """Returns the `mean` and `std` of pixels in [0, 1] per RGB channel, over a sample in which all videos weigh the same.

  They do not depend on the machine, but for the decoder's rounding, and are rounded to four digits. A channel that
  hardly varies has a standard deviation of 0.01, by which clips can be divided.

  Args:
    source: examples of the training split.

  Returns:
    None if no video of the sample can be read.
  """
  sums = []
  for i in np.unique(np.linspace(0, len(source) - 1, min(MAX_VIDEOS, len(source))).round().astype(int)).tolist():
    example = source[i]
    times = (np.arange(FRAMES) + 0.5) / FRAMES * example['duration']
    try:
      frames = np.stack(decode(example['video'], times)).reshape(-1, 3) / np.float32(255)  # t*h*w 3
    except VideoError:
      continue
    sums.append((frames.mean(axis=0, dtype=np.float64), np.square(frames).mean(axis=0, dtype=np.float64)))
  if not sums:
    return None
  mean, square = np.mean(sums, axis=0)  # 3, 3
  std = np.sqrt(np.maximum(square - mean**2, 0.01**2))
  return {'mean': mean.round(4).tolist(), 'std': std.round(4).tolist()}
