"""The common start of the configs: all fields with their defaults. mevit_jax/config/ documents the fields."""

from ml_collections import ConfigDict

from mevit_jax.config.flags import default_config
from mevit_jax.config.model import variant

# Parameters without weight decay: biases, norms, tokens and positions.
NO_DECAY = 'bias$|scale$|class_token|class_position|frame_tokens|time_position|embedding/(space|time)'


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


def get_tiny_config(image_size: int, patch_size: int) -> ConfigDict:
  """Returns the config of a model of a quarter of a million parameters, trained from scratch on a CPU with AdamW."""
  config = get_config('Ti/16')
  config.model.update(
    image_size=(image_size, image_size),
    patch_size=(patch_size, patch_size),
    frames=8,
    width=64,
    heads=4,
    mlp_dim=256,
    space_blocks=1,
    motion_blocks=2,
    class_blocks=1,
    block_size=2,
    motion_init='random',  # without pretrained weights there is nothing to copy
    drop_path=0.0,
    dtype='float32',
  )
  config.optimizer.update(name='adamw', schedule='cosine', no_decay=NO_DECAY, clip_norm=1.0)
  config.evaluation.update(crops=1, batch_size=64)
  return config
