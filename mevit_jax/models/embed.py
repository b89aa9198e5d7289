"""A clip becomes tokens: patches in block order, and their positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.order import to_block_order
from mevit_jax.models.platforms import embedded


class Embedding(nnx.Module):
  """Patch embedding and positions, eq. 1: z(p, t) = E x(p, t) + e_space(p) + e_time(t), patches in block order."""

  def __init__(self, config: MEViTConfig, rngs: nnx.Rngs):
    self.config = config
    ph, pw = config.patch_size
    # A patch's embedding has unit scale for pixels of unit scale, and so have positions: smaller ones are not noticed.
    unit = jax.nn.initializers.normal(1.0)
    lecun = jax.nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
    self.kernel = nnx.Param(lecun(rngs.params(), (ph, pw, 3, config.width)))
    self.bias = nnx.Param(jnp.zeros(config.width))
    self.space = nnx.Param(unit(rngs.params(), (*config.grid, config.width)))
    self.time = nnx.Param(unit(rngs.params(), (config.frames, config.width)))

  def __call__(self, video: jax.Array) -> jax.Array:
    """Embeds `b t h w 3` as tokens `b t n d`."""
    dtype = jnp.dtype(self.config.dtype)
    tokens = embedded(video.astype(dtype), self.kernel[...].astype(dtype), self.config)  # b t n d
    space = to_block_order(self.space[...], self.config)  # n d
    positions = self.bias[...] + space + self.time[...][:, None]  # t n d
    return tokens + positions.astype(dtype)
