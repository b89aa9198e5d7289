"""configs/small.py and the generated datasets that it was chosen on."""

import dataclasses

import numpy as np
import pytest

from benchmarks import small_datasets
from mevit_jax.config.flags import parse_config
from mevit_jax.configs import small
from mevit_jax.models.functional import build_model, count_parameters
from mevit_jax.video.decode import inspect


def test_small_has_at_most_two_million_parameters():
  config = parse_config(small.get_config())
  model = dataclasses.replace(config.model, classes=100)
  assert count_parameters(build_model(model).abstract) <= 2_000_000
  assert config.training.patience
  assert (config.data.mean, config.data.std) == ((), ())  # those of the dataset


def test_every_class_of_every_kind_has_videos_in_every_split(tmp_path, monkeypatch):
  monkeypatch.setattr(small_datasets, 'TRAIN', {'appearance': 6, 'motion': 8, 'both': 12})
  monkeypatch.setattr(small_datasets, 'HELD_OUT', {'test': 12})
  small_datasets.main(tmp_path)
  for kind, (names, _) in small_datasets.KINDS.items():
    for split in ('train', 'test'):
      assert {path.name for path in (tmp_path / kind / split).iterdir()} == set(names)
  info = inspect(next(tmp_path.glob('both/test/*/*.mp4')).read_bytes())
  assert (info.num_frames, info.height, info.width) == (32, 64, 64)


@pytest.mark.parametrize('shape', small_datasets.SHAPES)
def test_only_the_order_of_frames_tells_opposite_directions_apart(shape):
  right, left = (
    small_datasets.render_both(f'{shape}_{name}', np.random.default_rng(3)) for name in ('moves_right', 'moves_left')
  )
  np.testing.assert_array_equal(right, left[::-1])


def test_textures_drift_and_differ():
  videos = [small_datasets.render_texture(name, np.random.default_rng(4)) for name in small_datasets.TEXTURES]
  assert len({video.tobytes() for video in videos}) == len(small_datasets.TEXTURES)
  assert all(np.abs(np.diff(video.astype(int), axis=0)).max() > 50 for video in videos)
