"""Clip sampling: frame times in seconds, and crop boxes in pixels.

A video is described by its duration and number of frames: frame `i` is assumed to be displayed from i to i + 1 mean
frame intervals. Randomness comes from a NumPy generator.
"""

import numpy as np
from PIL import Image

from mevit_jax.config.data import ClipConfig

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the original frame

RATE = 30  # frames per second in which `stride` is measured
# Position within a clip's first frame, in frame intervals. A little after its middle, all times of the clip are far
# from frame boundaries at 30 fps; with exactly the middle, every other time at 15 fps would be on a boundary.
_OFFSET = 0.55


def train_times(rng: np.random.Generator, config: ClipConfig, duration: float, num_frames: int) -> np.ndarray:
  """Samples frame times for training, float64 seconds `t`: a random dense clip, or a random time per segment."""
  if config.sampling == 'uniform':
    return (np.arange(config.frames) + rng.random(config.frames)) * duration / config.frames
  start = int(rng.integers(_num_starts(config, duration, num_frames)))
  return _dense(config, start, duration / num_frames)


def view_times(config: ClipConfig, duration: float, num_frames: int, clips: int = 1) -> np.ndarray:
  """Returns frame times for evaluation, float64 seconds `clips t`.

  Dense: the center clip, or evenly spaced clips that include both ends. Uniform: clip `j` of `k` has the frame at
  (j + 1/2) / k of every segment.
  """
  if config.sampling == 'uniform':
    phases = (np.arange(clips)[:, None] + 0.5) / clips
    frames = (np.arange(config.frames) + phases) * num_frames / config.frames
    # Segment positions are often on frame boundaries: round to a frame and use its middle.
    return (np.floor(frames + 1e-6) + 0.5) * duration / num_frames  # clips t
  last = _num_starts(config, duration, num_frames) - 1
  starts = np.arange(clips) * last // (clips - 1) if clips > 1 else np.array([last // 2])
  return _dense(config, starts[:, None], duration / num_frames)  # clips t


def _num_starts(config: ClipConfig, duration: float, num_frames: int) -> int:
  """Number of frames at which a dense clip can start and still fit in the video; 1 for a short video."""
  span = (config.frames - 1) * config.stride / RATE
  return max(1, int(np.ceil(num_frames * (1 - span / duration) - _OFFSET)))


def _dense(config: ClipConfig, start: int | np.ndarray, interval: float) -> np.ndarray:
  return (start + _OFFSET) * interval + np.arange(config.frames) * config.stride / RATE


def train_box(rng: np.random.Generator, config: ClipConfig, height: int, width: int) -> Box:
  """Samples a crop of `size` from a frame whose short side is resized to a random length.

  The frame is enlarged further if it would not cover `size`.
  """
  scale = rng.uniform(*config.short_side) / min(height, width)
  return _box(config, height, width, scale, rng.random(), rng.random())


def view_boxes(config: ClipConfig, height: int, width: int, crops: int = 1) -> list[Box]:
  """Returns crops of a frame resized to just cover `size`: the center one, or evenly spaced with both ends."""
  positions = np.linspace(0, 1, crops) if crops > 1 else np.array([0.5])
  return [_box(config, height, width, 0, position, position) for position in positions.tolist()]


def _box(config: ClipConfig, height: int, width: int, scale: float, x: float, y: float) -> Box:
  """Returns the crop at relative position x, y in [0, 1] of the frame scaled by `scale` or to cover `size`."""
  scale = max(scale, config.size[0] / height, config.size[1] / width)
  box_height, box_width = config.size[0] / scale, config.size[1] / scale
  left, top = x * max(0, width - box_width), y * max(0, height - box_height)
  return left, top, min(width, left + box_width), min(height, top + box_height)


def crop_resize(frame: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
  """Crops `box` from a uint8 frame `h w 3` and resizes it to (height, width), bilinear and antialiased."""
  image = Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR, box)
  return np.asarray(image)  # h w 3
