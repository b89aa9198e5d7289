"""Table 1 of the paper, on Kinetics-400: the block size of motion attention, in all 12 blocks, without class attention.

  python main.py --config=configs/ablations/table1.py:3 --workdir=runs/table1_3 --config.data.data_dir=/data

Top-1 and top-5 in the paper: M = 1 78.6 93.0, 2 80.2 93.6, 3 80.0 93.2, 7 77.6 92.8, 14 77.9 92.8. Not trained here.
"""

from ml_collections import ConfigDict

from mevit_jax.configs import k400


def get_config(block_size: str = '2') -> ConfigDict:
  """Returns the config of the row with this block size."""
  config = k400.get_config()
  config.model.space_blocks, config.model.motion_blocks, config.model.class_blocks = 0, 12, 0
  config.model.block_size = int(block_size)
  return config
