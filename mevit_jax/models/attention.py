"""Attention within groups of tokens: a group is a frame (space attention) or a block (motion attention)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mevit_jax.config.model import MEViTConfig


class Heads(NamedTuple):
  """Queries, keys and values, each `... h k`, or `... d` with the heads concatenated."""

  query: jax.Array
  key: jax.Array
  value: jax.Array


# Queries `... q h k`, keys and values `... s h k` -> `... q h k`.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def split_heads(projected: Heads, width: int) -> Heads:
  """Splits `... d` into heads of width `k`: `... h k`."""
  query, key, value = (x.reshape(*x.shape[:-1], -1, width) for x in projected)
  return Heads(query, key, value)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Computes softmax attention, eqs. 3 and 4: `... q h k` over `... s h k` -> `... q h k`.

  The softmax is at least float32. The weighted sum is divided by the denominator (`q k` divisions, not `q s`).
  """
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  logits = jnp.einsum('...qhk,...shk->...hqs', query, key, preferred_element_type=dtype)  # ... h q s
  largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))  # cancels in the quotient
  weights = jnp.exp((logits - largest) * query.shape[-1] ** -0.5)
  summed = jnp.einsum('...hqs,...shk->...hqk', weights.astype(value.dtype), value, preferred_element_type=dtype)
  output = summed / weights.sum(axis=-1, keepdims=True)
  return output.astype(value.dtype).swapaxes(-3, -2)  # ... q h k


def attend_by_cudnn(
  query: jax.Array, key: jax.Array, value: jax.Array, implementation: Literal['cudnn', 'xla'] = 'cudnn'
) -> jax.Array:
  """Computes self-attention with cuDNN, in bfloat16 or float16: `... s h k` -> `... s h k`.

  JAX does not support odd `s` in training, so such inputs are padded. Sequence lengths are passed even without padding:
  without them some versions of cuDNN return NaN gradients (Hopper, NVIDIA/cudnn-frontend issues 160 and 1072).
  """
  groups, size = query.shape[:-3], query.shape[-3]
  padding = [(0, 0), (0, size % 2), (0, 0), (0, 0)]
  q, k, v = (jnp.pad(x.reshape(-1, *x.shape[-3:]), padding) for x in (query, key, value))  # b·g s h k
  lengths = jnp.full(math.prod(groups), size, jnp.int32)
  output = jax.nn.dot_product_attention(
    q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation
  )
  return output[:, :size].reshape(query.shape)


def grouped_attention(
  patches: Heads, token: Heads | None = None, attend: Attend = attend
) -> tuple[jax.Array, jax.Array | None]:
  """Computes attention within each group, with the class token as an additional key and query.

  Args:
    patches: `b g s h k`: g groups of s patches.
    token: class token `b h k`, or None.
    attend: attention function.

  Returns:
    Outputs of the patches `b g s h k`, and of the class token in each group `b g h k` (None without one).
  """
  if token is None:
    return attend(*patches), None
  output = attend(*(join(x, y) for x, y in zip(patches, token, strict=True)))  # b g s+1 h k
  return output[:, :, :-1], output[:, :, -1]


def join(patches: jax.Array, token: jax.Array) -> jax.Array:
  """Appends the class token `b h k` to every group of patches `b g s h k`: `b g s+1 h k`."""
  b, groups, _, h, k = patches.shape
  return jnp.concatenate([patches, jnp.broadcast_to(token[:, None, None], (b, groups, 1, h, k))], axis=2)


def space_attention(
  patches: Heads, token: Heads | None, config: MEViTConfig, attend: Attend = attend
) -> tuple[jax.Array, jax.Array | None]:
  """Computes space attention, eq. 6: patches attend to their frame; class token outputs are averaged over frames.

  Args:
    patches: `b t n h k`.
    token: class token `b h k`, or None.
    config: unused; the signature is that of `motion_attention`.
    attend: attention function.

  Returns:
    Outputs of the patches `b t n h k`, and of the class token `b h k` or None.
  """
  del config
  output, token_output = grouped_attention(patches, token, attend)
  return output, None if token_output is None else token_output.mean(axis=1)


def motion_attention(
  patches: Heads, token: Heads | None, config: MEViTConfig, attend: Attend = attend
) -> tuple[jax.Array, jax.Array | None]:
  """Computes motion attention, eq. 8: patches attend to their block in all frames; class token outputs are averaged.

  Arguments and results are those of `space_attention`, with patches in block order: the blocks of a region are a slice
  and one transpose of frames and blocks, which moves contiguous runs of m·h·k numbers.
  """
  outputs: list[jax.Array] = []
  token_outputs: list[jax.Array] = []
  regions = zip(*(motion_groups(x, config) for x in patches), strict=True)
  for (nh, nw, mh, mw), region in zip(config.blocks, regions, strict=True):
    output, token_output = grouped_attention(Heads(*region), token, attend)  # b g t·m h k
    outputs.append(_ungroup_blocks(output, nh * nw, mh * mw))
    if token_output is not None:
      token_outputs.append(token_output)
  output = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)  # b t n h k
  return output, None if token is None else jnp.concatenate(token_outputs, axis=1).mean(axis=1)


def motion_groups(x: jax.Array, config: MEViTConfig) -> list[jax.Array]:
  """Groups patches `b t n h k` in block order by eq. 8: one `b g t·m h k` per region of equal blocks."""
  regions, start = [], 0
  for nh, nw, mh, mw in config.blocks:
    g, m = nh * nw, mh * mw
    regions.append(_group_blocks(x[:, :, start : start + g * m], g, m))
    start += g * m
  return regions


def _group_blocks(x: jax.Array, g: int, m: int) -> jax.Array:
  """Transposes `b t g·m h k` to `b g t·m h k`."""
  b, t, _, h, k = x.shape
  x = x.reshape(b, t, g, m, h, k).swapaxes(1, 2)  # b g t m h k
  return x.reshape(b, g, t * m, h, k)  # b g t·m h k


def _ungroup_blocks(x: jax.Array, g: int, m: int) -> jax.Array:
  """Transposes `b g t·m h k` to `b t g·m h k`."""
  b, _, tm, h, k = x.shape
  x = x.reshape(b, g, tm // m, m, h, k).swapaxes(1, 2)  # b t g m h k
  return x.reshape(b, tm // m, g * m, h, k)  # b t g·m h k
