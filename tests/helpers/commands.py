"""Arguments of the command, and a video."""

import numpy as np

from mevit_jax.datasets.builders import moving_shapes


def video(seed: int) -> bytes:
  return moving_shapes.encode(np.random.default_rng(seed).integers(0, 256, (4, 16, 16, 3), np.uint8))


def small(data_dir):
  return (
    'moving_shapes',
    f'--data_dir={data_dir}',
    '--train_videos=8',
    '--validation_videos=8',
    '--frames=2',
    '--size=16',
  )
