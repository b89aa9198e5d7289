"""Views of videos that no dataset has looked at, in memory that does not grow with their length.

`video.decode` is told a video's duration and holds all its packets. Here a first pass over the packets notes when each
is displayed, and a second one decodes those runs that the views need.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from av.video.stream import VideoStream

from mevit_jax.config.data import ClipConfig
from mevit_jax.errors import UserError
from mevit_jax.video.clips import crop_resize, view_boxes, view_times
from mevit_jax.video.container import TIMED, Demux, File, VideoError, opened, tick_seconds
from mevit_jax.video.decode import ToRGB, UnsafeError, Walk, damage_of, decode_run, displayed, plan_runs

# Each of their packets holds one frame. (VP8's alternate references are packets of their own, and never shown.)
_FRAME_A_PACKET = {'h264', 'hevc', 'vp9', 'av1', 'mpeg4', 'mjpeg'}


class Reader(Protocol):
  """A video's frames by time.

  `duration` is in seconds, to the end of the last one's display; `damage` is '' or says in one line what is not there.
  """

  @property
  def num_frames(self) -> int: ...

  @property
  def duration(self) -> float: ...

  @property
  def damage(self) -> str: ...

  def frames(self, times: np.ndarray) -> Iterator[np.ndarray]:
    """The frame displayed at each of rising `times`, RGB uint8 `h w 3`, as `video.decode` has them."""


class Span(NamedTuple):
  """A part of a video: from `start` to `end` in seconds, so many frames."""

  start: float
  end: float
  num_frames: int


class _Packet(NamedTuple):
  pts: int | None
  keyframe: bool
  discard: bool
  duration: int


class FileReader:
  """A `Reader` of an encoded file.

  Raises VideoError where there is no video, or less than half of one; OSError where the file cannot be read.
  """

  num_frames: int
  duration: float
  damage: str

  def __init__(self, file: File):
    self._file = file
    with opened(file) as (container, stream):
      demux = Demux(container, stream, everything=True)
      packets = [_Packet(p.pts, p.is_keyframe, bool(p.is_discard), p.duration or 0) for p in demux]
      self._runs = container.format.name in TIMED and _plain(stream, packets)
      if self._runs:
        self._note(stream, packets)
        self.damage = damage_of(container, stream, demux, self.duration, [])
    if not self._runs:
      walk = Walk(file)
      for _ in walk:
        pass
      self.num_frames, self.duration, self.damage = walk.info.num_frames, walk.info.duration, walk.info.damage
    if self.num_frames == 1:
      raise VideoError('a single frame, as a still image is')

  def _note(self, stream: VideoStream, packets: list[_Packet]) -> None:
    """Keeps what the packets say of time: all of it that `Walk` would find by decoding them."""
    self._stamps: list[int] = [packet.pts or 0 for packet in packets]
    self._keyframes = [packet.keyframe for packet in packets]
    self._shown = np.sort([packet.pts for packet in packets if not packet.discard]).astype(np.int64)
    self._seconds = (self._shown - self._shown[0]) * tick_seconds(stream)
    last = next(packet.duration for packet in packets if packet.pts == self._shown[-1]) * tick_seconds(stream)
    self.num_frames = len(self._shown)
    rate = stream.guessed_rate or stream.average_rate or 25
    self.duration = float(self._seconds[-1] + (last or self._seconds[-1] / max(1, self.num_frames - 1) or 1 / rate))

  def frames(self, times: np.ndarray) -> Iterator[np.ndarray]:
    """See `Reader`."""
    done = 0
    if self._runs:
      try:
        for frame in self._from_keyframes(times):
          done += 1
          yield frame
        return
      except UnsafeError:
        pass
    yield from self._from_the_first(times[done:])

  def _from_keyframes(self, times: np.ndarray) -> Iterator[np.ndarray]:
    asked = self._shown[displayed(self._seconds, times)].tolist()
    wanted, place = set(asked), 0
    with opened(self._file) as (container, stream):
      size, to_rgb = (stream.width, stream.height), ToRGB()
      packets, read = iter(Demux(container, stream)), 0
      for first, last in _apart(plan_runs(self._keyframes, self._stamps, wanted)):
        for _ in itertools.islice(packets, first - read):
          pass
        for frame in decode_run(stream, itertools.islice(packets, last + 1 - first), wanted, size):
          if place == len(asked) or frame.pts != asked[place]:
            raise UnsafeError  # one was not put out
          rgb = to_rgb(frame)
          while place < len(asked) and asked[place] == frame.pts:
            yield rgb
            place += 1
        read = last + 1
    if place < len(asked):
      raise UnsafeError

  def _from_the_first(self, times: np.ndarray) -> Iterator[np.ndarray]:
    """Two walks: when the frames are displayed is known at the end of the first."""
    walk = Walk(self._file)
    for _ in walk:
      pass
    self.damage = self.damage or walk.info.damage  # of packets that say nothing of it themselves
    order = np.argsort(walk.ticks, kind='stable')
    asked = order[displayed(walk.ticks[order] * float(walk.tick), times)].tolist()
    wanted, kept, place = set(asked), dict[int, np.ndarray](), 0
    last_place = {index: place for place, index in enumerate(asked)}
    for index, frame in enumerate(Walk(self._file)):
      if index == 0:
        to_rgb = ToRGB(frame.width, frame.height)
      if index in wanted:
        kept[index] = to_rgb(frame)
      while place < len(asked) and asked[place] in kept:
        yield kept[asked[place]]
        if last_place[asked[place]] == place:
          del kept[asked[place]]
        place += 1


def _plain(stream: VideoStream, packets: list[_Packet]) -> bool:
  """Whether the packets alone say which frames there are, and when."""
  stamps = {packet.pts for packet in packets}
  return (
    stream.codec_context.codec.canonical_name in _FRAME_A_PACKET
    and None not in stamps
    and len(stamps) == len(packets)
    and packets[0].pts == min(stamp for stamp in stamps if stamp is not None)
    and not all(packet.discard for packet in packets)
  )


def _apart(runs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
  """Runs of which none begins before the one before it ends: those that do are one."""
  first, last = runs[0]
  for start, stop in runs[1:]:
    if start > last:
      yield first, last
      first = start
    last = max(last, stop)
  yield first, last


@dataclass(frozen=True)
class ArrayReader:
  """A `Reader` of frames in memory, uint8 `t h w 3`, shown at an even rate."""

  video: np.ndarray
  fps: float
  damage: str = ''

  def __post_init__(self):
    if self.video.ndim != 4 or self.video.shape[-1] != 3 or self.video.dtype != np.uint8:
      raise VideoError(f'frames are an array t h w 3 of uint8, not {self.video.shape} of {self.video.dtype}')
    if len(self.video) < 2:
      raise VideoError(f'{len(self.video)} frames are no video')
    if not self.fps > 0:
      raise UserError(f'fps must be more than 0, not {self.fps}')

  @property
  def num_frames(self) -> int:
    return len(self.video)

  @property
  def duration(self) -> float:
    return len(self.video) / self.fps

  def frames(self, times: np.ndarray) -> Iterator[np.ndarray]:
    """See `Reader`."""
    for index in displayed(np.arange(len(self.video)) / self.fps, times).tolist():
      yield self.video[index]


def spans(reader: Reader, window: float | None = None, every: float | None = None) -> list[Span]:
  """All of a video as one span; or windows of `window` seconds, `every` so many, the last one at the video's end."""
  if window is None or window >= reader.duration:
    return [Span(0.0, reader.duration, reader.num_frames)]
  interval = reader.duration / reader.num_frames
  length = min(reader.num_frames, max(1, round(window / interval)))
  last = reader.num_frames - length
  step = max(1.0, (every or window) / interval)
  starts = sorted({*(round(k * step) for k in range(int(last / step) + 1)), last})
  return [Span(start * interval, (start + length) * interval, length) for start in starts if start <= last]


