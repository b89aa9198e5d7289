import gc
import io

import av
import numpy as np
import pytest

from mevit_jax.errors import UserError
from mevit_jax.video import transcode as transcode_module
from mevit_jax.video.decode import VideoError, decode, inspect
from mevit_jax.video.transcode import Encoding, reencode
from tests.helpers.videos import decode_all, make_video, number, picture

H264 = Encoding('h264', quality=12)
KINDS = {
  'b_frames': {'options': {'bf': '3', 'b-pyramid': 'normal'}},
  'sound': {'sound': True},
  'vp9': {'container': 'webm', 'codec': 'libvpx-vp9', 'options': {'lag-in-frames': '12'}},
  'avi': {'container': 'avi', 'codec': 'mpeg4', 'options': {'bf': '2'}},
  'mpeg': {'container': 'mpeg', 'codec': 'mpeg2video', 'options': {'bf': '2'}},
  'transport': {'container': 'mpegts'},
  'ten_bit': {'pixels': 'yuv420p10le'},
  'full_range': {'pixels': 'yuvj420p', 'codec': 'mjpeg', 'container': 'mov'},
  'gray': {'pixels': 'gray'},
  'rgb': {'pixels': 'rgb24', 'codec': 'png', 'container': 'mov'},
  'odd': {'pixels': 'yuv444p', 'size': (51, 67)},
}


def psnr(a, b):
  return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.parametrize(
  'wrong', [{'kind': 'x'}, {'short_side': 1}, {'short_side': -2}, {'keyframes': 0}, {'quality': 52}]
)
def test_invalid_encodings_are_rejected(wrong):
  with pytest.raises(UserError, match=next(iter(wrong)).replace('kind', 'encoding')):
    Encoding(**wrong)


def test_encoding_keep_stores_the_original_bytes():
  data = make_video()
  stored, source, info = reencode(data, Encoding())
  assert stored is data
  assert source == info == inspect(data)


