"""Writing frames as a video file, and copying a video with an overlay."""

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mevit_jax.files import atomic_path
from mevit_jax.video.container import File
from mevit_jax.video.decode import FrameIterator
from mevit_jax.video.picture import ToRGB

_TICK = Fraction(1, 90_000)  # seconds, MPEG's time base


def write_overlay(path: Path, video: File, draw: Callable[[np.ndarray, float], np.ndarray]) -> None:
  """Writes a video's frames with an overlay, in display orientation and without audio, as H.264 in an mp4 file.

  Frames keep their display times. Memory does not grow with the number of frames.

  Args:
    path: see `write_frames`.
    video: the source. It is read twice: display times are known only after the first pass.
    draw: function (frame uint8 `h w 3`, its time in seconds) -> the frame to write, of the same size.

  Raises:
    VideoError: the source is not a usable video.
    OSError: the source cannot be read.
    UserError: the file cannot be written.
  """
  first_pass = FrameIterator(video)
  for _ in first_pass:
    pass
  times = (first_pass.ticks * float(first_pass.tick)).tolist()

  def drawn_frames() -> Iterator[tuple[np.ndarray, float]]:
    to_rgb = ToRGB(*first_pass.size)
    for frame, seconds in zip(FrameIterator(video), times, strict=True):
      yield draw(to_rgb(frame), seconds), seconds

  write_frames(path, drawn_frames(), first_pass.info.fps)


def write_frames(path: Path, frames: Iterable[tuple[np.ndarray, float]], fps: float) -> None:
  """Writes frames as H.264 in an mp4 file, atomically; an odd height or width loses its last pixel.

  Args:
    path: file to write.
    frames: pairs (uint8 `h w 3`, time in seconds); all of one size, with times that increase from 0.
    fps: approximate frame rate.

  Raises:
    UserError: the file cannot be written.
  """
  with (
    atomic_path(path) as temporary,
    temporary.open('wb') as file,
    av.open(file, 'w', format='mp4') as output,
  ):
    stream = output.add_stream('libx264', rate=round(fps) or 1, options={'crf': '20', 'preset': 'veryfast'})
    stream.pix_fmt, stream.time_base, stream.codec_context.time_base = 'yuv420p', _TICK, _TICK
    previous = -1
    for pixels, seconds in frames:
      if previous < 0:
        stream.height, stream.width = (side // 2 * 2 for side in pixels.shape[:2])
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[: stream.height, : stream.width]))
      previous = max(previous + 1, round(seconds / _TICK))  # encoders require increasing timestamps
      frame.pts, frame.time_base = previous, _TICK
      output.mux(stream.encode(frame))
    output.mux(stream.encode())
