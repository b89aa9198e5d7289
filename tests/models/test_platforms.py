"""Fast paths against plain XLA in complete models; the TPU kernel runs in interpret mode on the CPU."""

import dataclasses
import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.config.mesh import MeshConfig
from mevit_jax.config.model import MEViTConfig
from mevit_jax.models import platforms
from mevit_jax.models.attention import Heads
from mevit_jax.models.functional import build_model, parameter_shapes
from mevit_jax.parallel.mesh import make_mesh
from mevit_jax.parallel.placement import batch_sharding, constrain_batch, shard_attention, shard_params
from mevit_jax.planning.environment import variables

ROOT = Path(__file__).parents[2]

CONFIG = MEViTConfig(
  classes=5, frames=2, image_size=(10, 15), patch_size=(5, 5), width=32, heads=4, mlp_dim=40, space_blocks=1,
  motion_blocks=1, class_blocks=0, block_size=2, dtype='float32',
)  # fmt: skip
CONFIGS = {
  'the last blocks are smaller': {'image_size': (25, 15), 'block_size': 2},
  'no class token, three frames': {'frames': 3, 'class_blocks': 1},
  'TimeSformer': {'attention_order': 'time_space', 'class_token_in_motion': False, 'block_size': 1},
  'joint attention': {'block_size': 3},
  'frame tokens, rotary positions': {'frame_tokens': 2, 'class_blocks': 1, 'rotary_theta': 100.0},
}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def kernel_here(monkeypatch):
  """Enables the TPU kernel in interpret mode."""
  for what, table in platforms.DEFAULT_KERNELS.items():
    interpreted = {'interpret': True} if what == 'attention' else {}
    monkeypatch.setitem(table, 'cpu', functools.partial(table['tpu'], **interpreted))
  with jax.default_matmul_precision('highest'):
    yield


def params_of(config, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), build_model(config).abstract)


def video_of(config, rows=2):
  return np.random.default_rng(1).normal(size=(rows, config.frames, *config.image_size, 3)).astype(np.float32)


def differentiated(config, *places):
  model = build_model(config, *places)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params, video):
    logits = model.apply(params, jnp.asarray(video, config.dtype))
    return (logits * np.arange(1, 6)).sum(), logits

  def logits_and_gradients(params, video):
    (_, logits), gradients = run(params, video)
    return {
      'logits': np.asarray(logits),
      **dict(zip(parameter_shapes(gradients), jax.tree.leaves(gradients), strict=True)),
    }

  return logits_and_gradients


def logits_and_gradients(config, params, video, *places):
  return differentiated(config, *places)(params, video)


def errors(found, expected):
  """Returns every tensor's error relative to its largest value; key biases have no gradient in exact arithmetic."""
  return {
    name: np.abs(np.float64(found[name]) - np.float64(x)).max() / np.abs(np.float64(x)).max()
    for name, x in expected.items() if not str(name).endswith('key/bias')
  }  # fmt: skip


def uses_kernel(config):
  model = build_model(config)
  return 'pallas_call' in str(jax.make_jaxpr(model.apply)(model.abstract, video_of(config)))


@pytest.mark.parametrize('name', [*list(CONFIGS)[:2], *map(slow, list(CONFIGS)[2:])])
def test_fast_paths_equal_plain_xla(name):
  config = dataclasses.replace(CONFIG, **CONFIGS[name])
  plain = dataclasses.replace(config, attention='plain')
  assert (uses_kernel(config), uses_kernel(plain)) == (True, False)
  inputs = params_of(config), video_of(config)
  found = errors(logits_and_gradients(config, *inputs), logits_and_gradients(plain, *inputs))
  assert max(found.values()) < 1e-5, found


def attended(config, name, dtype, token):
  """Returns the outputs of an attention and the gradients of its inputs."""
  rng, n = np.random.default_rng(0), config.grid[0] * config.grid[1]
  patches = Heads(*jnp.asarray(rng.normal(size=(3, 2, config.frames, n, config.width)), dtype))
  one = Heads(*jnp.asarray(rng.normal(size=(3, 2, config.width)), dtype)) if token else None

  def weighed(patches, one):
    outputs = platforms.dispatch_attention(name, patches, one, config, lambda attention: attention)
    return sum((jnp.sin(jnp.arange(x.size).reshape(x.shape)) * x).sum() for x in jax.tree.leaves(outputs)), outputs

  (_, outputs), gradients = jax.jit(jax.value_and_grad(weighed, (0, 1), has_aux=True))(patches, one)
  return dict(enumerate(jax.tree.leaves((outputs, gradients))))


