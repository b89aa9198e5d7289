"""Table 3 of the paper, on Kinetics-400: how many blocks have motion attention (the last ones), with block size 2.

  python main.py --config=configs/ablations/table3.py:8 --workdir=runs/table3_8 --config.data.data_dir=/data

Top-1 there: 0 of 12 75.6, 2 77.5, 4 77.9, 8 80.3, 12 80.2. Not run here.
"""

from mevit_jax.configs import k400


def get_config(motion_blocks: str = '8'):
  """The row with this many motion blocks."""
  config = k400.get_config()
  motion = int(motion_blocks)
  config.model.space_blocks, config.model.motion_blocks, config.model.class_blocks = 12 - motion, motion, 0
  return config
