"""Videos out of encoded bytes: what a file holds, and the frames shown at given times.

All packets are read first (1-2 ms for a ten second clip) and then only those that a clip needs are
decoded. So nothing depends on a container's index or on its seek function: the packets' own
timestamps say where to start. Whatever looks unsafe is decoded from the first packet to the last.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from mevit_jax.errors import UserError

av.logging.set_level(None)  # errors are raised; FFmpeg's own complaints would flood the terminal

# These carry a display time for every packet. Others guess: AVI's are wrong where frames reorder.
_TIMED = {'mov,mp4,m4a,3gp,3g2,mj2', 'matroska,webm'}
_PICTURE = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
_TOLERANCE = 1e-6  # seconds: a time asked for may be a timestamp that went through float arithmetic


class VideoError(UserError):
  """A video that cannot be used: the message is its reason, in one line."""


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


def inspect(data: bytes) -> VideoInfo:
  """Decodes every frame once. Raises VideoError if the file is no video or no frame decodes."""
  with _opened(data) as (container, stream):
    packets, end, torn = _demux(container, stream, everything=True)
    scan = _Scan(stream, container.format.name in _TIMED)
    scan.run(packets)
    times, order = scan.timeline()
    last = scan.lengths[order[-1]] or (times[-1] / (len(times) - 1) if len(times) > 1 else 0)
    duration = float(times[-1] + (last or 1 / scan.rate))
    declared = (container.duration or 0) / av.time_base
    damage = ''
    if torn or end < 0.9 * declared:
      damage = f'the file ends at {end:.1f} s of {declared:.1f} s{torn and f": {torn}"}'
    elif scan.errors:
      damage = f'{len(scan.errors)} of {len(packets)} packets do not decode: {scan.errors[0]}'
    height, width = scan.shape
    codec = stream.codec_context.codec.canonical_name
    return VideoInfo(len(times), len(times) / duration, duration, height, width, codec, damage)


def decode(data: bytes, times: np.ndarray) -> list[np.ndarray]:
  """The frames displayed at `times`, in seconds since the first frame's display, in any order.

  A frame is displayed from its timestamp until the next one's; the first is displayed before its
  time too, and the last one for ever. Returns an RGB uint8 `h w 3` a time (a frame that is
  displayed at several of them is one array). Raises VideoError if nothing decodes.
  """
  with _opened(data) as (container, stream):
    packets, _, _ = _demux(container, stream)
    timed = container.format.name in _TIMED
    frames = _decode_runs(stream, packets, times) if timed else None
    return frames or _decode_all(stream, packets, times, timed)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
  if not data:
    raise VideoError('the file is empty')
  try:
    container = av.open(io.BytesIO(data), 'r', metadata_errors='replace')
  except av.FFmpegError as error:
    raise VideoError(f'not a video that FFmpeg can open: {_reason(error)}') from error
  with container:
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


def _demux(container: InputContainer, stream: VideoStream, everything: bool = False) -> tuple[list[Packet], float, str]:
  """The stream's packets, the end in seconds of what was read, and the error that ended it or ''.

  `everything` reads the other streams too: sound may last longer than the pictures do.
  """
  packets, end, torn = [], 0.0, ''
  try:
    for packet in container.demux() if everything else container.demux(stream):
      if packet.size == 0 and packet.pts is None and packet.dts is None:
        continue  # PyAV's own end marks
      if packet.stream is stream:
        packets.append(packet)
      if packet.pts is not None:
        end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
  except av.FFmpegError as error:
    torn = _reason(error)
  if not packets:
    raise VideoError(f'no video packets{torn and f": {torn}"}')
  return packets, end - (container.start_time or 0) / av.time_base, torn


def _decode_runs(stream: VideoStream, packets: list[Packet], times: np.ndarray) -> list[np.ndarray] | None:
  """`decode` from the keyframes before each time, or None where that is not known to be exact."""
  stamps = [packet.pts for packet in packets if packet.pts is not None]
  shown = np.sort([packet.pts for packet in packets if packet.pts is not None and not packet.is_discard])
  if len(set(stamps)) < len(packets) or stamps[0] != min(stamps) or not shown.size:
    return None
  seconds = (shown - shown[0]) * _tick(stream)
  asked = shown[_displayed(seconds, times)].tolist()
  wanted = set(asked)
  size = stream.width, stream.height  # before decoding: a decoder changes them with its frames
  context, to_rgb, found = stream.codec_context, _ToRGB(), {}
  for first, last in _runs(packets, stamps, wanted):
    for packet in [*packets[first : last + 1], None]:
      if packet is not None and context.name == 'h264':
        # A frame that no other refers to need not be decoded. (HEVC's flag for this is weaker.)
        context.skip_frame = 'DEFAULT' if packet.pts in wanted else 'NONREF'
      try:
        decoded = stream.decode(packet)
      except av.FFmpegError:
        return None
      for frame in decoded:
        broken_start = frame.pts == stamps[first] and not frame.key_frame
        if frame.is_corrupt or broken_start or (frame.width, frame.height) != size:
          return None
        if frame.pts in wanted and frame.pts not in found:
          found[frame.pts] = to_rgb(frame)
    context.flush_buffers()
  # A packet may hold no frame to show (VP8's alternate references): then the frame is another one.
  return [found[pts] for pts in asked] if len(found) == len(wanted) else None


def _runs(packets: list[Packet], stamps: list[int], wanted: set[int]) -> list[tuple[int, int]]:
  """First and last packet of the runs that hold the wanted frames, each from a keyframe.

  Frames that come after a keyframe but are displayed before it may refer to what came before.
  """
  keys: list[int] = []
  runs: dict[int, int] = {}
  for index, packet in enumerate(packets):
    if packet.is_keyframe or index == 0:
      keys.append(index)
    if stamps[index] in wanted:
      runs[next(k for k in reversed(keys) if stamps[k] <= stamps[index])] = index
  return sorted(runs.items())


def _decode_all(stream: VideoStream, packets: list[Packet], times: np.ndarray, timed: bool) -> list[np.ndarray]:
  """`decode` from the first packet to the last: again if the packets' timestamps misled."""
  stream.codec_context.skip_frame = 'DEFAULT'
  stamps = np.sort([np.nan if packet.pts is None else packet.pts for packet in packets])
  index = _displayed((stamps - stamps[0]) * _tick(stream), times)
  while True:
    stream.codec_context.flush_buffers()
    scan = _Scan(stream, timed, keep=set(index.tolist()))
    scan.run(packets)
    seconds, order = scan.timeline()
    shown = order[_displayed(seconds, times)]
    if set(shown.tolist()) <= scan.kept.keys():
      return [scan.kept[i] for i in shown.tolist()]
    index = shown


