"""Re-encoding of videos during dataset preparation, so that decoding a few of their frames is cheap.

The defaults are a trade-off between size, CPU time and PSNR: see docs/data.md.
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
from mevit_jax.video.container import MAX_PIXELS, VideoError, error_reason
from mevit_jax.video.decode import FrameIterator, VideoInfo, inspect
from mevit_jax.video.picture import apply_orientation, displayed_size, is_hdr, orientation_of, rescale

KINDS = ('keep', 'h264')

# Each frame refers only to the previous one, so that decoding a frame needs just those since its keyframe. Without
# CABAC frames decode in two thirds of the time. Tuned for PSNR, not for visual quality.
_X264 = {
  'preset': 'veryfast',
  'tune': 'psnr',
  'a53cc': '0',
  'x264-params': 'cabac=0:ref=1:weightp=0:bframes=0:scenecut=0',
}
_MAX_GAP = 2**31  # ticks between consecutive frames in mp4


@dataclass(frozen=True)
class Encoding:
  """Storage format of a dataset's videos.

  Attributes:
    kind: 'keep' stores the original bytes; 'h264' re-encodes without audio.
    short_side: maximum short side in pixels; videos are never scaled up, and 0 keeps the original size.
    keyframes: keyframe interval in frames.
    quality: x264's CRF; lower is better.

  Raises:
    UserError: a value is out of range.
  """

  kind: str = 'keep'
  short_side: int = 320
  keyframes: int = 6
  quality: int = 23

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise UserError(f'encoding must be {" or ".join(map(repr, KINDS))}, not {self.kind!r}')
    if self.short_side < 2 and self.short_side != 0:
      raise UserError(f'short_side must be at least 2 pixels, or 0 to keep the original size, not {self.short_side}')
    if self.keyframes < 1:
      raise UserError(f'keyframes must be at least 1 (every frame), not {self.keyframes}')
    if not 0 <= self.quality <= 51:
      raise UserError(f'quality must be an x264 CRF in [0, 51] (lower is better), not {self.quality}')


def reencode(
  data: bytes, encoding: Encoding, time_limit: float | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[bytes, VideoInfo, VideoInfo]:
  """Returns the bytes to store, the properties of the source, and those of the stored video.

  The source is decoded once, frame by frame; of a damaged source the decodable frames are stored. Frames keep their
  display times, orientation is applied, pixels become square, and HDR is mapped to SDR. The source is kept unchanged if
  its frames are not in the order of their timestamps, or have gaps that exceed mp4's limit.

  Args:
    data: an encoded file.
    encoding: storage format.
    time_limit: maximum seconds for decoding and encoding, checked between packets.
    max_pixels: limit of height x width of a frame.

  Raises:
    VideoError: as `inspect`, or the frames cannot be encoded.
  """
  if encoding.kind == 'keep':
    info = inspect(data, time_limit, max_pixels)
    return data, info, info
  frames = FrameIterator(data, time_limit, max_pixels)
  encoder = _Encoder(encoding, frames)
  try:
    for frame in frames:
      encoder.add(frame)
    ticks = np.append(frames.ticks, round(frames.info.duration / frames.tick))
    gaps = np.diff(ticks)
    if gaps.min() < 1 or gaps.max() >= _MAX_GAP:
      return data, frames.info, frames.info
    stored = encoder.finish(ticks.tolist(), frames.tick)
  except av.FFmpegError as error:
    raise VideoError(f'cannot be re-encoded: {error_reason(error)}') from error
  info = inspect(stored, None, max_pixels)
  if info.damage or info.num_frames != frames.info.num_frames:
    raise VideoError(f're-encoding kept {info.num_frames} of {frames.info.num_frames} frames {info.damage}'.rstrip())
  return stored, frames.info, info


class _Encoder:
  """Encodes the frames of an iterator to an mp4 file; display times are assigned at the end, when all are known."""

  def __init__(self, encoding: Encoding, frames: FrameIterator):
    self._encoding, self._frames = encoding, frames
    self._packets: list[Packet] = []
    self._count = 0
    self._reformatter = VideoReformatter()
    self._file = io.BytesIO()
    self._output = av.open(self._file, 'w', format='mp4')
    self._stream = self._output.add_stream('libx264', rate=30, options=_X264 | {'crf': str(encoding.quality)})

  def _start(self, frame: VideoFrame) -> None:
    """Configures the stream; size and orientation of the first frame apply to all frames."""
    self._orientation = orientation_of(frame)
    width, height = self._frames.size
    sides = displayed_size(height, width, self._orientation)
    target = min(*sides, self._encoding.short_side or min(sides))
    # Even, because chroma is subsampled 2 x 2; an odd side is scaled down by a pixel.
    self._stream.height, self._stream.width = [max(2, side * target // min(sides) // 2 * 2) for side in sides]
    self._stream.pix_fmt = 'yuv420p'
    context = self._stream.codec_context
    context.time_base = Fraction(1, 30)  # a placeholder: `finish` sets the real one
    context.gop_size, context.thread_count = self._encoding.keyframes, 1  # one thread makes the output deterministic
    context.color_range = ColorRange.MPEG
    # RGB has no YUV color space.
    context.colorspace = Colorspace.ITU709 if is_hdr(frame) else frame.colorspace or Colorspace.ITU601

  def add(self, frame: VideoFrame) -> None:
    """Encodes the next frame, which may have any size and pixel format."""
    if self._count == 0:
      self._start(frame)
    context = self._stream.codec_context
    height, width = displayed_size(context.height, context.width, self._orientation)
    picture = rescale(
      frame,
      self._reformatter,
      width,
      height,
      'yuv420p',
      dst_colorspace=context.colorspace,
      dst_color_range=ColorRange.MPEG,
      interpolation=Interpolation.BICUBIC,
    )
    picture = self._orient(picture)
    picture.pts, picture.time_base = self._count, context.time_base
    self._packets += self._stream.encode(picture)
    self._count += 1

  def _orient(self, picture: VideoFrame) -> VideoFrame:
    """Applies the orientation to a yuv420p frame; returns a new frame without the source's picture type."""
    pixels = picture.to_ndarray()  # the three planes, concatenated vertically
    height, width = picture.height, picture.width
    luma, blue, red = np.split(pixels.ravel(), [height * width, height * width * 5 // 4])
    half = height // 2, width // 2
    planes = [apply_orientation(luma.reshape(height, width), self._orientation)]  # h w
    planes += [apply_orientation(chroma.reshape(half), self._orientation) for chroma in (blue, red)]
    pixels = np.concatenate([plane.ravel() for plane in planes]).reshape(-1, planes[0].shape[1])
    return VideoFrame.from_ndarray(pixels, 'yuv420p')

  def finish(self, times: list[int], tick: Fraction) -> bytes:
    """Returns the mp4 file.

    Args:
      times: display time of every frame, and the end of the last one, in ticks.
      tick: length of a tick in seconds.
    """
    self._packets += self._stream.encode(None)
    self._stream.time_base = tick
    for packet, start, end in zip(self._packets, times[:-1], times[1:], strict=True):
      packet.time_base, packet.pts, packet.dts, packet.duration = tick, start, start, end - start
      self._output.mux(packet)
    self._output.close()
    return self._file.getvalue()
