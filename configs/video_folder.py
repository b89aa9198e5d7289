"""MEViT on a folder of your own videos: 8 uniform segments, AdamW with a cosine schedule.

  mevit prepare video_folder ROOT --data_dir=data --name=mine
  python main.py --config=configs/video_folder.py --workdir=runs/mine --config.data.dataset=mine

ROOT is a folder with one subfolder of videos per class, or a CSV file with the columns path,label. Training from
scratch needs many videos: use --config.init_from. A smaller model: --config=configs/video_folder.py:Ti/16. B/16 was not
trained here yet.
"""

from ml_collections import ConfigDict

from mevit_jax.configs import common


def get_config(size: str = 'B/16') -> ConfigDict:
  """Returns the config; `size` is a ViT variant such as 'B/16': Ti, S, B, L or H, a slash and the patch size."""
  config = common.get_config(size)
  config.data.dataset = 'video_folder'
  config.data.sampling = 'uniform'
  config.data.workers = 4
  config.augment.flip = True  # directional classes swap their labels, see AugmentConfig
  config.optimizer.name, config.optimizer.schedule = 'adamw', 'cosine'
  config.optimizer.learning_rate = 1e-4
  config.optimizer.weight_decay = 0.05
  config.optimizer.no_decay = common.NO_DECAY
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.clip_norm = 1.0
  config.training.batch_size = 16
  config.training.epochs = 30.0
  config.training.label_smoothing = 0.1
  config.training.save_every = 500
  config.evaluation.crops = 1
  config.evaluation.batch_size = 16
  return config
