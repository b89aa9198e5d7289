"""Fused attention against plain XLA: in interpret mode on the CPU, and compiled ahead of time for TPUs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.attention import Heads, motion_attention, space_attention
from mevit_jax.models.kernels import fused_attention, fused_cost, supported
from tests.helpers.naive import assert_close

ROOT = Path(__file__).parents[2]


def config_of(grid, frames, width, heads, block_size):
  return MEViTConfig(frames=frames, width=width, heads=heads, image_size=grid, patch_size=(1, 1), block_size=block_size)


def inputs(config, token, dtype='float32', examples=2):
  """Returns queries, keys and values of patches and class token, and gradients of the two outputs."""
  rng = np.random.default_rng(0)
  n = config.grid[0] * config.grid[1]
  patches = [jnp.asarray(rng.standard_normal((examples, config.frames, n, config.width)), dtype) for _ in range(4)]
  tokens = [jnp.asarray(rng.standard_normal((examples, config.width)), dtype) for _ in range(4)]
  primals = *patches[:3], tuple(tokens[:3]) if token else None
  return primals, (patches[3], tokens[3] if token else None)


def fused(config, kind):
  blocks = config.blocks if kind == 'motion' else None
  return lambda *primals: fused_attention(*primals, heads=config.heads, blocks=blocks, interpret=True)


def plain(config, kind):
  def split(x):
    return x.reshape(*x.shape[:-1], config.heads, -1)

  def attention(query, key, value, token):
    one = None if token is None else Heads(*map(split, token))
    patches = Heads(*map(split, (query, key, value)))
    output, token_output = (motion_attention if kind == 'motion' else space_attention)(patches, one, config)
    return output.reshape(query.shape), None if token is None else token_output.reshape(len(query), -1)

  return attention


def run(function, primals, gradients, changed=lambda both: both):
  """Returns the outputs and the gradients of all inputs; `change` transforms the function first."""

  def both(primals, gradients):
    outputs, pull = jax.vjp(function, *primals)
    return outputs, pull(gradients)

  return jax.jit(changed(both))(primals, gradients)


@pytest.mark.parametrize(
  ('kind', 'grid', 'frames', 'width', 'heads', 'block_size', 'token'),
  [
    ('space', (3, 6), 9, 128, 2, 1, True),  # 18 patches: the class token replaces padding; a loop and a remainder
    ('space', (4, 4), 2, 160, 2, 1, True),  # 16: the class token needs another vector register; heads of 80 share one
    ('motion', (6, 6), 2, 192, 3, 2, True),  # 36 patches in windows of 8, the last half empty; an odd number of heads
    ('motion', (5, 3), 3, 64, 2, 2, True),  # unequal blocks, an odd number of frames
    ('motion', (5, 7), 2, 128, 1, 3, True),  # blocks that overlap their neighbors' windows
    ('motion', (3, 4), 2, 96, 3, 1, False),
    ('motion', (4, 5), 2, 256, 4, 5, True),  # the full grid, two programs per example
  ],
)
def test_fused_attention_equals_plain_xla(kind, grid, frames, width, heads, block_size, token):
  config = config_of(grid, frames, width, heads, block_size)
  arguments = inputs(config, token)
  assert_close(run(fused(config, kind), *arguments), run(plain(config, kind), *arguments), 1e-5)


def on_matrix_units(function):
  """Rounds the operands of every matrix product to bfloat16, like a TPU by default."""

  def rounded(*arguments):
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    names = [*closed.jaxpr.constvars, *closed.jaxpr.invars]
    values = dict(zip(names, [*closed.consts, *jax.tree.leaves(arguments)], strict=True))
    for step in closed.jaxpr.eqns:
      assert 'jaxpr' not in step.params  # products inside it would be missed
      read = [x.val if isinstance(x, Literal) else values[x] for x in step.invars]
      if step.primitive is jax.lax.dot_general_p:
        read = [jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) for x in read]
      found = step.primitive.bind(*read, **step.params)
      values.update(zip(step.outvars, found if step.primitive.multiple_results else [found], strict=True))
    return jax.tree.unflatten(jax.tree.structure(shapes), [values[x] for x in closed.jaxpr.outvars])

  return rounded


# Largest ratio of the kernel's error to that of plain XLA which rounds only operands and results. Both round each
# query's weights for the outputs; for the gradients plain XLA rounds once more, after dividing them by their sum.
AT_MOST = {'patches': 1.001, 'token': 1.001, 'query': 0.85, 'key': 0.85, 'value': 0.95}
AT_MOST |= {'token query': 0.9, 'token key': 0.9, 'token value': 0.99}  # fewer numbers


@pytest.mark.parametrize('kind', ['space', 'motion'])
def test_bfloat16_error_is_at_most_that_of_plain_xla(kind):
  config = config_of((6, 6), 2, 128, 2, 2)
  arguments = inputs(config, True, 'bfloat16', examples=20)
  with jax.enable_x64(True):
    exact = run(plain(config, kind), *jax.tree.map(lambda x: np.asarray(x, np.float64), arguments))
    exact = jax.tree.map(np.asarray, exact)
  ours = run(fused(config, kind), *arguments)
  plains = run(plain(config, kind), *jax.tree.map(jnp.float32, arguments), on_matrix_units)
  plains = jax.tree.map(jnp.bfloat16, plains)
  errors = (np.array([_errors(x, e) for x, e in _pairs(one, exact)]) for one in (ours, plains))  # kinds 10
  for name, ratios in zip(AT_MOST, np.divide(*errors), strict=True):
    assert ratios.mean() < AT_MOST[name], name
    assert ratios.max() < 1.1, name


def _pairs(one, other):
  return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


def _errors(found, exact):
  """Returns the root mean square of each of ten parts of the examples."""
  return np.sqrt(np.mean(np.square(np.float64(found) - exact).reshape(10, -1), axis=1))


def test_keys_of_other_groups_and_padding_change_nothing():
  # Logits as large as float32 allows without subtracting the maximum, and values that would be visible.
  config = config_of((6, 2), 2, 64, 1, 2)
  (query, key, value, _), _ = inputs(config, False)
  first = fused(config, 'motion')(100 * query, key, value, None)[0]
  other = value.at[:, :, 4:].set(1e30), key.at[:, :, 4:].multiply(100)
  second = fused(config, 'motion')(100 * query, other[1], other[0], None)[0]
  assert np.all(np.isfinite(first))
  np.testing.assert_array_equal(first[:, :, :4], second[:, :, :4])


def test_cost_estimate_and_supported_shapes():
  shape, base = (8, 8, 196, 768), {'heads': 12, 'token': True, 'dtype': 'bfloat16'}

  def blocks(block_size, frames=8):
    return config_of((14, 14), frames, 768, 12, block_size).blocks

  assert supported(shape, blocks=None, **base)
  assert supported(shape, blocks=blocks(2), **base)
  assert not supported(shape, blocks=blocks(14), **base)  # the logits of a window of 1 600 tokens
  assert not supported(shape, blocks=None, **{**base, 'dtype': 'float64'})
  forward, backward = fused_cost(shape, blocks=blocks(2), **base)
  array = 2 * 8 * 8 * 196 * 768
  assert 4 * array < forward.bytes < 4.01 * array
  assert 7 * array < backward.bytes < 7.01 * array
  # 25 windows of 80 rows, 80 x 64 x 80 and 64 x 80 x 80 in padded tiles; 12 heads of 8 examples.
  assert forward.flops == 2 * 128**2 * (80 + 64) * 25 * 12 * 8
  assert backward.flops == 2 * 128**2 * (2 * 80 + 3 * 64) * 25 * 12 * 8
  assert fused_cost(shape, blocks=blocks(1), **base) == (forward, backward)  # M = 1 costs as much as M = 2


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.kernels import fused_attention
for name in ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'):
  device = topologies.get_topology_desc(platform='tpu', topology_name=name).devices[0]
  for grid, frames, width, heads, block_size, token in (
    (14, 8, 768, 12, 2, True), (14, 8, 768, 12, 3, True), (16, 4, 1280, 16, 2, False), (7, 5, 192, 3, 2, True),
  ):
    config = MEViTConfig(frames=frames, width=width, heads=heads, image_size=grid, patch_size=1, block_size=block_size)
    def of(*shape):
      return jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    patches, one = of(frames, grid**2, width), of(width)
    for blocks in (None, config.blocks):
      def both(query, key, value, token, gradients):
        function = lambda *x: fused_attention(*x, heads=heads, blocks=blocks)
        outputs, pull = jax.vjp(function, query, key, value, token)
        return outputs, pull(gradients)
      text = jax.jit(both).lower(
        *[patches] * 3, (one,) * 3 if token else None, (patches, one if token else None)
      ).compile().as_text()
      assert text.count('tpu_custom_call') == 2, text
print('compiled')
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu, of requirements-plan.txt')
def test_compiles_for_tpus():
  wanted = {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  done = subprocess.run(
    [sys.executable, '-c', COMPILE], cwd=ROOT, env={**os.environ, **wanted}, capture_output=True, text=True
  )
  assert 'compiled' in done.stdout, done.stderr[-3000:]
