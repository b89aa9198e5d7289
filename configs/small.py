"""A small MEViT for 300 to 2,000 videos of your own, trained from scratch on a CPU: without any pretrained weights.

  mevit prepare video_folder ROOT --data_dir=data --name=mine --encoding=h264 --short_side=80
  mevit train --config=small --workdir=runs/mine --config.data.dataset=mine

Few large patches; the dataset's own pixel mean and standard deviation; weak augmentation; a long schedule that ends
when validation no longer improves, after which the best checkpoint is evaluated. docs/small_datasets.md compares it
with a linear classifier. With pretrained weights use video_folder.
"""

from ml_collections import ConfigDict

from mevit_jax.configs import common


def get_config() -> ConfigDict:
  """Returns the config: 0.3 million parameters."""
  config = common.get_tiny_config(64, 16)
  config.data.dataset = 'video_folder'
  config.data.sampling = 'uniform'
  config.data.short_side = (64, 76)
  config.augment.flip = True  # directional classes swap their labels, see AugmentConfig
  config.optimizer.update(
    learning_rate=1e-3,
    base_batch_size=16,
    weight_decay=0.1,
    warmup_epochs=2.0,
  )
  config.training.update(batch_size=16, epochs=200.0, log_every=100, save_every=1000, evaluate_every=200, patience=10)
  return config
