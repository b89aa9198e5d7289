"""Fused grouped attention: `attention.py` as one kernel, without logits or transposed copies in memory."""

import functools

import jax
import jax.numpy as jnp

from mevit_jax.models.kernels import tpu
from mevit_jax.models.kernels.cost import ROWS, VMEM, Cost, cost, vmem_bytes
from mevit_jax.models.kernels.windows import Blocks, Plan, plan_motion, plan_space

# Query, key and value of the class token, each `b d`.
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
  """Computes attention within groups of patches, with the class token as an additional key and query (eqs. 6, 8).

  Args:
    query: `b t n d`, n in block order, d = h·k with heads outermost.
    key: `b t n d`.
    value: `b t n d`.
    token: query, key and value of the class token, `b d` each, or None.
    heads: number of heads, `h`.
    blocks: blocks of a frame by region, `MEViTConfig.blocks`: a group is a block in all frames. None: a frame.
    interpret: run the kernel in Pallas' interpreter, on any device, for tests.

  Returns:
    Outputs of the patches `b t n d`, and of the class token, averaged over groups, `b d` or None.
  """
  stacked = None if token is None else jnp.stack(token, axis=1)  # b 3 d
  output, token_output = _attention(query, key, value, stacked, heads, blocks, interpret)
  return output, None if token_output is None else token_output.astype(query.dtype)


def supported(
  shape: tuple[int, int, int, int], *, heads: int, blocks: Blocks | None, token: bool, dtype: jnp.dtype
) -> bool:
  """Returns whether `fused_attention` supports `b t n d`: a dtype of at most four bytes, windows that fit in VMEM."""
  itemsize = jnp.dtype(dtype).itemsize
  if itemsize > 4:
    return False
  plan = _plan(shape, blocks, token)
  return plan.rows <= ROWS and vmem_bytes(shape, heads, plan, itemsize) <= VMEM


def fused_cost(
  shape: tuple[int, int, int, int], *, heads: int, blocks: Blocks | None, token: bool, dtype: jnp.dtype
) -> tuple[Cost, Cost]:
  """Estimates the forward and backward cost of `fused_attention` for `b t n d`."""
  plan, itemsize = _plan(shape, blocks, token), jnp.dtype(dtype).itemsize
  return cost(shape, heads, plan, token, False, itemsize), cost(shape, heads, plan, token, True, itemsize)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  token: jax.Array | None,
  heads: int,
  blocks: Blocks | None,
  interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
  return _attention_forward(query, key, value, token, heads, blocks, interpret)[0]


def _attention_forward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  token: jax.Array | None,
  heads: int,
  blocks: Blocks | None,
  interpret: bool,
) -> tuple[tuple[jax.Array, jax.Array | None], tuple[jax.Array | None, ...]]:
  plan = _plan(query.shape, blocks, token is not None)
  output, *sums = tpu.forward((query, key, value, token), plan, heads, interpret)
  token_output = sums[0][:, 0] / sum(plan.groups) if sums else None
  return (output, token_output), (query, key, value, token)


def _attention_backward(
  heads: int, blocks: Blocks | None, interpret: bool, residuals: tuple, gradients: tuple
) -> tuple[jax.Array | None, ...]:
  query, key, value, token = residuals
  gradient, token_gradient = gradients
  plan = _plan(query.shape, blocks, token is not None)
  if token is not None:
    token_gradient = token_gradient.astype(query.dtype)[:, None]  # b 1 d
  outputs = tpu.backward((query, key, value, token), (gradient, token_gradient), plan, heads, interpret)
  return *outputs[:3], None if token is None else outputs[3].astype(token.dtype)


_attention.defvjp(_attention_forward, _attention_backward)


def _plan(shape: tuple[int, ...], blocks: Blocks | None, token: bool) -> Plan:
  _, frames, patches, _ = shape
  return plan_space(frames, patches, token) if blocks is None else plan_motion(frames, blocks, token)
