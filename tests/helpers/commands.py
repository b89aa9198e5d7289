"""Arguments for `mevit prepare`, and a small video."""

import numpy as np

from mevit_jax.datasets.builders import moving_shapes


def make_noise_video(seed: int) -> bytes:
  """Returns an encoded video of four random frames."""
  return moving_shapes.encode(np.random.default_rng(seed).integers(0, 256, (4, 16, 16, 3), np.uint8))


def small_shapes(data_dir):
  """Returns arguments that prepare a tiny moving_shapes."""
  return (
    'moving_shapes',
    f'--data_dir={data_dir}',
    '--train_videos=8',
    '--validation_videos=8',
    '--frames=2',
    '--size=16',
  )
