import numpy as np
import pytest

from mevit_jax.config.data import ClipConfig
from mevit_jax.errors import UserError
from mevit_jax.video.clips import crop_resize, train_box, train_times, view_boxes, view_times
from mevit_jax.video.decode import decode, inspect
from tests.helpers.videos import make_video, number, picture

RATES = [10, 12, 15, 24, 24000 / 1001, 25, 30000 / 1001, 30, 48, 50, 60]
FRAMES = [(480, 640), (640, 480), (256, 340), (100, 1000), (33, 47), (224, 224)]
SIZES = [((224, 224), (256, 320)), ((112, 112), (128, 160)), ((64, 256), (80, 96))]


def frame_of(times, rate):
  return np.floor(times * rate + 1e-3).astype(int)


@pytest.mark.parametrize(
  'wrong',
  [
    {'sampling': 'sparse'},
    {'frames': 0},
    {'stride': 0},
    {'size': (0, 224)},
    {'short_side': (320, 256)},
    {'short_side': (200, 256)},
  ],
)
def test_invalid_configs_are_rejected(wrong):
  with pytest.raises(UserError):
    ClipConfig(**wrong)


@pytest.mark.parametrize('stride', [1, 2, 7, 32])
def test_dense_at_30_fps_is_every_stride_th_frame(stride):
  config = ClipConfig(frames=8, stride=stride)
  rng = np.random.default_rng(0)
  for num_frames, wobble in [(300, 0), (301, 1e-4), (1000, -1e-4)]:
    duration = num_frames / 30 + wobble  # a container may round its timestamps
    starts = set()
    for _ in range(2000 if stride == 32 else 50):
      frames = np.floor(train_times(rng, config, duration, num_frames) * num_frames / duration)
      np.testing.assert_array_equal(np.diff(frames), stride)
      starts.add(frames[0])
      assert frames[-1] < num_frames
    if stride == 32 and num_frames < 400:  # exactly the clips that fit
      assert starts == set(range(num_frames - 7 * 32))


@pytest.mark.parametrize('rate', RATES)
def test_times_are_not_near_frame_boundaries(rate):
  """Rounded timestamps cannot change which frames a regular pattern selects."""
  num_frames = 400
  for config in [ClipConfig(8, stride=s) for s in (1, 2, 4, 8, 16, 32)] + [
    ClipConfig(t, sampling='uniform') for t in (8, 16, 32)
  ]:
    position = view_times(config, num_frames / rate, num_frames, 3) * rate
    if rate == round(rate):
      distance = np.abs(position - np.round(position))
      assert distance.min() > 0.01
    assert (position[:, 0] >= 0).all()


@pytest.mark.parametrize('rate', [24, 25, 30000 / 1001, 30, 60])
def test_frames_of_encoded_files(rate):
  data = make_video(100, rate=round(rate) if rate == round(rate) else 30, container='matroska')
  info = inspect(data)
  config = ClipConfig(frames=4, stride=8)
  times = view_times(config, info.duration, info.num_frames, 3)
  expected = np.floor(times * info.fps)
  frames = decode(data, times.ravel())
  assert [number(frame) for frame in frames] == expected.ravel().astype(int).tolist()


def test_short_videos_repeat_their_last_frame():
  config = ClipConfig(frames=8, stride=32)
  for times in (
    train_times(np.random.default_rng(0), config, 1.0, 30),
    view_times(config, 1.0, 30)[0],
  ):
    assert frame_of(times, 30)[0] == 0
    np.testing.assert_allclose(np.diff(times), 32 / 30)
  shown = decode(make_video(30), times)
  assert [number(frame) for frame in shown] == [0] + [29] * 7


def test_dense_views():
  config = ClipConfig(frames=8, stride=8)
  last = 300 - 7 * 8 - 1
  assert frame_of(view_times(config, 10.0, 300), 30)[:, 0].tolist() == [last // 2]
  starts = frame_of(view_times(config, 10.0, 300, 5), 30)[:, 0]
  assert (starts[0], starts[-1]) == (0, last)
  assert np.ptp(np.diff(starts)) <= 1


def test_uniform_takes_one_frame_of_each_segment():
  config = ClipConfig(frames=8, sampling='uniform')
  rng = np.random.default_rng(0)
  segments = np.arange(8)
  for num_frames, duration in [(16, 0.5), (80, 4.0), (3, 1.0), (123, 4.1)]:
    times = train_times(rng, config, duration, num_frames)
    np.testing.assert_array_equal(np.floor(times / duration * 8), segments)
    middle = frame_of(view_times(config, duration, num_frames)[0], num_frames / duration)
    expected = (2 * segments + 1) * num_frames // 16
    np.testing.assert_array_equal(middle, expected)


def test_uniform_views_differ():
  config = ClipConfig(frames=8, sampling='uniform')
  frames = frame_of(view_times(config, 4.0, 120, 3), 30)
  assert np.unique(frames).size == 24
  np.testing.assert_array_equal(np.sort(frames, axis=0), frames)


@pytest.mark.parametrize('shape', FRAMES)
@pytest.mark.parametrize(('size', 'short_side'), SIZES)
def test_boxes_are_inside_and_keep_the_aspect_ratio(shape, size, short_side):
  config = ClipConfig(size=size, short_side=short_side)
  rng = np.random.default_rng(0)
  boxes = [train_box(rng, config, *shape) for _ in range(200)]
  boxes += view_boxes(config, *shape, 1) + view_boxes(config, *shape, 3)
  for left, top, right, bottom in boxes:
    assert 0 <= left < right <= shape[1]
    assert 0 <= top < bottom <= shape[0]
    assert (right - left) / (bottom - top) == pytest.approx(size[1] / size[0])


def test_train_box_has_the_configured_scale():
  config = ClipConfig(size=(224, 224), short_side=(256, 320))
  rng = np.random.default_rng(0)
  boxes = np.array([train_box(rng, config, 480, 640) for _ in range(2000)])
  short_sides = 224 / (boxes[:, 2] - boxes[:, 0]) * 480
  assert 256 <= short_sides.min() < 257
  assert 319 < short_sides.max() <= 320
  assert short_sides.mean() == pytest.approx(288, abs=2)
  for near, far, length in [(0, 2, 640), (1, 3, 480)]:  # anywhere in the frame
    assert boxes[:, near].min() < 5
    assert boxes[:, far].max() > length - 5


def test_view_boxes_are_spread_along_the_long_side():
  config = ClipConfig(size=(224, 224))
  assert view_boxes(config, 240, 320) == [(40, 0, 280, 240)]
  assert view_boxes(config, 240, 320, 3) == [(0, 0, 240, 240), (40, 0, 280, 240), (80, 0, 320, 240)]
  tall = [box[1] for box in view_boxes(config, 480, 240, 4)]
  np.testing.assert_allclose(tall, [0, 80, 160, 240])


def test_crop_resize_is_the_crop_resized():
  frame = picture(170, 120, 160)
  np.testing.assert_array_equal(crop_resize(frame, (8, 4, 72, 36), (32, 64)), frame[4:36, 8:72])
  small = crop_resize(frame, (0, 0, 160, 120), (60, 80))
  assert (small.shape, small.dtype) == ((60, 80, 3), np.uint8)
  assert number(small) == 170
  # Antialiased: a fine pattern becomes its mean rather than one of its colors.
  stripes = np.repeat(np.tile(np.array([[0], [255]], np.uint8), (60, 160))[..., None], 3, -1)
  assert np.abs(crop_resize(stripes, (0, 0, 160, 120), (10, 10)).astype(int) - 127).max() < 16
