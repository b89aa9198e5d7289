"""Videos out of encoded bytes: what a file holds, and the frames shown at given times.

All packets are read first (1-2 ms for a ten second clip) and then only those that a clip needs are
decoded. So nothing depends on a container's index or on its seek function: the packets' own
timestamps say where to start. Whatever looks unsafe is decoded from the first packet to the last.
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
  TIMED,
  Demux,
  File,
  Scan,
  Turns,
  VideoError,
  opened,
  tick_seconds,
  turns_of,
  upright,
)

_TOLERANCE = 1e-6  # seconds: a time asked for may be a timestamp that went through float arithmetic


class UnsafeError(Exception):
  """Decoding from a keyframe on may not give what decoding from the first packet on does."""


@dataclass(frozen=True)
class VideoInfo:
  """What a file holds, as displayed: rotation is applied, pixels are taken as square.

  `duration` is in seconds, from the first frame's display to the end of the last's; `fps` is the
  mean rate, num_frames / duration. `damage` is '' or one line that says what does not decode.
  """

  num_frames: int
  fps: float
  duration: float
  height: int
  width: int
  codec: str
  damage: str


def inspect(data: File, time_limit: float | None = None) -> VideoInfo:
  """Decodes every frame once, in memory that does not grow with their number.

  Raises VideoError if the file is no video or no frame decodes; if less than half of what it declares is there, or less
  than half of its packets decode; or if that takes longer than `time_limit` seconds.
  """
  walk = Walk(data, time_limit)
  for _ in walk:
    pass
  return walk.info


def decode(data: bytes, times: np.ndarray) -> list[np.ndarray]:
  """The frames displayed at `times`, in seconds since the first frame's display, in any order.

  A frame is displayed from its timestamp until the next one's; the first is displayed before its
  time too, and the last one for ever. Returns an RGB uint8 `h w 3` a time (a frame that is
  displayed at several of them is one array). Raises VideoError if it cannot, as `inspect` does.
  """
  with opened(data) as (container, stream):
    packets = list(Demux(container, stream))
    frames = _decode_runs(stream, packets, times) if container.format.name in TIMED else None
    if frames is not None:
      return frames
    stamps = np.sort([np.nan if packet.pts is None else packet.pts for packet in packets])
    guess = displayed((stamps - stamps[0]) * tick_seconds(stream), times)
  return _decode_all(data, times, guess.tolist())


class Walk:
  """Iterating decodes every frame once, in the order in which the decoder puts them out; `inspect` says what it raises.

  When all have come, `info` says what they were, and `ticks`, int64, when each of them is displayed, in units of `tick`
  seconds: from 0, and almost always rising.
  """

  info: VideoInfo
  ticks: np.ndarray
  tick: Fraction

  def __init__(self, data: File, time_limit: float | None = None):
    self._data, self._time_limit = data, time_limit

  def __iter__(self) -> Iterator[VideoFrame]:
    with opened(self._data) as (container, stream):
      packets = Demux(container, stream, everything=True, time_limit=self._time_limit)
      scan = Scan(stream, container.format.name in TIMED)
      yield from scan.run(packets)
      failures = scan.failures()
      if len(scan.stamps) == 1:
        raise VideoError(_undecoded(failures, packets.count) if failures else 'a single frame, as a still image is')
      self.ticks, self.tick = scan.timeline()
      order = np.argsort(self.ticks, kind='stable')
      times = self.ticks[order] * float(self.tick)
      last = scan.lengths[order[-1]] or times[-1] / (len(times) - 1) or 1 / scan.rate
      duration = float(times[-1] + last)
      damage = damage_of(container, stream, packets, duration, failures)
      codec = stream.codec_context.codec.canonical_name
      self.info = VideoInfo(len(times), len(times) / duration, duration, *scan.shape, codec, damage)


def damage_of(
  container: InputContainer, stream: VideoStream, packets: Demux, duration: float, failures: list[str]
) -> str:
  """What does not decode, or ''. Raises VideoError where it is more than half."""
  declared = (container.duration or 0) / av.time_base
  torn = bool(packets.torn) or packets.end < 0.9 * declared
  pictures = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else declared * torn
  if duration < pictures / 2:
    raise VideoError(f'only {duration:.1f} s of {pictures:.1f} s are there{packets.torn and f": {packets.torn}"}')
  if len(failures) > packets.count / 2:
    raise VideoError(_undecoded(failures, packets.count))
  if torn:
    return f'the file ends at {packets.end:.1f} s of {declared:.1f} s{packets.torn and f": {packets.torn}"}'
  return _undecoded(failures, packets.count) if failures else ''


def _undecoded(failures: list[str], packets: int) -> str:
  return f'{len(failures)} of {packets} packets do not decode: {failures[0]}'


def _decode_runs(stream: VideoStream, packets: list[Packet], times: np.ndarray) -> list[np.ndarray] | None:
  """`decode` from the keyframes before each time, or None where that is not known to be exact."""
  stamps = [packet.pts for packet in packets if packet.pts is not None]
  shown = np.sort([packet.pts for packet in packets if packet.pts is not None and not packet.is_discard])
  if len(set(stamps)) < len(packets) or stamps[0] != min(stamps) or not shown.size:
    return None
  seconds = (shown - shown[0]) * tick_seconds(stream)
  asked = shown[displayed(seconds, times)].tolist()
  wanted = set(asked)
  size = stream.width, stream.height  # before decoding: a decoder changes them with its frames
  to_rgb, found = ToRGB(), {}
  try:
    for first, last in plan_runs([packet.is_keyframe for packet in packets], stamps, wanted):
      for frame in decode_run(stream, packets[first : last + 1], wanted, size):
        if frame.pts not in found:  # this run may lack what it refers to
          found[frame.pts] = to_rgb(frame)
  except UnsafeError:
    return None
  # A packet may hold no frame to show (VP8's alternate references): then the frame is another one.
  return [found[pts] for pts in asked] if len(found) == len(wanted) else None


def plan_runs(keyframes: list[bool], stamps: list[int], wanted: set[int]) -> list[tuple[int, int]]:
  """First and last packet of the runs that hold the wanted frames, each from a keyframe.

  Frames that come after a keyframe but are displayed before it may refer to what came before.
  """
  keys: list[int] = []
  runs: dict[int, int] = {}
  for index, keyframe in enumerate(keyframes):
    if keyframe or index == 0:
      keys.append(index)
    if stamps[index] in wanted:
      runs[next(k for k in reversed(keys) if stamps[k] <= stamps[index])] = index
  return sorted(runs.items())


def decode_run(
  stream: VideoStream, packets: Iterable[Packet], wanted: set[int], size: tuple[int, int]
) -> Iterator[VideoFrame]:
  """The frames whose stamps are wanted, of a run of packets from a keyframe on, each once and in display order.

  Raises UnsafeError where they may not be what decoding from the first packet on would give.
  """
  context, given, start = stream.codec_context, set(), None
  for packet in itertools.chain(packets, [None]):
    if packet is not None:
      start = packet.pts if start is None else start
      if context.name == 'h264':
        # A frame that no other refers to need not be decoded. (HEVC's flag for this is weaker.)
        context.skip_frame = 'DEFAULT' if packet.pts in wanted else 'NONREF'
    try:
      decoded = stream.decode(packet)
    except av.FFmpegError as error:
      raise UnsafeError from error
    for frame in decoded:
      broken_start = frame.pts == start and not frame.key_frame
      if frame.is_corrupt or broken_start or (frame.width, frame.height) != size:
        raise UnsafeError
      if frame.pts in wanted and frame.pts not in given:
        given.add(frame.pts)
        yield frame
  context.flush_buffers()


def _decode_all(data: bytes, times: np.ndarray, guess: list[int]) -> list[np.ndarray]:
  """`decode` from the first packet to the last: again if the frames shown are not those that the packets made guess."""
  while True:
    walk, kept = Walk(data), dict[int, np.ndarray]()
    for index, frame in enumerate(walk):
      if index == 0:  # a video has its first frame's size, whatever comes later
        to_rgb = ToRGB(frame.width, frame.height)
      if index in guess:
        kept[index] = to_rgb(frame)
    order = np.argsort(walk.ticks, kind='stable')
    shown = order[displayed(walk.ticks[order] * float(walk.tick), times)].tolist()
    if set(shown) <= kept.keys():
      return [kept[index] for index in shown]
    guess = shown


def displayed(seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
  """Index of the last of the sorted `seconds` that is at or before each time; the first at least"""
  return np.maximum(np.searchsorted(seconds, np.ravel(times) + _TOLERANCE, side='right') - 1, 0)


class ToRGB:
  """A video's frames as RGB arrays, turned upright as the first one given is; with a size, all of them scaled to it."""

  def __init__(self, width: int | None = None, height: int | None = None):
    self._size = {'width': width, 'height': height}
    self._reformatter = VideoReformatter()
    self._turns: Turns | None = None

  def __call__(self, frame: VideoFrame) -> np.ndarray:
    rgb = self._reformatter.reformat(frame, format='rgb24', threads=1, **self._size)
    if self._turns is None:  # asked once: see `turns_of`
      self._turns = turns_of(frame)
    return np.ascontiguousarray(upright(rgb.to_ndarray(), self._turns))  # h w 3
