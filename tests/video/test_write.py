"""Videos copied with an overlay."""

import numpy as np
import pytest

from mevit_jax.video.container import VideoError
from mevit_jax.video.write import write_overlay
from tests.helpers.videos import decode_all, make_video, number


def recording_overlay(times):
  def draw(frame, time):
    times.append(time)
    drawn = frame.copy()
    drawn[-8:, -8:] = 255
    return drawn

  return draw


@pytest.mark.parametrize(
  ('stamps', 'options'),
  [
    (None, {}),
    ([0, 40, 50, 500, 510, 1500, 1540, 1600], {'options': {'bf': '2'}}),
    (None, {'container': 'avi', 'codec': 'mpeg4', 'options': {'bf': '2'}}),
    (None, {'rotation': 90}),
    (None, {'pixels': 'yuv444p', 'size': (51, 67)}),
  ],
  ids=['even', 'variable rate', 'avi', 'rotated', 'odd'],
)
def test_frames_keep_their_order_and_times(tmp_path, stamps, options):
  data, drawn = make_video(8, stamps=stamps, **options), []
  write_overlay(tmp_path / 'out.mp4', data, recording_overlay(drawn))
  frames, times = decode_all((tmp_path / 'out.mp4').read_bytes())
  expected = np.array(stamps or np.arange(8) * 1000 / 30) / 1000
  np.testing.assert_allclose(times, expected, atol=1e-4)
  np.testing.assert_allclose(drawn, expected, atol=1e-3)
  assert all(frame[-6:-3, -6:-3].min() > 200 for frame in frames)  # the overlay
  height, width = options.get('size', (48, 64))
  if 'rotation' in options:
    height, width = width, height
  assert frames[0].shape == (height // 2 * 2, width // 2 * 2, 3)
  if 'rotation' in options:
    frames = [np.rot90(frame, -1) for frame in frames]
  assert [number(frame) for frame in frames] == [*range(8)]


def test_a_failed_write_leaves_no_file(tmp_path):
  with pytest.raises(VideoError):
    write_overlay(tmp_path / 'out.mp4', b'not a video' * 99, recording_overlay([]))
  with pytest.raises(ZeroDivisionError):
    write_overlay(tmp_path / 'out.mp4', make_video(3), lambda frame, time: 1 // 0)
  assert not list(tmp_path.iterdir())
