"""Clocks that do not start at zero or that jump, and what is missing of a file."""

import io

import av
import numpy as np
import pytest

from mevit_jax.video.container import VideoError
from mevit_jax.video.decode import decode, inspect
from mevit_jax.video.reader import FileReader
from mevit_jax.video.transcode import Encoding, reencode
from tests.helpers.videos import make_video, number, picture


@pytest.mark.parametrize('seconds', [1, 5, 1000])
@pytest.mark.parametrize('bf', ['0', '2'])
@pytest.mark.parametrize(
  ('container', 'codec'),
  [('avi', 'libx264'), ('avi', 'mpeg4'), ('flv', 'libx264'), ('nut', 'libx264'), ('asf', 'wmv2'), ('ivf', 'libvpx')],
)
def test_a_late_start_is_not_damage(container, codec, bf, seconds):
  """AVI has no start time: its muxer stores empty packets, and the first frame may last until the second one."""
  if bf == '2' and codec in ('wmv2', 'libvpx'):
    pytest.skip('no B-frames')
  data = make_video(50, container=container, codec=codec, options={'bf': bf}, shift=30 * seconds)
  info, reader = inspect(data), FileReader(data)
  assert (info.num_frames, info.damage, reader.damage) == (50, '', '')
  if container != 'avi':
    assert info.duration == pytest.approx(50 / 30, abs=0.04)
    assert [number(frame) for frame in decode(data, (np.array([3, 40]) + 0.5) / 30)] == [3, 40]


def test_flv_may_declare_its_end_or_its_duration():
  data = bytearray(make_video(120, container='flv', codec='flv1', shift=90))  # 3 to 7 s
  position = data.index(b'duration') + 9
  for declared in (4.0, 7.0):
    data[position : position + 8] = np.array(declared, '>f8').tobytes()
    assert inspect(bytes(data)).damage == ''
  with pytest.raises(VideoError, match='contains only'):
    inspect(bytes(data[: len(data) // 4]))


def _segments(folder, codec: str) -> dict[str, bytes]:
  """Segments of a stream in fragmented MP4, as HLS and DASH deliver it, each with the initialization segment."""
  options = {'hls_segment_type': 'fmp4', 'hls_time': '1', 'hls_playlist_type': 'vod'}
  with av.open(str(folder / 'list.m3u8'), 'w', format='hls', options=options) as output:
    stream = output.add_stream(codec, rate=30, options={'g': '30', 'bf': '2'})
    stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
    for index in range(150):
      output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index))))
    output.mux(stream.encode())
  start = (folder / 'init.mp4').read_bytes()
  return {path.name: start + path.read_bytes() for path in sorted(folder.glob('*.m4s'))}


def test_a_segment_of_a_stream_is_not_damaged(tmp_path):
  segments, first = _segments(tmp_path, 'libx264'), 0
  assert len(segments) >= 3
  for data in segments.values():
    info = inspect(data)
    assert (info.damage, FileReader(data).damage) == ('', '')
    assert info.duration == pytest.approx(info.num_frames / 30, abs=0.05)
    assert number(decode(data, np.zeros(1))[0]) == first
    first += info.num_frames
  assert first == 150


@pytest.mark.parametrize('options', [{}, {'movflags': 'frag_keyframe+empty_moov+default_base_moof+dash'}])
def test_missing_packets_of_mp4_are_noted_exactly(options, tmp_path):
  path = tmp_path / 'video.mp4'
  with av.open(str(path), 'w', options=options or {'movflags': 'faststart'}) as output:
    stream = output.add_stream('libx264', rate=30, options={'bf': '0', 'sc_threshold': '0'})
    stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
    stream.codec_context.gop_size = 120
    for index in range(120):
      output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index))))
    output.mux(stream.encode())
  data = path.read_bytes()
  with av.open(io.BytesIO(data)) as container:
    ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
  assert inspect(data).damage == ''
  info = inspect(data[: ends[114]])
  assert (info.num_frames, info.damage.split(':')[0]) == (115, 'truncated at 3.8 s of 4.0 s')
  assert FileReader(data[: ends[114]]).damage == info.damage
  with pytest.raises(VideoError, match=r'contains only 1\.\d s of 4\.0 s'):
    inspect(data[: ends[45]])


def _join(*shifts: int) -> bytes:
  """Recordings of 40 frames, joined byte by byte; each one's clock starts at a number of frames."""
  return b''.join(
    make_video(
      [picture(40 * part + index) for index in range(40)], container='mpegts', options={'bf': '2'}, shift=shift
    )
    for part, shift in enumerate(shifts)
  )


@pytest.mark.parametrize(
  ('shifts', 'note'),
  [
    ((0, 0), 'jumps at 1.3 s'),
    ((0, 30_000), 'jumps at 1.3 s'),
    ((30_000, 0), 'jumps at 1.3 s'),
    ((0, 0, 9000), 'jumps 2 times, first at 1.3 s'),
    ((0, 20), 'jumps at 1.3 s'),
  ],
)
def test_time_goes_on_after_the_clock_jumps(shifts, note):
  data, count = _join(*shifts), 40 * len(shifts)
  info, times = inspect(data), (np.arange(count) + 0.5) / 30
  assert (info.num_frames, info.duration) == (count, pytest.approx(count / 30))
  assert info.damage == f'its clock {note}: time continues after the previous frame'
  assert [number(frame) for frame in decode(data, times)] == [*range(count)]
  stored, source, stored_info = reencode(data, Encoding('h264', quality=10))
  assert (source.damage, stored_info.damage) == (info.damage, '')
  assert stored_info.duration == pytest.approx(count / 30, abs=1e-4)
  assert [number(frame) for frame in decode(stored, times)] == [*range(count)]


def test_a_steady_clock_is_not_corrected():
  assert inspect(_join(0, 40)).damage == ''  # the second part starts where the first one ends
  short_gap = inspect(_join(0, 130))  # 3 s without frames
  assert (short_gap.damage, short_gap.duration) == ('', pytest.approx(170 / 30, abs=0.1))


@pytest.mark.parametrize(('codec', 'container'), [('libx264', 'mp4'), ('libx264', 'matroska'), ('libx265', 'mp4')])
def test_frames_alone_and_together_are_equal_if_the_first_keyframe_does_not_decode(codec, container):
  """Time then starts with another frame."""
  data = bytearray(make_video(container=container, codec=codec, options={'bf': '0'}))
  with av.open(io.BytesIO(bytes(data))) as opened:
    position, size = next((packet.pos, packet.size) for packet in opened.demux(video=0))
  if container == 'mp4':  # a unit of zeros
    data[position : position + size] = (size - 4).to_bytes(4, 'big') + bytes(size - 4)
  else:  # after the header of the block
    data[position + 16 : position + size] = bytes(size - 16)
  damaged = bytes(data)
  info = inspect(damaged)
  assert info.damage
  times = (np.arange(info.num_frames) + 0.5) / 30
  together = decode(damaged, times)
  for index in (0, 5, 20, info.num_frames - 1):
    np.testing.assert_array_equal(decode(damaged, times[index : index + 1])[0], together[index])
    np.testing.assert_array_equal(next(FileReader(damaged).frames(times[index : index + 1])), together[index])
