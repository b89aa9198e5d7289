"""The common start of the configs: all fields with their defaults. mevit_jax/config/ documents the fields."""

from ml_collections import ConfigDict

from mevit_jax.config.flags import default_config
from mevit_jax.config.model import variant


def get_config(size: str = 'B/16') -> ConfigDict:
  """Returns the config of the paper's model for a ViT variant such as 'B/16'.

  The first third of the blocks has space attention only, the last block has class attention, and the blocks between
  have motion attention: 4, 7 and 1 of the 12 blocks of ViT-B.
  """
  config = default_config()
  sizes = variant(size)
  depth = sizes.pop('depth')
  config.model.update(sizes)
  config.model.space_blocks = depth // 3
  config.model.class_blocks = 1
  config.model.motion_blocks = depth - depth // 3 - 1
  config.model.drop_path = 0.1
  if depth > 12:  # L and H: loop over blocks to compile in minutes, and keep only their inputs for the backward pass
    config.model.unroll, config.model.remat = 1, 'block'
  return config
