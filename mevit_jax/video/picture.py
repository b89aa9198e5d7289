"""Pictures as displayed: oriented, with square pixels, in standard dynamic range."""

import math
import threading
from typing import Any, NamedTuple

import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation, VideoReformatter

from mevit_jax.video.container import VideoError

_HDR = {ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67}  # PQ and HLG
_TO_SDR: dict[str, Any] = {
  'dst_color_trc': ColorTrc.BT709,
  'dst_color_primaries': ColorPrimaries.BT709,
  'dst_colorspace': Colorspace.ITU709,
}
_MAX_TILT = math.tan(math.radians(1))


class Orientation(NamedTuple):
  """Rotation by multiples of 90 degrees and mirroring: an optional transpose, followed by optional flips."""

  transpose: bool = False
  flip_y: bool = False
  flip_x: bool = False


def orientation_of(frame: VideoFrame) -> Orientation:
  """Returns the orientation that a frame's display matrix requests (rotation, or a front camera's mirroring).

  Reading side data keeps the frame's memory until Python next collects reference cycles, because side data and frame
  refer to each other. Call it once per video.

  Raises:
    VideoError: the rotation is not a multiple of 90 degrees.
  """
  side_data: Any = frame.side_data
  if Type.DISPLAYMATRIX not in side_data:
    return Orientation()
  a, b, _, c, d, *_ = np.frombuffer(side_data[Type.DISPLAYMATRIX], np.int32).tolist()
  upright, sideways = max(abs(a), abs(d)), max(abs(b), abs(c))
  if min(upright, sideways) > _MAX_TILT * max(upright, sideways):
    angle = math.degrees(math.atan2(b, a)) % 360
    raise VideoError(f'rotated by {angle:.0f} degrees, not by a multiple of 90; re-encode it upright')
  return Orientation(True, b < 0, c < 0) if sideways > upright else Orientation(False, d < 0, a < 0)


def displayed_size(height: int, width: int, orientation: Orientation) -> tuple[int, int]:
  """Converts a stored (height, width) to the displayed one; also the inverse."""
  return (width, height) if orientation.transpose else (height, width)


def apply_orientation(pixels: np.ndarray, orientation: Orientation) -> np.ndarray:
  """Returns a view of an array `h w ...` as displayed."""
  pixels = pixels.swapaxes(0, 1) if orientation.transpose else pixels
  return pixels[:: -1 if orientation.flip_y else 1, :: -1 if orientation.flip_x else 1]


def rescale(
  frame: VideoFrame, reformatter: VideoReformatter, width: int, height: int, pixels: str, **options: Any
) -> VideoFrame:
  """Scales a frame, converts its pixel format, and maps HDR (PQ or HLG, BT.2020) to SDR (BT.709), all by swscale.

  SDR's white is HDR's reference white (203 nits); brighter highlights are clipped.
  """
  if (frame.width, frame.height) != (width, height):
    options.setdefault('interpolation', Interpolation.BICUBIC)
  if frame.color_trc in _HDR:
    reformatter, options = _hdr_reformatter(frame, width, height, pixels), options | _TO_SDR
  return reformatter.reformat(frame, width, height, pixels, threads=1, **options)


def is_hdr(frame: VideoFrame) -> bool:
  """Returns True if a frame's transfer function is PQ or HLG."""
  return frame.color_trc in _HDR


class _Reformatters(threading.local):
  """Reformatters of HDR frames. The first frame of each costs two seconds: swscale builds a table of colors."""

  def __init__(self) -> None:
    self.by_format: dict[tuple, VideoReformatter] = {}


_REFORMATTERS = _Reformatters()
_MAX_REFORMATTERS = 8


def _hdr_reformatter(frame: VideoFrame, *target: Any) -> VideoReformatter:
  source = frame.width, frame.height, frame.format.name, frame.color_trc, frame.color_primaries, frame.colorspace
  key = (*source, frame.color_range, *target)
  cached = _REFORMATTERS.by_format
  if key not in cached and len(cached) == _MAX_REFORMATTERS:
    cached.pop(next(iter(cached)))
  return cached.setdefault(key, VideoReformatter())


class ToRGB:
  """Converts a video's frames to RGB arrays as displayed. The orientation is read from the first frame.

  Args:
    width: width to scale to, before orientation.
    height: height to scale to, before orientation.
  """

  def __init__(self, width: int, height: int):
    self._size = width, height
    self._reformatter = VideoReformatter()
    self._orientation: Orientation | None = None

  def __call__(self, frame: VideoFrame) -> np.ndarray:
    if self._orientation is None:  # read once: see `orientation_of`
      self._orientation = orientation_of(frame)
    rgb = rescale(frame, self._reformatter, *self._size, 'rgb24')
    return np.ascontiguousarray(apply_orientation(rgb.to_ndarray(), self._orientation))  # h w 3
