"""Readers for unprepared videos: the same frames and views as in evaluation, in bounded memory."""

import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from mevit_jax.config.data import ClipConfig
from mevit_jax.data import pipeline
from mevit_jax.video import reader
from mevit_jax.video.decode import VideoError, decode, inspect
from mevit_jax.video.reader import ArrayReader, FileReader, read_views, spans
from tests.helpers.videos import make_video, number, picture
from tests.video.test_decode import KINDS


@pytest.fixture(params=KINDS, scope='module')
def data(request):
  return make_video(**KINDS[request.param])


def test_reader_agrees_with_inspect_and_decode(data, tmp_path):
  info, path = inspect(data), tmp_path / 'video'
  path.write_bytes(data)
  for file_reader in FileReader(data), FileReader(path):
    assert (file_reader.num_frames, file_reader.duration, file_reader.damage) == (info.num_frames, info.duration, '')
    rng = np.random.default_rng(0)
    for times in (rng.uniform(-0.2, 1.6, 6), np.repeat(rng.uniform(0, 1.3, 3), 2), np.arange(40) / 30 + 0.01):
      requested = np.sort(times)
      for frame, expected in zip(file_reader.frames(requested), decode(data, requested), strict=True):
        np.testing.assert_array_equal(frame, expected)


def test_ordinary_files_are_not_fully_decoded(monkeypatch):
  data = make_video(120, options={'bf': '3', 'x264-params': 'open-gop=1'})
  monkeypatch.setattr(reader, 'FrameIterator', None)
  file_reader = FileReader(data)
  assert [number(frame) for frame in file_reader.frames((np.array([3, 50, 51, 100, 119]) + 0.5) / 30)] == [
    3,
    50,
    51,
    100,
    119,
  ]


@pytest.mark.parametrize('sound', [False, True])
def test_false_keyframes_fall_back_to_decoding_from_the_start(sound):
  data = make_video(keyframes=1000, sound=sound)
  start = data.index(b'stss') - 4
  broken = data[: start + 4] + b'free' + data[start + 8 :]
  times = np.array([0, 0, 7, 7, 33, 39]) / 30
  for frame, expected in zip(FileReader(broken).frames(times), decode(data, times), strict=True):
    np.testing.assert_array_equal(frame, expected)


def test_reader_of_variable_frame_rate():
  data = make_video(8, stamps=[0, 40, 50, 500, 510, 1500, 1540, 1600], options={'bf': '2'})
  file_reader, info = FileReader(data), inspect(data)
  assert (file_reader.num_frames, file_reader.duration) == (8, info.duration)
  requested = np.array([0, 0.045, 0.3, 0.4999, 0.5, 1.2, 1.55, 9.0])
  assert [number(frame) for frame in file_reader.frames(requested)] == [0, 1, 2, 2, 3, 4, 6, 7]


def test_truncated_files_are_read_to_their_end():
  complete = make_video(120, container='matroska')
  cut = complete[: int(len(complete) * 0.6)]
  file_reader, info = FileReader(cut), inspect(cut)
  assert (file_reader.num_frames, file_reader.duration, file_reader.damage) == (
    info.num_frames,
    info.duration,
    info.damage,
  )
  with pytest.raises(VideoError, match='contains only'):
    FileReader(complete[: int(len(complete) * 0.4)])


@pytest.mark.parametrize(
  'data', [b'', b'not a video' * 99, make_video(1), make_video(1, container='avi', codec='mpeg4')]
)
def test_unusable_files_are_errors_with_a_reason(data, tmp_path):
  (tmp_path / 'video').write_bytes(data)
  for file in (data, tmp_path / 'video'):
    with pytest.raises(VideoError, match=r'empty|not a video|single frame'):
      FileReader(file)


