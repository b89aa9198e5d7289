"""MEViT on Kinetics-400: 8 frames, stride 32, TimeSformer's hyperparameters.

  python main.py --config=configs/k400.py --workdir=runs/k400 --config.data.data_dir=/data
  python main.py --config=configs/k400.py:L/16 --workdir=runs/k400_l --config.data.data_dir=/data

16 frames: --config.model.frames=16 --config.data.stride=16.

The paper reports 80.6 top-1 and 94.7 top-5 with 1x3 views (81.1 and 94.9 with 16 frames), starting from an ImageNet
ViT. Not trained here yet.
"""

from ml_collections import ConfigDict

from mevit_jax.configs import common


def get_config(size: str = 'B/16') -> ConfigDict:
  """Returns the config; `size` is a ViT variant such as 'B/16': Ti, S, B, L or H, a slash and the patch size."""
  config = common.get_config(size)
  config.data.dataset = 'kinetics400'
  config.data.sampling = 'dense'
  config.data.stride = 32
  config.augment.flip = True
  config.evaluation.clips, config.evaluation.crops = 1, 3
  config.data.workers = 16
  return config
