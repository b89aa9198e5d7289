"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of neighbouring clips, with their labels."""

from functools import partial

import jax
import jax.numpy as jnp

from mevit_jax.augment.pixels import in_box


def mix(
  video: jax.Array,
  targets: jax.Array,
  keys: jax.Array,
  mixup: float,
  cutmix: float,
  probability: float,
  cutmix_share: float,
) -> tuple[jax.Array, jax.Array]:
  """Mixes each clip with its neighbour: rows 0 and 1, 2 and 3, and so on.

  The two of a pair are mixed with one share, each being the larger part of one of the two results. Neighbours, because
  they are on one device and in one part of an accumulated batch, however many there are of those.

  Args:
    video: `b t h w 3`.
    targets: `b c`, distributions.
    keys: `b`, a key a row; a pair's draw is keyed by its first row.
    mixup: the share of the clip is drawn from Beta(mixup, mixup); 0: all are cut.
    cutmix: the share of the frame that the neighbour's box covers is drawn from Beta(cutmix, cutmix); 0: none is cut.
    probability: that a pair is mixed at all.
    cutmix_share: the share of mixed pairs that are cut, where both are asked for.

  Returns:
    The clips, float32, and their targets, mixed by the share of the pixels: what a box loses at the edge is counted.
  """
  h, w = video.shape[2:4]
  cut = cutmix_share if mixup and cutmix else float(cutmix > 0)
  draw = partial(_draw_own, h=h, w=w, mixup=mixup, cutmix=cutmix, probability=probability, cut=cut)
  own, share = jax.vmap(draw)(keys[::2])  # b/2 h w, b/2
  mixed = _with_neighbour(video.astype(jnp.float32), own[:, None, None, :, :, None])
  return mixed, _with_neighbour(targets, share[:, None, None])


def _with_neighbour(rows: jax.Array, own: jax.Array) -> jax.Array:
  """Rows `b ...`, of which `own` (of `b/2 1 ...`) stays and the rest is the neighbour's."""
  pairs = rows.reshape(-1, 2, *rows.shape[1:])  # b/2 2 ...
  return (own * pairs + (1 - own) * pairs[:, ::-1]).reshape(rows.shape)  # b ...


def _draw_own(
  key: jax.Array, h: int, w: int, mixup: float, cutmix: float, probability: float, cut: float
) -> tuple[jax.Array, jax.Array]:
  """What share of each pixel `h w` is the clip's own, and of all of them."""
  use_key, cut_key, share_key, y_key, x_key = jax.random.split(key, 5)
  is_used = jax.random.bernoulli(use_key, probability)
  is_cut = jax.random.bernoulli(cut_key, cut)
  alpha = jnp.where(is_cut, cutmix, mixup)
  share = jnp.where(is_used, jax.random.beta(share_key, alpha, alpha), 1)
  side = jnp.sqrt(1 - share)
  height, width = (h * side).astype(jnp.int32), (w * side).astype(jnp.int32)
  y, x = jax.random.randint(y_key, (), 0, h), jax.random.randint(x_key, (), 0, w)  # the box's centre
  box = in_box(h, w, y - height // 2, y + height // 2, x - width // 2, x + width // 2)
  return jnp.where(is_cut, 1.0 - box, share), jnp.where(is_cut, 1 - box.mean(), share)
