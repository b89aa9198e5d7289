"""Cost of augmenting a batch, by operation and relative to a training step.

  python -m benchmarks.augmentation [--clips=8 --frames=8 --size=224 --model=Ti/16] [--json=FILE]

Milliseconds of CPU time per batch over all cores: the minimum of interleaved rounds. Here every clip gets every
RandAugment operation; in training a clip gets only the few that are drawn for it.
"""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mevit_jax.augment.clip import augment
from mevit_jax.augment.mixing import mix
from mevit_jax.augment.randaugment import OPERATIONS, operate
from mevit_jax.cli import command
from mevit_jax.config.augment import AugmentConfig
from mevit_jax.config.data import Normalization
from mevit_jax.config.model import MEViTConfig, variant
from mevit_jax.files import write_json
from mevit_jax.models.functional import build_model

_CLIPS = flags.DEFINE_integer('clips', 8, 'Clips per batch.')
_FRAMES = flags.DEFINE_integer('frames', 8, 'Frames per clip.')
_SIZE = flags.DEFINE_integer('size', 224, 'Side length in pixels.')
_MODEL = flags.DEFINE_string('model', 'Ti/16', 'ViT variant whose training step to compare with; empty for none.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Timed rounds.')
_JSON = flags.DEFINE_string('json', '', 'JSON file to write the results to.')

NORMALIZATION = Normalization()
CONFIGS = {
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
  """Times all cases and prints a table."""
  command.no_arguments(argv)
  shape = (_CLIPS.value, _FRAMES.value, _SIZE.value, _SIZE.value, 3)
  video = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
  cases = make_cases(video)
  times: dict[str, list[float]] = {name: [] for name in cases}
  for round_ in range(_ROUNDS.value + 1):
    for name, run in cases.items():
      key = jax.random.key(round_)
      start = time.process_time()
      jax.block_until_ready(run(key))
      if round_:  # the first round compiles
        times[name].append(1000 * (time.process_time() - start))
  best = {name: min(seconds) for name, seconds in times.items()}
  step = best.get('training step')
  print(f'{_CLIPS.value} clips {_FRAMES.value}x{_SIZE.value}x{_SIZE.value}, ms of CPU time, {jax.devices()[0]}')
  for name, value in best.items():
    print(f'{name:36s} {value:9.1f}' + (f'  {100 * value / step:6.2f} % of the step of {_MODEL.value}' if step else ''))
  if _JSON.value:
    write_json(_JSON.value, {'shape': shape, 'model': _MODEL.value, 'ms': best})


def make_cases(video: jax.Array) -> dict[str, Callable[[jax.Array], object]]:
  """Returns the timed functions by name; each takes a key."""
  batch = len(video)
  operate_all = jax.jit(lambda video, operation: jax.lax.map(lambda clip: operate(clip, operation, 9.0, 1), video))
  cases = {
    f'randaugment {name}, all clips': lambda key, i=i: operate_all(video, i) for i, name in enumerate(OPERATIONS)
  }
  augment_all = jax.jit(
    lambda video, keys, config: augment(video, jnp.zeros(batch, jnp.int32), keys, config, (0,), NORMALIZATION),
    static_argnums=2,
  )
  for name, config in CONFIGS.items():
    cases[name] = lambda key, config=config: augment_all(video, jax.random.split(key, batch), config)
  mix_all = jax.jit(lambda video, keys: mix(video, jnp.eye(batch), keys, 0.8, 1.0, 1.0, 0.5))
  cases['mixup and cutmix'] = lambda key: mix_all(video, jax.random.split(key, batch))
  if _MODEL.value:
    cases['training step'] = make_step(video)
  return cases


def make_step(video: jax.Array) -> Callable[[jax.Array], object]:
  """Builds a training step's forward and backward pass of a model with the paper's stages, without augmentation."""
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
