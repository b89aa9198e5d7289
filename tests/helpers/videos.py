"""Small videos encoded in memory, whose frames contain their index."""

import io
from fractions import Fraction

import av
import numpy as np


def picture(index: int, height: int = 48, width: int = 64) -> np.ndarray:
  """Frame `index`, uint8 `h w 3`: its index in binary, as eight white or black bars, above a moving ramp."""
  ramp = (np.arange(width) * 3 + index * 5) % 200 + 20
  pixels = np.repeat(np.tile(ramp.astype(np.uint8), (height, 1))[..., None], 3, -1)  # h w 3
  for bit in range(8):
    start, stop = bit * width // 8, (bit + 1) * width // 8
    pixels[: height // 2, start:stop] = 255 if index >> bit & 1 else 0
  return pixels


def number(frame: np.ndarray) -> int:
  """Reads the index that `picture` drew; robust to compression and resizing."""
  height, width = frame.shape[:2]
  bars = [frame[: height // 3, bit * width // 8 : (bit + 1) * width // 8] for bit in range(8)]
  return sum((bar[:, bar.shape[1] // 4 : -bar.shape[1] // 4].mean() > 128) << bit for bit, bar in enumerate(bars))


def make_video(
  frames: int | list[np.ndarray] = 40,
  *,
  container: str = 'mp4',
  codec: str = 'libx264',
  rate: int = 30,
  stamps: list[int] | None = None,
  shift: int = 0,
  keyframes: int = 12,
  pixels: str = 'yuv420p',
  size: tuple[int, int] = (48, 64),
  rotation: float | None = None,
  mirror: bool = False,
  sound: bool = False,
  aspect: Fraction | None = None,
  options: dict[str, str] | None = None,
  container_options: dict[str, str] | None = None,
) -> bytes:
  """Encodes a video.

  `stamps` are display times in milliseconds, `shift` is the first frame's time in frames, `size` is (height, width),
  and `aspect` is a pixel's width / height.
  """
  height, width = size
  if isinstance(frames, int):
    frames = [picture(index, height, width) for index in range(frames)]
  file = io.BytesIO()
  with av.open(file, 'w', format=container, options=container_options or {}) as output:
    stream = output.add_stream(codec, rate=rate, options=options or {})
    stream.height, stream.width, stream.pix_fmt = height, width, pixels
    stream.codec_context.gop_size = keyframes
    stream.codec_context.thread_count = 1
    if aspect:
      stream.codec_context.sample_aspect_ratio = aspect
    if stamps:
      stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
    if rotation is not None or mirror:
      stream.set_display_rotation(rotation or 0, hflip=mirror)
    audio = output.add_stream('aac', rate=8000, layout='mono') if sound else None
    for index, array in enumerate(frames):
      frame = av.VideoFrame.from_ndarray(array)
      if stamps:
        frame.pts, frame.time_base = stamps[index], stream.codec_context.time_base
      elif shift:
        frame.pts, frame.time_base = shift + index, Fraction(1, rate)
      output.mux(stream.encode(frame))
    output.mux(stream.encode())
    if audio is not None:
      noise = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), 'fltp', 'mono')
      noise.sample_rate = 8000
      output.mux(audio.encode(noise))
      output.mux(audio.encode())
  return file.getvalue()


def decode_all(data: bytes) -> tuple[list[np.ndarray], np.ndarray]:
  """Decodes every frame and its time with a plain PyAV loop, the reference for `decode`."""
  with av.open(io.BytesIO(data)) as container:
    container.streams.video[0].thread_type = 'NONE'
    frames = list(container.decode(video=0))
    times = np.array([float(frame.pts * frame.time_base) for frame in frames])
    return [frame.to_ndarray(format='rgb24') for frame in frames], times - times[0]
