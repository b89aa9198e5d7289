"""Videos stored so that a few of their frames are cheap to read: encoded again, once, when a dataset is prepared.

The defaults come from a frontier of bytes, CPU and PSNR: docs/data.md.
"""

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from mevit_jax.errors import UserError
from mevit_jax.video.container import VideoError, reason, turned, turns_of, upright
from mevit_jax.video.decode import VideoInfo, Walk, inspect

KINDS = ('keep', 'h264')

# A frame refers to the one before it and to no other, so none is decoded but those from the keyframe to the one wanted.
# Without CABAC frames decode in two thirds of the time. Least squares (tune psnr), not what flatters the eye.
_X264 = {
  'preset': 'veryfast',
  'tune': 'psnr',
  'a53cc': '0',
  'x264-params': 'cabac=0:ref=1:weightp=0:bframes=0:scenecut=0',
}
_LONGEST = 2**31  # ticks from a frame to the next, in mp4


@dataclass(frozen=True)
class Encoding:
  """How a dataset's videos are stored.

  'keep' stores a file's bytes as they are. 'h264' encodes it again, without its sound: `short_side` pixels at most (0:
  as it is; never scaled up), a keyframe every `keyframes` frames, and `quality` as x264's crf, less is better. Raises
  UserError for what cannot be.
  """

  kind: str = 'keep'
  short_side: int = 320
  keyframes: int = 6
  quality: int = 23

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(f'encoding is {" or ".join(map(repr, KINDS))}, not {self.kind!r}')
    if self.short_side < 2 and self.short_side != 0:
      raise UserError(f'short_side is at least 2 pixels, or 0 for as it is, not {self.short_side}')
    if self.keyframes < 1:
      raise UserError(f'keyframes is at least 1, every frame, not {self.keyframes}')
    if not 0 <= self.quality <= 51:
      raise UserError(f"quality is x264's crf, from 0 to 51 and less is better, not {self.quality}")


def reencode(data: bytes, encoding: Encoding, time_limit: float | None = None) -> tuple[bytes, VideoInfo, VideoInfo]:
  """The bytes to store, what `inspect` says of the source, and what it says of them.

  The source is decoded once, a frame at a time; what decodes of a damaged one is stored. Frames keep their display
  times, and are stored upright. A source is kept as it is where its frames are not in the order of their times, or have
  gaps that an mp4 file cannot hold.

  Args:
    data: an encoded file.
    encoding: how to store it.
    time_limit: seconds that it may take to decode and encode, looked at between packets.

  Raises:
    VideoError: as `inspect`, or its frames cannot be encoded.
  """
  if encoding.kind == 'keep':
    info = inspect(data, time_limit)
    return data, info, info
  walk, encoder = Walk(data, time_limit), _Encoder(encoding)
  try:
    for frame in walk:
      encoder.add(frame)
    times = np.append(walk.ticks, round(walk.info.duration / walk.tick))
    gaps = np.diff(times)
    if gaps.min() < 1 or gaps.max() >= _LONGEST:
      return data, walk.info, walk.info
    stored = encoder.finish(times.tolist(), walk.tick)
  except av.FFmpegError as error:
    raise VideoError(f'cannot be encoded again: {reason(error)}') from error
  info = inspect(stored)
  if info.damage or info.num_frames != walk.info.num_frames:
    raise VideoError(f'of {walk.info.num_frames} frames {info.num_frames} are there when encoded again {info.damage}')
  return stored, walk.info, info


class _Encoder:
  """Frames in, an mp4 file out; their times are given when all of them are there."""

  def __init__(self, encoding: Encoding):
    self._encoding = encoding
    self._packets: list[Packet] = []
    self._count = 0
    self._reformatter = VideoReformatter()
    self._file = io.BytesIO()
    self._output = av.open(self._file, 'w', format='mp4')
    self._stream = self._output.add_stream('libx264', rate=30, options=_X264 | {'crf': str(encoding.quality)})

  def _start(self, frame: VideoFrame) -> None:
    """A video has its first frame's size and is turned as that is, whatever comes later."""
    self._turns = turns_of(frame)
    sides = turned(frame.height, frame.width, self._turns)
    target = min(*sides, self._encoding.short_side or min(sides))
    # Even, because 2 x 2 pixels share a colour: what is left over is scaled away.
    self._stream.height, self._stream.width = [max(2, side * target // min(sides) // 2 * 2) for side in sides]
    self._stream.pix_fmt = 'yuv420p'
    context = self._stream.codec_context
    context.time_base = Fraction(1, 30)  # of no consequence: `finish` knows better
    context.gop_size, context.thread_count = self._encoding.keyframes, 1  # one thread: the same bytes every time
    context.color_range = ColorRange.MPEG
    context.colorspace = frame.colorspace or Colorspace.ITU601  # RGB has none of these

  def add(self, frame: VideoFrame) -> None:
    """The next frame, of any size and format."""
    if self._count == 0:
      self._start(frame)
    context = self._stream.codec_context
    height, width = turned(context.height, context.width, self._turns)
    picture = self._reformatter.reformat(
      frame,
      width,
      height,
      'yuv420p',
      dst_colorspace=context.colorspace,
      dst_color_range=ColorRange.MPEG,
      interpolation=Interpolation.BICUBIC,
      threads=1,
    )
    picture = self._upright(picture)
    picture.pts, picture.time_base = self._count, context.time_base
    self._packets += self._stream.encode(picture)
    self._count += 1

  def _upright(self, picture: VideoFrame) -> VideoFrame:
    """A yuv420p picture as it is displayed; a new one, which knows nothing of the source's keyframes."""
    pixels = picture.to_ndarray()  # its three planes, one below the other
    height, width = picture.height, picture.width
    luma, blue, red = np.split(pixels.ravel(), [height * width, height * width * 5 // 4])
    half = height // 2, width // 2
    planes = [upright(luma.reshape(height, width), self._turns)]  # h w
    planes += [upright(chroma.reshape(half), self._turns) for chroma in (blue, red)]
    pixels = np.concatenate([plane.ravel() for plane in planes]).reshape(-1, planes[0].shape[1])
    return VideoFrame.from_ndarray(pixels, 'yuv420p')

  def finish(self, times: list[int], tick: Fraction) -> bytes:
    """The file; `times`, in ticks of so many seconds, are when its frames are displayed, and when the last one ends."""
    self._packets += self._stream.encode(None)
    self._stream.time_base = tick
    for packet, start, end in zip(self._packets, times[:-1], times[1:], strict=True):
      packet.time_base, packet.pts, packet.dts, packet.duration = tick, start, start, end - start
      self._output.mux(packet)
    self._output.close()
    return self._file.getvalue()
