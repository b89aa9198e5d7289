"""Inspecting encoded videos, and decoding the frames displayed at given times.

All packets are demuxed first (1-2 ms for a ten-second clip); then only the packets that a clip needs are decoded. The
packets' own timestamps determine where decoding starts, so nothing depends on a container's index or its seek
function. Files for which this may be inexact are decoded from the first packet to the last.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mevit_jax.video.container import CONTAINERS_WITH_PTS, MAX_PIXELS, File, VideoError, open_video, square_width
from mevit_jax.video.packets import Demuxer, PacketDecoder, describe_damage, summarize, time_base_seconds
from mevit_jax.video.picture import ToRGB

_TOLERANCE = 1e-6  # seconds: a requested time may be a timestamp after float arithmetic


class UnsafeError(Exception):
  """Decoding from a keyframe may give other frames than decoding from the first packet."""


@dataclass(frozen=True)
class VideoInfo:
  """Properties of a video as displayed: rotation is applied, and pixels are square.

  Attributes:
    num_frames: number of frames that decode.
    fps: mean frame rate, num_frames / duration.
    duration: seconds from the display of the first frame to the end of the last one.
    height: height of a frame in pixels.
    width: width of a frame in pixels.
    codec: FFmpeg's name of the codec.
    damage: one line that says what does not decode, or that the clock jumps; or ''.
  """

  num_frames: int
  fps: float
  duration: float
  height: int
  width: int
  codec: str
  damage: str


def inspect(data: File, time_limit: float | None = None, max_pixels: int = MAX_PIXELS) -> VideoInfo:
  """Decodes every frame once, in memory that does not grow with the number of frames.

  Args:
    data: the file.
    time_limit: seconds that decoding may take.
    max_pixels: limit of height x width of a frame.

  Raises:
    VideoError: the file is not a video, no frame decodes, less than half of the declared duration is present, less than
      half of the packets decode, or a limit is exceeded.
  """
  frames = FrameIterator(data, time_limit, max_pixels)
  for _ in frames:
    pass
  return frames.info


def decode(data: bytes, times: np.ndarray, num_frames: int | None = None) -> list[np.ndarray]:
  """Returns the frames displayed at `times`, RGB uint8 `h w 3` each.

  A frame is displayed from its timestamp until the next frame's. The first frame also counts as displayed before its
  timestamp, and the last one forever. A frame displayed at several times is returned as one and the same array.

  Args:
    data: an encoded file.
    times: seconds since the display of the first frame, in any order.
    num_frames: number of frames that `inspect` found. Where every packet gave one, the first one need not be decoded to
      know that time starts with it.

  Raises:
    VideoError: as `inspect`.
  """
  with open_video(data) as (container, stream):
    packets = list(Demuxer(container, stream))
    index = index_packets(
      container.format.name, [(packet.pts, packet.is_keyframe, packet.is_discard) for packet in packets]
    )
    frames = _decode_runs(stream, packets, index, times, num_frames) if index else None
    if frames is not None:
      return frames
    timestamps = np.sort([np.nan if packet.pts is None else packet.pts for packet in packets])
    guess = displayed_index((timestamps - timestamps[0]) * time_base_seconds(stream), times)
  return _decode_all(data, times, guess.tolist())


class FrameIterator:
  """Iterator that decodes every frame once, in the decoder's output order.

  Attributes:
    size: width and height of the first frame, with square pixels, before orientation. Set with the first frame.
    info: properties of the video. Set when iteration has finished, like the following.
    ticks: int64 display time of every frame in units of `tick`, from 0; almost always increasing.
    tick: unit of `ticks` in seconds.

  Raises:
    VideoError: as `inspect`.
  """

  size: tuple[int, int]
  info: VideoInfo
  ticks: np.ndarray
  tick: Fraction

  def __init__(self, data: File, time_limit: float | None = None, max_pixels: int = MAX_PIXELS):
    self._data, self._time_limit, self._max_pixels = data, time_limit, max_pixels

  def __iter__(self) -> Iterator[VideoFrame]:
    with open_video(self._data, self._max_pixels) as (container, stream):
      packets = Demuxer(container, stream, all_streams=True, time_limit=self._time_limit)
      decoder = PacketDecoder(stream, container.format.name in CONTAINERS_WITH_PTS)
      for frame in decoder.run(packets):
        self.size = decoder.size
        yield frame
      failures = decoder.failures()
      if len(decoder.timestamps) == 1:
        raise VideoError(summarize(failures, packets.count) if failures else 'a single frame, like a still image')
      self.ticks, self.tick = decoder.timeline()
      order = np.argsort(self.ticks, kind='stable')
      seconds = self.ticks[order] * float(self.tick)
      last = decoder.durations[order[-1]] or seconds[-1] / (len(seconds) - 1) or 1 / decoder.rate
      duration = float(seconds[-1] + last)
      damage = describe_damage(packets, decoder.start, duration, failures, decoder.leading)
      codec = stream.codec_context.codec.canonical_name
      self.info = VideoInfo(len(seconds), len(seconds) / duration, duration, *decoder.shape, codec, damage)

  def displayed(self, times: np.ndarray) -> list[int]:
    """Returns the index, in output order, of the frame displayed at each time."""
    order = np.argsort(self.ticks, kind='stable')
    return order[displayed_index(self.ticks[order] * float(self.tick), times)].tolist()


@dataclass(frozen=True)
class FrameIndex:
  """The packets of a video whose frames can be decoded from the keyframes before them.

  Attributes:
    timestamps: presentation timestamp of every packet, in units of the stream's time base.
    keyframes: True for every packet that is marked as a keyframe.
    shown: sorted timestamps of the packets that are displayed.
  """

  timestamps: list[int]
  keyframes: list[bool]
  shown: np.ndarray

  def requested(self, stream: VideoStream, times: np.ndarray) -> list[int]:
    """Returns the timestamp of the packet displayed at each time, in seconds since the first one's."""
    seconds = (self.shown - self.shown[0]) * time_base_seconds(stream)
    return self.shown[displayed_index(seconds, times)].tolist()