@pytest.mark.parametrize('kind', KINDS)
def test_reencoding_keeps_frames_and_times(kind):
  data = make_video(**KINDS[kind])
  stored, source, info = reencode(data, H264)
  assert (source, info) == (inspect(data), inspect(stored))
  assert (info.num_frames, info.damage, info.codec) == (40, '', 'h264')
  assert info.duration == pytest.approx(source.duration, abs=1e-4)
  assert (info.height, info.width) == (source.height // 2 * 2, source.width // 2 * 2)
  times = np.random.default_rng(0).uniform(-0.2, 1.6, 20)
  frames = decode(data, times)
  reencoded = decode(stored, times)
  assert [number(frame) for frame in reencoded] == [number(frame) for frame in frames]
  if kind != 'odd':
    assert psnr(np.stack(reencoded), np.stack(frames)) > 40


def test_variable_frame_rate_is_kept_exactly():
  stamps = [0, 40, 41, 500, 510, 1500, 1540, 9600]
  for container in ('mp4', 'matroska'):
    data = make_video(8, stamps=stamps, container=container, options={'bf': '2'})
    stored, source, info = reencode(data, H264)
    assert info.duration == pytest.approx(source.duration, abs=1e-4)
    _, times = decode_all(stored)
    np.testing.assert_allclose(times, decode_all(data)[1], atol=1e-9)
    requested = np.concatenate([times, times - 1e-4, times + 1e-4])
    assert [number(f) for f in decode(stored, requested)] == [number(f) for f in decode(data, requested)]


@pytest.mark.parametrize('mirror', [False, True])
@pytest.mark.parametrize('degrees', [0, 90, 180, 270])
def test_orientation_is_applied(degrees, mirror):
  data = make_video([picture(37)] * 3, rotation=degrees, mirror=mirror)
  for short_side in (0, 24):
    stored, source, info = reencode(data, Encoding('h264', short_side, quality=5))
    transposed = degrees in (90, 270)
    assert (source.height, source.width) == ((64, 48) if transposed else (48, 64))
    small = (info.height, info.width)
    assert small == (((32, 24) if transposed else (24, 32)) if short_side else (source.height, source.width))
    upright = decode(data, np.zeros(1))[0]
    if short_side:
      upright = upright.reshape(small[0], 2, small[1], 2, 3).mean((1, 3))  # h w 3
    assert psnr(decode(stored, np.zeros(1))[0], upright) > (25 if short_side else 35)


@pytest.mark.parametrize('matrix', [1, 2, 5, 6, 9])
@pytest.mark.parametrize('full', [False, True])
def test_colors_are_kept(matrix, full):
  colors = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [255, 255, 255], [0, 0, 0], [90, 160, 120]], np.uint8)
  flat = np.repeat(np.tile(colors.repeat(16, 0), (32, 1))[None], 1, 0).reshape(32, 96, 3)  # h w 3
  file = io.BytesIO()
  with av.open(file, 'w', format='mp4') as output:
    stream = output.add_stream('libx264', rate=30, options={'crf': '1'})
    stream.width, stream.height, stream.pix_fmt = 96, 32, 'yuvj420p' if full else 'yuv420p'
    stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
    space = {2: 5, 6: 5}.get(matrix, matrix)
    frame = av.VideoFrame.from_ndarray(flat).reformat(
      format=stream.pix_fmt, dst_colorspace=space, dst_color_range=2 if full else 1
    )
    for frame.pts in range(3):
      output.mux(stream.encode(frame))
    output.mux(stream.encode())
  before = decode(file.getvalue(), np.zeros(1))[0]
  after = decode(reencode(file.getvalue(), Encoding('h264', quality=1))[0], np.zeros(1))[0]
  for start in range(0, 96, 16):
    inside = np.s_[4:-4, start + 4 : start + 12]
    np.testing.assert_allclose(before[inside].mean((0, 1)), colors[start // 16], atol=4)
    np.testing.assert_allclose(after[inside].mean((0, 1)), before[inside].mean((0, 1)), atol=2)


@pytest.mark.parametrize(
  ('size', 'short_side', 'expected'),
  [
    ((48, 64), 320, (48, 64)),
    ((48, 64), 24, (24, 32)),
    ((64, 48), 24, (32, 24)),
    ((51, 67), 0, (50, 66)),
    ((51, 67), 25, (24, 32)),
    ((1, 1), 320, (2, 2)),
    ((1, 7), 0, (2, 6)),
  ],
)
def test_output_sizes(size, short_side, expected):
  data = make_video(3, codec='png', container='mov', pixels='rgb24', size=size)
  _, source, info = reencode(data, Encoding('h264', short_side))
  assert (source.height, source.width) == size
  assert (info.height, info.width) == expected


def test_keyframe_interval_is_configurable():
  stored = reencode(make_video(60, keyframes=1000), Encoding('h264', keyframes=5))[0]
  with av.open(io.BytesIO(stored)) as container:
    packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [p.is_keyframe for p in packets] == [i % 5 == 0 for i in range(60)]
    assert all(packet.pts == packet.dts for packet in packets)
    assert len(container.streams) == 1


def test_output_is_deterministic():
  data = make_video()
  assert reencode(data, H264)[0] == reencode(data, H264)[0]


def test_only_the_decodable_part_of_a_damaged_video_is_stored():
  complete = make_video(120, container='matroska')
  stored, source, info = reencode(complete[: int(len(complete) * 0.6)], H264)
  assert 'truncated at' in source.damage
  assert (info.damage, info.num_frames) == ('', source.num_frames)
  last = np.array([source.duration - 0.01, 100.0])
  assert [number(frame) for frame in decode(stored, last)] == [source.num_frames - 1] * 2


def test_frames_keep_the_size_of_the_first_one():
  def packets(size):
    with av.open(
      io.BytesIO(make_video(6, container='h264', size=size, options={'bf': '0'})), format='h264'
    ) as container:
      return b''.join(bytes(packet) for packet in container.demux(video=0))

  stored, _, info = reencode(packets((48, 64)) + packets((96, 128)), H264)
  assert (info.num_frames, info.height, info.width) == (12, 48, 64)
  assert [number(frame) for frame in decode(stored, (np.arange(12) + 0.5) / info.fps)] == [*range(6), *range(6)]


def test_videos_with_duplicate_timestamps_are_kept():
  data = make_video(6, rate=2000, container='matroska', options={'bf': '0'})  # whose time base is a millisecond
  stored, source, info = reencode(data, H264)
  assert stored is data
  assert source == info


@pytest.mark.parametrize('data', [b'', b'not a video at all' * 99, make_video()[:2000]])
def test_unusable_files_are_errors_with_a_reason(data):
  with pytest.raises(VideoError):
    reencode(data, H264)


def test_transcoding_stops_at_the_time_limit():
  with pytest.raises(VideoError, match='longer than'):
    reencode(make_video(), H264, time_limit=1e-6)


def test_frames_are_freed_after_transcoding(monkeypatch):
  """Memory does not grow with the video's length, even without garbage collection."""
  alive = []

  class Encoder(transcode_module._Encoder):
    def add(self, frame):
      super().add(frame)
      alive.append(sum(issubclass(type(item), av.VideoFrame) for item in gc.get_objects()))

  monkeypatch.setattr(transcode_module, '_Encoder', Encoder)
  data = make_video(30, rotation=90)
  gc.collect()
  gc.disable()
  try:
    reencode(data, H264)
  finally:
    gc.enable()
  assert len(alive) == 30
  assert max(alive) < 10
