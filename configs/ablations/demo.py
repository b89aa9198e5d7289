"""The demo without motion attention or with another block size, at the same budget.

README.md has the results. With --config.model.class_blocks=0, only motion attention reads several frames.

python main.py --config=configs/ablations/demo.py:0 --workdir=runs/demo_none     (no motion attention)
python main.py --config=configs/ablations/demo.py:1 --workdir=runs/demo_m1       (the same patch in all frames)
python main.py --config=configs/ablations/demo.py:2 --workdir=runs/demo_m2       (the demo itself)
python main.py --config=configs/ablations/demo.py:4 --workdir=runs/demo_m4       (the entire grid: joint attention)
"""

from ml_collections import ConfigDict

from mevit_jax.configs import demo


def get_config(block_size: str = '2') -> ConfigDict:
  """Returns the config with this block size; 0 disables motion attention."""
  config = demo.get_config()
  if block_size == '0':
    config.model.space_blocks += config.model.motion_blocks
    config.model.motion_blocks = 0
  else:
    config.model.block_size = int(block_size)
  return config
