"""An encoded file opened, its packets and its decoded frames, one by one: what `video` is made of."""

import contextlib
import io
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

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

av.logging.set_level(None)  # errors are raised; FFmpeg's own complaints would flood the terminal

# These carry a display time for every packet. Others guess: AVI's are wrong where frames reorder.
TIMED = {'mov,mp4,m4a,3gp,3g2,mj2', 'matroska,webm'}
# Their decoders pass over what they cannot decode: HEVC's without an error, H.264's after one, until the next keyframe.
_SILENT = {'hevc', 'h264'}
_PICTURE = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails

File = bytes | Path  # an encoded file: in memory, or to be read in parts


class VideoError(UserError):
  """A video that cannot be used: the message is its reason, in one line."""


@contextlib.contextmanager
def opened(data: File) -> Iterator[tuple[InputContainer, VideoStream]]:
  """A file, and the video stream that is meant. Raises VideoError if there is none, OSError if it cannot be read."""
  # A path is opened here: FFmpeg would take 'http:...' and 'concat:...' for more than names.
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(data.open('rb') if isinstance(data, Path) else io.BytesIO(data))
    if not file.read(1):
      raise VideoError('the file is empty')
    file.seek(0)
    try:
      container = stack.enter_context(av.open(file, 'r', metadata_errors='replace'))
    except av.FFmpegError as error:
      raise VideoError(f'not a video that FFmpeg can open: {reason(error)}') from error
    if container.format.name.endswith('_pipe'):
      raise VideoError(f'a still image ({container.format.name.removesuffix("_pipe")})')
    stream = _best_stream(container)
    stream.thread_type = 'NONE'  # worker processes are the parallelism
    stream.codec_context.thread_count = 1
    yield container, stream


def _best_stream(container: InputContainer) -> VideoStream:
  streams = [stream for stream in container.streams.video if not stream.disposition & _PICTURE]
  if not streams:
    raise VideoError('no video stream')
  streams = [stream for stream in streams if stream.codec_context is not None]
  if not streams:
    raise VideoError('no decoder for its video stream')
  best = container.streams.best('video')
  return best if best in streams else max(streams, key=lambda s: s.width * s.height)


@dataclass
class Demux:
  """The stream's packets, one by one. `everything` reads the other streams too: sound may last longer than pictures.

  Then `end` is where in seconds that ended, and `torn` the error that ended it, or ''.
  """

  container: InputContainer
  stream: VideoStream
  everything: bool = False
  time_limit: float | None = None
  count: int = 0
  end: float = 0.0
  torn: str = ''

  def __iter__(self) -> Iterator[Packet]:
    began, start = time.monotonic(), (self.container.start_time or 0) / av.time_base
    try:
      for packet in self.container.demux() if self.everything else self.container.demux(self.stream):
        if packet.size == 0 and packet.pts is None and packet.dts is None:
          continue  # PyAV's own end marks
        if self.time_limit and time.monotonic() - began > self.time_limit:
          raise VideoError(f'takes longer than {self.time_limit:g} s to decode')
        if self.everything and packet.pts is not None:
          end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
          self.end = max(self.end, end - start)
        if packet.stream_index == self.stream.index:
          self.count += 1
          yield packet
    except av.FFmpegError as error:
      self.torn = reason(error)
    except IndexError:  # PyAV, when all is read: it has no end mark for a stream that came up on the way
      pass
    if not self.count:
      raise VideoError(f'no video packets{self.torn and f": {self.torn}"}')


@dataclass
class Scan:
  """One decode of all packets: what is known of the frames, in the order in which they came out."""

  stream: VideoStream
  timed: bool
  stamps: list[int | None] = field(default_factory=list)
  lengths: list[float] = field(default_factory=list)
  errors: list[str] = field(default_factory=list)
  shape: tuple[int, int] = (0, 0)
  _first: int | None = None  # the first keyframe's stamp
  _expected: int = 0  # packets without an error of which a frame must come
  _fields: bool = False

  def run(self, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
    """Decodes the packets; a packet that fails is noted, and the next one tried."""
    for packet in itertools.chain(packets, [None]):
      expected = packet is not None and self._expects(packet)
      try:
        decoded = self.stream.decode(packet)
      except av.FFmpegError as error:
        self.errors.append(reason(error))
        continue
      self._expected += expected
      for frame in decoded:
        if not self.stamps:
          self.shape = turned(frame.height, frame.width, turns_of(frame))
        self.stamps.append(frame.pts)
        self.lengths.append((frame.duration or 0) * tick_seconds(self.stream))
        self._fields |= frame.interlaced_frame
        yield frame
    if not self.stamps:
      raise VideoError(': '.join(['no frame decodes', *self.errors[:1]]))

  def _expects(self, packet: Packet) -> bool:
    """Whether a frame must come of a packet: of those that come, or are shown, before the first keyframe none need."""
    if self._first is None and (packet.is_keyframe or self.timed):  # torn, it may not be known for one
      self._first = packet.pts
    if self._first is None or packet.pts is None or packet.is_discard or not packet.size:
      return False
    return packet.pts >= self._first

  def failures(self) -> list[str]:
    """Of each packet that does not decode, why."""
    first, codec = self._first, self.stream.codec_context.codec.canonical_name
    if first is None or codec not in _SILENT or (codec == 'h264' and (self._fields or not self.errors)):
      return self.errors  # Two packets of H.264 may be the fields of one frame.
    frames = sum(stamp is not None and stamp >= first for stamp in self.stamps)
    return self.errors + ['no frame comes of it'] * (self._expected - frames)

  @property
  def rate(self) -> Fraction:
    return self.stream.guessed_rate or self.stream.average_rate or Fraction(25)

  def timeline(self) -> tuple[np.ndarray, Fraction]:
    """Every frame's display time, int64 from 0, and its unit in seconds.

    Decoders put frames out in display order; where stamps contradict it, the container decides.
    """
    if None in self.stamps:
      return np.arange(len(self.stamps)), 1 / self.rate
    stamps = np.array(self.stamps, np.int64)
    return (stamps if self.timed else np.sort(stamps)) - stamps.min(), self.stream.time_base or 1 / self.rate


Turns = tuple[bool, bool, bool]


def turns_of(frame: VideoFrame) -> Turns:
  """What a frame's display matrix asks for: quarter turns, and mirrors (a phone's front camera).

  Whether x and y change places, and then whether y and x are reversed. Asking keeps the frame's memory until Python
  next collects cycles: side data and frame refer to each other.
  """
  notes: Any = frame.side_data
  if Type.DISPLAYMATRIX not in notes:
    return False, False, False
  a, b, _, c, d, *_ = np.frombuffer(notes[Type.DISPLAYMATRIX], np.int32).tolist()
  swapped = abs(b) > abs(a)
  return (True, b < 0, c < 0) if swapped else (False, d < 0, a < 0)


def turned(height: int, width: int, turns: Turns) -> tuple[int, int]:
  """Height and width as displayed, of those stored; or the other way round."""
  return (width, height) if turns[0] else (height, width)


def upright(pixels: np.ndarray, turns: Turns) -> np.ndarray:
  """An array `h w ...` as it is displayed."""
  swapped, reversed_y, reversed_x = turns
  pixels = pixels.swapaxes(0, 1) if swapped else pixels
  return pixels[:: -1 if reversed_y else 1, :: -1 if reversed_x else 1]


def tick_seconds(stream: VideoStream) -> float:
  return float(stream.time_base or 0)  # seconds


def reason(error: av.FFmpegError) -> str:
  return f'{type(error).__name__} ({error.strerror})'
