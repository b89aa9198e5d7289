"""Where all recipes start: every field and its default. The fields are explained in mevit_jax/experiment.py."""

from mevit_jax.config.flags import default_config
from mevit_jax.config.model import variant


def get_config(size: str = 'B/16'):
  """A recipe for a ViT of this size, 'B/16' or another, in the shape of the paper's model.

  A third of the blocks with space attention only, the last one with class attention, motion attention between: 4, 7
  and 1 of the 12 of ViT-B.
  """
  config = default_config()
  sizes = variant(size)
  depth = sizes.pop('depth')
  config.model.update(sizes)
  config.model.space_blocks = depth // 3
  config.model.class_blocks = 1
  config.model.motion_blocks = depth - depth // 3 - 1
  config.model.drop_path = 0.1
  if depth > 12:  # L and H: blocks in a loop compile in minutes, and keep their inputs alone for the backward pass
    config.model.unroll, config.model.remat = 1, 'block'
  return config
