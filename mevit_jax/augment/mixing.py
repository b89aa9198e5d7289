"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of adjacent clips and their labels."""

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
  """Mixes pairs of adjacent clips: 0 and 1, 2 and 3, and so on.

  Both clips of a pair use the same mixing weight. Adjacent clips are on the same device and in the same microbatch, for
  any number of devices and microbatches.

  Args:
    video: `b t h w 3`.
    targets: class distributions `b c`.
    keys: PRNG keys `b`; a pair uses that of its first clip.
    mixup: alpha of mixup, with weights from Beta(alpha, alpha); 0 disables it.
    cutmix: alpha of CutMix, with box areas from Beta(alpha, alpha); 0 disables it.
    probability: probability that a pair is mixed.
    cutmix_share: fraction of mixed pairs that use CutMix if both are enabled.

  Returns:
    Clips, float32, and targets, mixed by the fraction of pixels that the (clipped) box actually covers.
  """
  h, w = video.shape[2:4]
  cut_probability = cutmix_share if mixup and cutmix else float(cutmix > 0)
  draw = partial(
    _draw_weights, h=h, w=w, mixup=mixup, cutmix=cutmix, probability=probability, cut_probability=cut_probability
  )
  own, share = jax.vmap(draw)(keys[::2])  # b/2 h w, b/2
  mixed = _mix_pairs(video.astype(jnp.float32), own[:, None, None, :, :, None])
  return mixed, _mix_pairs(targets, share[:, None, None])


def _mix_pairs(x: jax.Array, own: jax.Array) -> jax.Array:
  """Mixes `b ...` in pairs, with weight `own` (`b/2 1 ...`) of the clip itself."""
  pairs = x.reshape(-1, 2, *x.shape[1:])  # b/2 2 ...
  return (own * pairs + (1 - own) * pairs[:, ::-1]).reshape(x.shape)  # b ...


def _draw_weights(
  key: jax.Array, h: int, w: int, mixup: float, cutmix: float, probability: float, cut_probability: float
) -> tuple[jax.Array, jax.Array]:
  """Draws the weight of the clip itself in each pixel `h w`, and its mean over pixels."""
  use_key, cut_key, share_key, y_key, x_key = jax.random.split(key, 5)
  is_used = jax.random.bernoulli(use_key, probability)
  is_cut = jax.random.bernoulli(cut_key, cut_probability)
  alpha = jnp.where(is_cut, cutmix, mixup)
  share = jnp.where(is_used, jax.random.beta(share_key, alpha, alpha), 1)
  side = jnp.sqrt(1 - share)
  height, width = (h * side).astype(jnp.int32), (w * side).astype(jnp.int32)
  y, x = jax.random.randint(y_key, (), 0, h), jax.random.randint(x_key, (), 0, w)  # center of the box
  box = in_box(h, w, y - height // 2, y + height // 2, x - width // 2, x + width // 2)
  return jnp.where(is_cut, 1.0 - box, share), jnp.where(is_cut, 1 - box.mean(), share)
