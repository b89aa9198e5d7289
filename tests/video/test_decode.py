import io
import struct

import av
import numpy as np
import pytest
from PIL import Image

from mevit_jax.video import decode as decode_module
from mevit_jax.video.decode import VideoError, decode, inspect
from mevit_jax.video.reader import FileReader
from tests.helpers.videos import decode_all, make_video, number, picture

B_FRAMES = {'bf': '3', 'b-pyramid': 'normal', 'refs': '4', 'sc_threshold': '0'}
KINDS = {
  'b_frames': {'options': B_FRAMES},
  'no_b_frames': {'options': {'bf': '0'}},
  'open_gop': {'options': B_FRAMES | {'x264-params': 'open-gop=1'}},
  'one_keyframe': {'keyframes': 1000},
  'all_keyframes': {'keyframes': 1},
  'fragmented': {'container_options': {'movflags': 'frag_keyframe+empty_moov'}},
  'sound': {'sound': True},
  'mkv': {'container': 'matroska', 'options': B_FRAMES},
  'vp8': {'container': 'webm', 'codec': 'libvpx', 'options': {'auto-alt-ref': '1'}},
  'vp9': {'container': 'webm', 'codec': 'libvpx-vp9', 'options': {'lag-in-frames': '12'}},
  'avi': {'container': 'avi', 'codec': 'mpeg4', 'options': {'bf': '2'}},
  'mpeg': {'container': 'mpeg', 'codec': 'mpeg2video', 'options': {'bf': '2'}},
  'transport': {'container': 'mpegts', 'options': B_FRAMES},
  'hevc': {'codec': 'libx265', 'options': {'x265-params': 'log-level=none:bframes=3'}},
  'ten_bit': {'pixels': 'yuv420p10le'},
  'full_range': {'pixels': 'yuvj420p', 'codec': 'mjpeg', 'container': 'mov'},
  'gray': {'pixels': 'gray'},
  'odd': {'pixels': 'yuv444p', 'size': (51, 67)},
}


@pytest.fixture(params=KINDS, scope='module')
def kind(request):
  return request.param


@pytest.fixture(scope='module')
def data(kind):
  return make_video(**KINDS[kind])


def test_decode_agrees_with_decoding_all_frames(kind, data):
  frames, times = decode_all(data)
  if kind in ('avi', 'mpeg'):  # their timestamps are in packet order, not in display order
    times = np.arange(len(frames)) / 30
  rng = np.random.default_rng(0)
  for requested in [rng.uniform(-0.2, 1.6, 6), rng.choice(times, 3), times[-1:], times]:
    for time, frame in zip(requested, decode(data, requested), strict=True):
      expected = frames[max(0, np.searchsorted(times, time + 1e-6, side='right') - 1)]
      np.testing.assert_array_equal(frame, expected)


def test_inspect_returns_the_properties_of_a_video(kind, data):
  info = inspect(data)
  assert (info.num_frames, info.damage) == (40, '')
  assert (info.height, info.width) == KINDS[kind].get('size', (48, 64))
  assert info.fps == pytest.approx(30, rel=1e-3)
  assert info.duration == pytest.approx(40 / 30, rel=1e-3)


def test_frames_match_their_times():
  frames = decode(make_video(200), (np.array([199, 0, 57, 57, 130]) + 0.5) / 30)
  assert [number(frame) for frame in frames] == [199, 0, 57, 57, 130]
  assert frames[2] is frames[3]


def test_only_needed_packets_are_decoded(monkeypatch):
  monkeypatch.setattr(decode_module, '_decode_all', None)
  data = make_video(120, options=B_FRAMES)
  runs = []
  plan = decode_module.plan_runs
  monkeypatch.setattr(decode_module, 'plan_runs', lambda *args: runs.extend(plan(*args)) or plan(*args))
  decode(data, np.array([50, 100]) / 30)
  assert sum(last - first + 1 for first, last in runs) < 40
  assert len(runs) == 2