def test_file_names_are_not_urls(tmp_path, monkeypatch):
  """FFmpeg would interpret the name as a protocol."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'concat:a|b').write_bytes(make_video(5))
  assert FileReader(Path('concat:a|b')).num_frames == 5


CLIPS = {
  'dense': ClipConfig(4, (16, 16), 'dense', 5, (16, 18)),
  'uniform': ClipConfig(4, (16, 24), 'uniform', 1, (16, 18)),
}


@pytest.mark.parametrize('clip', CLIPS.values(), ids=CLIPS)
def test_views_of_an_entire_video_equal_those_of_evaluation(clip, data):
  info = inspect(data)
  example = {'video': data, 'label': 0, 'id': 'a', 'num_frames': info.num_frames, 'duration': info.duration}
  expected = next(iter(pipeline.eval_batches([example], clip, clips=3, crops=2, batch_size=1)))['video'][0]
  file_reader = FileReader(data)
  ((span, views),) = read_views(file_reader, clip, spans(file_reader), 3, 2)
  assert span == (0, info.duration, info.num_frames)
  np.testing.assert_array_equal(views, expected)


@pytest.mark.parametrize('clip', CLIPS.values(), ids=CLIPS)
def test_windows_equal_separate_videos(clip):
  frames = np.stack([picture(index) for index in range(90)])
  array_reader = ArrayReader(frames, fps=30)
  parts = spans(array_reader, 1.0, 0.7)
  assert [round(part.start * 30) for part in parts] == [0, 21, 42, 60]  # the last window ends with the video
  seen = dict(read_views(array_reader, clip, parts, 2, 1))
  assert list(seen) == parts
  for part, views in seen.items():
    first = round(part.start * 30)
    alone = ArrayReader(frames[first : first + 30], fps=30)
    ((_, expected),) = read_views(alone, clip, spans(alone), 2, 1)
    np.testing.assert_array_equal(views, expected)


def test_windows_cover_the_video():
  array_reader = ArrayReader(np.zeros((100, 2, 2, 3), np.uint8), fps=25)  # 4 s
  for window, every in ((1, None), (1, 1), (1, 0.3), (2.5, 1), (0.01, 0.001), (9, 1)):
    parts = spans(array_reader, window, every)
    assert (parts[0].start, parts[-1].end) == (0, 4)
    ends = [part.end for part in parts]
    assert all(part.start <= end + 1e-9 for part, end in zip(parts[1:], ends, strict=False))
    assert len(set(parts)) == len(parts)


@pytest.mark.parametrize(
  ('video', 'message'),
  [
    (np.zeros((4, 8, 8, 3), np.float32), 'uint8'),
    (np.zeros((4, 8, 8), np.uint8), 'uint8'),
    (np.zeros((1, 8, 8, 3), np.uint8), 'at least 2 frames'),
  ],
)
def test_invalid_arrays_are_rejected(video, message):
  with pytest.raises(VideoError, match=message):
    ArrayReader(video, 30)


# Prints the number of windows of a long video, and the growth of peak memory in MB.
LONG = """
import re, sys
from pathlib import Path
from mevit_jax.config.data import ClipConfig
from mevit_jax.video.reader import FileReader, read_views, spans

def peak():  # of this process only: getrusage includes the parent
  return int(re.search('VmHWM: *([0-9]+)', Path('/proc/self/status').read_text().replace('\t', ' '))[1]) / 1024

file = FileReader(Path(sys.argv[1]))
before = peak()
clip = ClipConfig(8, (16, 16), 'uniform', 1, (16, 16))
done = sum(1 for _ in read_views(file, clip, spans(file, 2, 0.5), 1, 1))
print(done, peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_the_video(tmp_path):
  """Neither packets nor frames accumulate: 800 frames of 1920x1080 are 2.5 GB, their packets 0.3 GB."""
  two_seconds = make_video(
    [np.roll(np.kron(np.random.default_rng(0).integers(0, 256, (135, 240, 3), np.uint8), np.ones((8, 8, 1), np.uint8)),
             8 * shift, 1) for shift in range(60)],
    size=(1080, 1920), keyframes=60, options={'preset': 'ultrafast'},
  )  # fmt: skip
  with av.open(io.BytesIO(two_seconds)) as source, av.open(tmp_path / 'long.mp4', 'w') as output:
    stream = source.streams.video[0]
    packets = [packet for packet in source.demux(stream) if packet.size]
    copy = output.add_stream_from_template(stream)
    for repeat in range(50):
      for packet in packets:
        copied = av.Packet(bytes(packet))
        shift = repeat * 2 * stream.time_base.denominator
        copied.pts, copied.dts, copied.duration = packet.pts + shift, packet.dts + shift, packet.duration
        copied.time_base, copied.is_keyframe, copied.stream = stream.time_base, packet.is_keyframe, copy
        output.mux(copied)
  done = subprocess.run(
    [sys.executable, '-c', LONG, str(tmp_path / 'long.mp4')], capture_output=True, text=True, check=True
  )
  windows, grown = done.stdout.split()
  assert int(windows) == 197
  assert float(grown) < 150  # 680 if the orientation of each frame is read, which defers freeing it
