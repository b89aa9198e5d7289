"""Table 2 of the paper, on Kinetics-400: number of class-attention blocks, with block size 2.

  python main.py --config=configs/ablations/table2.py:11+1 --workdir=runs/table2_11 --config.data.data_dir=/data

Top-1 in the paper by self-attention + class-attention blocks: 9+3 79.4, 10+2 80.3, 11+1 80.5, 12+1 80.6. Not trained
here.
"""

from ml_collections import ConfigDict

from mevit_jax.configs import k400


def get_config(blocks: str = '11+1') -> ConfigDict:
  """Returns the config of the row with these blocks: 'self-attention+class-attention'."""
  config = k400.get_config()
  motion, _, classes = blocks.partition('+')
  config.model.space_blocks, config.model.motion_blocks = 0, int(motion)
  config.model.class_blocks = int(classes)
  return config
