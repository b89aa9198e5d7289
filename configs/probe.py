"""A probe on a frozen image encoder: for up to some thousand videos of your own, on a laptop.

  mevit prepare video_folder ROOT --data_dir=data --name=mine
  mevit train --config=probe --workdir=runs/mine --config.data.dataset=mine --config.init_from=ENCODER

ENCODER is an image encoder, such as DINOv2, as a folder, a file or a name on the Hugging Face Hub; the model takes its
sizes from it. Its features of every clip are computed once and stored in WORKDIR/features. Then the rest is trained:
positions in time, motion blocks that add nothing at first (--config.model.motion_blocks, 0 by default), class
block and head. docs/small_datasets.md compares it with training from scratch.
"""

from ml_collections import ConfigDict

from mevit_jax.configs import common


def get_config() -> ConfigDict:
  """Returns the config."""
  config = common.get_config('S/16')
  config.model.update(
    frames=8,
    space_encoder=True,
    space_blocks=12,
    motion_blocks=0,
    class_blocks=1,
    frame_tokens=1,
    drop_path=0.0,
    dtype='float32',
  )
  config.data.dataset = 'video_folder'
  config.data.sampling = 'uniform'
  config.data.short_side = (224, 224)
  config.optimizer.update(
    name='adamw',
    learning_rate=1e-3,
    base_batch_size=16,
    schedule='cosine',
    weight_decay=0.05,
    no_decay=common.NO_DECAY,
    freeze='^(embedding|frame_tokens|pre_norm|space)',
    warmup_epochs=1.0,
    clip_norm=1.0,
  )
  config.training.update(batch_size=16, epochs=30.0, cache_features=1, log_every=20, save_every=1000)
  config.evaluation.update(crops=1, batch_size=16)
  return config
