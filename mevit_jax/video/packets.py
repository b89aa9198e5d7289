"""Demuxing and decoding of all packets of a video: clocks that jump, packets that do not decode, what is missing."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.format import Flags
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mevit_jax.video.container import VideoError, error_reason, square_width
from mevit_jax.video.picture import displayed_size, orientation_of

# Decoders that skip packets they cannot decode: HEVC without an error, H.264 after one error, until the next keyframe.
_CODECS_THAT_SKIP = {'hevc', 'h264'}
# Formats whose declared duration is the end of the file on its own clock, even if timestamps do not start at 0. Writers
# of FLV disagree.
_DECLARE_THE_END = {'matroska,webm', 'asf', 'avi', 'nut'}
_CLOCK_MAY_JUMP: Any = Flags.ts_discont.value  # a property of formats: MPEG-TS, MPEG program streams (VOB), Ogg
_MAX_REORDERING = 0.25  # seconds between the first packet's time of decoding and of display
# A clock jumps if it goes back by more than the first, or moves by more than the second, in seconds: as in ffmpeg.
_MAX_BACK, _MAX_MOVE = 0.1, 10.0


class _Clock:
  """The timestamps of one stream of a format whose clock may jump (MPEG-TS, VOB): joined recordings, restarts.

  After a jump, time continues after the previous packet, as in ffmpeg and players.
  """

  def __init__(self, unit: float):
    self._back, self._move = _MAX_BACK / unit, _MAX_MOVE / unit
    self._offset = self._last = self._step = self._delay = 0
    self._started = False

  def correct(self, packet: Packet) -> bool:
    """Corrects a packet's timestamps; returns True if the clock jumped."""
    jumped = False
    if packet.dts is not None:
      now, expected = packet.dts + self._offset, self._last + self._step
      if self._started and (now + self._back < self._last or abs(now - expected) > self._move):
        self._offset += expected - now
        now, jumped = expected, True
      self._step = packet.duration or (now - self._last if self._started and not jumped else self._step)
      self._last, self._started = now, True
      packet.dts = now
    if packet.pts is not None:
      packet.pts += self._offset
      delay = packet.pts - self._last
      if packet.dts is not None and not -self._back <= delay <= self._move:  # it belongs to the packet after the jump
        packet.pts = self._last + self._delay
      elif packet.dts is not None:
        self._delay = max(self._delay, delay)
    return jumped


@dataclass
class Demuxer:
  """Iterator over the packets of the video stream. Where the clock of a joined MPEG-TS or VOB jumps, it is corrected.

  Attributes:
    container: the open file.
    stream: its video stream.
    all_streams: reads the other streams too, because audio may last longer than video.
    time_limit: seconds after which iteration raises VideoError.
    count: number of video packets so far.
    end: end time of the last packet of any stream in seconds since the start of the file; needs `all_streams`.
    jumps: times at which the video's clock jumped, in seconds since the start of the file.
    error: the FFmpeg error that ended iteration early, or ''.
  """

  container: InputContainer
  stream: VideoStream
  all_streams: bool = False
  time_limit: float | None = None
  count: int = 0
  end: float = 0.0
  jumps: list[float] = field(default_factory=list)
  error: str = ''

  def __iter__(self) -> Iterator[Packet]:
    began, start = time.monotonic(), (self.container.start_time or 0) / av.time_base
    clocks = dict[int, _Clock]() if self.container.format.flags & _CLOCK_MAY_JUMP else None
    try:
      for packet in self.container.demux() if self.all_streams else self.container.demux(self.stream):
        if packet.size == 0 and packet.pts is None and packet.dts is None:
          continue  # PyAV's own end-of-stream packets
        if self.time_limit and time.monotonic() - began > self.time_limit:
          raise VideoError(f'takes longer than {self.time_limit:g} s to decode')
        if clocks is not None:
          self._correct(packet, clocks, start)
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
      indexed = 'they are in another file, or cut off' if len(self.stream.index_entries) else ''
      raise VideoError(': '.join(['no video packets', *filter(None, [self.error or indexed])]))

  def _correct(self, packet: Packet, clocks: dict[int, _Clock], start: float) -> None:
    unit = float(packet.time_base or 0)
    if unit and packet.stream_index not in clocks:
      clocks[packet.stream_index] = _Clock(unit)
    jumped = bool(unit) and clocks[packet.stream_index].correct(packet)
    if jumped and packet.stream_index == self.stream.index:
      self.jumps.append(((packet.pts if packet.pts is not None else packet.dts) or 0) * unit - start)