@pytest.mark.parametrize(
  ('name', 'image_size', 'frames', 'token'),
  [
    ('space', (10, 15), 2, True),  # 7 tokens including the class token
    ('space', (5, 15), 1, False),
    ('motion', (25, 15), 2, True),  # blocks of 4, 2, 2 and 1 patches of a frame
    ('motion', (25, 15), 3, False),
  ],
)
def test_cudnn_layout_equals_plain_xla(name, image_size, frames, token, monkeypatch):
  """With the XLA implementation of the cuDNN call: groups, the class token, and padding to even lengths."""
  by_cudnn = platforms.OPTIONAL_KERNELS['cudnn']['cuda']
  monkeypatch.setitem(platforms.OPTIONAL_KERNELS['cudnn'], 'cpu', functools.partial(by_cudnn, implementation='xla'))
  calls, dpa = [], jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda *args, **how: calls.append(args) or dpa(*args, **how))
  config = dataclasses.replace(CONFIG, image_size=image_size, frames=frames, attention='cudnn')
  found = attended(config, name, 'float32', token)
  assert calls
  assert all(query.shape[1] % 2 == 0 for query, *_ in calls)
  found = errors(found, attended(dataclasses.replace(config, attention='plain'), name, 'float32', token))
  assert max(found.values()) < 1e-5, found


def test_cudnn_changes_nothing_on_other_platforms():
  auto, cudnn = (
    attended(dataclasses.replace(CONFIG, attention=attention), 'space', 'bfloat16', True)
    for attention in ('auto', 'cudnn')
  )
  jax.tree.map(np.testing.assert_array_equal, cudnn, auto)


