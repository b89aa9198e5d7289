"""Views of videos that are not part of a prepared dataset, in memory that does not grow with their length.

`decode.decode` needs a video's duration and holds all of its packets. Here a first pass over the packets records their
timestamps, and a second one decodes the runs that the views need.
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
from mevit_jax.video.container import File, VideoError, open_video, square_width
from mevit_jax.video.decode import (
  FrameIndex,
  FrameIterator,
  UnsafeError,
  decode_run,
  displayed_index,
  index_packets,
  plan_runs,
)
from mevit_jax.video.packets import Demuxer, describe_damage, time_base_seconds
from mevit_jax.video.picture import ToRGB

# Codecs whose packets each contain one frame. (VP8's alternate references are separate packets that are never shown.)
_ONE_FRAME_PER_PACKET = {'h264', 'hevc', 'vp9', 'av1', 'mpeg4', 'mjpeg'}


class Reader(Protocol):
  """Random access to a video's frames by time."""

  @property
  def num_frames(self) -> int:
    """Number of frames."""
    ...

  @property
  def duration(self) -> float:
    """Seconds from the display of the first frame to the end of the last one."""
    ...

  @property
  def damage(self) -> str:
    """One line that says which part is missing or does not decode, or ''."""
    ...

  def frames(self, times: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the frame displayed at each of the increasing `times`, RGB uint8 `h w 3`, as `decode.decode` does."""
    ...


class Span(NamedTuple):
  """A part of a video: start and end in seconds, and its number of frames."""

  start: float
  end: float
  num_frames: int


class _Packet(NamedTuple):
  pts: int | None
  keyframe: bool
  discard: bool
  duration: int


class FileReader:
  """A `Reader` for an encoded file.

  Raises:
    VideoError: the file is not a video, or less than half of it is present.
    OSError: the file cannot be read.
  """

  num_frames: int
  duration: float
  damage: str

  def __init__(self, file: File):
    self._file = file
    with open_video(file) as (container, stream):
      demuxer = Demuxer(container, stream, all_streams=True)
      packets = [_Packet(p.pts, p.is_keyframe, bool(p.is_discard), p.duration or 0) for p in demuxer]
      self._index = index_packets(container.format.name, [packet[:3] for packet in packets])
      if stream.codec_context.codec.canonical_name not in _ONE_FRAME_PER_PACKET:
        self._index = None
      if self._index is not None and self._first_frame_decodes(self._index):
        self._record_timestamps(stream, self._index, packets)
        start = float(self._index.shown[0]) * time_base_seconds(stream)
        self.damage = describe_damage(demuxer, start, self.duration)
      else:
        self._index = None
    if self._index is None:
      frames = FrameIterator(file)
      for _ in frames:
        pass
      self.num_frames, self.duration, self.damage = frames.info.num_frames, frames.info.duration, frames.info.damage
    if self.num_frames == 1:
      raise VideoError('a single frame, like a still image')

  def _first_frame_decodes(self, index: FrameIndex) -> bool:
    """Returns True if the first frame decodes; otherwise, time starts with another one."""
    wanted = {int(index.shown[0])}
    with open_video(self._file) as (container, stream):
      last = index.timestamps.index(*wanted)
      packets = itertools.islice(Demuxer(container, stream), last + 1)
      try:
        return bool(list(decode_run(stream, packets, wanted, (stream.width, stream.height), True)))
      except UnsafeError:
        return False

  def _record_timestamps(self, stream: VideoStream, index: FrameIndex, packets: list[_Packet]) -> None:
    """Derives from the packets what `FrameIterator` would find by decoding them."""
    self.num_frames = len(index.shown)
    seconds = (index.shown - index.shown[0]) * time_base_seconds(stream)
    last = next(packet.duration for packet in packets if packet.pts == index.shown[-1]) * time_base_seconds(stream)
    rate = stream.guessed_rate or stream.average_rate or 25
    self.duration = float(seconds[-1] + (last or seconds[-1] / max(1, self.num_frames - 1) or 1 / rate))

  def frames(self, times: np.ndarray) -> Iterator[np.ndarray]:
    """See `Reader`."""
    done = 0
    if self._index is not None:
      try:
        for frame in self._decode_from_keyframes(self._index, times):
          done += 1
          yield frame
        return
      except UnsafeError:
        pass
    yield from self._decode_from_start(times[done:])

  def _decode_from_keyframes(self, index: FrameIndex, times: np.ndarray) -> Iterator[np.ndarray]:
    with open_video(self._file) as (container, stream):
      requested, position = index.requested(stream, times), 0
      wanted, size = set(requested), (stream.width, stream.height)
      to_rgb = ToRGB(square_width(stream, size[0]), size[1])
      packets, num_read = iter(Demuxer(container, stream)), 0
      for first, last in _merge_runs(plan_runs(index.keyframes, index.timestamps, wanted)):
        for _ in itertools.islice(packets, first - num_read):
          pass
        for frame in decode_run(stream, itertools.islice(packets, last + 1 - first), wanted, size, first == 0):
          if position == len(requested) or frame.pts != requested[position]:
            raise UnsafeError  # the decoder did not return a requested frame
          rgb = to_rgb(frame)
          while position < len(requested) and requested[position] == frame.pts:
            yield rgb
            position += 1
        num_read = last + 1
    if position < len(requested):
      raise UnsafeError

  def _decode_from_start(self, times: np.ndarray) -> Iterator[np.ndarray]:
    """Decodes everything twice: display times are known only at the end of the first pass."""
    first_pass = FrameIterator(self._file)
    for _ in first_pass:
      pass
    self.damage = self.damage or first_pass.info.damage  # also packets that only decoding shows to be corrupt
    requested = first_pass.displayed(times)
    wanted, kept, position = set(requested), dict[int, np.ndarray](), 0
    last_position = {index: position for position, index in enumerate(requested)}
    to_rgb = ToRGB(*first_pass.size)
    for index, frame in enumerate(FrameIterator(self._file)):
      if index in wanted:
        kept[index] = to_rgb(frame)
      while position < len(requested) and requested[position] in kept:
        yield kept[requested[position]]
        if last_position[requested[position]] == position:
          del kept[requested[position]]
        position += 1


def _merge_runs(runs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
  """Merges runs that overlap."""
  first, last = runs[0]
  for start, stop in runs[1:]:
    if start > last:
      yield first, last
      first = start
    last = max(last, stop)
  yield first, last


@dataclass(frozen=True)
class ArrayReader:
  """A `Reader` for frames in memory at a constant rate.

  Attributes:
    video: uint8 `t h w 3`.
    fps: frames per second.
    damage: always ''.

  Raises:
    VideoError: the array is not a video.
    UserError: fps is not positive.
  """

  video: np.ndarray
  fps: float
  damage: str = ''

  def __post_init__(self) -> None:
    if self.video.ndim != 4 or self.video.shape[-1] != 3 or self.video.dtype != np.uint8:
      raise VideoError(f'frames must be a uint8 array (t, h, w, 3), not {self.video.dtype} {self.video.shape}')
    if len(self.video) < 2:
      raise VideoError(f'a video must have at least 2 frames, not {len(self.video)}')
    if not self.fps > 0:
      raise UserError(f'fps must be more than 0, not {self.fps}')

  @property
  def num_frames(self) -> int:
    """See `Reader`."""
    return len(self.video)

  @property
  def duration(self) -> float:
    """See `Reader`."""
    return len(self.video) / self.fps

  def frames(self, times: np.ndarray) -> Iterator[np.ndarray]:
    """See `Reader`."""
    for index in displayed_index(np.arange(len(self.video)) / self.fps, times).tolist():
      yield self.video[index]


def spans(reader: Reader, window: float | None = None, every: float | None = None) -> list[Span]:
  """Splits a video into windows; the last one ends with the video.

  Args:
    reader: the video.
    window: length of a window in seconds; None, or more than the video's duration, gives one span for the entire video.
    every: distance between the starts of consecutive windows in seconds; `window` by default.
  """
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
  """Yields each span with its evaluation views, uint8 `v t h w 3`, as soon as its last frame is decoded.

  Views are ordered `v = clips crops`, as in `pipeline.eval_batches`.

  Args:
    reader: the video.
    clip: clip sampling and crop size.
    parts: the spans.
    clips: clips per span.
    crops: crops per clip.
  """
  times = np.stack(
    [part.start + view_times(clip, part.end - part.start, part.num_frames, clips) for part in parts]
  )  # parts clips t
  order = np.argsort(times, axis=None, kind='stable')
  positions = np.stack(np.unravel_index(order, times.shape), axis=1).tolist()
  remaining = np.full(len(parts), times[0].size)
  views = dict[int, np.ndarray]()
  previous, cropped = None, np.empty(0)
  for (part, k, t), frame in zip(positions, reader.frames(times.ravel()[order]), strict=True):
    if frame is not previous:
      height, width = frame.shape[:2]
      boxes = view_boxes(clip, height, width, crops)
      previous, cropped = frame, np.stack([crop_resize(frame, box, clip.size) for box in boxes])  # crops h w 3
    if part not in views:
      views[part] = np.empty((clips, crops, clip.frames, *clip.size, 3), np.uint8)
    views[part][k, :, t] = cropped
    remaining[part] -= 1
    if not remaining[part]:
      completed = views.pop(part)
      yield parts[part], completed.reshape(-1, *completed.shape[2:])  # v t h w 3
