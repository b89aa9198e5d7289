"""MEViT on Something-Something-v2: 16 uniform segments, no flip.

  python main.py --config=configs/ssv2.py --workdir=runs/ssv2 --config.data.data_dir=/data

The paper reports 65.7 top-1 and 90.5 top-5 with 16 frames and 1x3 views. Not trained here yet.
"""

from ml_collections import ConfigDict

from mevit_jax.configs import common


def get_config(size: str = 'B/16') -> ConfigDict:
  """Returns the config; `size` is a ViT variant such as 'B/16': Ti, S, B, L or H, a slash and the patch size."""
  config = common.get_config(size)
  config.data.dataset = 'something_something_v2'
  config.data.sampling = 'uniform'
  config.model.frames = 16
  config.augment.flip = False  # classes differ in left and right
  config.evaluation.clips, config.evaluation.crops = 1, 3
  config.data.workers = 16
  return config
