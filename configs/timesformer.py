"""TimeSformer (Bertasius et al. 2021) as a configuration: 12 motion blocks, block size 1, time first, on Kinetics-400.

  python main.py --config=configs/timesformer.py --workdir=runs/timesformer --config.data.data_dir=/data

Its authors report 78.0 top-1 with 8x32 frames and 1x3 views, after about 416 V100 hours. Not trained here yet.
"""

from ml_collections import ConfigDict

from mevit_jax.configs import k400


def get_config(size: str = 'B/16') -> ConfigDict:
  """Returns the config; `size` is a ViT variant such as 'B/16': Ti, S, B, L or H, a slash and the patch size."""
  config = k400.get_config(size)
  model = config.model
  depth = model.space_blocks + model.motion_blocks + model.class_blocks
  model.space_blocks, model.motion_blocks, model.class_blocks = 0, depth, 0
  model.block_size = 1
  model.attention_order = 'time_space'
  model.class_token_in_motion = False
  return config
