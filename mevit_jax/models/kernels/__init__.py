"""Attention as one kernel: what the plain path of `attention.py` does, without its logits and layouts in memory."""

import functools

import jax
import jax.numpy as jnp

from mevit_jax.models.kernels import tpu
from mevit_jax.models.kernels.cost import ROWS, VMEM, Cost, cost, vmem_bytes
from mevit_jax.models.kernels.windows import Blocks, Plan, plan_motion, plan_space

# The class token's query, key and value, each `b d`.
Token = tuple[jax.Array, jax.Array, jax.Array]


def fused_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  token: Token | None,
  *,
  heads: int,
  blocks: Blocks | None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """Attention within groups of patches, which the class token may join as a key and as a query (eqs. 6 and 8).

  Args:
    query: `b t n d`, n in block order, d = h·k with heads outermost.
    key: likewise.
    value: likewise.
    token: the class token's query, key and value `b d`, or None.
    heads: `h`.
    blocks: the blocks of a frame by region, `MEViTConfig.blocks`: a group is a block in all frames. None: a frame.
    interpret: whether to run it step by step on any device, for tests.

  Returns:
    `b t n d`, and the mean over groups of the class token's outputs `b d`, or None.
  """
  one = None if token is None else jnp.stack(token, axis=1)  # b 3 d
  output, token_output = _attention(query, key, value, one, heads, blocks, interpret)
  return output, None if token_output is None else token_output.astype(query.dtype)


def supported(
  shape: tuple[int, int, int, int], *, heads: int, blocks: Blocks | None, token: bool, dtype: jnp.dtype
) -> bool:
  """Whether `fused_attention` takes `b t n d` of this dtype: at most four bytes a number, windows that fit in VMEM."""
  itemsize = jnp.dtype(dtype).itemsize
  if itemsize > 4:
    return False
  plan = _plan(shape, blocks, token)
  return plan.rows <= ROWS and vmem_bytes(shape, heads, plan, itemsize) <= VMEM


def fused_cost(
  shape: tuple[int, int, int, int], *, heads: int, blocks: Blocks | None, token: bool, dtype: jnp.dtype
) -> tuple[Cost, Cost]:
  """What `fused_attention` of `b t n d` costs, forward and backward."""
  plan, itemsize = _plan(shape, blocks, token), jnp.dtype(dtype).itemsize
  return cost(shape, heads, plan, token, False, itemsize), cost(shape, heads, plan, token, True, itemsize)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(query, key, value, token, heads, blocks, interpret):
  return _attention_forward(query, key, value, token, heads, blocks, interpret)[0]


def _attention_forward(query, key, value, token, heads, blocks, interpret):
  plan = _plan(query.shape, blocks, token is not None)
  output, *sums = tpu.forward(query, key, value, token, plan, heads, interpret)
  token_output = sums[0][:, 0] / sum(plan.groups) if sums else None
  return (output, token_output), (query, key, value, token)


def _attention_backward(heads, blocks, interpret, kept, gradients):
  query, key, value, token = kept
  gradient, token_gradient = gradients
  plan = _plan(query.shape, blocks, token is not None)
  if token is not None:
    token_gradient = token_gradient.astype(query.dtype)[:, None]  # b 1 d
  found = tpu.backward(query, key, value, token, gradient, token_gradient, plan, heads, interpret)
  return *found[:3], None if token is None else found[3].astype(token.dtype)


_attention.defvjp(_attention_forward, _attention_backward)


def _plan(shape: tuple[int, ...], blocks: Blocks | None, token: bool) -> Plan:
  _, frames, patches, _ = shape
  return plan_space(frames, patches, token) if blocks is None else plan_motion(frames, blocks, token)
