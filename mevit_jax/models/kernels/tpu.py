"""Fused attention within groups for TPU (Pallas, Mosaic): no layout is moved, and no logits leave the chip's VMEM.

A program reads all frames and patches of one example and some heads (128 lanes, mostly two heads) and goes through
them window by window (windows.py). Logits stand transposed, keys down and queries across, so that the softmax reduces
along sublanes, which is cheap; heads are told apart by zeros in the lanes of the others, which costs a matrix unit
nothing and moves nothing. The backward pass keeps only the inputs: the probabilities are computed again.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mevit_jax.models.kernels.cost import cost, vmem_bytes
from mevit_jax.models.kernels.windows import PACKED, Plan, lanes_of, registers_of

_ROWS_AND_LANES = (((1,), (1,)), ((), ()))  # x @ y.T


@functools.partial(jax.jit, static_argnames=('plan', 'heads', 'interpret'))  # traced once for all blocks
def forward(query, key, value, token, plan: Plan, heads: int, interpret: bool):
  """Queries, keys, values `b t n d`, token's `b 3 d` or None -> `b t n d` and the token's, over groups, `b 1 d`."""
  b, d = query.shape[0], query.shape[-1]
  outputs = [jax.ShapeDtypeStruct(query.shape, query.dtype)]
  if token is not None:
    outputs.append(jax.ShapeDtypeStruct((b, 1, d), jnp.float32))
  return _call(_forward, [query, key, value], [token], outputs, plan, heads, interpret)


@functools.partial(jax.jit, static_argnames=('plan', 'heads', 'interpret'))
def backward(query, key, value, token, gradient, token_gradient, plan: Plan, heads: int, interpret: bool):
  """Gradients of `forward`'s query, key, value, and of the token's `b 3 d`; `token_gradient` is its mean's, `b 1 d`."""
  b, d = query.shape[0], query.shape[-1]
  outputs = [jax.ShapeDtypeStruct(query.shape, query.dtype)] * 3
  if token is not None:
    outputs.append(jax.ShapeDtypeStruct((b, 3, d), jnp.float32))
  return _call(_backward, [query, key, value, gradient], [token, token_gradient], outputs, plan, heads, interpret)


def _call(kernel, patches, tokens, outputs, plan, heads, interpret):
  b, t, _, d = patches[0].shape
  lanes, size = lanes_of(d, heads), patches[0].dtype.itemsize
  count = cost(patches[0].shape, heads, plan, tokens[0] is not None, kernel is _backward, size)
  tokens = [x for x in tokens if x is not None]

  def spec(x):
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