def read_views(
  reader: Reader, clip: ClipConfig, parts: list[Span], clips: int, crops: int
) -> Iterator[tuple[Span, np.ndarray]]:
  """Each span with evaluation's views of it, uint8 `v t h w 3`, as soon as its last frame is decoded.

  Views are `v = clips crops`, a clip's crops next to each other, as `pipeline.eval_batches` has them.
  """
  times = np.stack(
    [part.start + view_times(clip, part.end - part.start, part.num_frames, clips) for part in parts]
  )  # parts clips t
  order = np.argsort(times, axis=None, kind='stable')
  places = np.stack(np.unravel_index(order, times.shape), axis=1).tolist()
  left = np.full(len(parts), times[0].size)
  views = dict[int, np.ndarray]()
  seen, cropped = None, np.empty(0)
  for (part, k, t), frame in zip(places, reader.frames(times.ravel()[order]), strict=True):
    if frame is not seen:
      height, width = frame.shape[:2]
      boxes = view_boxes(clip, height, width, crops)
      seen, cropped = frame, np.stack([crop_resize(frame, box, clip.size) for box in boxes])  # crops h w 3
    if part not in views:
      views[part] = np.empty((clips, crops, clip.frames, *clip.size, 3), np.uint8)
    views[part][k, :, t] = cropped
    left[part] -= 1
    if not left[part]:
      done = views.pop(part)
      yield parts[part], done.reshape(-1, *done.shape[2:])  # v t h w 3
