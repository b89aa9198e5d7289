"""Table 3 of the paper, on Kinetics-400: number of blocks with motion attention (the last ones), with block size 2.

  python main.py --config=configs/ablations/table3.py:8 --workdir=runs/table3_8 --config.data.data_dir=/data

Top-1 in the paper: 0 of 12 75.6, 2 77.5, 4 77.9, 8 80.3, 12 80.2. Not trained here.
"""

from ml_collections import ConfigDict

from mevit_jax.configs import k400


def get_config(motion_blocks: str = '8') -> ConfigDict:
  """Returns the config of the row with this number of motion blocks."""
  config = k400.get_config()
  motion = int(motion_blocks)
  config.model.space_blocks, config.model.motion_blocks, config.model.class_blocks = 12 - motion, motion, 0
  return config
