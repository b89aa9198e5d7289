"""Opening, demuxing and decoding encoded video files: the layer over PyAV that the rest of `video` uses."""

import contextlib
import io
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mevit_jax.errors import UserError

av.logging.set_level(None)  # errors are raised; FFmpeg's own messages would flood the terminal

# Containers that store a presentation timestamp for every packet. For others FFmpeg estimates them, wrongly for AVI
# with reordered frames.
CONTAINERS_WITH_PTS = {'mov,mp4,m4a,3gp,3g2,mj2', 'matroska,webm'}
# Decoders that skip packets they cannot decode: HEVC without an error, H.264 after one error, until the next keyframe.
_CODECS_THAT_SKIP = {'hevc', 'h264'}
# Metadata that is not UTF-8: PyAV 18 raises an error unless told otherwise, PyAV 19 has no such option.
_METADATA: dict[str, Any] = {'metadata_errors': 'replace'} if int(av.__version__.split('.')[0]) < 19 else {}
_STILL_IMAGE = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails

File = bytes | Path  # an encoded file: its bytes, or a path that is read in parts


class VideoError(UserError):
  """A video that cannot be used; the message is the reason, in one line."""


@contextlib.contextmanager
def open_video(file: File) -> Iterator[tuple[InputContainer, VideoStream]]:
  """Opens a file and selects its main video stream.

  Raises:
    VideoError: the file has no video stream that can be decoded.
    OSError: the file cannot be read.
  """
  # Python opens the path: FFmpeg would interpret names such as 'http:...' and 'concat:...'.
  with contextlib.ExitStack() as stack:
    handle = stack.enter_context(file.open('rb') if isinstance(file, Path) else io.BytesIO(file))
    if not handle.read(1):
      raise VideoError('the file is empty')
    handle.seek(0)
    try:
      container = stack.enter_context(av.open(handle, 'r', **_METADATA))
    except av.FFmpegError as error:
      raise VideoError(f'not a video that FFmpeg can open: {error_reason(error)}') from error
    if container.format.name.endswith('_pipe'):
      raise VideoError(f'a still image ({container.format.name.removesuffix("_pipe")})')
    stream = _main_stream(container)
    stream.thread_type = 'NONE'  # worker processes provide the parallelism
    stream.codec_context.thread_count = 1
    yield container, stream


def _main_stream(container: InputContainer) -> VideoStream:
  streams = [stream for stream in container.streams.video if not stream.disposition & _STILL_IMAGE]
  if not streams:
    raise VideoError('no video stream')
  streams = [stream for stream in streams if stream.codec_context is not None]
  if not streams:
    raise VideoError('no decoder for its video stream')
  best = container.streams.best('video')
  return best if best in streams else max(streams, key=lambda s: s.width * s.height)


@dataclass
class Demuxer:
  """Iterator over the packets of the video stream.

  Attributes:
    container: the open file.
    stream: its video stream.
    all_streams: reads the other streams too, because audio may last longer than video.
    time_limit: seconds after which iteration raises VideoError.
    count: number of video packets so far.
    end: end time of the last packet of any stream in seconds since the start of the file; needs `all_streams`.
    error: the FFmpeg error that ended iteration early, or ''.
  """

  container: InputContainer
  stream: VideoStream
  all_streams: bool = False
  time_limit: float | None = None
  count: int = 0
  end: float = 0.0
  error: str = ''

  def __iter__(self) -> Iterator[Packet]:
    began, start = time.monotonic(), (self.container.start_time or 0) / av.time_base
    try:
      for packet in self.container.demux() if self.all_streams else self.container.demux(self.stream):
        if packet.size == 0 and packet.pts is None and packet.dts is None:
          continue  # PyAV's own end-of-stream packets
        if self.time_limit and time.monotonic() - began > self.time_limit:
          raise VideoError(f'takes longer than {self.time_limit:g} s to decode')
        if self.all_streams and packet.pts is not None:
          end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
          self.end = max(self.end, end - start)
        if packet.stream_index == self.stream.index:
          self.count += 1
          yield packet
    except av.FFmpegError as error:
      self.error = error_reason(error)
    except IndexError:  # raised by PyAV at the end of a file, if a stream first appeared in the middle
      pass
    if not self.count:
      raise VideoError(f'no video packets{self.error and f": {self.error}"}')


