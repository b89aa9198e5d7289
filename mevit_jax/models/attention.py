"""Attention within groups of tokens: one operation, which serves frames (space) and blocks (motion)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mevit_jax.config.model import MEViTConfig


class Heads(NamedTuple):
  """Queries, keys and values of some tokens, each `... h k`, or `... d` with the heads side by side."""

  query: jax.Array
  key: jax.Array
  value: jax.Array


# Queries `... q h k`, keys and values `... s h k` -> `... q h k`.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def by_heads(projected: Heads, width: int) -> Heads:
  """`... d` -> `... h k`, of heads of this width `k`."""
  query, key, value = (x.reshape(*x.shape[:-1], -1, width) for x in projected)
  return Heads(query, key, value)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Softmax attention, eqs. 3 and 4: `... q h k` over `... s h k` -> `... q h k`; the softmax is float32 at least.

  The sum is divided, `q k` numbers, and not each of the `q s` weights.
  """
  precise = _precise(query.dtype)
  logits = jnp.einsum('...qhk,...shk->...hqs', query, key, preferred_element_type=precise)  # ... h q s
  largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))  # it cancels
  weights = jnp.exp((logits - largest) * query.shape[-1] ** -0.5)
  summed = jnp.einsum('...hqs,...shk->...hqk', weights.astype(value.dtype), value, preferred_element_type=precise)
  output = summed / weights.sum(axis=-1, keepdims=True)
  return output.astype(value.dtype).swapaxes(-3, -2)  # ... q h k


def attend_by_cudnn(
  query: jax.Array, key: jax.Array, value: jax.Array, implementation: Literal['cudnn', 'xla'] = 'cudnn'
) -> jax.Array:
  """`attend` by JAX's call of cuDNN, in bfloat16 or float16, as many queries as keys: `... s h k` -> `... s h k`.

  JAX takes no odd `s` in training. Lengths are told even where nothing is padded: without them some versions of cuDNN
  give gradients that are NaN (github.com/NVIDIA/cudnn-frontend/issues/160 and 1072, Hopper).
  """
  groups, size = query.shape[:-3], query.shape[-3]
  even = [(0, 0), (0, size % 2), (0, 0), (0, 0)]
  q, k, v = (jnp.pad(x.reshape(-1, *x.shape[-3:]), even) for x in (query, key, value))  # b·g s h k
  lengths = jnp.full(math.prod(groups), size, jnp.int32)
  output = jax.nn.dot_product_attention(
    q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation
  )
  return output[:, :size].reshape(query.shape)


def _precise(dtype: jnp.dtype) -> jnp.dtype:
  """float32, or float64 for it."""
  return jnp.promote_types(dtype, jnp.float32)


def grouped_attention(
  patches: Heads, token: Heads | None = None, attend: Attend = attend
) -> tuple[jax.Array, jax.Array | None]:
  """Attention within each group, which the class token may join as a key and as a query.

  Args:
    patches: `b g s h k`: g groups of s patches.
    token: `b h k`: the class token, or None.
    attend: what computes it.

  Returns:
    The patches' outputs `b g s h k` and the class token's in every group `b g h k` (None without one).
  """
  if token is None:
    return attend(*patches), None
  output = attend(*(join(group, one) for group, one in zip(patches, token, strict=True)))  # b g s+1 h k
  return output[:, :, :-1], output[:, :, -1]


def join(patches: jax.Array, token: jax.Array) -> jax.Array:
  """The class token `b h k` as the last of every group of patches `b g s h k` -> `b g s+1 h k`."""
  b, groups, _, h, k = patches.shape
  return jnp.concatenate([patches, jnp.broadcast_to(token[:, None, None], (b, groups, 1, h, k))], axis=2)


def space_attention(patches: Heads, token: Heads | None, config: MEViTConfig, attend: Attend = attend):
  """Eq. 6: every patch reads its own frame; the class token's outputs are averaged over the frames.

  Args:
    patches: `b t n h k`.
    token: `b h k`, or None.
    config: not needed here; the same arguments as `motion_attention`.
    attend: what computes it.

  Returns:
    `b t n h k`, and `b h k` or None.
  """
  del config
  output, token_output = grouped_attention(patches, token, attend)
  return output, None if token_output is None else token_output.mean(axis=1)


def motion_attention(patches: Heads, token: Heads | None, config: MEViTConfig, attend: Attend = attend):
  """Eq. 8: every patch reads its block in all frames; the class token's outputs are averaged over the blocks.

  Args and returns as `space_attention`; the patches are in block order, so that the blocks of a region are a slice and
  one swap of frames and blocks, with whole runs of m·h·k numbers moved.
  """
  outputs: list[jax.Array] = []
  token_outputs: list[jax.Array] = []
  regions = zip(*(motion_groups(x, config) for x in patches), strict=True)
  for (nh, nw, mh, mw), region in zip(config.blocks, regions, strict=True):
    output, token_output = grouped_attention(Heads(*region), token, attend)  # b g t·m h k
    outputs.append(_by_frame(output, nh * nw, mh * mw))
    if token_output is not None:
      token_outputs.append(token_output)
  output = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)  # b t n h k
  return output, None if token is None else jnp.concatenate(token_outputs, axis=1).mean(axis=1)


def motion_groups(x: jax.Array, config: MEViTConfig) -> list[jax.Array]:
  """Patches `b t n h k` in block order by the groups of eq. 8: a `b g t·m h k` for each region of equal blocks."""
  found, start = [], 0
  for nh, nw, mh, mw in config.blocks:
    g, m = nh * nw, mh * mw
    found.append(_by_block(x[:, :, start : start + g * m], g, m))
    start += g * m
  return found


def _by_block(x: jax.Array, g: int, m: int) -> jax.Array:
  b, t, _, h, k = x.shape
  x = x.reshape(b, t, g, m, h, k).swapaxes(1, 2)  # b g t m h k
  return x.reshape(b, g, t * m, h, k)


def _by_frame(x: jax.Array, g: int, m: int) -> jax.Array:
  b, _, tm, h, k = x.shape
  x = x.reshape(b, g, tm // m, m, h, k).swapaxes(1, 2)  # b t g m h k
  return x.reshape(b, tm // m, g * m, h, k)
