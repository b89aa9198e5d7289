"""The fast paths against plain XLA, in whole models: TPU's kernel step by step (interpret mode) on this machine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.models import platforms
from mevit_jax.models.config import MEViTConfig
from mevit_jax.models.functional import build_model, names_of
from mevit_jax.parallel.mesh import MeshConfig, make_mesh
from mevit_jax.parallel.placement import by_rows, each_device, keep_rows, put

CONFIG = MEViTConfig(
  classes=5, frames=2, image_size=(10, 15), patch_size=(5, 5), width=32, heads=4, mlp_dim=40, space_blocks=1,
  motion_blocks=1, class_blocks=0, block_size=2, dtype='float32',
)  # fmt: skip
CONFIGS = {
  'the last blocks are smaller': {'image_size': (25, 15), 'block_size': 2},
  'no class token, three frames': {'frames': 3, 'class_blocks': 1},
  'TimeSformer': {'order': 'time_space', 'class_token_in_motion': False, 'block_size': 1},
  'joint attention': {'block_size': 3},
}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def kernel_here(monkeypatch):
  """What TPUs have, on this machine."""
  for what, table in platforms.FASTEST.items():
    interpreted = {'interpret': True} if what == 'attention' else {}
    monkeypatch.setitem(table, 'cpu', functools.partial(table['tpu'], **interpreted))
  with jax.default_matmul_precision('highest'):
    yield


def params_of(config):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), build_model(config).abstract)


def video_of(config, rows=2):
  return np.random.default_rng(1).normal(size=(rows, config.frames, *config.image_size, 3)).astype(np.float32)


def logits_and_gradients(config, params, video, *places):
  model = build_model(config, *places)

  def loss(params):
    logits = model.apply(params, jnp.asarray(video, config.dtype))
    return (logits * np.arange(1, 6)).sum(), logits

  (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return {'logits': np.asarray(logits), **dict(zip(names_of(gradients), jax.tree.leaves(gradients), strict=True))}


def errors(found, expected):
  """Of every tensor, as a share of its largest; key biases have no gradient in exact arithmetic."""
  return {
    name: np.abs(np.float64(found[name]) - np.float64(x)).max() / np.abs(np.float64(x)).max()
    for name, x in expected.items() if not name.endswith('key/bias')
  }  # fmt: skip


def uses_kernel(config):
  model = build_model(config)
  return 'pallas_call' in str(jax.make_jaxpr(model.apply)(model.abstract, video_of(config)))


@pytest.mark.parametrize('name', [*list(CONFIGS)[:2], *map(slow, list(CONFIGS)[2:])])
def test_fast_is_plain(name):
  config = dataclasses.replace(CONFIG, **CONFIGS[name])
  plain = dataclasses.replace(config, attention='plain')
  assert (uses_kernel(config), uses_kernel(plain)) == (True, False)
  inputs = params_of(config), video_of(config)
  found = errors(logits_and_gradients(config, *inputs), logits_and_gradients(plain, *inputs))
  assert max(found.values()) < 1e-5, found


def test_what_has_no_room_on_the_chip_is_plain():
  """Joint attention over 16 frames has 3,136 tokens: their logits do not stay on the chip."""
  sizes = {'image_size': 224, 'patch_size': 16, 'frames': 16, 'width': 128, 'heads': 2}
  config = dataclasses.replace(CONFIG, **sizes, space_blocks=0)
  model = build_model(dataclasses.replace(config, block_size=14))
  kernels = [
    str(jax.make_jaxpr(model.apply)(model.abstract, video_of(model.config))).count('pallas_call')
    for model in (model, build_model(config))
  ]
  assert kernels[0] == kernels[1] / 2 > 0  # space attention alone


def multiplied(jaxpr):
  """FLOPs of a kernel's matrix products with whole tiles: 128 deep and wide, eight rows at a time."""
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
  """Every kernel of a program, once."""
  found = {}
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'pallas_call':
      found[equation.params['name'], str(equation.invars[1].aval)] = equation
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      found |= calls_of(inner) if hasattr(inner, 'eqns') else {}
  return found


@pytest.mark.parametrize(('block_size', 'heads'), [(2, 12), (3, 12), slow(7, 12), slow(2, 3)])
def test_kernels_say_what_they_multiply(block_size, heads):
  """The plan counts a kernel by its own estimate: it is what its program has, tiles padded, and all its bytes."""
  config = MEViTConfig(
    classes=5, width=64 * heads, heads=heads, space_blocks=0, motion_blocks=1, class_blocks=0, block_size=block_size
  )
  model = build_model(config)
  video = jax.ShapeDtypeStruct((2, 8, 224, 224, 3), jnp.bfloat16)
  calls = calls_of(jax.make_jaxpr(jax.grad(lambda *args: model.apply(*args).sum()))(model.abstract, video).jaxpr)
  assert len(calls) == 4  # space and motion, forwards and backwards
  for name, call in calls.items():
    programs = np.prod(call.params['grid_mapping'].grid)
    said = call.params['cost_estimate']
    assert said.flops == programs * multiplied(call.params['jaxpr']), name
    big = [x.aval for x in (*call.invars, *call.outvars) if x.aval.ndim == 4]
    assert said.bytes_accessed >= sum(x.size * x.dtype.itemsize for x in big), name


@pytest.mark.parametrize('remat', [slow('block'), 'residuals'])
def test_fast_with_remat(remat):
  config = dataclasses.replace(CONFIG, remat=remat)
  inputs = params_of(config), video_of(config)
  plain = dataclasses.replace(CONFIG, attention='plain')
  found = errors(logits_and_gradients(config, *inputs), logits_and_gradients(plain, *inputs))
  assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_bfloat16_is_no_worse_than_plain():
  config = dataclasses.replace(CONFIG, image_size=(25, 15), frames=4)
  inputs = params_of(config), video_of(config)
  with jax.enable_x64():
    exact = logits_and_gradients(dataclasses.replace(config, attention='plain', dtype='float64'), *inputs)
  both = []
  for attention in ('auto', 'plain'):
    found = dataclasses.replace(config, attention=attention, dtype='bfloat16')
    both.append(errors(logits_and_gradients(found, *inputs), exact))
  fast, plain = (np.sqrt(np.mean(np.square(list(one.values())))) for one in both)
  assert 1e-4 < fast < 1.1 * plain  # rounded, and the same rounding


@pytest.mark.parametrize('sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, slow({'tensor': 4})])
def test_fast_on_many_devices(sizes):
  """Every device computes its rows and heads, and none sends what attention reads or makes."""
  mesh = make_mesh(MeshConfig(**{'data': 1, **sizes}))
  params, video = params_of(CONFIG), video_of(CONFIG, 4)
  expected = logits_and_gradients(CONFIG, params, video)
  video = jax.device_put(video, by_rows(mesh))
  found = logits_and_gradients(CONFIG, put(params, mesh), video, keep_rows(mesh), each_device(mesh))
  assert max(errors(found, expected).values()) < 1e-5
