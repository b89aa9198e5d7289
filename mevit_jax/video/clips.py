"""Which frames a clip has and which part of them: times in seconds, boxes in pixels.

A video is known here by its duration and its number of frames: its frame `i` is taken to be shown
from i to i + 1 mean frame intervals. Randomness comes in as a NumPy generator.
"""

import numpy as np
from PIL import Image

from mevit_jax.config.data import ClipConfig

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the native frame

RATE = 30  # `stride` counts frames of a video of this many frames a second
# A clip aims a little after the middle of its first frame. At 30 fps all its frames are then far
# from where one frame becomes the next; in the very middle, every other one of 15 fps would not be.
_AIM = 0.55


def train_times(rng: np.random.Generator, config: ClipConfig, duration: float, num_frames: int) -> np.ndarray:
  """Random times, float64 seconds `t`: a dense clip's start, or a time in each uniform segment."""
  if config.sampling == 'uniform':
    return (np.arange(config.frames) + rng.random(config.frames)) * duration / config.frames
  start = int(rng.integers(_num_starts(config, duration, num_frames)))
  return _dense(config, start, duration / num_frames)


def view_times(config: ClipConfig, duration: float, num_frames: int, clips: int = 1) -> np.ndarray:
  """Evaluation's times, float64 seconds `clips t`.

  Dense: the centre clip, or clips spread evenly, both ends included. Uniform: clip `j` of `k` has
  the frame at (j + 1/2) / k of every segment.
  """
  if config.sampling == 'uniform':
    phases = (np.arange(clips)[:, None] + 0.5) / clips
    frames = (np.arange(config.frames) + phases) * num_frames / config.frames
    # Segments often meet frames edge to edge: name the frame, and aim at its middle.
    return (np.floor(frames + 1e-6) + 0.5) * duration / num_frames  # clips t
  last = _num_starts(config, duration, num_frames) - 1
  starts = np.arange(clips) * last // (clips - 1) if clips > 1 else np.array([last // 2])
  return _dense(config, starts[:, None], duration / num_frames)  # clips t


def _num_starts(config: ClipConfig, duration: float, num_frames: int) -> int:
  """How many frames a dense clip can start at and end before the video does; 1 for a short one."""
  span = (config.frames - 1) * config.stride / RATE
  return max(1, int(np.ceil(num_frames * (1 - span / duration) - _AIM)))


def _dense(config: ClipConfig, start: int | np.ndarray, interval: float) -> np.ndarray:
  return (start + _AIM) * interval + np.arange(config.frames) * config.stride / RATE


def train_box(rng: np.random.Generator, config: ClipConfig, height: int, width: int) -> Box:
  """A random crop of `size` from a frame whose short side is first scaled to a random length.

  The frame is scaled up further where `size` is wider or taller than it would be.
  """
  scale = rng.uniform(*config.short_side) / min(height, width)
  return _box(config, height, width, scale, rng.random(), rng.random())


def view_boxes(config: ClipConfig, height: int, width: int, crops: int = 1) -> list[Box]:
  """Crops of a frame that just covers `size`: the centre one, or spread evenly, ends included."""
  places = np.linspace(0, 1, crops) if crops > 1 else np.array([0.5])
  return [_box(config, height, width, 0, place, place) for place in places.tolist()]


def _box(config: ClipConfig, height: int, width: int, scale: float, x: float, y: float) -> Box:
  """The crop at x, y in 0..1 of a frame that is scaled, by more if `size` needs it."""
  scale = max(scale, config.size[0] / height, config.size[1] / width)
  box_height, box_width = config.size[0] / scale, config.size[1] / scale
  left, top = x * max(0, width - box_width), y * max(0, height - box_height)
  return left, top, min(width, left + box_width), min(height, top + box_height)


def crop_resize(frame: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
  """The part `box` of a uint8 `h w 3` at another size (height, width), bilinear, antialiased."""
  image = Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR, box)
  return np.asarray(image)  # h w 3
