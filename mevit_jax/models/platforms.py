"""Platform-specific implementations in one table; all other platforms use plain XLA.

The choice is made at lowering, so that a program compiled ahead of time for another platform gets that platform's.
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
  motion_attention,
  space_attention,
  split_heads,
)
from mevit_jax.models.order import to_block_order

# Wraps an attention function so that each device computes its shard of the batch and heads.
ShardMapWrapper = Callable[[Callable], Callable]


def dispatch_attention(
  name: str, patches: Heads, token: Heads | None, config: MEViTConfig, wrap: ShardMapWrapper
) -> tuple[jax.Array, jax.Array | None]:
  """Computes space or motion attention (eqs. 6 and 8) with the implementation of the platform.

  Args:
    name: 'space' or 'motion'.
    patches: `b t n d` in block order, heads concatenated.
    token: class token `b d`, or None.
    config: model config; `config.attention` selects the implementations.
    wrap: wrapper of custom kernels, see `ShardMapWrapper`.

  Returns:
    Outputs of the patches `b t n d`, and of the class token, averaged over groups, `b d` or None.
  """
  plain = partial(_xla_attention, name, config)
  if config.attention == 'plain':
    return plain(patches, token)
  table = DEFAULT_KERNELS['attention'] | OPTIONAL_KERNELS.get(config.attention, {})
  fast = {platform: wrap(partial(attention, name, config)) for platform, attention in table.items()}
  return jax.lax.platform_dependent(patches, token, default=plain, **fast)


def embed_patches(video: jax.Array, kernel: jax.Array, config: MEViTConfig) -> jax.Array:
  """Embeds patches, in block order: video `b t h w 3`, kernel `ph pw 3 d` -> `b t n d`."""
  fast = {platform: partial(embed, config) for platform, embed in DEFAULT_KERNELS['embedding'].items()}
  return jax.lax.platform_dependent(video, kernel, default=partial(_matmul_embedding, config), **fast)


def sum_over_tokens(x: jax.Array) -> jax.Array:
  """Sums `... d` over all tokens to `d`, in at least float32."""
  return jax.lax.platform_dependent(x, default=_reduce_sum, **DEFAULT_KERNELS['sum'])


def _xla_attention(
  name: str, config: MEViTConfig, patches: Heads, token: Heads | None, attend: Attend = attend
) -> tuple[jax.Array, jax.Array | None]:
  attention = space_attention if name == 'space' else motion_attention
  width = config.width // config.heads
  heads = split_heads(patches, width), token and split_heads(token, width)
  output, token_output = attention(*heads, config, attend)
  output = output.reshape(patches.query.shape)
  return output, None if token is None or token_output is None else token_output.reshape(token.query.shape)


def _pallas_attention(
  name: str, config: MEViTConfig, patches: Heads, token: Heads | None, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array | None]:
  from mevit_jax.models import kernels  # deferred: importing Pallas is slow

  b, t, n, d = patches.query.shape
  heads = d * config.heads // config.width  # heads of this device
  blocks, dtype = None if name == 'space' else config.blocks, patches.query.dtype
  if not kernels.supported((b, t, n, d), heads=heads, blocks=blocks, token=token is not None, dtype=dtype):
    return _xla_attention(name, config, patches, token)
  return kernels.fused_attention(*patches, token, heads=heads, blocks=blocks, interpret=interpret)


def _cudnn_attention(
  name: str, config: MEViTConfig, patches: Heads, token: Heads | None, *,
  implementation: Literal['cudnn', 'xla'] = 'cudnn',
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
  width, dtype = config.width // config.heads, patches.query.dtype
  supported = dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
  # All branches are traced on every platform, and JAX cannot trace this one without its CUDA plug-in.
  has_plugin = any(find_spec(f'jax_cuda{version}_plugin') for version in (12, 13))
  if implementation == 'cudnn' and not (supported and has_plugin):
    return _xla_attention(name, config, patches, token)
  return _xla_attention(name, config, patches, token, partial(attend_by_cudnn, implementation=implementation))


def _matmul_embedding(config: MEViTConfig, video: jax.Array, kernel: jax.Array) -> jax.Array:
  (rows, columns), (ph, pw) = config.grid, config.patch_size
  b, t = video.shape[:2]
  pixels = video.reshape(b, t, rows, ph, columns, pw, 3)  # b t rows ph columns pw 3
  pixels = pixels.transpose(0, 1, 2, 4, 3, 5, 6)  # b t rows columns ph pw 3
  pixels = pixels.reshape(b, t, rows, columns, ph * pw * 3)  # b t rows columns ph·pw·3
  return to_block_order(pixels, config) @ kernel.reshape(ph * pw * 3, -1)  # b t n d


def _conv_embedding(config: MEViTConfig, video: jax.Array, kernel: jax.Array) -> jax.Array:
  frames = video.reshape(-1, *video.shape[2:])  # b·t h w 3
  layouts = ('NHWC', 'HWIO', 'NHWC')
  grid = jax.lax.conv_general_dilated(frames, kernel, config.patch_size, 'VALID', dimension_numbers=layouts)
  return to_block_order(grid.reshape(*video.shape[:2], *grid.shape[1:]), config)  # b t n d


def _reduce_sum(x: jax.Array) -> jax.Array:
  return x.sum(axis=range(x.ndim - 1), dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)


def _matmul_sum(x: jax.Array) -> jax.Array:
  """Sums by a matrix product with 8 rows of ones (a register's sublanes); XLA would turn a single row into a sum."""
  ones, axes = jnp.ones((8, *x.shape[:-1]), x.dtype), range(x.ndim - 1)
  contracted = tuple(axis + 1 for axis in axes), tuple(axes)
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  summed = jax.lax.dot_general(
    ones, x, (contracted, ((), ())), precision='highest', preferred_element_type=dtype
  )  # 8 d
  return summed[0].astype(x.dtype)


# Implementations faster than plain XLA, by JAX platform name; each is tested against plain XLA.
DEFAULT_KERNELS: dict[str, dict[str, Callable]] = {
  'attention': {'tpu': _pallas_attention},  # logits stay in VMEM, and nothing is transposed
  'embedding': {'tpu': _conv_embedding},  # extracting patches takes two copies, as slow as half a block
  'sum': {'tpu': _matmul_sum},  # the vector unit is ten times slower
}

# Additional attention implementations, enabled by `config.attention`; not yet timed, so not enabled by default.
OPTIONAL_KERNELS: dict[str, dict[str, Callable]] = {
  'cudnn': {'cuda': _cudnn_attention},  # logits stay on chip
}
