"""MEViT on Kinetics-600: the config of Kinetics-400 with 16 frames.

  python main.py --config=configs/k600.py --workdir=runs/k600 --config.data.data_dir=/data

The paper reports 85.6 top-1 and 95.2 top-5 with 16 frames and 1x3 views. Not trained here yet.
"""

from ml_collections import ConfigDict

from mevit_jax.configs import k400


def get_config(size: str = 'B/16') -> ConfigDict:
  """Returns the config; `size` is a ViT variant such as 'B/16': Ti, S, B, L or H, a slash and the patch size."""
  config = k400.get_config(size)
  config.data.dataset = 'kinetics600'
  config.model.frames, config.data.stride = 16, 16
  return config