def test_false_keyframes_fall_back_to_decoding_from_the_start():
  """A file that marks every frame as a keyframe is decoded correctly."""
  data = make_video(keyframes=1000)
  start = data.index(b'stss') - 4
  broken = data[: start + 4] + b'free' + data[start + 8 :]
  frames, times = decode_all(data)
  for index in (7, 33):
    np.testing.assert_array_equal(decode(broken, times[index : index + 1])[0], frames[index])


@pytest.mark.parametrize('container', ['mp4', 'matroska'])
def test_periodic_intra_refresh_is_decoded_from_the_start(container):
  """Its recovery points are marked as keyframes, although frames after them refer to earlier ones."""
  shades = np.random.default_rng(0).integers(0, 256, (15, 20, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
  pictures = [np.roll(shades, index, 1) for index in range(110)]
  options = {'preset': 'veryfast', 'bf': '0', 'x264-params': 'intra-refresh=1:keyint=48:bframes=0'}
  data = make_video(pictures, size=(120, 160), container=container, keyframes=48, options=options)
  expected, _ = decode_all(data)
  times = (np.arange(110) + 0.5) / 30
  reader = FileReader(data)
  for index in range(0, 110, 7):
    requested = times[index : index + 1]
    np.testing.assert_array_equal(decode(data, requested)[0], expected[index])
    np.testing.assert_array_equal(next(reader.frames(requested)), expected[index])


def test_frames_of_variable_frame_rate_match_their_times():
  stamps = [0, 40, 50, 500, 510, 1500, 1540, 1600]
  data = make_video(8, stamps=stamps, options={'bf': '2'})
  info = inspect(data)
  assert info.num_frames == 8
  assert info.duration == pytest.approx(1.6, abs=0.3)
  assert info.fps == pytest.approx(8 / info.duration)
  requested = np.array([0, 0.045, 0.3, 0.4999, 0.5, 1.2, 1.55, 9.0])
  assert [number(frame) for frame in decode(data, requested)] == [0, 1, 2, 2, 3, 4, 6, 7]


@pytest.mark.parametrize('mirror', [False, True])
@pytest.mark.parametrize('degrees', [0, 90, 180, 270])
def test_rotation_and_mirrors_are_applied(degrees, mirror):
  stored = [picture(37)] * 3
  upright = decode(make_video(stored), np.zeros(1))[0]
  data = make_video(stored, rotation=degrees, mirror=mirror)
  # FFmpeg mirrors after the counterclockwise rotation, which makes it clockwise.
  expected = np.rot90(upright, degrees // 90)
  if mirror:
    expected = np.rot90(upright[:, ::-1], -degrees // 90)
  np.testing.assert_array_equal(decode(data, np.zeros(1))[0], expected)
  info = inspect(data)
  assert (info.height, info.width) == expected.shape[:2]


def test_duration_missing_in_the_header_is_computed():
  live = make_video(container='webm', codec='libvpx', container_options={'live': '1'})
  with av.open(io.BytesIO(live)) as container:
    assert container.duration is None
  info = inspect(live)
  assert (info.num_frames, info.damage) == (40, '')
  assert info.duration == pytest.approx(40 / 30, abs=0.04)


def test_truncated_files_are_reported_and_used():
  complete = make_video(120, container='matroska')
  cut = complete[: int(len(complete) * 0.6)]
  info = inspect(cut)
  assert 60 <= info.num_frames < 100
  assert 'truncated at' in info.damage
  frames, _ = decode_all(complete)
  np.testing.assert_array_equal(decode(cut, np.array([0.5]))[0], frames[15])
  last = decode(cut, np.array([info.duration - 0.01, 100.0]))
  assert [number(frame) for frame in last] == [info.num_frames - 1] * 2


@pytest.mark.parametrize(('container', 'codec'), [('matroska', 'libx264'), ('flv', 'flv1')])
def test_less_than_half_of_a_video_is_an_error(container, codec):
  complete = make_video(120, container=container, codec=codec)
  with pytest.raises(VideoError, match=r'contains only 1\.\d s of 4\.0 s'):
    inspect(complete[: int(len(complete) * 0.4)])


@pytest.mark.parametrize('container', ['matroska', 'mp4', 'mpegts'])
def test_longer_audio_is_not_damage(container):
  info = inspect(make_video(6, container=container, sound=True))  # one second of audio
  assert (info.num_frames, info.damage) == (6, '')


@pytest.mark.parametrize('seconds', [1, 5, 1000])
@pytest.mark.parametrize('container', ['matroska', 'webm', 'mp4', 'mpegts'])
def test_timestamps_need_not_start_at_zero(container, seconds):
  codec = 'libvpx' if container == 'webm' else 'libx264'
  stamps = [1000 * seconds + 40 * index for index in range(50)]
  data = make_video(50, container=container, codec=codec, stamps=stamps)
  info, reader = inspect(data), FileReader(data)
  assert (info.num_frames, info.damage, reader.damage) == (50, '', '')
  assert info.duration == pytest.approx(2, abs=0.05)
  assert reader.duration == info.duration
  assert [number(frame) for frame in decode(data, np.array([0.1, 1.5]))] == [2, 37]
  if container == 'matroska':
    assert 'truncated at' in inspect(data[: int(len(data) * 0.7)]).damage
    with pytest.raises(VideoError, match='contains only'):
      inspect(data[: int(len(data) * 0.4)])


def test_wrong_declared_duration_is_an_error():
  data = bytearray(make_video(120, container='matroska'))
  offset = data.index(b'\x44\x89\x88') + 3  # Duration, a float of eight bytes, in milliseconds
  assert struct.unpack('>d', data[offset : offset + 8])[0] == pytest.approx(4000, abs=50)
  data[offset : offset + 8] = struct.pack('>d', 36e6)
  with pytest.raises(VideoError, match=r'contains only 4\.0 s of 36000\.0 s'):
    inspect(bytes(data))


@pytest.mark.parametrize('kind', ['gif', 'avif'])
def test_a_single_frame_is_a_still_image(kind):
  with pytest.raises(VideoError, match='single frame'):
    inspect(_still(kind))


def test_video_of_one_pixel():
  data = make_video(3, codec='png', container='mov', pixels='rgb24', size=(1, 1))
  info = inspect(data)
  assert (info.num_frames, info.height, info.width) == (3, 1, 1)
  assert decode(data, np.zeros(1))[0].shape == (1, 1, 3)


def test_decoding_stops_at_the_time_limit():
  data = make_video(120)
  assert inspect(data, time_limit=60).num_frames == 120
  with pytest.raises(VideoError, match='longer than 1e-06 s'):
    inspect(data, time_limit=1e-6)


def _packets(data):
  with av.open(io.BytesIO(bytes(data))) as container:
    return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def _with_corrupt_packets(data, indices):
  """Zeroes some packets."""
  data = bytearray(data)
  for position, size in [_packets(data)[index] for index in indices]:
    data[position : position + size] = struct.pack('>I', size - 4) + bytes(size - 4)
  return bytes(data)


def test_corrupt_packets_are_reported_and_skipped():
  data = _with_corrupt_packets(make_video(keyframes=10, options={'bf': '0'}), range(20, 25))
  info = inspect(data)
  assert 'of 40 packets do not decode' in info.damage
  assert 30 <= info.num_frames < 40
  assert number(decode(data, np.array([35.5 / 30]))[0]) == 35
  assert decode(data, np.array([22 / 30]))[0].shape == (48, 64, 3)


def test_mostly_corrupt_video_is_an_error():
  with pytest.raises(VideoError, match='of 40 packets do not decode'):
    inspect(_with_corrupt_packets(make_video(keyframes=10, options={'bf': '0'}), range(1, 35)))


HEVC = 'log-level=none:keyint=10:min-keyint=10:scenecut=0:bframes=3'
OPEN = {  # open GOPs of ten frames: leading frames follow the keyframe, are displayed before it and refer to both sides
  'hevc': {'codec': 'libx265', 'options': {'x265-params': f'{HEVC}:open-gop=1'}},
  'h264': {'keyframes': 10, 'options': B_FRAMES | {'x264-params': 'open-gop=1'}},
}


@pytest.mark.parametrize(
  ('codec', 'corrupt', 'frames'),
  [('hevc', [0], 30), ('hevc', range(15, 20), 35), ('hevc', [30], 39), ('h264', [0], 30), ('h264', range(15, 20), 35)],
)
def test_packets_skipped_by_the_decoder_are_counted(codec, corrupt, frames):
  """HEVC raises no error; H.264 raises one for the first packet and outputs nothing until the next keyframe."""
  data = _with_corrupt_packets(make_video(**OPEN[codec]), corrupt)
  info = inspect(data)
  assert info.num_frames == frames
  assert info.damage.startswith(f'{40 - frames} of 40 packets do not decode: ')
  reader = FileReader(data)
  assert len(list(reader.frames(np.arange(40) / 30))) == 40
  assert reader.damage == info.damage


def test_only_errors_count_for_interlaced_h264():
  """Two packets may be the fields of one frame."""
  data = _with_corrupt_packets(make_video(keyframes=10, options={'x264-params': 'interlaced=1'}), [0])
  assert inspect(data).damage.startswith('1 of 40 packets do not decode: Invalid')


def test_a_corrupt_video_is_not_reported_as_a_still_image():
  with pytest.raises(VideoError, match='39 of 40 packets do not decode: the decoder returned no frame'):
    inspect(_with_corrupt_packets(make_video(**OPEN['hevc']), range(1, 40)))


@pytest.mark.parametrize(('codec', 'container'), [('hevc', 'mp4'), ('hevc', 'mpegts'), ('h264', 'mp4')])
def test_frames_that_are_not_displayed_are_not_damage(codec, container):
  """Leading frames of the first keyframe, and packets that an edit list discards."""
  complete = make_video(**OPEN[codec])

  def cut(first, shift):
    file = io.BytesIO()
    with av.open(io.BytesIO(complete)) as source, av.open(file, 'w', format=container) as output:
      stream = output.add_stream_from_template(source.streams.video[0])
      for packet in [packet for packet in source.demux(video=0) if packet.size][first:]:
        packet.pts, packet.dts = (stamp - shift * packet.duration for stamp in (packet.pts, packet.dts))
        packet.stream = stream
        output.mux(packet)
    return file.getvalue()

  with av.open(io.BytesIO(complete)) as source:
    second = [index for index, packet in enumerate(source.demux(video=0)) if packet.is_keyframe][1]
  assert second < 10  # it has leading frames
  for data, frames in ((cut(second, 0), 30), (cut(0, 5), 35 if container == 'mp4' else 40)):
    info = inspect(data)
    assert (info.num_frames, info.damage) == (frames, '')


def test_frames_keep_the_size_of_the_first_one():
  def packets(size):
    file = make_video(6, container='h264', size=size, options={'bf': '0'})
    with av.open(io.BytesIO(file), format='h264') as container:
      return b''.join(bytes(packet) for packet in container.demux(video=0))

  data = packets((48, 64)) + packets((96, 128))
  info = inspect(data)
  assert (info.num_frames, info.height, info.width) == (12, 48, 64)
  frames = decode(data, np.arange(12) / info.fps)
  assert [(number(frame), frame.shape) for frame in frames] == [(index % 6, (48, 64, 3)) for index in range(12)]


def _still(kind: str) -> bytes:
  file = io.BytesIO()
  Image.fromarray(picture(1)).save(file, kind)
  return file.getvalue()


def _sound_only() -> bytes:
  file = io.BytesIO()
  with av.open(file, 'w', format='mp4') as output:
    stream = output.add_stream('aac', rate=8000, layout='mono')
    noise = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), 'fltp', 'mono')
    noise.sample_rate = 8000
    output.mux(stream.encode(noise))
    output.mux(stream.encode())
  return file.getvalue()


@pytest.mark.parametrize(
  ('data', 'reason'),
  [
    (b'', 'empty'),
    (b'not a video at all' * 99, 'not a video'),
    (_still('jpeg'), 'still image'),
    (_sound_only(), 'no video stream'),
    (make_video()[:2000], 'not a video'),  # the index is at the end of the file
  ],
)
def test_unusable_files_are_errors_with_a_reason(data, reason, capfd):
  for use in (inspect, lambda data: decode(data, np.zeros(1))):
    with pytest.raises(VideoError, match=reason) as error:
      use(data)
    assert '\n' not in str(error.value)
  assert capfd.readouterr().err == ''
