"""Patch and position embedding; patches are in block order."""

import jax
import jax.numpy as jnp
from flax import nnx

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.order import to_block_order
from mevit_jax.models.platforms import embed_patches


class Embedding(nnx.Module):
  """Patch and position embedding, eq. 1: z(p, t) = E x(p, t) + e_space(p) + e_time(t), in block order.

  With `config.space_encoder`, e_time is added behind the space stage instead, see `MEViT`.
  """

  def __init__(self, config: MEViTConfig, rngs: nnx.Rngs):
    self.config = config
    ph, pw = config.patch_size
    # Patch embeddings of unit-scale pixels have unit scale; smaller positions would have little effect.
    unit = jax.nn.initializers.normal(1.0)
    lecun = jax.nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
    self.kernel = nnx.Param(lecun(rngs.params(), (ph, pw, 3, config.width)))
    self.bias = nnx.Param(jnp.zeros(config.width))
    self.space = nnx.Param(unit(rngs.params(), (*config.grid, config.width)))
    if not config.space_encoder:
      self.time = nnx.Param(unit(rngs.params(), (config.frames, config.width)))

  def __call__(self, video: jax.Array) -> jax.Array:
    """Embeds a video `b t h w 3` as tokens `b t n d`."""
    dtype = jnp.dtype(self.config.dtype)
    tokens = embed_patches(video.astype(dtype), self.kernel[...].astype(dtype), self.config)  # b t n d
    space = to_block_order(self.space[...], self.config)  # n d
    positions = self.bias[...] + space  # n d
    if not self.config.space_encoder:
      positions = positions + self.time[...][:, None]  # t n d
    return tokens + positions.astype(dtype)
