"""Fused grouped attention for TPU (Pallas, Mosaic): nothing is transposed in HBM, and logits stay in VMEM.

A program reads all frames and patches of one example and some heads (128 lanes, usually two heads) and processes them
window by window (windows.py). Logits are transposed, `keys queries`, so that the softmax reduces along sublanes, which
is cheap. A head is selected by zeroing the lanes of the others, which is free in the matrix unit. The backward pass
saves only the inputs and recomputes the probabilities.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mevit_jax.models.kernels.cost import cost, vmem_bytes
from mevit_jax.models.kernels.windows import PACKED, Plan, lanes_of, registers_of

# Reference to an array in VMEM or SMEM: read and written by indexing. Pallas has no public type for it.
Ref = Any
Index = int | jax.Array

_ROWS_AND_LANES = (((1,), (1,)), ((), ()))  # x @ y.T


@functools.partial(jax.jit, static_argnames=('plan', 'heads', 'interpret'))  # traced once for all blocks of the model
def forward(inputs: tuple, plan: Plan, heads: int, interpret: bool) -> list[jax.Array]:
  """Computes the outputs of the patches `b t n d`, and of the class token, summed over groups, `b 1 d`.

  Args:
    inputs: queries, keys and values `b t n d`, and those of the class token `b 3 d` or None.
    plan: windows.
    heads: number of heads, `h`.
    interpret: run in Pallas' interpreter.
  """
  query, key, value, token = inputs
  b, d = query.shape[0], query.shape[-1]
  outputs = [jax.ShapeDtypeStruct(query.shape, query.dtype)]
  if token is not None:
    outputs.append(jax.ShapeDtypeStruct((b, 1, d), jnp.float32))
  return _call(_forward, [query, key, value], [token], outputs, plan, heads, interpret)


@functools.partial(jax.jit, static_argnames=('plan', 'heads', 'interpret'))
def backward(inputs: tuple, gradients: tuple, plan: Plan, heads: int, interpret: bool) -> list[jax.Array]:
  """Computes the gradients of the inputs of `forward`.

  Args:
    inputs: inputs of `forward`.
    gradients: gradients of the patches' outputs `b t n d` and of the class token's, averaged over groups, `b 1 d`.
    plan: windows.
    heads: number of heads, `h`.
    interpret: run in Pallas' interpreter.
  """
  (query, key, value, token), (gradient, token_gradient) = inputs, gradients
  b, d = query.shape[0], query.shape[-1]
  outputs = [jax.ShapeDtypeStruct(query.shape, query.dtype)] * 3
  if token is not None:
    outputs.append(jax.ShapeDtypeStruct((b, 3, d), jnp.float32))
  return _call(_backward, [query, key, value, gradient], [token, token_gradient], outputs, plan, heads, interpret)


def _call(
  kernel: Callable, patches: list, tokens: list, outputs: list, plan: Plan, heads: int, interpret: bool
) -> list[jax.Array]:
  """Calls a kernel with a grid of (examples, groups of heads)."""
  b, t, _, d = patches[0].shape
  lanes, size = lanes_of(d, heads), patches[0].dtype.itemsize
  count = cost(patches[0].shape, heads, plan, tokens[0] is not None, kernel is _backward, size)
  tokens = [x for x in tokens if x is not None]

  def spec(x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    if x.ndim == 3:
      return pl.BlockSpec((1, x.shape[1], lanes), lambda i, j, *_: (i, 0, j))
    return pl.BlockSpec((1, t, plan.padded, lanes), lambda i, j, *_: (i, 0, 0, j))

  table = jnp.array([plan.starts, *zip(*plan.own, strict=True), plan.groups, plan.patterns], jnp.int32)
  bias = pl.BlockSpec(plan.bias.shape, lambda i, j, *_: (0, 0, 0))
  specs = [bias, *map(spec, patches + tokens)], [spec(x) for x in outputs]
  return pl.pallas_call(
    functools.partial(kernel, plan=plan, width=d // heads, token=bool(tokens)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(b, d // lanes), in_specs=specs[0], out_specs=specs[1]
    ),
    out_shape=outputs,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel'),
      vmem_limit_bytes=max(32 * 2**20, round(1.25 * vmem_bytes(patches[0].shape, heads, plan, size))),
    ),
    cost_estimate=pl.CostEstimate(flops=count.flops, bytes_accessed=count.bytes, transcendentals=count.exponentials),
    name=kernel.__name__.strip('_'),
    interpret=interpret,
  )(table, jnp.asarray(plan.bias), *patches, *tokens)


def _forward(table: Ref, bias: Ref, *refs: Ref, plan: Plan, width: int, token: bool) -> None:
  """Kernel of `forward`; `width` is the head width."""
  query, key, value, *others = refs
  token_ref, output, token_output = others if token else (None, *others, None)
  heads = range(query.shape[-1] // width)
  if token:
    token_output[...] = jnp.zeros_like(token_output)

  def windows(ws: Sequence[Index], ragged: bool) -> None:
    batch = [_Window(plan, table, w, ragged) for w in ws]
    inputs = [[window.read(ref, token_ref, i) for i, ref in enumerate((query, key, value))] for window in batch]
    logits = [[_heads_dot(k, q, head, width) for head in heads] for q, k, _ in inputs]
    weights = [[_softmax(x, bias[window.pattern], width) for x in xs] for window, xs in zip(batch, logits, strict=True)]
    values = [v.T for _, _, v in inputs]  # lanes keys
    parts = [
      [_dot(v[head * width : (head + 1) * width], x.astype(v.dtype)) / total for head, (x, total) in enumerate(xs)]
      for v, xs in zip(values, weights, strict=True)
    ]
    for window, xs in zip(batch, parts, strict=True):
      result = jnp.concatenate(xs, axis=0).T  # queries lanes
      window.write(output, result.astype(query.dtype))
      if token:
        token_output[0] += window.token_sum(result, True)

  _for_each_window(plan, windows)


def _backward(table: Ref, bias: Ref, *refs: Ref, plan: Plan, width: int, token: bool) -> None:
  """Kernel of `backward`; `width` is the head width."""
  query, key, value, gradient, *others = refs
  token_ref, token_gradient, *outputs = others if token else (None, None, *others)
  heads = range(query.shape[-1] // width)
  scale = width**-0.5
  if token:
    outputs[3][...] = jnp.zeros_like(outputs[3])

  def windows(ws: Sequence[Index], ragged: bool) -> None:
    batch = [_Window(plan, table, w, ragged) for w in ws]
    inputs = [
      [
        *(window.read(ref, token_ref, i) for i, ref in enumerate((query, key, value))),
        window.read_gradient(gradient, token_gradient),
      ]
      for window in batch
    ]
    logits = [[_heads_dot(k, q, head, width) for head in heads] for q, k, _, _ in inputs]
    dweights = [[_heads_dot(v, do, head, width) for head in heads] for _, _, v, do in inputs]
    both = []  # weights and gradients of logits, by window and head
    for window, xs, ys in zip(batch, logits, dweights, strict=True):
      for x, y in zip(xs, ys, strict=True):
        weights, total = _softmax(x, bias[window.pattern], width)
        factor = window.output_factor(x.shape[1])
        weights = weights * (factor / total)
        dlogits = weights * (y - jnp.sum(weights * y, axis=0, keepdims=True) / factor)
        both.append((weights.astype(query.dtype), dlogits.astype(query.dtype)))
    for i, (window, (q, k, _, do)) in enumerate(zip(batch, inputs, strict=True)):
      transposed = [x.T for x in (k, q, do)]  # lanes rows: a head is a range of rows
      parts: list[list[jax.Array]] = [[], [], []]
      for head, (weights, dlogits) in enumerate(both[i * len(heads) : (i + 1) * len(heads)]):
        keys, queries, gradients = (x[head * width : (head + 1) * width] for x in transposed)
        parts[0].append(_dot(keys, dlogits) * scale)  # k queries
        parts[1].append(_dot(queries, dlogits, _ROWS_AND_LANES) * scale)  # k keys
        parts[2].append(_dot(gradients, weights, _ROWS_AND_LANES))  # k keys
      for j, xs in enumerate(parts):
        x = jnp.concatenate(xs, axis=0).T  # rows lanes
        window.write(outputs[j], x.astype(q.dtype))
        if token:
          outputs[3][0, j : j + 1] += window.token_sum(x, j == 0)

  _for_each_window(plan, windows)


def _softmax(logits: jax.Array, bias: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
  """Returns unnormalized softmax weights `keys queries`, at most 1, and their sums `1 queries`."""
  logits = logits + jnp.concatenate([bias] * math.ceil(logits.shape[1] / bias.shape[1]), axis=1)[:, : logits.shape[1]]
  largest = jnp.max(logits, axis=0, keepdims=True)
  weights = jnp.exp2((logits - largest) * (width**-0.5 * math.log2(math.e)))
  return weights, jnp.sum(weights, axis=0, keepdims=True)


def _heads_dot(x: jax.Array, y: jax.Array, head: int, width: int) -> jax.Array:
  """Multiplies `rows lanes` and `columns lanes` for one head: `rows columns`."""
  first, last = registers_of(head, width, x.shape[1])
  return _dot(x[:, first:last], _select_head(y, head, width), _ROWS_AND_LANES)


def _select_head(x: jax.Array, head: int, width: int) -> jax.Array:
  """Returns the registers of a head, with the lanes of other heads zeroed."""
  first, last = registers_of(head, width, x.shape[1])
  if last - first == width:
    return x[:, first:last]
  lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], last - first), 1) + first
  return jnp.where((lane >= head * width) & (lane < (head + 1) * width), x[:, first:last], 0)


def _dot(x: jax.Array, y: jax.Array, dimensions: tuple = (((1,), (0,)), ((), ()))) -> jax.Array:
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _where(mask: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  """Selects rows like `jnp.where`, in float32: Mosaic has no row masks for packed (16-bit) registers."""
  return jnp.where(mask, x.astype(jnp.float32), y.astype(jnp.float32)).astype(x.dtype)


def _for_each_window(plan: Plan, windows: Callable[[Sequence[Index], bool], None]) -> None:
  """Runs `windows(ws, ragged)` for all windows, several at once to overlap matrix products with softmax."""

  def loop(first: int, last: int, ragged: bool) -> None:
    at_once = min(plan.at_once, last - first)
    times, rest = divmod(last - first, at_once)

    def body(i: jax.Array, _: None) -> None:
      windows([first + i * at_once + j for j in range(at_once)], ragged)

    if times == 1:
      windows(range(first, first + at_once), ragged)
    else:
      jax.lax.fori_loop(0, times, body, None)
    if rest:
      windows(range(last - rest, last), ragged)

  if plan.plain:
    loop(0, plan.plain, False)
  if plan.plain < len(plan.starts):
    loop(plan.plain, len(plan.starts), True)


class _Window:
  """Reads and writes the rows of a window, with the class token's rows inserted."""

  def __init__(self, plan: Plan, table: Ref, w: Index, ragged: bool):
    self.plan, self.w, self.ragged = plan, w, ragged
    start, self.first, self.last, self.groups, self.pattern = (table[i, w] for i in range(5))
    self.start = pl.multiple_of(start, 8)

  def _index(self) -> tuple:
    plan = self.plan
    if plan.space:
      return 0, self.w
    return 0, slice(None), pl.ds(self.start, plan.size)

  def _mask(self, lanes: int, first: Index, last: Index) -> jax.Array:
    """Returns a mask of the rows of patches from `first` to `last`."""
    plan = self.plan
    patch = jax.lax.broadcasted_iota(jnp.int32, (plan.frames, plan.size, lanes), 1)
    patch = patch.reshape(plan.frames * plan.size, lanes)
    return (patch >= first) & (patch < last)

  def _join(self, x: jax.Array, filler: Callable[[int, int], jax.Array]) -> jax.Array:
    """Appends the class token's rows (or zeros) to rows of patches."""
    plan = self.plan
    tail = plan.first_token_row // PACKED * PACKED
    if tail < len(x):
      row = tail + jax.lax.broadcasted_iota(jnp.int32, (len(x) - tail, x.shape[1]), 0)
      last = _where(row < plan.first_token_row, x[tail:], filler(len(x) - tail, tail))
      x = last if tail == 0 else jnp.concatenate([x[:tail], last], axis=0)
    if len(x) < plan.rows:
      x = jnp.concatenate([x, filler(plan.rows - len(x), len(x))], axis=0)
    return x

  def read(self, ref: Ref, token_ref: Ref | None, i: int) -> jax.Array:
    """Reads queries, keys or values, `rows lanes`; `i` is their row in `token_ref`."""
    x = self._patches(ref)
    if self.ragged and not self.plan.space:  # memory after the last patch is undefined
      x = _where(self._mask(x.shape[1], 0, self.plan.patches - self.start), x, jnp.zeros_like(x))

    def filler(count: int, _: int) -> jax.Array:
      if token_ref is None:
        return jnp.zeros((count, x.shape[1]), x.dtype)
      return jnp.broadcast_to(token_ref[0, i : i + 1], (count, x.shape[1]))

    return self._join(x, filler)

  def read_gradient(self, ref: Ref, token_ref: Ref | None) -> jax.Array:
    """Reads the gradient of the output, `rows lanes`, 0 for rows that belong to other windows."""
    x = self._patches(ref)
    if self.ragged and not self.plan.space:
      x = _where(self._mask(x.shape[1], self.first, self.last), x, jnp.zeros_like(x))

    def filler(count: int, first: int) -> jax.Array:
      zeros = jnp.zeros((count, x.shape[1]), x.dtype)
      if token_ref is None:
        return zeros
      row = first + jax.lax.broadcasted_iota(jnp.int32, zeros.shape, 0)
      return _where(row < self.plan.first_token_row + self.groups, jnp.broadcast_to(token_ref[0], zeros.shape), zeros)

    return self._join(x, filler)

  def write(self, ref: Ref, x: jax.Array) -> None:
    """Writes the rows of the patches."""
    plan = self.plan
    x = x[: plan.frames * plan.size]
    if self.ragged and not plan.space:
      x = _where(self._mask(x.shape[1], self.first, self.last), x, self._patches(ref))
    ref[self._index()] = x if plan.space else x.reshape(plan.frames, plan.size, x.shape[1])

  def output_factor(self, queries: int) -> jax.Array:
    """Returns the weight of each query's output, `1 queries`: the class token's are averaged over all groups."""
    query = jax.lax.broadcasted_iota(jnp.int32, (1, queries), 1)
    return jnp.where(query < self.plan.first_token_row, 1.0, 1 / sum(self.plan.groups))

  def token_sum(self, x: jax.Array, all_groups: bool) -> jax.Array:
    """Sums the class token's rows, one per group of the window, or takes only the first: `1 lanes`, float32."""
    tail = self.plan.first_token_row // PACKED * PACKED
    x = x[tail:].astype(jnp.float32)
    row = tail - self.plan.first_token_row + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    count = self.groups if all_groups else 1
    return jnp.sum(jnp.where((row >= 0) & (row < count), x, 0), axis=0, keepdims=True)

  def _patches(self, ref: Ref) -> jax.Array:
    x = ref[self._index()]
    return x if self.plan.space else x.reshape(-1, x.shape[-1])
