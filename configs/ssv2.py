"""MEViT on Something-Something-v2: 16 uniform segments, no flip.

  python main.py --config=configs/ssv2.py --workdir=runs/ssv2 --config.data.data_dir=/data

The paper reports 65.7 top-1 and 90.5 top-5 with 16 frames and 1x3 views. Not run here.
"""

from mevit_jax.configs import common


def get_config(size: str = 'B/16'):
  """The recipe; `size` is a ViT's name: Ti, S, B, L or H, a slash, and the patch."""
  config = common.get_config(size)
  config.data.dataset = 'something_something_v2'
  config.data.sampling = 'uniform'
  config.model.frames = 16
  config.augment.flip = False  # left and right are what is to be told apart
  config.evaluation.clips, config.evaluation.crops = 1, 3
  config.data.workers = 16
  return config
