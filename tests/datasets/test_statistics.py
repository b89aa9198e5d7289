"""Pixel statistics of datasets, compared with those of all frames that a plain decoder shows."""

import numpy as np

from mevit_jax.config.data import Normalization
from mevit_jax.datasets.reader import open_split, read_normalization
from mevit_jax.datasets.statistics import FRAMES, MAX_VIDEOS, measure_pixels
from tests.helpers.videos import decode_all, make_video

RED, GREEN = np.uint8([200, 10, 60]), np.uint8([20, 230, 60])


def example(*colors, **options):
  """A video with the same number of frames of each color."""
  video = make_video([np.tile(color, (32, 48, 1)) for color in colors for _ in range(8)], **options)
  return {'video': video, 'duration': 8 * len(colors) / 30}


def test_statistics_equal_those_of_all_frames():
  examples = [example(RED, GREEN, RED, GREEN), example(GREEN, GREEN, GREEN, GREEN)]
  pixels = np.concatenate([np.stack(decode_all(x['video'])[0]).reshape(-1, 3) for x in examples]) / 255
  found = measure_pixels(examples)
  np.testing.assert_allclose(found['mean'], pixels.mean(axis=0), atol=1e-3)
  np.testing.assert_allclose(found['std'], np.maximum(pixels.std(axis=0), 0.01), atol=1e-3)
  assert found['std'][2] == 0.01  # the blue channel is constant


def test_every_video_has_the_same_weight_and_the_sample_covers_the_split():
  few, many = example(RED), example(GREEN)
  found = measure_pixels([few] + [many] * (2 * MAX_VIDEOS))
  assert found['mean'][1] < measure_pixels([many])['mean'][1]  # the first video is in the sample
  large = {**example(RED, size=(64, 96)), 'duration': 8 / 30}
  equal = measure_pixels([large, many])['mean']
  np.testing.assert_allclose(equal, np.mean([measure_pixels([x])['mean'] for x in (large, many)], axis=0), atol=1e-4)


def test_unreadable_videos_are_left_out():
  broken = {'video': b'no video', 'duration': 1.0}
  assert measure_pixels([example(RED), broken]) == measure_pixels([example(RED)])
  assert measure_pixels([broken]) is None
  assert measure_pixels([]) is None
  assert FRAMES > 1


def test_a_prepared_dataset_states_its_training_pixels(shapes_dir):
  split = open_split(shapes_dir, 'moving_shapes', 'validation')
  train = open_split(shapes_dir, 'moving_shapes', 'train')
  pixels = np.concatenate([np.stack(decode_all(x['video'])[0]).reshape(-1, 3) for x in train.source]) / 255
  assert split.normalization == train.normalization == read_normalization(split.directory)
  assert isinstance(split.normalization, Normalization)
  np.testing.assert_allclose(split.normalization.mean, pixels.mean(axis=0), atol=0.01)
  np.testing.assert_allclose(split.normalization.std, pixels.std(axis=0), atol=0.01)
