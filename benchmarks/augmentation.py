"""What augmentation of a batch costs, operation by operation, and as a share of a training step.

  python -m benchmarks.augmentation [--clips=8 --frames=8 --size=224 --model=Ti/16] [--json=FILE]

Milliseconds of CPU time for the whole batch, over all cores: the smallest of a few rounds, in which all take turns.
An operation of RandAugment is drawn for every clip here; in training a clip gets the few that are drawn for it.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mevit_jax.augment.clip import augment
from mevit_jax.augment.mixing import mix
from mevit_jax.augment.randaugment import OPERATIONS, operate
from mevit_jax.cli import command
from mevit_jax.config.augment import AugmentConfig
from mevit_jax.config.model import MEViTConfig, variant
from mevit_jax.models.functional import build_model

_CLIPS = flags.DEFINE_integer('clips', 8, 'Clips of a batch.')
_FRAMES = flags.DEFINE_integer('frames', 8, 'Frames of a clip.')
_SIZE = flags.DEFINE_integer('size', 224, 'Pixels of a side.')
_MODEL = flags.DEFINE_string('model', 'Ti/16', 'Whose step to compare with; empty for none.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Rounds.')
_JSON = flags.DEFINE_string('json', '', 'Write the figures here too.')

MEAN = STD = (0.5, 0.5, 0.5)
RECIPES = {
  'flip': AugmentConfig(flip=True),
  'color_jitter, all clips': AugmentConfig(color_jitter=1.0),
  'grayscale, all clips': AugmentConfig(grayscale=1.0),
  'blur, all clips': AugmentConfig(blur=1.0),
  'erase, all clips': AugmentConfig(erase=1.0),
  'ViViT on Kinetics': AugmentConfig(flip=True, color_jitter=0.8, grayscale=0.1),
  'MViT, VideoMAE (without mixing)': AugmentConfig(
    flip=True, randaugment=4, randaugment_magnitude=7.0, erase=0.25
  ),
}  # fmt: skip


def main(argv: Sequence[str]) -> None:
  command.no_arguments(argv)
  shape = (_CLIPS.value, _FRAMES.value, _SIZE.value, _SIZE.value, 3)
  video = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
  cases = cases_of(video)
  times: dict[str, list[float]] = {name: [] for name in cases}
  for round_ in range(_ROUNDS.value + 1):
    for name, run in cases.items():
      key = jax.random.key(round_)
      start = time.process_time()
      jax.block_until_ready(run(key))
      if round_:  # the first one compiles
        times[name].append(1000 * (time.process_time() - start))
  best = {name: min(found) for name, found in times.items()}
  step = best.get('training step')
  print(f'{_CLIPS.value} clips {_FRAMES.value}x{_SIZE.value}x{_SIZE.value}, ms of CPU time, {jax.devices()[0]}')
  for name, value in best.items():
    print(f'{name:36s} {value:9.1f}' + (f'  {100 * value / step:6.2f} % of the step of {_MODEL.value}' if step else ''))
  if _JSON.value:
    Path(_JSON.value).write_text(json.dumps({'shape': shape, 'model': _MODEL.value, 'ms': best}, indent=2))


def cases_of(video: jax.Array) -> dict[str, Callable[[jax.Array], object]]:
  """What is measured, each a function of a key."""
  rows = len(video)
  operate_all = jax.jit(lambda video, operation: jax.lax.map(lambda clip: operate(clip, operation, 9.0, 1), video))
  cases = {
    f'randaugment {name}, all clips': lambda key, i=i: operate_all(video, i) for i, name in enumerate(OPERATIONS)
  }
  augment_all = jax.jit(
    lambda video, keys, config: augment(video, jnp.zeros(rows, jnp.int32), keys, config, (0,), MEAN, STD),
    static_argnums=2,
  )
  for name, config in RECIPES.items():
    cases[name] = lambda key, config=config: augment_all(video, jax.random.split(key, rows), config)
  mix_all = jax.jit(lambda video, keys: mix(video, jnp.eye(rows), keys, 0.8, 1.0, 1.0, 0.5))
  cases['mixup and cutmix'] = lambda key: mix_all(video, jax.random.split(key, rows))
  if _MODEL.value:
    cases['training step'] = step_of(video)
  return cases


def step_of(video: jax.Array) -> Callable[[jax.Array], object]:
  """Forward and backward of the paper's shape of a model, without augmentation."""
  sizes = variant(_MODEL.value)
  depth = sizes.pop('depth')
  blocks = {'space_blocks': depth // 3, 'motion_blocks': depth - depth // 3 - 1, 'class_blocks': 1}
  shape = {'frames': video.shape[1], 'image_size': video.shape[2:4]}
  model = build_model(MEViTConfig(classes=400, dtype='float32', **sizes, **blocks, **shape))
  params = model.init(jax.random.key(0))
  gradient = jax.jit(jax.grad(lambda params, video: (model.apply(params, video / 255.0 - 0.5) ** 2).sum()))
  return lambda key: gradient(params, video)


if __name__ == '__main__':
  command.run(main)