def index_packets(container: str, packets: Sequence[tuple[int | None, bool, bool]]) -> FrameIndex | None:
  """Returns the index of a video, or None if decoding from keyframes may be inexact.

  That is so where timestamps are estimated, missing or ambiguous, or if the file begins before its first keyframe, or
  with frames that are displayed before it: which of those are decoded depends on the decoder.

  Args:
    container: FFmpeg's name of the container format.
    packets: timestamp, keyframe flag and discard flag of every packet.
  """
  timestamps = [timestamp for timestamp, _, _ in packets if timestamp is not None]
  shown = np.sort([timestamp for timestamp, _, discard in packets if timestamp is not None and not discard])
  exact = container in CONTAINERS_WITH_PTS and len(set(timestamps)) == len(packets) and bool(shown.size)
  if not exact or not packets[0][1] or timestamps[0] != min(timestamps):
    return None
  return FrameIndex(timestamps, [keyframe for _, keyframe, _ in packets], shown.astype(np.int64))


def _decode_runs(
  stream: VideoStream, packets: list[Packet], index: FrameIndex, times: np.ndarray, num_frames: int | None
) -> list[np.ndarray] | None:
  """Decodes from the keyframe before each time; returns None if this may be inexact."""
  requested = index.requested(stream, times)
  wanted = {*requested}
  if num_frames != len(index.shown):
    wanted.add(int(index.shown[0]))  # if it does not decode, time starts with another frame
  size = stream.width, stream.height  # read before decoding: a decoder updates them with its frames
  to_rgb, decoded, seen = ToRGB(square_width(stream, size[0]), size[1]), {}, set()
  try:
    for first, last in plan_runs(index.keyframes, index.timestamps, wanted):
      for frame in decode_run(stream, packets[first : last + 1], wanted, size, first == 0):
        if frame.pts not in seen and frame.pts in requested:  # a later run may lack the references of this frame
          decoded[frame.pts] = to_rgb(frame)
        seen.add(frame.pts)
  except UnsafeError:
    return None
  # A packet may contain no displayable frame (VP8's alternate references): then another frame is displayed.
  return [decoded[pts] for pts in requested] if len(seen) == len(wanted) else None


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
        to_rgb = ToRGB(*frames.size)
      if index in guess:
        kept[index] = to_rgb(frame)
    displayed = frames.displayed(times)
    if set(displayed) <= kept.keys():
      return [kept[index] for index in displayed]
    guess = displayed


def displayed_index(seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
  """Returns the index of the last of the sorted `seconds` at or before each time; 0 for times before the first."""
  return np.maximum(np.searchsorted(seconds, np.ravel(times) + _TOLERANCE, side='right') - 1, 0)