@dataclass
class PacketDecoder:
  """Decodes all packets once and records properties of the frames, in the order of the decoder's output.

  Attributes:
    stream: the video stream.
    has_pts: the container stores presentation timestamps, see `CONTAINERS_WITH_PTS`.
    timestamps: presentation timestamp of every frame in units of the stream's time base; None if unknown.
    durations: duration of every frame in seconds; 0 if unknown.
    errors: FFmpeg's message for every packet that raised an error.
    shape: height and width of the first frame as displayed.
  """

  stream: VideoStream
  has_pts: bool
  timestamps: list[int | None] = field(default_factory=list)
  durations: list[float] = field(default_factory=list)
  errors: list[str] = field(default_factory=list)
  shape: tuple[int, int] = (0, 0)
  _first_keyframe: int | None = None  # timestamp
  _num_expected: int = 0  # packets that decoded without an error and must have produced a frame
  _interlaced: bool = False

  def run(self, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
    """Decodes the packets; records the error of a packet that fails and continues with the next one."""
    for packet in itertools.chain(packets, [None]):
      expected = packet is not None and self._expects_frame(packet)
      try:
        decoded = self.stream.decode(packet)
      except av.FFmpegError as error:
        self.errors.append(error_reason(error))
        continue
      self._num_expected += expected
      for frame in decoded:
        if not self.timestamps:
          self.shape = displayed_size(frame.height, frame.width, orientation_of(frame))
        self.timestamps.append(frame.pts)
        self.durations.append((frame.duration or 0) * time_base_seconds(self.stream))
        self._interlaced |= frame.interlaced_frame
        yield frame
    if not self.timestamps:
      raise VideoError(': '.join(['no frame decodes', *self.errors[:1]]))

  def _expects_frame(self, packet: Packet) -> bool:
    """Returns True if a packet must produce a frame; packets before the first keyframe need not.

    These are packets that come before it in the file, or that are displayed before it.
    """
    if self._first_keyframe is None and (packet.is_keyframe or self.has_pts):
      # With timestamps the first packet counts, also if it is corrupt and therefore not recognized as a keyframe.
      self._first_keyframe = packet.pts
    if self._first_keyframe is None or packet.pts is None or packet.is_discard or not packet.size:
      return False
    return packet.pts >= self._first_keyframe

  def failures(self) -> list[str]:
    """Returns the reason for every packet that does not decode."""
    first, codec = self._first_keyframe, self.stream.codec_context.codec.canonical_name
    if first is None or codec not in _CODECS_THAT_SKIP or (codec == 'h264' and (self._interlaced or not self.errors)):
      return self.errors  # two packets of interlaced H.264 may be the fields of one frame
    num_frames = sum(timestamp is not None and timestamp >= first for timestamp in self.timestamps)
    return self.errors + ['the decoder returned no frame'] * (self._num_expected - num_frames)

  @property
  def rate(self) -> Fraction:
    """Nominal frame rate."""
    return self.stream.guessed_rate or self.stream.average_rate or Fraction(25)

  def timeline(self) -> tuple[np.ndarray, Fraction]:
    """Returns every frame's display time, int64 from 0, and its unit in seconds.

    Decoders output frames in display order. Where timestamps contradict this order, they are trusted only if the
    container stores them.
    """
    if None in self.timestamps:
      return np.arange(len(self.timestamps)), 1 / self.rate
    timestamps = np.array(self.timestamps, np.int64)
    ordered = timestamps if self.has_pts else np.sort(timestamps)
    return ordered - timestamps.min(), self.stream.time_base or 1 / self.rate


class Orientation(NamedTuple):
  """Rotation by multiples of 90 degrees and mirroring: an optional transpose, followed by optional flips."""

  transpose: bool = False
  flip_y: bool = False
  flip_x: bool = False


def orientation_of(frame: VideoFrame) -> Orientation:
  """Returns the orientation that a frame's display matrix requests (rotation, or a front camera's mirroring).

  Reading side data keeps the frame's memory until Python next collects reference cycles, because side data and frame
  refer to each other. Call it once per video.
  """
  side_data: Any = frame.side_data
  if Type.DISPLAYMATRIX not in side_data:
    return Orientation()
  a, b, _, c, d, *_ = np.frombuffer(side_data[Type.DISPLAYMATRIX], np.int32).tolist()
  return Orientation(True, b < 0, c < 0) if abs(b) > abs(a) else Orientation(False, d < 0, a < 0)


def displayed_size(height: int, width: int, orientation: Orientation) -> tuple[int, int]:
  """Converts a stored (height, width) to the displayed one; also the inverse."""
  return (width, height) if orientation.transpose else (height, width)


def apply_orientation(pixels: np.ndarray, orientation: Orientation) -> np.ndarray:
  """Returns a view of an array `h w ...` as displayed."""
  pixels = pixels.swapaxes(0, 1) if orientation.transpose else pixels
  return pixels[:: -1 if orientation.flip_y else 1, :: -1 if orientation.flip_x else 1]


def time_base_seconds(stream: VideoStream) -> float:
  """Unit of the stream's timestamps in seconds; 0 if unknown."""
  return float(stream.time_base or 0)


def error_reason(error: av.FFmpegError) -> str:
  """Formats an FFmpeg error in one line."""
  return error.strerror or type(error).__name__
