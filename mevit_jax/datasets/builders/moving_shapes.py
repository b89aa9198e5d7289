"""Moving shapes: a synthetic dataset of eight motions in four pairs; the motions of a pair are each other's reverse.

The two classes of a pair show the same frames in opposite orders, so a model that ignores the order of frames can only
guess between them. The files are H.264 videos. Every frame is a keyframe with a constant quantizer, so that the decoded
frames are exactly reversed too: predicted frames would carry traces of the order.
"""

import colorsys
import dataclasses
import io
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from mevit_jax.datasets.builders import VideoBuilder

FPS = 30
SHARD_VIDEOS = 256
PAIRS = {  # forward, backward
  'horizontal': ('moves_right', 'moves_left'),
  'vertical': ('moves_down', 'moves_up'),
  'size': ('grows', 'shrinks'),
  'turn': ('turns_clockwise', 'turns_anticlockwise'),
}
CLASS_NAMES = tuple(name for pair in PAIRS.values() for name in pair)

# Unions of convex polygons, clockwise (y points down), around the origin, with length 1.
_HEAD = ((0.1, -0.32), (0.5, 0.0), (0.1, 0.32))
SHAPES = {
  'square': (((-0.4, -0.4), (0.4, -0.4), (0.4, 0.4), (-0.4, 0.4)),),
  'rectangle': (((-0.5, -0.3), (0.5, -0.3), (0.5, 0.3), (-0.5, 0.3)),),
  'triangle': (((-0.4, -0.45), (0.5, 0.0), (-0.4, 0.45)),),
  'dart': (((-0.5, -0.2), (0.15, -0.2), (0.15, 0.2), (-0.5, 0.2)), _HEAD),
  'bar': (((-0.5, -0.13), (0.5, -0.13), (0.5, 0.13), (-0.5, 0.13)),),
  'arrow': (((-0.5, -0.12), (0.15, -0.12), (0.15, 0.12), (-0.5, 0.12)), _HEAD),
}


@dataclasses.dataclass(frozen=True)
class Pose:
  """Pose of a shape: center and length as fractions of the frame's side, angle in radians."""

  x: float
  y: float
  length: float
  angle: float


@dataclasses.dataclass(frozen=True)
class Params:
  """Content of a clip, independent of the direction of play: a shape that moves between two poses.

  Attributes:
    shape: a key of SHAPES.
    start, end: poses of the first and last frame, played forward.
    color: red, green and blue in 0..1.
    background: colors at opposite ends of the frame.
    gradient: direction from the first to the second background color, in radians.
  """

  shape: str
  start: Pose
  end: Pose
  color: tuple[float, ...]
  background: tuple[tuple[float, ...], tuple[float, ...]]
  gradient: float


def draw(pair: str, rng: np.random.Generator) -> Params:
  """Draws random parameters of a clip of `pair`, independent of the direction of play."""
  shapes = ('bar', 'arrow') if pair == 'turn' else ('square', 'rectangle', 'triangle', 'dart')
  start, end = _poses(pair, rng)
  dim = _color(rng, value=(0.05, 0.3))
  return Params(
    shape=shapes[rng.integers(len(shapes))],
    start=start,
    end=end,
    color=_color(rng, value=(0.8, 1.0), saturation=(0.3, 1.0)),
    background=(dim, dim if rng.random() < 0.5 else _color(rng, value=(0.05, 0.3))),
    gradient=rng.uniform(0, 2 * np.pi),
  )


def _poses(pair: str, rng: np.random.Generator) -> tuple[Pose, Pose]:
  angle = rng.uniform(0, 2 * np.pi)
  if pair == 'turn':
    x, y = rng.uniform(0.47, 0.53, 2)
    length, turn = rng.uniform(0.75, 1.0), np.radians(rng.uniform(120, 200))
    return Pose(x, y, length, angle), Pose(x, y, length, angle + turn)
  if pair == 'size':
    x, y = rng.uniform(0.35, 0.65, 2)
    small, factor = rng.uniform(0.2, 0.32), rng.uniform(2.0, 3.0)
    return Pose(x, y, small, angle), Pose(x, y, small * factor, angle)
  length, distance, drift = rng.uniform(0.34, 0.46), rng.uniform(0.4, 0.7), rng.uniform(-0.06, 0.06)
  along = rng.uniform(0.1, 0.9 - distance)
  across = rng.uniform(0.2, 0.8)
  first, last = (along, across - drift), (along + distance, across + drift)
  if pair == 'vertical':
    first, last = first[::-1], last[::-1]
  return Pose(*first, length, angle), Pose(*last, length, angle)


def _color(
  rng: np.random.Generator,
  value: tuple[float, float],
  saturation: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, ...]:
  return colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))


def render(name: str, params: Params, frames: int = 16, size: int = 48) -> np.ndarray:
  """Renders one clip; `moves_left` is exactly `moves_right` reversed, and so for each pair.

  Returns:
    uint8 `t h w 3`, `frames` square frames of `size` pixels.
  """
  is_forward = any(name == pair[0] for pair in PAIRS.values())
  coverage = _coverage(params, frames, size)[..., None]  # t h w 1
  video = np.asarray(params.color, np.float32) * coverage + _background(params, size) * (1 - coverage)
  video = (255 * video + 0.5).astype(np.uint8)  # t h w 3
  return video if is_forward else video[::-1]