def _forward(table, bias, query, key, value, *refs, plan, width, token):
  token_ref, output, token_output = refs if token else (None, *refs, None)
  heads = range(query.shape[-1] // width)
  if token:
    token_output[...] = jnp.zeros_like(token_output)

  def windows(ws, ragged):
    rows = [_Window(plan, table, w, ragged) for w in ws]
    read = [[one.read(ref, token_ref, i) for i, ref in enumerate((query, key, value))] for one in rows]
    logits = [[_heads_dot(k, q, head, width) for head in heads] for q, k, _ in read]
    weights = [[_softmax(x, bias[one.pattern], width) for x in xs] for one, xs in zip(rows, logits, strict=True)]
    values = [v.T for _, _, v in read]  # lanes keys
    parts = [
      [_dot(v[head * width : (head + 1) * width], x.astype(v.dtype)) / total for head, (x, total) in enumerate(xs)]
      for v, xs in zip(values, weights, strict=True)
    ]
    for one, xs in zip(rows, parts, strict=True):
      result = jnp.concatenate(xs, axis=0).T  # queries lanes
      one.write(output, result.astype(query.dtype))
      if token:
        token_output[0] += one.token_sum(result, True)

  _each_window(plan, windows)


def _backward(table, bias, query, key, value, gradient, *refs, plan, width, token):
  token_ref, token_gradient, *outputs = refs if token else (None, None, *refs)
  heads = range(query.shape[-1] // width)
  scale = width**-0.5
  if token:
    outputs[3][...] = jnp.zeros_like(outputs[3])

  def windows(ws, ragged):
    rows = [_Window(plan, table, w, ragged) for w in ws]
    read = [
      [
        *(one.read(ref, token_ref, i) for i, ref in enumerate((query, key, value))),
        one.read_gradient(gradient, token_gradient),
      ]
      for one in rows
    ]
    logits = [[_heads_dot(k, q, head, width) for head in heads] for q, k, _, _ in read]
    dweights = [[_heads_dot(v, do, head, width) for head in heads] for _, _, v, do in read]
    both = []
    for one, xs, ys in zip(rows, logits, dweights, strict=True):
      for x, y in zip(xs, ys, strict=True):
        weights, total = _softmax(x, bias[one.pattern], width)
        share = one.share(x.shape[1])
        weights = weights * (share / total)
        dlogits = weights * (y - jnp.sum(weights * y, axis=0, keepdims=True) / share)
        both.append((weights.astype(query.dtype), dlogits.astype(query.dtype)))
    for i, (one, (q, k, _, do)) in enumerate(zip(rows, read, strict=True)):
      across = [x.T for x in (k, q, do)]  # lanes rows: a head is rows of it
      parts: list[list[jax.Array]] = [[], [], []]
      for head, (weights, dlogits) in enumerate(both[i * len(heads) : (i + 1) * len(heads)]):
        keys, queries, gradients = (x[head * width : (head + 1) * width] for x in across)
        parts[0].append(_dot(keys, dlogits) * scale)  # k queries
        parts[1].append(_dot(queries, dlogits, _ROWS_AND_LANES) * scale)  # k keys
        parts[2].append(_dot(gradients, weights, _ROWS_AND_LANES))  # k keys
      for j, xs in enumerate(parts):
        x = jnp.concatenate(xs, axis=0).T  # rows lanes
        one.write(outputs[j], x.astype(q.dtype))
        if token:
          outputs[3][0, j : j + 1] += one.token_sum(x, j == 0)

  _each_window(plan, windows)


def _softmax(logits, bias, width):
  """The exponentials of a head's logits `keys queries`, at most 1, and their sums `1 queries`."""
  logits = logits + jnp.concatenate([bias] * math.ceil(logits.shape[1] / bias.shape[1]), axis=1)[:, : logits.shape[1]]
  largest = jnp.max(logits, axis=0, keepdims=True)
  weights = jnp.exp2((logits - largest) * (width**-0.5 * math.log2(math.e)))
  return weights, jnp.sum(weights, axis=0, keepdims=True)


def _heads_dot(x, y, head, width):
  """`rows lanes` and `columns lanes` of all heads -> the products of one head `rows columns`."""
  first, last = registers_of(head, width, x.shape[1])
  return _dot(x[:, first:last], _only(y, head, width), _ROWS_AND_LANES)


def _only(x, head, width):
  """The registers of a head, with zeros for other heads."""
  first, last = registers_of(head, width, x.shape[1])
  if last - first == width:
    return x[:, first:last]
  lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], last - first), 1) + first
  return jnp.where((lane >= head * width) & (lane < (head + 1) * width), x[:, first:last], 0)


def _dot(x, y, dimensions=(((1,), (0,)), ((), ()))):
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _choose(mask, x, y):
  """Where rows are chosen; in float32, as Mosaic has no masks of rows for registers that pack two of them."""
  return jnp.where(mask, x.astype(jnp.float32), y.astype(jnp.float32)).astype(x.dtype)