def _displayed(seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
  """Index of the last of the sorted `seconds` that is at or before each time; the first at least"""
  return np.maximum(np.searchsorted(seconds, np.ravel(times) + _TOLERANCE, side='right') - 1, 0)


@dataclass
class _Scan:
  """One decode of all packets; `keep` are the frames, by output order, that become RGB."""

  stream: VideoStream
  timed: bool
  keep: set[int] = field(default_factory=set)
  stamps: list[int | None] = field(default_factory=list)
  lengths: list[float] = field(default_factory=list)
  kept: dict[int, np.ndarray] = field(default_factory=dict)
  errors: list[str] = field(default_factory=list)
  shape: tuple[int, int] = (0, 0)

  def run(self, packets: list[Packet]) -> None:
    """Decodes the packets; a packet that fails is noted, and the next one tried."""
    to_rgb = None
    for packet in [*packets, None]:
      try:
        decoded = self.stream.decode(packet)
      except av.FFmpegError as error:
        self.errors.append(_reason(error))
        continue
      for frame in decoded:
        if to_rgb is None:  # a video has its first frame's size, whatever comes later
          to_rgb = _ToRGB(frame.width, frame.height)
          self.shape = _upright(np.empty((frame.height, frame.width, 0)), frame).shape[:2]
        if len(self.stamps) in self.keep:
          self.kept[len(self.stamps)] = to_rgb(frame)
        self.stamps.append(frame.pts)
        self.lengths.append((frame.duration or 0) * _tick(self.stream))
    if not self.stamps:
      raise VideoError(': '.join(['no frame decodes', *self.errors[:1]]))

  @property
  def rate(self) -> float:
    return float(self.stream.guessed_rate or self.stream.average_rate or 25)

  def timeline(self) -> tuple[np.ndarray, np.ndarray]:
    """Display times in seconds from 0, sorted, and which output frame each one belongs to.

    Decoders put frames out in display order; where stamps contradict it, the container decides.
    """
    order = np.arange(len(self.stamps))
    if None in self.stamps:
      return order / self.rate, order
    stamps = np.array(self.stamps, np.int64)
    if self.timed:
      order = np.argsort(stamps, kind='stable')
    return (np.sort(stamps) - stamps.min()) * _tick(self.stream), order


def _tick(stream: VideoStream) -> float:
  return float(stream.time_base or 0)  # seconds


class _ToRGB:
  """Frames as upright RGB arrays; with a size, all of them scaled to it."""

  def __init__(self, width: int | None = None, height: int | None = None):
    self._size = {'width': width, 'height': height}
    self._reformatter = VideoReformatter()

  def __call__(self, frame: VideoFrame) -> np.ndarray:
    rgb = self._reformatter.reformat(frame, format='rgb24', threads=1, **self._size)
    return np.ascontiguousarray(_upright(rgb.to_ndarray(), frame))  # h w 3


def _upright(pixels: np.ndarray, frame: VideoFrame) -> np.ndarray:
  """Applies the display matrix: quarter turns, and mirrors (a phone's front camera), `h w 3`."""
  notes: Any = frame.side_data
  if Type.DISPLAYMATRIX not in notes:
    return pixels
  a, b, _, c, d, *_ = np.frombuffer(notes[Type.DISPLAYMATRIX], np.int32).tolist()
  if abs(b) > abs(a):  # x and y change places
    pixels, a, d = pixels.swapaxes(0, 1), c, b
  return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _reason(error: av.FFmpegError) -> str:
  return f'{type(error).__name__} ({error.strerror})'