def _coverage(params: Params, frames: int, size: int) -> np.ndarray:
  """Returns the fraction of each pixel that the shape covers: `t h w` in 0..1."""
  time = np.linspace(0, 1, frames)
  start, end = params.start, params.end
  length = size * start.length * (end.length / start.length) ** time  # t, in pixels
  angle = start.angle + (end.angle - start.angle) * time
  x = size * (start.x + (end.x - start.x) * time)
  y = size * (start.y + (end.y - start.y) * time)
  center = np.stack([x, y], -1)  # t 2
  rotation = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1)
  rotation = rotation.reshape(frames, 2, 2)
  grid = np.arange(size, dtype=np.float32) + 0.5
  outside = np.full((frames, size, size), np.inf, np.float32)
  for polygon in SHAPES[params.shape]:
    corners = np.asarray(polygon)
    edges = np.roll(corners, -1, axis=0) - corners
    normals = np.stack([edges[:, 1], -edges[:, 0]], -1) / np.linalg.norm(edges, axis=-1)[:, None]
    offsets = (normals * corners).sum(-1)  # e
    normals = np.einsum('tij,ej->tei', rotation, normals)  # t e 2
    offsets = offsets * length[:, None] + np.einsum('tei,ti->te', normals, center)
    normals, offsets = normals.astype(np.float32), offsets.astype(np.float32)
    # Distance beyond the farthest edge: negative inside, because the polygon is convex.
    beyond = np.full_like(outside, -np.inf)
    for e in range(len(corners)):
      across = normals[:, e, 0, None] * grid  # t w
      down = normals[:, e, 1, None] * grid - offsets[:, e, None]  # t h
      np.maximum(beyond, down[:, :, None] + across[:, None, :], out=beyond)
    np.minimum(outside, beyond, out=outside)
  return np.clip(0.5 - outside, 0, 1)


def _background(params: Params, size: int) -> np.ndarray:
  """Returns a plain color or a smooth gradient: `h w 3` in 0..1."""
  grid = np.linspace(-0.5, 0.5, size, dtype=np.float32)
  ramp = np.cos(params.gradient) * grid + np.sin(params.gradient) * grid[:, None]
  ramp = (ramp / np.sqrt(2) + 0.5)[..., None].astype(np.float32)  # h w 1
  near, far = np.asarray(params.background, np.float32)
  return near + (far - near) * ramp


def encode(video: np.ndarray) -> bytes:
  """Encodes uint8 `t h w 3` as H.264 in MP4 at 30 frames per second; height and width must be even."""
  file = io.BytesIO()
  options = {'preset': 'veryfast', 'qp': '16', 'g': '1', 'bf': '0', 'threads': '1'}
  with av.open(file, 'w', format='mp4') as container:
    stream = container.add_stream('libx264', rate=FPS, options=options)
    stream.height, stream.width = video.shape[1:3]
    stream.pix_fmt, stream.time_base = 'yuv420p', Fraction(1, FPS)
    for frame in video:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
    container.mux(stream.encode())
  return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Item:
  """Everything that one video depends on."""

  seed: int
  split: str
  index: int
  frames: int
  size: int


class MovingShapes(VideoBuilder):
  """Eight motions of a shape in four pairs; the motions of a pair are each other's reverse."""

  @staticmethod
  def make(item: Item) -> dict[str, Any]:
    """Renders and encodes one video."""
    name, params = clip(item)
    return {
      'video': encode(render(name, params, item.frames, item.size)),
      'label': name,
      'id': f'{item.split}/{item.index:06d}',
      'num_frames': item.frames,
      'fps': float(FPS),
      'duration': item.frames / FPS,
      'height': item.size,
      'width': item.size,
    }


def clip(item: Item) -> tuple[str, Params]:
  """Returns the class (index modulo the number of classes) and the parameters of a video."""
  name = CLASS_NAMES[item.index % len(CLASS_NAMES)]
  pair = next(pair for pair, names in PAIRS.items() if name in names)
  return name, draw(pair, make_rng(item))


def make_rng(item: Item) -> np.random.Generator:
  """Returns the random generator of a video, seeded by (seed, split, index)."""
  return np.random.default_rng([item.seed, item.index, *item.split.encode()])


def build(
  data_dir: str | Path,
  videos: Mapping[str, int],
  seed: int = 0,
  frames: int = 16,
  size: int = 48,
  name: str = 'moving_shapes',
) -> MovingShapes:
  """Returns the builder of a dataset with `videos[split]` videos per split, of `frames` frames of `size` pixels."""
  shards = {
    split: [
      [Item(seed, split, i, frames, size) for i in range(first, min(first + SHARD_VIDEOS, count))]
      for first in range(0, count, SHARD_VIDEOS)
    ]
    for split, count in videos.items()
  }
  return MovingShapes(data_dir, name, CLASS_NAMES, shards)
