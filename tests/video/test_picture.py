"""Frames as displayed: square pixels, standard dynamic range, rotations."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace, ColorTrc

from mevit_jax.video.container import VideoError
from mevit_jax.video.decode import decode, inspect
from mevit_jax.video.reader import FileReader
from mevit_jax.video.transcode import Encoding, reencode
from tests.helpers.videos import make_video, number, picture


def _disk(height: int, width: int, aspect: float) -> np.ndarray:
  """A white disk that is round if a pixel is `aspect` times as wide as high."""
  y, x = np.mgrid[:height, :width]
  inside = ((x + 0.5 - width / 2) * aspect) ** 2 + (y + 0.5 - height / 2) ** 2 < (
    min(height, width * aspect) * 0.4
  ) ** 2
  return np.repeat(np.where(inside, 255, 0).astype(np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize('container', ['mp4', 'matroska', 'mpegts'])
@pytest.mark.parametrize('aspect', [Fraction(4, 3), Fraction(8, 9), Fraction(64, 51), Fraction(16, 15), Fraction(1, 2)])
def test_pixels_become_square(container, aspect):
  data = make_video([_disk(96, 120, float(aspect))] * 3, size=(96, 120), container=container, aspect=aspect)
  info, reader = inspect(data), FileReader(data)
  assert (info.height, info.width) == (96, int(120 * aspect))  # ffmpeg's scale=iw*sar:ih
  stored, _, stored_info = reencode(data, Encoding('h264', 0))
  assert (stored_info.height, stored_info.width) == (96, info.width // 2 * 2)
  with av.open(io.BytesIO(stored)) as opened:
    assert opened.streams.video[0].sample_aspect_ratio in (None, 1)
  for frame in (decode(data, np.zeros(1))[0], next(reader.frames(np.zeros(1))), decode(stored, np.zeros(1))[0]):
    white = frame[..., 0] > 128
    assert np.ptp(np.nonzero(white.any(0))) == pytest.approx(np.ptp(np.nonzero(white.any(1))), abs=2)


def test_almost_square_pixels_are_left():
  """Scaling to even sides leaves an aspect that keeps the exact shape."""
  data = make_video(3, aspect=Fraction(256, 255))
  assert inspect(data).width == 64


def test_squared_frames_are_limited():
  data = make_video(3, aspect=Fraction(10, 1))
  with pytest.raises(VideoError, match=r'frames of 640x48 pixels, more than the limit'):
    inspect(data, max_pixels=10**4)


def _encode_hdr(codes: np.ndarray, transfer: int) -> bytes:
  """A video of gray columns, of the given 10-bit codes, with BT.2020 colors."""
  file, width = io.BytesIO(), 16 * len(codes)
  with av.open(file, 'w', format='mp4') as output:
    stream = output.add_stream('libx265', rate=30, options={'crf': '1', 'x265-params': 'log-level=none'})
    stream.width, stream.height, stream.pix_fmt = width, 64, 'yuv420p10le'
    context = stream.codec_context
    context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, 1
    for index in range(3):
      frame = av.VideoFrame(width, 64, 'yuv420p10le')
      for plane, row in zip(frame.planes, (codes.repeat(16), *[np.full(width // 2, 512)] * 2), strict=True):
        pixels = np.frombuffer(plane, np.uint16).reshape(plane.height, -1).copy()
        pixels[:, : len(row)] = row
        plane.update(pixels.tobytes())
      frame.pts = index
      frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = transfer, 9, 9, 1
      output.mux(stream.encode(frame))
    output.mux(stream.encode())
  return file.getvalue()


def _pq(nits: np.ndarray) -> np.ndarray:
  """SMPTE ST 2084's code of a luminance, in [0, 1]."""
  power = (nits / 10000) ** 0.1593017578125
  return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def _hlg(light: np.ndarray) -> np.ndarray:
  """BT.2100's code of scene light, in [0, 1]."""
  high = 0.17883277 * np.log(np.maximum(12 * light - 0.28466892, 1e-9)) + 0.55991073
  return np.where(light <= 1 / 12, np.sqrt(3 * light), high)


@pytest.mark.parametrize('transfer', ['pq', 'hlg'])
def test_hdr_is_mapped_to_sdr(transfer):
  nits = np.array([0.0, 5, 20, 50, 100, 160, 203, 1000])
  code = _pq(nits) if transfer == 'pq' else _hlg((nits / 1000) ** (1 / 1.2))  # of a display of 1000 nits
  data = _encode_hdr((64 + code * 876).round(), ColorTrc.SMPTE2084 if transfer == 'pq' else ColorTrc.ARIB_STD_B67)
  # BT.1886: a display's light is the code to the power 2.4. SDR's white is HDR's reference white, 203 nits.
  expected = 255 * np.minimum(nits / 203, 1) ** (1 / 2.4)
  stored, _, info = reencode(data, Encoding('h264', quality=1))
  with av.open(io.BytesIO(stored)) as opened:
    frame = next(opened.decode(video=0))
    assert (frame.format.name, frame.colorspace) == ('yuv420p', Colorspace.ITU709)
    assert frame.color_trc not in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
  assert (info.num_frames, info.damage) == (3, '')
  for frame in (decode(data, np.zeros(1))[0], decode(stored, np.zeros(1))[0]):
    measured = frame[24:40, 8::16].mean(0)  # w 3
    np.testing.assert_allclose(measured, expected[:, None].repeat(3, 1), atol=12)


@pytest.mark.parametrize('degrees', [30, 45, 100, -20])
def test_other_rotations_are_named(degrees):
  data = make_video(3, rotation=degrees)
  for use in (inspect, lambda data: decode(data, np.zeros(1)), lambda data: reencode(data, Encoding('h264'))):
    with pytest.raises(VideoError, match=r'rotated by \d+ degrees, not by a multiple of 90; re-encode it upright'):
      use(data)


def test_rotations_are_rounded():
  data = make_video([picture(37)] * 3, rotation=90.4)
  assert inspect(data).height == 64
  assert number(np.rot90(decode(data, np.zeros(1))[0], -1)) == 37