@dataclass
class PacketDecoder:
  """Decodes all packets once and records properties of the frames, in the order of the decoder's output.

  Attributes:
    stream: the video stream.
    has_pts: the container stores presentation timestamps, see `CONTAINERS_WITH_PTS`.
    timestamps: presentation timestamp of every frame in units of the stream's time base; None if unknown.
    durations: duration of every frame in seconds; 0 if unknown.
    errors: FFmpeg's message for every packet that raised an error.
    leading: number of frames before the first key frame, if the first packet is not a keyframe: references are missing.
    size: width and height of the first frame, with square pixels, before orientation.
    shape: height and width of the first frame as displayed.
  """

  stream: VideoStream
  has_pts: bool
  timestamps: list[int | None] = field(default_factory=list)
  durations: list[float] = field(default_factory=list)
  errors: list[str] = field(default_factory=list)
  leading: int = 0
  size: tuple[int, int] = (0, 0)
  shape: tuple[int, int] = (0, 0)
  _first_keyframe: int | None = None  # timestamp
  _num_expected: int = 0  # packets that decoded without an error and must have produced a frame
  _interlaced: bool = False
  _has_started: bool = False  # at a keyframe

  def run(self, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
    """Decodes the packets; records the error of a packet that fails and continues with the next one."""
    for number, packet in enumerate(itertools.chain(packets, [None])):
      self._has_started |= number == 0 and packet is not None and packet.is_keyframe
      expected = packet is not None and self._expects_frame(packet)
      try:
        decoded = self.stream.decode(packet)
      except av.FFmpegError as error:
        too_large = isinstance(error, av.ArgumentError)  # also raised for other reasons
        self.errors.append('a frame has too many pixels, or is invalid' if too_large else error_reason(error))
        continue
      self._num_expected += expected
      for frame in decoded:
        if not self.timestamps:
          self.size = square_width(self.stream, frame.width), frame.height
          self.shape = displayed_size(self.size[1], self.size[0], orientation_of(frame))
        self.timestamps.append(frame.pts)
        self.durations.append((frame.duration or 0) * time_base_seconds(self.stream))
        self._interlaced |= frame.interlaced_frame
        if frame.key_frame and not self._has_started:
          self._has_started, self.leading = True, len(self.timestamps) - 1
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

  @property
  def start(self) -> float:
    """Timestamp of the first frame in seconds; 0 if unknown."""
    known = [timestamp for timestamp in self.timestamps if timestamp is not None]
    return min(known, default=0) * time_base_seconds(self.stream)


def describe_damage(
  packets: Demuxer, start: float, duration: float, failures: Sequence[str] = (), leading: int = 0
) -> str:
  """Returns one line that says what is missing or does not decode, and where the clock was corrected; or ''.

  Args:
    packets: the exhausted demuxer of all streams.
    start: timestamp of the first frame in seconds.
    duration: duration of the decoded frames in seconds.
    failures: reason for every packet that does not decode.
    leading: number of frames before the first key frame.

  Raises:
    VideoError: more than half is missing or does not decode.
  """
  declared, expected, truncated = _declared_durations(packets, start, duration)
  detail = packets.error and f': {packets.error}'
  if duration < expected / 2:
    raise VideoError(f'contains only {duration:.1f} s of {expected:.1f} s{detail}')
  if len(failures) > packets.count / 2:
    raise VideoError(summarize(failures, packets.count))
  remarks = []
  if truncated:
    remarks.append(f'truncated at {packets.end:.1f} s of {declared:.1f} s{detail}')
  elif failures:
    remarks.append(summarize(failures, packets.count))
  if leading:
    remarks.append(f'begins before its first keyframe: the first {leading} frames lack their references')
  if packets.jumps:
    count = len(packets.jumps)
    times = f'at {packets.jumps[0]:.1f} s' if count == 1 else f'{count} times, first at {packets.jumps[0]:.1f} s'
    remarks.append(f'its clock jumps {times}: time continues after the previous frame')
  return '; '.join(remarks)


def _declared_durations(packets: Demuxer, start: float, duration: float) -> tuple[float, float, bool]:
  """Returns the declared duration of the file and of its frames in seconds, and True if its end is missing."""
  container, stream = packets.container, packets.stream
  if packets.jumps:  # FFmpeg's estimate, from the first and last timestamp, is meaningless
    return packets.end, duration, bool(packets.error)
  if container.format.name.startswith('mov') and len(index := stream.index_entries) > 1:
    # The index lists every packet. (Headers of fragmented files declare the end on the clock of the entire stream.)
    shown = [entry.timestamp for entry in index if not entry.is_discard]
    span = (max(shown) - min(shown)) * time_base_seconds(stream) if len(shown) > 1 else 0.0
    declared = span * len(shown) / max(1, len(shown) - 1)
    return declared, declared, bool(packets.error) or packets.count < len(index)
  declared = (container.duration or 0) / av.time_base
  offset = max(0, container.start_time or 0) / av.time_base
  declares_end = container.format.name in _DECLARE_THE_END or (
    container.format.name in ('flv', 'live_flv') and packets.end <= declared - offset + 0.1
  )
  declared -= offset * declares_end
  truncated = bool(packets.error) or packets.end < min(0.9 * declared, declared - _MAX_REORDERING)
  if stream.duration and stream.time_base:
    return declared, float(stream.duration * stream.time_base) - max(0, start) * declares_end, truncated
  return declared, declared * truncated, truncated


def summarize(failures: Sequence[str], num_packets: int) -> str:
  """Formats the number of packets that do not decode, and the first reason."""
  return f'{len(failures)} of {num_packets} packets do not decode: {failures[0]}'


def time_base_seconds(stream: VideoStream) -> float:
  """Unit of the stream's timestamps in seconds; 0 if unknown."""
  return float(stream.time_base or 0)
