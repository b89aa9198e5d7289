"""Film strips: frames of a video side by side in one image."""

import numpy as np
from PIL import Image


def sample_frames(count: int, limit: int) -> np.ndarray:
  """Returns up to `limit` evenly spaced indices of `count` frames, first and last included."""
  return np.linspace(0, count - 1, min(limit, count)).round().astype(int)


def resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes a frame, uint8 `h w 3`, to (width, height); pixels of an enlarged frame stay visible as squares."""
  enlarges = size[1] >= frame.shape[0]
  resample = Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS
  return np.asarray(Image.fromarray(frame).resize(size, resample))


def film_strip(frames: np.ndarray, size: tuple[int, int], gap: int = 3) -> np.ndarray:
  """Puts frames side by side: uint8 `h w 3`.

  Args:
    frames: all frames to show, uint8 `t h w 3`; see `sample_frames`.
    size: width and height of a frame in the strip, in pixels; see `frame_size`.
    gap: width of the white gap between frames, in pixels.
  """
  white = np.full((size[1], gap, 3), 255, np.uint8)
  columns = [column for frame in frames for column in (resize_frame(frame, size), white)]
  return np.concatenate(columns[:-1], axis=1)  # h w 3


def frame_size(frames: np.ndarray, height: int) -> tuple[int, int]:
  """Returns the width and height, in pixels, of frames `t h w 3` scaled to a height."""
  return max(1, round(frames.shape[2] * height / frames.shape[1])), height
