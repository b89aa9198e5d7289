"""Frames written as a video; a video written anew, with something drawn on its frames."""

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mevit_jax.video.container import File
from mevit_jax.video.decode import ToRGB, Walk

_TICK = Fraction(1, 90_000)  # of a second, as MPEG has it


def write_overlay(path: Path, video: File, draw: Callable[[np.ndarray, float], np.ndarray]) -> None:
  """Writes a video's frames, upright and without sound, as H.264 in an mp4 file.

  Frames keep their times. Memory does not grow with their number.

  Args:
    path: see `write_frames`.
    video: what to read, twice: when its frames are displayed is known at the end.
    draw: (frame uint8 `h w 3`, its time in seconds) -> the frame to write, of the same size.

  Raises:
    VideoError: it cannot be read; OSError likewise, or it cannot be written.
  """
  walk = Walk(video)
  for _ in walk:
    pass
  times = (walk.ticks * float(walk.tick)).tolist()

  def drawn() -> Iterator[tuple[np.ndarray, float]]:
    for index, (frame, seconds) in enumerate(zip(Walk(video), times, strict=True)):
      if index == 0:
        to_rgb = ToRGB(frame.width, frame.height)
      yield draw(to_rgb(frame), seconds), seconds

  write_frames(path, drawn(), walk.info.fps)


def write_frames(path: Path, frames: Iterable[tuple[np.ndarray, float]], fps: float) -> None:
  """Writes frames as H.264 in an mp4 file; an odd height or width loses its last pixel.

  Args:
    path: where to write; half a file is never left there.
    frames: uint8 `h w 3`, all of one size, each with its time in seconds, rising from 0.
    fps: about how many there are in a second.
  """
  temporary = path.with_name(f'{path.name}.tmp')
  try:
    with temporary.open('wb') as file, av.open(file, 'w', format='mp4') as output:
      stream = output.add_stream('libx264', rate=round(fps) or 1, options={'crf': '20', 'preset': 'veryfast'})
      stream.pix_fmt, stream.time_base, stream.codec_context.time_base = 'yuv420p', _TICK, _TICK
      before = -1
      for pixels, seconds in frames:
        if before < 0:
          stream.height, stream.width = (side // 2 * 2 for side in pixels.shape[:2])
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[: stream.height, : stream.width]))
        before = max(before + 1, round(seconds / _TICK))  # an encoder wants them to rise
        frame.pts, frame.time_base = before, _TICK
        output.mux(stream.encode(frame))
      output.mux(stream.encode())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
