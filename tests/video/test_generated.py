"""Every frame of generated files, alone, together, in sequence and after re-encoding, equals that of decoding all."""

import io

import av
import numpy as np
import pytest

from mevit_jax.video.decode import FrameIterator, decode, inspect
from mevit_jax.video.picture import ToRGB
from mevit_jax.video.reader import FileReader
from mevit_jax.video.transcode import Encoding, reencode
from tests.helpers import generated
from tests.helpers.generated import CODECS, CONTAINERS, FEATURES, RATE

# Every feature, container and codec at least once.
SAMPLE = [
  ('h264 open GOP', 'mp4', 'ordinary'),
  ('h264 interlaced', 'avi', 'ordinary'),
  ('vp8', 'webm', 'ordinary'),
  ('mjpeg', 'mov', 'ordinary'),
  ('hevc', 'fragmented', 'offset 5 s'),
  ('h264 intra refresh', 'flv', 'offset 5 s'),
  ('mpeg4', 'nut', 'offset 3000 s'),
  ('h264', 'mp4', 'leading frames'),
  ('vp9', 'matroska', 'leading frames'),
  ('mpeg2', 'matroska', 'leading frames'),
  ('hevc open GOP', 'mp4', 'open start'),
  ('h264 B pyramid', 'mov', 'edit list'),
  ('h264', 'mpegts', 'clock restarts'),
  ('mpeg2', 'vob', 'clock jumps on'),
  ('h264 B pyramid', 'mpegts', 'clock jumps back'),
  ('h264 one keyframe', 'matroska', 'variable rate'),
  ('h264 intra refresh', 'mp4', 'rotation'),
]
OTHERS = [case for case in generated.cases() if case not in SAMPLE]


def test_the_sample_has_everything():
  assert [{*column} for column in zip(*SAMPLE, strict=True)] == [{*CODECS}, {*CONTAINERS}, {*FEATURES}]


def _check(case):
  file = generated.generate(*case)
  if file is None:
    pytest.skip('no such files')
  info, order = inspect(file.data), np.argsort(file.times, kind='stable')
  expected, times = [file.frames[index] for index in order], generated.middles(file.times)
  _check_report(case, file, info)

  def check(frames, first=0):
    for index, (frame, wanted) in enumerate(zip(frames, expected[first:], strict=True), first):
      if index >= file.defined:
        np.testing.assert_array_equal(frame, wanted, err_msg=f'frame {index}')

  together = decode(file.data, times)
  check(together)
  for index, time in enumerate(times):
    alone = decode(file.data, times[index : index + 1])
    np.testing.assert_array_equal(alone[0], together[index], err_msg=f'frame {index} alone at {time}')
  check(decode(file.data, times, info.num_frames))
  check(decode(file.data, times[-1:], info.num_frames), len(times) - 1)
  check(FileReader(file.data).frames(times))
  iterator, to_rgb = FrameIterator(file.data), None
  in_sequence = []
  for frame in iterator:
    to_rgb = to_rgb or ToRGB(*iterator.size)
    in_sequence.append(to_rgb(frame))
  check([in_sequence[index] for index in np.argsort(iterator.ticks, kind='stable')])
  stored = reencode(file.data, Encoding('h264', quality=5))[0]
  for index, (frame, wanted) in enumerate(zip(decode(stored, times), expected, strict=True)):
    assert index < file.defined or np.abs(frame.astype(int) - wanted).mean() < 8, f'frame {index} re-encoded'


def _check_report(case, file, info):
  last = 1 / RATE if case[2] != 'variable rate' else info.duration - file.times.max()
  assert (info.num_frames, info.duration) == (len(file.frames), pytest.approx(file.times.max() + last, abs=0.5 / RATE))
  reader = FileReader(file.data)
  assert (reader.num_frames, reader.duration, reader.damage) == (info.num_frames, info.duration, info.damage)
  assert ('its clock jumps at 1.6 s' in info.damage) == case[2].startswith('clock')
  if not file.defined and not case[2].startswith('clock'):
    assert info.damage == ''


@pytest.mark.parametrize('case', SAMPLE, ids=' '.join)
def test_frames_are_those_of_decoding_all(case):
  _check(case)


@pytest.mark.slow
@pytest.mark.parametrize('case', OTHERS, ids=' '.join)
def test_frames_of_hundreds_of_files_are_those_of_decoding_all(case):
  _check(case)


def test_frames_without_their_references_are_noted():
  file = generated.generate('mpeg4', 'mp4', 'leading frames')
  assert file is not None
  with av.open(io.BytesIO(file.data)) as container:
    first = next(index for index, frame in enumerate(container.decode(video=0)) if frame.key_frame)
  note = f'begins before its first keyframe: the first {first} frames lack their references'
  assert (first > 0, inspect(file.data).damage) == (True, note)
