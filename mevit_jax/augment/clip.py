"""What happens to clips on the device: uint8 pixels become normalised floats, augmented alike in all frames."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np

from mevit_jax.augment.pixels import blur, drop_color, erase, jitter_color
from mevit_jax.augment.randaugment import randaugment
from mevit_jax.config.augment import AugmentConfig
from mevit_jax.config.data import Normalization

# What a horizontal flip turns into each other, in class names; datasets spell the other way round in two ways.
_SIDES = {a + end: b + end for a, b in (('left', 'right'), ('right', 'left')) for end in ('', 'ward', 'wards')}
_BACK = {'anticlockwise': 'clockwise', 'counterclockwise': 'clockwise'}
_MIRRORS = tuple({**_SIDES, **_BACK, 'clockwise': other} for other in _BACK)
_WORD = re.compile(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+')  # of 'turns_left', 'Turn Left', 'turnLeft', 'TURN LEFT'


def normalize(video: jax.Array, normalization: Normalization, dtype: Any) -> jax.Array:
  """uint8 `... 3` in [0, 255] -> `... 3` of `dtype`: (video / 255 - mean) / std, computed in float32."""
  mean, std = normalization
  scale = 1 / (255 * np.asarray(std, np.float32))
  shift = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
  return (video.astype(jnp.float32) * scale - shift).astype(dtype)


def augment(
  video: jax.Array,
  labels: jax.Array,
  keys: jax.Array,
  config: AugmentConfig,
  mirrors: Sequence[int],
  normalization: Normalization,
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
    normalization: pixel mean and standard deviation, for erased boxes.

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
    change = partial(_change, config=config, normalization=normalization)
    with jax.default_matmul_precision('float32'):  # a TPU's default would round pixels to 8 bits and factors too
      video = jax.lax.map(lambda row: change(*row), (video, clip_keys))
  return video, labels


def _change(clip: jax.Array, key: jax.Array, config: AugmentConfig, normalization: Normalization) -> jax.Array:
  """Changes the pixels of one clip: uint8 `t h w 3` -> float32."""
  first_key, *keys = jax.random.split(key, 5)
  if config.randaugment:
    levels = config.randaugment_magnitude, config.randaugment_std, config.randaugment_probability
    clip = randaugment(clip, first_key, config.randaugment, *levels)
  jitter = config.brightness, config.contrast, config.saturation, config.hue
  mean, std = normalization
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
