"""What runs on which platform: one small table, and plain XLA everywhere else.

Choices are made when a program is lowered: one that is compiled here for other devices has theirs.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Literal

import jax
import jax.numpy as jnp

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.attention import (
  Attend,
  Heads,
  attend,
  attend_by_cudnn,
  by_heads,
  motion_attention,
  space_attention,
)
from mevit_jax.models.order import to_block_order

# What makes of an attention one that runs on each device's own rows and heads, where there are many.
Each = Callable[[Callable], Callable]


def grouped(
  name: str, patches: Heads, token: Heads | None, config: MEViTConfig, each: Each
) -> tuple[jax.Array, jax.Array | None]:
  """Space or motion attention (eqs. 6 and 8).

  Args:
    name: 'space' or 'motion'.
    patches: `b t n d` in block order, heads side by side.
    token: `b d`, or None.
    config: of the model, whose `attention` says what there is to choose from.
    each: see `Each`.

  Returns:
    The patches' outputs `b t n d`, and the class token's mean over the groups `b d`, or None.
  """
  plain = partial(_plain, name, config)
  if config.attention == 'plain':
    return plain(patches, token)
  table = DEFAULT_KERNELS['attention'] | OPTIONAL_KERNELS.get(config.attention, {})
  fast = {platform: each(partial(attention, name, config)) for platform, attention in table.items()}
  return jax.lax.platform_dependent(patches, token, default=plain, **fast)


def embedded(video: jax.Array, kernel: jax.Array, config: MEViTConfig) -> jax.Array:
  """Patches in block order times a kernel: `b t h w 3` and `ph pw 3 d` -> `b t n d`."""
  fast = {platform: partial(embed, config) for platform, embed in DEFAULT_KERNELS['embedding'].items()}
  return jax.lax.platform_dependent(video, kernel, default=partial(_by_product, config), **fast)


def sum_over_tokens(x: jax.Array) -> jax.Array:
  """`... d` -> `d`, summed in float32 at least."""
  return jax.lax.platform_dependent(x, default=_by_sum, **DEFAULT_KERNELS['sum'])


def _plain(name: str, config: MEViTConfig, patches: Heads, token: Heads | None, attend: Attend = attend):
  attention = space_attention if name == 'space' else motion_attention
  width = config.width // config.heads
  heads = by_heads(patches, width), token and by_heads(token, width)
  output, token_output = attention(*heads, config, attend)
  return output.reshape(patches.query.shape), token and token_output.reshape(token.query.shape)


def _by_kernel(name: str, config: MEViTConfig, patches: Heads, token: Heads | None, *, interpret: bool = False):
  from mevit_jax.models import kernels  # here: Pallas takes its time to be imported

  b, t, n, d = patches.query.shape
  heads = d * config.heads // config.width  # a device's own
  blocks, dtype = None if name == 'space' else config.blocks, patches.query.dtype
  if not kernels.supported((b, t, n, d), heads=heads, blocks=blocks, token=token is not None, dtype=dtype):
    return _plain(name, config, patches, token)
  return kernels.fused_attention(*patches, token, heads=heads, blocks=blocks, interpret=interpret)


def _by_cudnn(
  name: str, config: MEViTConfig, patches: Heads, token: Heads | None, *,
  implementation: Literal['cudnn', 'xla'] = 'cudnn',
):  # fmt: skip
  width, dtype = config.width // config.heads, patches.query.dtype
  takes = dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
  # Without its CUDA plug-in JAX cannot even trace this, which it does for CPUs too before it leaves it out.
  here = any(find_spec(f'jax_cuda{version}_plugin') for version in (12, 13))
  if implementation == 'cudnn' and not (takes and here):
    return _plain(name, config, patches, token)
  return _plain(name, config, patches, token, partial(attend_by_cudnn, implementation=implementation))


def _by_product(config: MEViTConfig, video: jax.Array, kernel: jax.Array) -> jax.Array:
  (rows, columns), (ph, pw) = config.grid, config.patch_size
  b, t = video.shape[:2]
  pixels = video.reshape(b, t, rows, ph, columns, pw, 3)  # b t rows ph columns pw 3
  pixels = pixels.transpose(0, 1, 2, 4, 3, 5, 6)  # b t rows columns ph pw 3
  pixels = pixels.reshape(b, t, rows, columns, ph * pw * 3)  # b t rows columns ph·pw·3
  return to_block_order(pixels, config) @ kernel.reshape(ph * pw * 3, -1)  # b t n d


def _by_convolution(config: MEViTConfig, video: jax.Array, kernel: jax.Array) -> jax.Array:
  frames = video.reshape(-1, *video.shape[2:])  # b·t h w 3
  layouts = ('NHWC', 'HWIO', 'NHWC')
  grid = jax.lax.conv_general_dilated(frames, kernel, config.patch_size, 'VALID', dimension_numbers=layouts)
  return to_block_order(grid.reshape(*video.shape[:2], *grid.shape[1:]), config)  # b t n d


def _by_sum(x: jax.Array) -> jax.Array:
  return x.sum(axis=range(x.ndim - 1), dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)


def _by_ones(x: jax.Array) -> jax.Array:
  """Eight equal rows of a matrix product, as a register has; of one row XLA would make a sum again."""
  ones, axes = jnp.ones((8, *x.shape[:-1]), x.dtype), range(x.ndim - 1)
  contracted = tuple(axis + 1 for axis in axes), tuple(axes)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  summed = jax.lax.dot_general(ones, x, (contracted, ((), ())), precision='highest', preferred_element_type=wide)  # 8 d
  return summed[0].astype(x.dtype)


# What is faster than plain XLA, by platforms as JAX names them; each is tested against what it stands for.
DEFAULT_KERNELS: dict[str, dict[str, Callable]] = {
  'attention': {'tpu': _by_kernel},  # logits stay on the chip, and no layout is moved
  'embedding': {'tpu': _by_convolution},  # patches as rows are two copies that cost as much as half a block
  'sum': {'tpu': _by_ones},  # the vector unit takes ten times as long
}

# What `config.attention` adds by name to the attentions above. Once it is timed and wins, it belongs there.
OPTIONAL_KERNELS: dict[str, dict[str, Callable]] = {
  'cudnn': {'cuda': _by_cudnn},  # logits stay on the chip
}
