"""Augmentation and normalization of clips on the device; the same augmentation for all frames of a clip."""

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

# Words in class names that a horizontal flip exchanges; 'clockwise' has two opposites.
_LEFT_RIGHT = {a + end: b + end for a, b in (('left', 'right'), ('right', 'left')) for end in ('', 'ward', 'wards')}
_COUNTERCLOCKWISE = {'anticlockwise': 'clockwise', 'counterclockwise': 'clockwise'}
_MIRRORS = tuple({**_LEFT_RIGHT, **_COUNTERCLOCKWISE, 'clockwise': opposite} for opposite in _COUNTERCLOCKWISE)
# 'Pulling it right out' names no direction.
_ADVERB = re.compile(r'(?<=\b(?:it|em) )right(?= (?:out|off|away|back|through|after|before)\b)')
_WORD = re.compile(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+')  # splits 'turns_left', 'Turn Left', 'turnLeft', 'TURN LEFT'


def normalize(video: jax.Array, normalization: Normalization, dtype: Any) -> jax.Array:
  """Normalizes pixels, uint8 `... 3` -> `... 3` of `dtype`: (video / 255 - mean) / std, computed in float32."""
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
  """Augments clips, each with its own key; the same augmentation for all frames of a clip.

  Clips are processed in sequence: only the operations drawn are computed, and the memory is that of one clip. On
  several devices, call this within `shard_map`, on each device's shard of the batch.

  Args:
    video: uint8 `b t h w 3`.
    labels: `b`.
    keys: PRNG keys `b`, one per clip, so that a clip does not depend on the batch sharding.
    config: augmentation config.
    mirrors: label of each class's mirror image, -1 if there is none; see `mirror_labels`.
    normalization: pixel mean and standard deviation, for erased boxes.

  Returns:
    Clips in [0, 255], except for the noise of erased boxes, float32 (uint8 if only flips are enabled), and labels.
  """
  flip_keys, clip_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
  if config.flip:
    mirrored = jnp.asarray(mirrors)[labels]
    flips = jax.vmap(jax.random.bernoulli)(flip_keys) & (mirrored >= 0)  # b
    video = jnp.where(flips[:, None, None, None, None], pix.flip_left_right(video), video)
    labels = jnp.where(flips, mirrored, labels)
  if any((config.randaugment, config.color_jitter, config.grayscale, config.blur, config.erase)):
    change = partial(_augment_pixels, config=config, normalization=normalization)
    with jax.default_matmul_precision('float32'):  # the default of TPUs rounds pixels and factors to 8 bits
      video = jax.lax.map(lambda clip_and_key: change(*clip_and_key), (video, clip_keys))
  return video, labels


def _augment_pixels(clip: jax.Array, key: jax.Array, config: AugmentConfig, normalization: Normalization) -> jax.Array:
  """Augments the pixels of one clip: uint8 `t h w 3` -> float32."""
  # The first n keys do not depend on the count (partitionable threefry), so operations can be added.
  randaugment_key, *keys = jax.random.split(key, 5)
  if config.randaugment:
    levels = config.randaugment_magnitude, config.randaugment_std, config.randaugment_probability
    clip = randaugment(clip, randaugment_key, config.randaugment, *levels)
  jitter = config.brightness, config.contrast, config.saturation, config.hue
  mean, std = normalization
  noise = std if config.erase_fill == 'noise' else (0, 0, 0)
  operations = (
    (config.color_jitter, keys[0], lambda clip, key: jitter_color(clip, key, *jitter)),
    (config.grayscale, keys[1], lambda clip, _: drop_color(clip)),
    (config.blur, keys[2], lambda clip, key: blur(clip, key, config.blur_sigma)),
    (config.erase, keys[3], lambda clip, key: erase(clip, key, config.erase_area, config.erase_aspect, mean, noise)),
  )
  clip = clip.astype(jnp.float32)
  for probability, key, operation in operations:
    if probability:
      apply_key, operation_key = jax.random.split(key)
      applies = jax.random.bernoulli(apply_key, probability)
      clip = jax.lax.cond(applies, operation, lambda clip, _: clip, clip, operation_key)
  return clip


def mirror_labels(class_names: Sequence[str]) -> tuple[int, ...]:
  """Returns the label of each class's mirror image: its own without a direction, -1 if the dataset has no opposite."""
  ids = {name: label for label, name in enumerate(class_names)}
  return tuple(_mirror(name, ids) for name in class_names)


def _mirror(name: str, ids: dict[str, int]) -> int:
  """Returns the label of the mirror image of one class, or -1."""
  words = ' '.join(_WORD.findall(name)).lower()
  if not set(_ADVERB.sub('', words).split()) & set(_MIRRORS[0]):
    return ids[name]
  mirrored = (_WORD.sub(partial(_swap, words), name) for words in _MIRRORS)
  return next((ids[opposite] for opposite in mirrored if opposite in ids), -1)


def _swap(opposites: dict[str, str], match: re.Match) -> str:
  """Replaces a word by its opposite in the same case: left, Left and LEFT become right, Right and RIGHT."""
  word = opposites.get(match[0].lower(), '')
  if not word:
    return match[0]
  return word.upper() if match[0].isupper() else word.capitalize() if match[0][0].isupper() else word
