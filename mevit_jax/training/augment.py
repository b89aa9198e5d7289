"""What happens to clips on the device: uint8 pixels become normalised floats, augmented alike in all frames."""

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Literal

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np

from mevit_jax.errors import UserError
from mevit_jax.training.pixels import blur, drop_color, erase, jitter_color
from mevit_jax.training.randaugment import randaugment

# What a horizontal flip turns into each other, in class names; datasets spell the other way round in two ways.
_SIDES = {a + end: b + end for a, b in (('left', 'right'), ('right', 'left')) for end in ('', 'ward', 'wards')}
_BACK = {'anticlockwise': 'clockwise', 'counterclockwise': 'clockwise'}
_MIRRORS = tuple({**_SIDES, **_BACK, 'clockwise': other} for other in _BACK)
_WORD = re.compile(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+')  # of 'turns_left', 'Turn Left', 'turnLeft', 'TURN LEFT'


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
  """Augmentation of training clips, in this order; all off by default. docs/augmentation.md shows each.

  Attributes:
    flip: flip half of the clips horizontally. A class whose name has a direction ('moves_left') takes the label of its
      mirror image ('moves_right'); where there is no such class its clips are not flipped.
    randaugment: operations of RandAugment on a clip; 0 is none.
    randaugment_magnitude: their mean level: 10 is the strongest of timm, and what is beyond goes on alike, up to 30.
    randaugment_std: standard deviation of the level.
    randaugment_probability: of each of them.
    color_jitter: probability of a change of brightness, contrast, saturation and hue.
    brightness: its largest change of brightness, of pixels in [0, 1].
    contrast: its largest change of the contrast's factor 1.
    saturation: its largest change of the saturation's factor 1.
    hue: its largest change of hue, in turns, at most half a one.
    grayscale: probability of losing all colour.
    blur: probability of a Gaussian blur.
    blur_sigma: its smallest and largest standard deviation in pixels.
    erase: probability of an erased box, the same in all frames.
    erase_area: its smallest and largest share of the frame.
    erase_aspect: its smallest and largest height over width.
    erase_fill: 'noise' of the pixels' mean and standard deviation, or their 'mean'.
    mixup: neighbouring clips of the batch are blended, with a share from Beta(mixup, mixup); 0 is off.
    cutmix: or a box of one is pasted into the other, with an area from Beta(cutmix, cutmix); 0 is off.
    mix_probability: that a pair is mixed.
    cutmix_share: where both are on, the share of mixed pairs that get a box.
  """

  flip: bool = False
  randaugment: int = 0
  randaugment_magnitude: float = 9.0
  randaugment_std: float = 0.5
  randaugment_probability: float = 0.5
  color_jitter: float = 0.0
  brightness: float = 32 / 255
  contrast: float = 0.4
  saturation: float = 0.4
  hue: float = 0.2
  grayscale: float = 0.0
  blur: float = 0.0
  blur_sigma: tuple[float, ...] = (0.1, 2.0)
  erase: float = 0.0
  erase_area: tuple[float, ...] = (0.02, 1 / 3)
  erase_aspect: tuple[float, ...] = (0.3, 1 / 0.3)
  erase_fill: Literal['noise', 'mean'] = 'noise'
  mixup: float = 0.0
  cutmix: float = 0.0
  mix_probability: float = 1.0
  cutmix_share: float = 0.5

  def __post_init__(self):
    for names, low, high in _RANGES:
      for name in names:
        if not low <= getattr(self, name) <= high:
          raise UserError(f'augment.{name} must be in [{low}, {high}], not {getattr(self, name)}')
    for name, most in (('blur_sigma', math.inf), ('erase_area', 1), ('erase_aspect', math.inf)):
      values = getattr(self, name)
      if not (len(values) == 2 and 0 < values[0] <= values[1] <= most):
        limit = '' if most == math.inf else f' and at most {most}'
        raise UserError(f'augment.{name} is a smallest and a largest number, positive{limit}, not {values}')
    if self.erase_fill not in ('noise', 'mean'):
      raise UserError(f"augment.erase_fill must be 'noise' or 'mean', not {self.erase_fill!r}")

  @property
  def mixes(self) -> bool:
    """Whether neighbouring clips are mixed: a batch then has to be even on each device and in each of its parts."""
    return bool((self.mixup or self.cutmix) and self.mix_probability)


_RANGES = (
  (
    (
      'color_jitter', 'brightness', 'contrast', 'saturation', 'grayscale', 'blur', 'erase', 'randaugment_probability',
      'mix_probability', 'cutmix_share',
    ),
    0, 1,
  ),
  (('hue',), 0, 0.5),
  (('randaugment_magnitude',), 0, 30),
  (('randaugment', 'randaugment_std', 'mixup', 'cutmix'), 0, math.inf),
)  # fmt: skip


def normalise(video: jax.Array, mean: Sequence[float], std: Sequence[float], dtype) -> jax.Array:
  """uint8 `... 3` in [0, 255] -> `... 3` of `dtype`: (video / 255 - mean) / std, computed in float32."""
  scale = 1 / (255 * np.asarray(std, np.float32))
  shift = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
  return (video.astype(jnp.float32) * scale - shift).astype(dtype)


def augment(
  video: jax.Array,
  labels: jax.Array,
  keys: jax.Array,
  config: AugmentConfig,
  mirrors: Sequence[int],
  mean: Sequence[float],
  std: Sequence[float],
) -> tuple[jax.Array, jax.Array]:
  """Augments clips, each with its own key, alike in all its frames.

  Clips are worked on one after the other, so that each costs what was drawn for it, and the memory is that of one. On
  many devices this is to be called within `shard_map`, on each device's rows.

  Args:
    video: uint8 `b t h w 3`.
    labels: `b`.
    keys: `b`: one a row, so that a row does not depend on how the batch is spread over devices.
    config: what to do.
    mirrors: the label of each class's mirror image, -1 where there is none; see `mirror_labels`.
    mean: of the pixels in [0, 1], by channel: what is erased gets it.
    std: likewise.

  Returns:
    The clips, in [0, 255] but for the noise of erased boxes, float32 (uint8 if they were flipped at most), and labels.
  """
  flip_keys, clip_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
  if config.flip:
    mirrored = jnp.asarray(mirrors)[labels]
    flips = jax.vmap(jax.random.bernoulli)(flip_keys) & (mirrored >= 0)  # b
    video = jnp.where(flips[:, None, None, None, None], pix.flip_left_right(video), video)
    labels = jnp.where(flips, mirrored, labels)
  if any((config.randaugment, config.color_jitter, config.grayscale, config.blur, config.erase)):
    change = partial(_change, config=config, mean=mean, std=std)
    with jax.default_matmul_precision('float32'):  # a TPU's default would round pixels to 8 bits and factors too
      video = jax.lax.map(lambda row: change(*row), (video, clip_keys))
  return video, labels


def _change(
  clip: jax.Array, key: jax.Array, config: AugmentConfig, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """Changes the pixels of one clip: uint8 `t h w 3` -> float32."""
  first_key, *keys = jax.random.split(key, 5)
  if config.randaugment:
    levels = config.randaugment_magnitude, config.randaugment_std, config.randaugment_probability
    clip = randaugment(clip, first_key, config.randaugment, *levels)
  jitter = config.brightness, config.contrast, config.saturation, config.hue
  noise = std if config.erase_fill == 'noise' else (0, 0, 0)
  changes = (
    (config.color_jitter, lambda clip, key: jitter_color(clip, key, *jitter)),
    (config.grayscale, lambda clip, _: drop_color(clip)),
    (config.blur, lambda clip, key: blur(clip, key, config.blur_sigma)),
    (config.erase, lambda clip, key: erase(clip, key, config.erase_area, config.erase_aspect, mean, noise)),
  )
  clip = clip.astype(jnp.float32)
  for (probability, change), key in zip(changes, keys, strict=True):
    if probability:
      use_key, change_key = jax.random.split(key)
      use = jax.random.bernoulli(use_key, probability)
      clip = jax.lax.cond(use, change, lambda clip, _: clip, clip, change_key)
  return clip


def mirror_labels(class_names: Sequence[str]) -> tuple[int, ...]:
  """Each class's label when its clip is flipped: its own for most, another's for a direction, -1 where none is."""
  ids = {name: label for label, name in enumerate(class_names)}
  return tuple(_mirror(name, ids) for name in class_names)


def _mirror(name: str, ids: dict[str, int]) -> int:
  directed = {word.lower() for word in _WORD.findall(name)} & set(_MIRRORS[0])
  if not directed:
    return ids[name]
  mirrored = (_WORD.sub(partial(_swap, words), name) for words in _MIRRORS)
  return next((ids[other] for other in mirrored if other in ids), -1)


def _swap(others: dict[str, str], match: re.Match) -> str:
  """The other word, written as this one: left, Left and LEFT become right, Right and RIGHT."""
  word = others.get(match[0].lower(), '')
  if not word:
    return match[0]
  return word.upper() if match[0].isupper() else word.capitalize() if match[0][0].isupper() else word
