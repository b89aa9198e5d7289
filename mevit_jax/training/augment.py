"""What happens to clips on the device: uint8 pixels become normalised floats, augmented alike in all frames."""

import dataclasses
import re
from collections.abc import Sequence
from functools import partial

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np

# What a horizontal flip turns into each other, in class names; datasets spell the other way round in two ways.
_SIDES = {a + end: b + end for a, b in (('left', 'right'), ('right', 'left')) for end in ('', 'ward', 'wards')}
_BACK = {'anticlockwise': 'clockwise', 'counterclockwise': 'clockwise'}
_MIRRORS = tuple({**_SIDES, **_BACK, 'clockwise': other} for other in _BACK)
_WORD = re.compile(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+')  # of 'turns_left', 'Turn Left', 'turnLeft', 'TURN LEFT'


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
  """Augmentation of training clips.

  Attributes:
    flip: flip half of the clips horizontally. A class whose name has a direction ('moves_left') takes the label of its
      mirror image ('moves_right'); where there is no such class its clips are not flipped.
  """

  flip: bool = False


def normalise(video: jax.Array, mean: Sequence[float], std: Sequence[float], dtype) -> jax.Array:
  """uint8 `... 3` in [0, 255] -> `... 3` of `dtype`: (video / 255 - mean) / std, computed in float32."""
  scale = 1 / (255 * np.asarray(std, np.float32))
  shift = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
  return (video.astype(jnp.float32) * scale - shift).astype(dtype)


def augment(
  video: jax.Array, labels: jax.Array, keys: jax.Array, config: AugmentConfig, mirrors: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
  """Augments clips, each with its own key.

  Args:
    video: `b t h w 3`.
    labels: `b`.
    keys: `b`: one a row, so that a row does not depend on how the batch is spread over devices.
    config: what to do.
    mirrors: the label of each class's mirror image, -1 where there is none; see `mirror_labels`.

  Returns:
    The clips, and their labels.
  """
  if not config.flip:
    return video, labels
  mirrored = jnp.asarray(mirrors)[labels]
  flips = jax.vmap(jax.random.bernoulli)(keys) & (mirrored >= 0)  # b
  flipped = jnp.where(flips[:, None, None, None, None], pix.flip_left_right(video), video)
  return flipped, jnp.where(flips, mirrored, labels)


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