COMPILE = """
import jax, jax.numpy as jnp
from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.functional import build_model
from mevit_jax.config.mesh import MeshConfig
from mevit_jax.parallel.mesh import make_mesh
from mevit_jax.parallel.placement import batch_sharding, shard_attention, constrain_batch, abstract_with_shardings
from mevit_jax.planning import chips

# 17 tokens a frame; 9 a block, and where M is 3 in blocks of three sizes 19, 7 (twice) and 3.
for gpu, changes, calls in (
  ('a100:1', {}, 3), ('h200:1', {'block_size': 3}, 6),
  ('h200:1', {'class_token_in_motion': False, 'attention_order': 'time_space'}, 3), ('h200:8', {}, 3),
  ('h200:1', {'dtype': 'float32'}, 0), ('h200:1', {'attention': 'auto'}, 0), ('h200:1', {'width': 24}, 0),
):
  config = MEViTConfig(**{
    'classes': 5, 'frames': 2, 'image_size': 16, 'patch_size': 4, 'width': 128, 'heads': 2, 'mlp_dim': 64,
    'space_blocks': 1, 'motion_blocks': 1, 'class_blocks': 0, 'block_size': 2, 'attention': 'cudnn', **changes,
  })
  topology = chips.parse(gpu)
  mesh = make_mesh(MeshConfig(), chips.devices_of(topology))
  model = build_model(config, constrain_batch(mesh), shard_attention(mesh))
  video = jax.ShapeDtypeStruct((8, 2, 16, 16, 3), jnp.bfloat16, sharding=batch_sharding(mesh))
  step = jax.jit(jax.grad(lambda *args: model.apply(*args).sum()))
  params = abstract_with_shardings(model.abstract, mesh)
  compiled = step.lower(params, video).compile({'xla_gpu_enable_triton_gemm': False})
  text = compiled.as_text()
  found = [text.count(f'custom_call_target="__cudnn$fmhaSoftmax{way}"') for way in ('', 'Backward')]
  assert found == [calls, calls], (gpu, changes, found)
  assert 'all-gather' not in text and 'all-to-all' not in text
print('compiled')
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec('jax_cuda13_plugin'), reason='needs jax_cuda13_plugin, of requirements-gpu.txt')
def test_cudnn_compiles_for_gpus():
  done = subprocess.run(
    [sys.executable, '-c', COMPILE], cwd=ROOT, env={**os.environ, **variables()}, capture_output=True, text=True
  )
  assert 'compiled' in done.stdout, done.stderr[-3000:]


def test_attention_that_exceeds_on_chip_memory_uses_plain_xla():
  """Joint attention over 16 frames has 3,136 tokens, whose logits exceed the on-chip memory."""
  sizes = {'image_size': 224, 'patch_size': 16, 'frames': 16, 'width': 128, 'heads': 2}
  config = dataclasses.replace(CONFIG, **sizes, space_blocks=0)
  model = build_model(dataclasses.replace(config, block_size=14))
  kernels = [
    str(jax.make_jaxpr(model.apply)(model.abstract, video_of(model.config))).count('pallas_call')
    for model in (model, build_model(config))
  ]
  assert kernels[0] == kernels[1] / 2 > 0  # space attention only


def multiplied(jaxpr):
  """Returns the FLOPs of a kernel's matrix products, padded to tiles: 128 deep and wide, eight rows."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (((left,), (right,)), _), (x, y) = equation.params['dimension_numbers'], (v.aval.shape for v in equation.invars)
      rows, depth, columns = x[1 - left], x[left], y[1 - right]
      total += 2 * (-(-rows // 8) * 8) * (-(-depth // 128) * 128) * (-(-columns // 128) * 128)
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      total += equation.params.get('length', 1) * multiplied(inner) if hasattr(inner, 'eqns') else 0
  return total


def calls_of(jaxpr):
  """Returns every kernel of a program, once."""
  found = {}
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'pallas_call':
      found[equation.params['name'], str(equation.invars[1].aval)] = equation
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      found |= calls_of(inner) if hasattr(inner, 'eqns') else {}
  return found


@pytest.mark.parametrize(('block_size', 'heads'), [(2, 12), (3, 12), slow(7, 12), slow(2, 3)])
def test_cost_estimates_of_kernels_equal_their_products(block_size, heads):
  """`mevit plan` uses these estimates: the padded products of the program, and all bytes it moves."""
  config = MEViTConfig(
    classes=5, width=64 * heads, heads=heads, space_blocks=0, motion_blocks=1, class_blocks=0, block_size=block_size
  )
  model = build_model(config)
  video = jax.ShapeDtypeStruct((2, 8, 224, 224, 3), jnp.bfloat16)
  calls = calls_of(jax.make_jaxpr(jax.grad(lambda *args: model.apply(*args).sum()))(model.abstract, video).jaxpr)
  assert len(calls) == 4  # space and motion, forward and backward
  for name, call in calls.items():
    programs = np.prod(call.params['grid_mapping'].grid)
    said = call.params['cost_estimate']
    assert said.flops == programs * multiplied(call.params['jaxpr']), name
    big = [x.aval for x in (*call.invars, *call.outvars) if x.aval.ndim == 4]
    assert said.bytes_accessed >= sum(x.size * x.dtype.itemsize for x in big), name


@pytest.mark.parametrize('remat', [slow('block'), 'residuals'])
def test_fast_paths_with_remat(remat):
  config = dataclasses.replace(CONFIG, remat=remat)
  inputs = params_of(config), video_of(config)
  plain = dataclasses.replace(CONFIG, attention='plain')
  found = errors(logits_and_gradients(config, *inputs), logits_and_gradients(plain, *inputs))
  assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_bfloat16_error_of_fast_paths_is_at_most_that_of_plain_xla():
  """Averages over many random parameters: for a single draw the ratio is between 0.88 and 1.17."""
  config = dataclasses.replace(CONFIG, image_size=(25, 15), frames=4)
  video, draws = video_of(config), [params_of(config, seed) for seed in range(24)]
  with jax.enable_x64():
    run = differentiated(dataclasses.replace(config, attention='plain', dtype='float64'))
    exact = [run(params, video) for params in draws]

  def error(attention):
    run = differentiated(dataclasses.replace(config, attention=attention, dtype='bfloat16'))
    return np.sqrt(np.mean([_squares(run(params, video), e) for params, e in zip(draws, exact, strict=True)]))

  fast, plain = error('auto'), error('plain')
  assert 1e-3 < fast < 1.1 * plain  # rounded in the same way


def _squares(found, exact):
  """Returns every tensor's mean square error relative to its mean square; the exact gradient of key biases is zero."""
  return [
    np.mean(np.square(np.float64(found[name]) - x)) / np.mean(np.square(x))
    for name, x in exact.items() if not str(name).endswith('key/bias')
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('sizes', 'name'),
  [
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, None),
    slow({'tensor': 4}, None),
    slow({'data': 2, 'fsdp': 2, 'tensor': 2}, 'frame tokens, rotary positions'),
  ],
)
def test_fast_paths_on_several_devices(sizes, name):
  """Every device computes its examples and heads; inputs and outputs of attention are not communicated."""
  mesh = make_mesh(MeshConfig(**{'data': 1, **sizes}))
  config = dataclasses.replace(CONFIG, **CONFIGS.get(name, {}))
  params, video = params_of(config), video_of(config, 4)
  expected = logits_and_gradients(config, params, video)
  video = jax.device_put(video, batch_sharding(mesh))
  found = logits_and_gradients(config, shard_params(params, mesh), video, constrain_batch(mesh), shard_attention(mesh))
  assert max(errors(found, expected).values()) < 1e-5
