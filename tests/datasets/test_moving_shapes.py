"""Moving shapes: a pair of classes is one clip played forwards and backwards; only the order of frames differs."""

import dataclasses
import io

import av
import numpy as np
import pytest

from mevit_jax.datasets.builders import moving_shapes

PAIRS = tuple(moving_shapes.PAIRS.items())


def _decode(data: bytes) -> np.ndarray:
  with av.open(io.BytesIO(data)) as container:
    return np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])


def _items(count: int, seed: int = 0, split: str = 'train') -> list[moving_shapes.Item]:
  return [moving_shapes.Item(seed, split, i, 4, 32) for i in range(count)]


def _center(video: np.ndarray) -> np.ndarray:
  """Returns each frame's center of the non-black pixels: `t 2` (x, y), in pixels."""
  weight = video.sum(-1, dtype=float)  # t h w
  grid = np.arange(video.shape[1])
  sides = [weight.sum(1) @ grid, weight.sum(2) @ grid]
  return np.stack(sides, -1) / weight.sum((1, 2))[:, None]


@pytest.mark.parametrize(('pair', 'names'), PAIRS)
def test_a_pair_is_one_clip_played_forwards_and_backwards(pair, names):
  rng = np.random.default_rng(0)
  for _ in range(5):
    params = moving_shapes.draw(pair, rng)
    forwards, backwards = (moving_shapes.render(name, params, 6, 32) for name in names)
    np.testing.assert_array_equal(forwards, backwards[::-1])
    assert (forwards[0] != forwards[-1]).any()


@pytest.mark.parametrize(('pair', 'names'), PAIRS)
def test_encoding_does_not_reveal_the_order(pair, names):
  params = moving_shapes.draw(pair, np.random.default_rng(1))
  videos = (moving_shapes.encode(moving_shapes.render(name, params, 6, 48)) for name in names)
  forwards, backwards = map(_decode, videos)
  np.testing.assert_array_equal(forwards, backwards[::-1])


def test_the_drawing_does_not_depend_on_the_direction():
  """The random draws do not depend on the class: with the opposite class they stay the same."""
  for index in range(0, 8, 2):
    pair, (forwards, backwards) = PAIRS[index // 2]
    item = _items(8)[index]
    assert moving_shapes.CLASS_NAMES[index : index + 2] == (forwards, backwards)
    assert moving_shapes.clip(item) == (forwards, moving_shapes.draw(pair, moving_shapes.make_rng(item)))
    other = dataclasses.replace(item, index=index + 1)
    assert moving_shapes.clip(other)[1] == moving_shapes.draw(pair, moving_shapes.make_rng(other))


def test_frame_statistics_do_not_depend_on_the_class():
  """Mean frame statistics over many videos agree between the two classes of a pair."""
  rng = np.random.default_rng(0)
  for pair, names in PAIRS:
    frames = [
      np.mean([moving_shapes.render(name, moving_shapes.draw(pair, rng), 4, 16) for _ in range(400)], (0, 1))
      for name in names
    ]
    np.testing.assert_allclose(*frames, atol=12)  # of 255; a mean's own deviation is about 4


@pytest.mark.parametrize(
  ('name', 'axis', 'sign'), [('moves_left', 0, -1), ('moves_right', 0, 1), ('moves_up', 1, -1), ('moves_down', 1, 1)]
)
def test_moves_have_the_direction_of_their_name(name, axis, sign):
  pair = next(pair for pair, names in PAIRS if name in names)
  rng = np.random.default_rng(2)
  for _ in range(10):
    params = dataclasses.replace(moving_shapes.draw(pair, rng), background=((0.0,) * 3,) * 2)
    way = np.diff(_center(moving_shapes.render(name, params, 8, 48))[[0, -1]], axis=0)[0]
    assert sign * way[axis] > 0.2 * 48
    assert abs(way[1 - axis]) < 0.2 * 48


def test_grows_covers_an_increasing_area():
  rng = np.random.default_rng(3)
  for _ in range(10):
    params = dataclasses.replace(moving_shapes.draw('size', rng), background=((0.0,) * 3,) * 2, color=(1.0,) * 3)
    area = moving_shapes.render('grows', params, 8, 48).sum((1, 2, 3), dtype=float)
    assert (np.diff(area) > 0).all()


def test_clockwise_is_clockwise_on_the_display():
  """A bar that points right points further down (y increases downwards) in a later frame."""
  pose = moving_shapes.Pose(0.0, 0.0, 1.8, 0.1)
  params = moving_shapes.Params('bar', pose, dataclasses.replace(pose, angle=1.4), (1.0,) * 3, ((0.0,) * 3,) * 2, 0.0)
  video = moving_shapes.render('turns_clockwise', params, 2, 32)
  first, last = (np.argwhere(frame[..., 0] > 128).mean(0) for frame in video)
  assert last[0] > first[0]  # y
  assert last[1] < first[1]  # x


def test_a_video_depends_only_on_its_seed_split_and_index():
  make = moving_shapes.MovingShapes.make
  videos = {make(item)['video'] for item in [*_items(16), *_items(8, seed=1), *_items(8, split='validation')]}
  assert len(videos) == 32
  assert make(_items(16)[9]) == make(_items(10)[9])


def test_metadata_of_an_example_matches_its_video():
  example = moving_shapes.MovingShapes.make(moving_shapes.Item(0, 'train', 3, 12, 40))
  video = _decode(example['video'])
  assert video.shape == (example['num_frames'], example['height'], example['width'], 3) == (12, 40, 40, 3)
  assert example['label'] == moving_shapes.CLASS_NAMES[3]
  assert example['duration'] == pytest.approx(12 / example['fps'])
  drawn = moving_shapes.render(*moving_shapes.clip(moving_shapes.Item(0, 'train', 3, 12, 40)), 12, 40)
  assert np.abs(video.astype(float) - drawn).mean() < 8