def _each_window(plan: Plan, windows):
  """Runs `windows(ws, ragged)` for all; some at once, as one's matrix products hide behind another's softmax."""

  def loop(first, last, ragged):
    at_once = min(plan.at_once, last - first)
    times, rest = divmod(last - first, at_once)

    def body(i, _):
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
  """A window's rows: read with the class token's in their place, and written back."""

  def __init__(self, plan: Plan, table, w, ragged: bool):
    self.plan, self.w, self.ragged = plan, w, ragged
    start, self.first, self.last, self.groups, self.pattern = (table[i, w] for i in range(5))
    self.start = pl.multiple_of(start, 8)

  def _at(self):
    plan = self.plan
    if plan.space:
      return 0, self.w
    return 0, slice(None), pl.ds(self.start, plan.size)

  def _mask(self, lanes, first, last):
    """Which rows are of the patches from `first` to `last`."""
    plan = self.plan
    patch = jax.lax.broadcasted_iota(jnp.int32, (plan.frames, plan.size, lanes), 1)
    patch = patch.reshape(plan.frames * plan.size, lanes)
    return (patch >= first) & (patch < last)

  def _join(self, x, filler):
    """Rows of patches, then the class token's (or zeros)."""
    plan = self.plan
    tail = plan.first_token_row // PACKED * PACKED
    if tail < len(x):
      row = tail + jax.lax.broadcasted_iota(jnp.int32, (len(x) - tail, x.shape[1]), 0)
      last = _choose(row < plan.first_token_row, x[tail:], filler(len(x) - tail, tail))
      x = last if tail == 0 else jnp.concatenate([x[:tail], last], axis=0)
    if len(x) < plan.rows:
      x = jnp.concatenate([x, filler(plan.rows - len(x), len(x))], axis=0)
    return x

  def read(self, ref, token_ref, i):
    """`rows lanes` of queries, keys or values; `i` is the row of the token's."""
    x = self._patches(ref)
    if self.ragged and not self.plan.space:  # what lies after the last patch may be anything
      x = _choose(self._mask(x.shape[1], 0, self.plan.patches - self.start), x, jnp.zeros_like(x))

    def filler(count, _):
      if token_ref is None:
        return jnp.zeros((count, x.shape[1]), x.dtype)
      return jnp.broadcast_to(token_ref[0, i : i + 1], (count, x.shape[1]))

    return self._join(x, filler)

  def read_gradient(self, ref, token_ref):
    """`rows lanes` of an output's gradient, 0 for rows that are not the window's own."""
    x = self._patches(ref)
    if self.ragged and not self.plan.space:
      x = _choose(self._mask(x.shape[1], self.first, self.last), x, jnp.zeros_like(x))

    def filler(count, first):
      zeros = jnp.zeros((count, x.shape[1]), x.dtype)
      if token_ref is None:
        return zeros
      row = first + jax.lax.broadcasted_iota(jnp.int32, zeros.shape, 0)
      return _choose(row < self.plan.first_token_row + self.groups, jnp.broadcast_to(token_ref[0], zeros.shape), zeros)

    return self._join(x, filler)

  def write(self, ref, x):
    """Writes the patches' rows."""
    plan = self.plan
    x = x[: plan.frames * plan.size]
    if self.ragged and not plan.space:
      x = _choose(self._mask(x.shape[1], self.first, self.last), x, self._patches(ref))
    ref[self._at()] = x if plan.space else x.reshape(plan.frames, plan.size, x.shape[1])

  def share(self, queries):
    """What a query's output counts for, `1 queries`: the class token's outputs are averaged over all groups."""
    query = jax.lax.broadcasted_iota(jnp.int32, (1, queries), 1)
    return jnp.where(query < self.plan.first_token_row, 1.0, 1 / sum(self.plan.groups))

  def token_sum(self, x, of_groups):
    """The sum of the class token's rows, one a group of the window (or the first alone): `1 lanes`, float32."""
    tail = self.plan.first_token_row // PACKED * PACKED
    x = x[tail:].astype(jnp.float32)
    row = tail - self.plan.first_token_row + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    count = self.groups if of_groups else 1
    return jnp.sum(jnp.where((row >= 0) & (row < count), x, 0), axis=0, keepdims=True)

  def _patches(self, ref):
    x = ref[self._at()]
    return x if self.plan.space else x.reshape(-1, x.shape[-1])
