"""Inspecting encoded videos, and decoding the frames displayed at given times.

All packets are demuxed first (1-2 ms for a ten-second clip); then only the packets that a clip needs are decoded. The
packets' own timestamps determine where decoding starts, so nothing depends on a container's index or its seek
function. Files for which this may be inexact are decoded from the first packet to the last.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from mevit_jax.video.container import (
  CONTAINERS_WITH_PTS,
  Demuxer,
  File,
  Orientation,
  PacketDecoder,
  VideoError,
  apply_orientation,
  open_video,
  orientation_of,
  time_base_seconds,
)

_TOLERANCE = 1e-6  # seconds: a requested time may be a timestamp after float arithmetic


class UnsafeError(Exception):
  """Decoding from a keyframe may give other frames than decoding from the first packet."""


@dataclass(frozen=True)
class VideoInfo:
  """Properties of a video as displayed: rotation is applied, pixels are treated as square.

  Attributes:
    num_frames: number of frames that decode.
    fps: mean frame rate, num_frames / duration.
    duration: seconds from the display of the first frame to the end of the last one.
    height: height of a frame in pixels.
    width: width of a frame in pixels.
    codec: FFmpeg's name of the codec.
    damage: one line that says what does not decode, or ''.
  """

  num_frames: int
  fps: float
  duration: float
  height: int
  width: int
  codec: str
  damage: str


def inspect(data: File, time_limit: float | None = None) -> VideoInfo:
  """Decodes every frame once, in memory that does not grow with the number of frames.

  Raises:
    VideoError: the file is not a video, no frame decodes, less than half of the declared duration is present, less than
      half of the packets decode, or decoding takes longer than `time_limit` seconds.
  """
  frames = FrameIterator(data, time_limit)
  for _ in frames:
    pass
  return frames.info


def decode(data: bytes, times: np.ndarray) -> list[np.ndarray]:
  """Returns the frames displayed at `times`, RGB uint8 `h w 3` each.

  A frame is displayed from its timestamp until the next frame's. The first frame also counts as displayed before its
  timestamp, and the last one forever. A frame displayed at several times is returned as one and the same array.

  Args:
    data: an encoded file.
    times: seconds since the display of the first frame, in any order.

  Raises:
    VideoError: as `inspect`.
  """
  with open_video(data) as (container, stream):
    packets = list(Demuxer(container, stream))
    frames = _decode_runs(stream, packets, times) if container.format.name in CONTAINERS_WITH_PTS else None
    if frames is not None:
      return frames
    timestamps = np.sort([np.nan if packet.pts is None else packet.pts for packet in packets])
    guess = displayed_index((timestamps - timestamps[0]) * time_base_seconds(stream), times)
  return _decode_all(data, times, guess.tolist())


class FrameIterator:
  """Iterator that decodes every frame once, in the decoder's output order.

  Attributes (set when iteration has finished):
    info: properties of the video.
    ticks: int64 display time of every frame in units of `tick`, from 0; almost always increasing.
    tick: unit of `ticks` in seconds.

  Raises:
    VideoError: as `inspect`.
  """

  info: VideoInfo
  ticks: np.ndarray
  tick: Fraction

  def __init__(self, data: File, time_limit: float | None = None):
    self._data, self._time_limit = data, time_limit

  def __iter__(self) -> Iterator[VideoFrame]:
    with open_video(self._data) as (container, stream):
      packets = Demuxer(container, stream, all_streams=True, time_limit=self._time_limit)
      decoder = PacketDecoder(stream, container.format.name in CONTAINERS_WITH_PTS)
      yield from decoder.run(packets)
      failures = decoder.failures()
      if len(decoder.timestamps) == 1:
        raise VideoError(_summarize(failures, packets.count) if failures else 'a single frame, like a still image')
      self.ticks, self.tick = decoder.timeline()
      order = np.argsort(self.ticks, kind='stable')
      seconds = self.ticks[order] * float(self.tick)
      last = decoder.durations[order[-1]] or seconds[-1] / (len(seconds) - 1) or 1 / decoder.rate
      duration = float(seconds[-1] + last)
      damage = describe_damage(container, stream, packets, duration, failures)
      codec = stream.codec_context.codec.canonical_name
      self.info = VideoInfo(len(seconds), len(seconds) / duration, duration, *decoder.shape, codec, damage)

  def displayed(self, times: np.ndarray) -> list[int]:
    """Returns the index, in output order, of the frame displayed at each time."""
    order = np.argsort(self.ticks, kind='stable')
    return order[displayed_index(self.ticks[order] * float(self.tick), times)].tolist()


def describe_damage(
  container: InputContainer, stream: VideoStream, packets: Demuxer, duration: float, failures: list[str]
) -> str:
  """Returns one line that says what does not decode, or ''.

  Args:
    container: the open file.
    stream: its video stream.
    packets: the exhausted demuxer of all streams.
    duration: duration of the decoded frames in seconds.
    failures: reason for every packet that does not decode.

  Raises:
    VideoError: more than half does not decode.
  """
  declared = (container.duration or 0) / av.time_base
  if container.format.name == 'matroska,webm':  # it declares the absolute end, also if timestamps do not start at 0
    declared -= max(0, container.start_time or 0) / av.time_base
  truncated = bool(packets.error) or packets.end < 0.9 * declared
  expected = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else declared * truncated
  detail = packets.error and f': {packets.error}'
  if duration < expected / 2:
    raise VideoError(f'contains only {duration:.1f} s of {expected:.1f} s{detail}')
  if len(failures) > packets.count / 2:
    raise VideoError(_summarize(failures, packets.count))
  if truncated:
    return f'truncated at {packets.end:.1f} s of {declared:.1f} s{detail}'
  return _summarize(failures, packets.count) if failures else ''


def _summarize(failures: list[str], num_packets: int) -> str:
  return f'{len(failures)} of {num_packets} packets do not decode: {failures[0]}'


def _decode_runs(stream: VideoStream, packets: list[Packet], times: np.ndarray) -> list[np.ndarray] | None:
  """Decodes from the keyframe before each time; returns None if this may be inexact."""
  timestamps = [packet.pts for packet in packets if packet.pts is not None]
  shown = np.sort([packet.pts for packet in packets if packet.pts is not None and not packet.is_discard])
  if len(set(timestamps)) < len(packets) or timestamps[0] != min(timestamps) or not shown.size:
    return None
  seconds = (shown - shown[0]) * time_base_seconds(stream)
  requested = shown[displayed_index(seconds, times)].tolist()
  wanted = set(requested)
  size = stream.width, stream.height  # read before decoding: a decoder updates them with its frames
  to_rgb, decoded = ToRGB(), {}
  try:
    for first, last in plan_runs([packet.is_keyframe for packet in packets], timestamps, wanted):
      for frame in decode_run(stream, packets[first : last + 1], wanted, size, first == 0):
        if frame.pts not in decoded:  # a later run may lack the references of this frame
          decoded[frame.pts] = to_rgb(frame)
  except UnsafeError:
    return None
  # A packet may contain no displayable frame (VP8's alternate references): then another frame is displayed.
  return [decoded[pts] for pts in requested] if len(decoded) == len(wanted) else None


def plan_runs(keyframes: list[bool], timestamps: list[int], wanted: set[int]) -> list[tuple[int, int]]:
  """Returns the first and last packet of each run, starting at a keyframe, that contains wanted frames.

  Frames that follow a keyframe in the file but are displayed before it may refer to earlier frames; their run starts at
  an earlier keyframe.
  """
  starts: list[int] = []
  runs: dict[int, int] = {}
  for index, keyframe in enumerate(keyframes):
    if keyframe or index == 0:
      starts.append(index)
    if timestamps[index] in wanted:
      runs[next(start for start in reversed(starts) if timestamps[start] <= timestamps[index])] = index
  return sorted(runs.items())


def decode_run(
  stream: VideoStream, packets: Iterable[Packet], wanted: set[int], size: tuple[int, int], from_start: bool
) -> Iterator[VideoFrame]:
  """Decodes a run of packets that starts at a keyframe; yields each wanted frame once, in display order.

  A packet marked as a keyframe may not be a valid start: with periodic intra refresh, H.264 marks recovery points,
  which refer to earlier frames. So the run's first packet must come out as a key frame before any wanted frame.

  Args:
    stream: the video stream.
    packets: the run's packets.
    wanted: timestamps of the frames to yield.
    size: width and height that every frame must have.
    from_start: the run starts at the first packet of the file, which is exact in any case.

  Raises:
    UnsafeError: the frames may differ from those of decoding from the first packet.
  """
  context, yielded, start, started = stream.codec_context, set(), None, from_start
  for packet in itertools.chain(packets, [None]):
    if packet is not None:
      start = packet.pts if start is None else start
      if context.name == 'h264':
        # Frames that no other frame refers to need not be decoded. (HEVC's flag for this is weaker.)
        context.skip_frame = 'DEFAULT' if packet.pts in wanted else 'NONREF'
    try:
      decoded = stream.decode(packet)
    except av.FFmpegError as error:
      raise UnsafeError from error
    for frame in decoded:
      broken_start = frame.pts == start and not frame.key_frame
      if frame.is_corrupt or broken_start or (frame.width, frame.height) != size:
        raise UnsafeError
      started = started or frame.pts == start
      if frame.pts in wanted and frame.pts not in yielded:
        if not started:
          raise UnsafeError
        yielded.add(frame.pts)
        yield frame
  context.flush_buffers()


def _decode_all(data: bytes, times: np.ndarray, guess: list[int]) -> list[np.ndarray]:
  """Decodes from the first packet to the last, and once more if other frames are displayed than guessed.

  Args:
    data: an encoded file.
    times: seconds since the display of the first frame.
    guess: frame indices to keep in the first pass, estimated from the packets.
  """
  while True:
    frames, kept = FrameIterator(data), dict[int, np.ndarray]()
    for index, frame in enumerate(frames):
      if index == 0:  # all frames are scaled to the size of the first
        to_rgb = ToRGB(frame.width, frame.height)
      if index in guess:
        kept[index] = to_rgb(frame)
    displayed = frames.displayed(times)
    if set(displayed) <= kept.keys():
      return [kept[index] for index in displayed]
    guess = displayed


def displayed_index(seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
  """Returns the index of the last of the sorted `seconds` at or before each time; 0 for times before the first."""
  return np.maximum(np.searchsorted(seconds, np.ravel(times) + _TOLERANCE, side='right') - 1, 0)


class ToRGB:
  """Converts a video's frames to RGB arrays in display orientation, which is read from the first frame.

  Args:
    width: width to scale to; None keeps each frame's own.
    height: height to scale to; None keeps each frame's own.
  """

  def __init__(self, width: int | None = None, height: int | None = None):
    self._size = {'width': width, 'height': height}
    self._reformatter = VideoReformatter()
    self._orientation: Orientation | None = None

  def __call__(self, frame: VideoFrame) -> np.ndarray:
    rgb = self._reformatter.reformat(frame, format='rgb24', threads=1, **self._size)
    if self._orientation is None:  # read once: see `orientation_of`
      self._orientation = orientation_of(frame)
    return np.ascontiguousarray(apply_orientation(rgb.to_ndarray(), self._orientation))  # h w 3
