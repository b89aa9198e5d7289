"""The training step on meshes of every shape: same results, sharded parameters, no all-gather of activations."""

import collections
import dataclasses
import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest

from mevit_jax.config.augment import AugmentConfig
from mevit_jax.config.data import Normalization
from mevit_jax.config.mesh import MeshConfig
from mevit_jax.config.model import MEViTConfig, variant
from mevit_jax.config.optimizer import OptimizerConfig
from mevit_jax.config.training import TrainingConfig
from mevit_jax.models.functional import build_model, parameter_shapes
from mevit_jax.parallel.hosts import global_batch
from mevit_jax.parallel.mesh import AXES, make_mesh
from mevit_jax.parallel.placement import batch_sharding, constrain_batch, param_shardings, shard_params
from mevit_jax.planning.hlo import read_program
from mevit_jax.training.optimizer import make_optimizer
from mevit_jax.training.state import TrainState, create_state, init_state
from mevit_jax.training.steps import make_train_step

pytestmark = pytest.mark.usefixtures('compile_once')

CLASSES, BATCH, STEPS = 24, 24, 20
LIMIT = 1000  # bytes; biases and norms are below it
# All sizes differ, so that the shape of a collective identifies its array.
CONFIG = MEViTConfig(
  classes=CLASSES, frames=2, image_size=(15, 10), patch_size=(5, 5), width=16, heads=8, mlp_dim=40,
  space_blocks=1, motion_blocks=1, class_blocks=1, block_size=2, motion_init='random', drop_path=0.2, dtype='float64',
)  # fmt: skip
OPTIMIZER = make_optimizer(OptimizerConfig(weight_decay=0.0), lambda step: 0.02)


def shapes_of(devices):
  """Returns all mesh shapes of a number of devices: (slice, data, fsdp, tensor)."""
  powers = itertools.product([1, 2, 4, 8], repeat=len(AXES))
  return [shape for shape in powers if math.prod(shape) == devices]


ALL = [shape for devices in (1, 2, 4, 8) for shape in shapes_of(devices)]
SOME = [(1, 2, 4, 1), (2, 1, 2, 2)]


def mesh_of(shape):
  return make_mesh(MeshConfig(**dict(zip(AXES, shape, strict=True))))


@functools.cache
def video_and_labels():
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (BATCH, CONFIG.frames, *CONFIG.image_size, 3), np.uint8)
  return {'video': video, 'label': rng.integers(0, CLASSES, BATCH).astype(np.int32)}


def first_params(config):
  """Returns random parameters, so that every one has a gradient."""
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(config.dtype), build_model(config).abstract)


@functools.cache
def trained(shape, **changes):
  """Trains 20 steps on a mesh; returns losses, the first gradient, the last params, the program and the state."""
  config = dataclasses.replace(CONFIG, **{k: v for k, v in changes.items() if k != 'accumulate'})
  with jax.enable_x64(config.dtype == 'float64'):
    mesh = mesh_of(shape)
    step = make_train_step(
      build_model(config, constrain_batch(mesh)), OPTIMIZER, augmentation=AugmentConfig(),
      training=TrainingConfig(label_smoothing=0.1, accumulate=changes.get('accumulate', 1), batch_size=BATCH),
      normalization=Normalization((0.5,) * 3, (0.25,) * 3), mirrors=range(CLASSES),
    )  # fmt: skip
    begin = functools.partial(create_state, OPTIMIZER)
    params = first_params(config)
    shardings = param_shardings(jax.eval_shape(begin, params), mesh)
    state = jax.jit(begin, out_shardings=shardings)(shard_params(params, mesh))
    batch = global_batch(video_and_labels(), batch_sharding(mesh))
    compiled = jax.jit(step, out_shardings=(shardings, None)).lower(state, batch).compile()
    losses, gradient = [], None
    for _ in range(STEPS):
      state, metrics = compiled(state, batch)
      losses.append(float(metrics['loss']))
      gradient = gradient or named(state.opt_state[1].trace)  # the momentum of the first step
    return losses, gradient, named(state.params), read_program(compiled.as_text()), state


def named(tree):
  """Returns arrays by name, without key biases: their gradient is zero in exact arithmetic."""
  leaves = zip(parameter_shapes(tree), jax.tree.leaves(tree), strict=True)
  return {name: np.asarray(x) for name, x in leaves if not name.endswith('key/bias')}


def assert_close(tree, expected, tolerance):
  """Compares arrays with an absolute tolerance relative to the largest element of each."""
  assert tree.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(tree[name], x, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=name)


def assert_same_training(shape, **changes):
  """Compares losses, a gradient and the parameters after 20 steps with those of one device, in float64."""
  losses, gradient, params, _, _ = trained(shape, **changes)
  # Every microbatch has its own drop path mask: the reference on one device uses the same microbatches.
  parts = {name: value for name, value in changes.items() if name not in ('unroll', 'remat')}
  expected = trained((1, 1, 1, 1), **parts)
  assert expected[0][-1] < expected[0][0] - 0.1  # it learns: the comparison is not trivial
  np.testing.assert_allclose(losses, expected[0], rtol=1e-12)
  assert_close(gradient, expected[1], 1e-12)
  assert_close(params, expected[2], 1e-12)


def parameter_shard_shapes(shape):
  """Returns the shapes of parameters and their shards, as sorted dimensions without 1s."""
  _, _, fsdp, tensor = shape
  shapes = set()
  for name, whole in parameter_shapes(build_model(CONFIG).abstract).items():
    whole = whole[1:] if '/blocks/' in name else whole  # of one block
    shapes |= {plain(whole), plain((math.prod(whole[:-1]), whole[-1]))}  # the patch embedding is used as a matrix
  # Position embeddings are the sum of two parameters; the optimizer's norms are scalars.
  shapes |= {plain((CONFIG.frames, math.prod(CONFIG.grid), CONFIG.width)), plain((CONFIG.frames, CONFIG.width)), ()}
  for _ in range(2):  # sharded over fsdp, tensor, or both
    shapes |= {
      plain((*sides[:i], sides[i] // parts, *sides[i + 1 :]))
      for sides in shapes for i in range(len(sides)) for parts in (fsdp, tensor) if sides[i] % parts == 0
    }  # fmt: skip
  return shapes


def plain(shape):
  return tuple(sorted(side for side in shape if side > 1))


def assert_expected_collectives(shape):
  """Checks that only gradients, sums over heads and hidden units are reduced, and only weights are gathered."""
  _, _, fsdp, tensor = shape
  outputs = collections.defaultdict(set)
  for collective in trained(shape)[3].collectives:
    outputs[collective.kind] |= {plain(output) for output in collective.shapes}
  weights = parameter_shard_shapes(shape)
  size = BATCH // batch_shards_of(shape)
  sums = {plain((size, *rest)) for rest in ((2, 6, 16), (12, 16), (16,), (CLASSES,), ())} if tensor > 1 else set()
  # With both fsdp and tensor, shards of head and embedding weights are permuted; never activations.
  kinds = {'all-reduce'} | ({'all-gather'} if fsdp > 1 else set())
  kinds |= {'collective-permute'} if fsdp > 1 and tensor > 1 else set()
  assert outputs.keys() <= kinds
  assert outputs['all-reduce'] <= weights | sums
  assert outputs['all-gather'] | outputs['collective-permute'] <= weights
  assert not weights & {
    plain((size, 2, 6, 16)),
    plain((size, 12, 16)),
    plain((size, 2, 6, 40)),
  }  # shapes are unambiguous
  if fsdp > 1:
    assert outputs['all-gather'] >= {plain((16, 40 // tensor)), plain((16, 16 // tensor))}  # heads side by side
  if tensor > 1:
    assert plain((size, 2, 6, 16)) in outputs['all-reduce']


def batch_shards_of(shape):
  return math.prod(shape[:3])


def assert_sharded(shape):
  """Checks that all parameters except vectors, and their optimizer state, are sharded over fsdp."""
  state = trained(shape)[4]
  assert isinstance(state, TrainState)
  for name, x in {**arrays(state.params), **arrays(state.opt_state)}.items():
    shard = x.addressable_shards[0].data
    if x.nbytes > LIMIT:
      assert shard.nbytes <= x.nbytes / shape[2], name


def arrays(tree):
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in paths}


def assert_all(shape):
  assert_same_training(shape)
  assert_expected_collectives(shape)
  assert_sharded(shape)


@pytest.mark.parametrize('shape', SOME)
def test_meshes_train_alike_with_sharded_parameters(shape):
  assert_all(shape)


@pytest.mark.slow
@pytest.mark.parametrize('shape', [shape for shape in ALL if shape not in SOME])
def test_every_mesh_trains_alike_with_sharded_parameters(shape):
  assert_all(shape)


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {'accumulate': 3},
    {'unroll': 1},
    {'remat': 'block'},
    {'unroll': 1, 'remat': 'residuals'},
    {'frame_tokens': 2, 'pre_norm': True, 'activation': 'quick_gelu'},
  ],
)
def test_microbatches_loops_and_remat_on_a_mesh(changes):
  assert_same_training((1, 2, 2, 2) if 'accumulate' not in changes else (1, 2, 2, 1), **changes)


@pytest.mark.slow
@pytest.mark.parametrize('shape', SOME)
def test_meshes_train_alike_in_float32(shape):
  """Within float32 rounding, which is 1e-6 of the largest gradient."""
  losses, gradient, _, _, _ = trained(shape, dtype='float32')
  expected = trained((1, 1, 1, 1), dtype='float32')
  np.testing.assert_allclose(losses[0], expected[0][0], rtol=1e-6)
  np.testing.assert_allclose(losses, expected[0], rtol=2e-6)
  assert_close(gradient, expected[1], 2e-6)


@pytest.mark.parametrize(('size', 'mesh'), [('B/16', (1, 1, 8, 1)), ('L/16', (1, 1, 4, 2)), ('H/14', (2, 1, 4, 1))])
def test_arrays_over_a_mebibyte_are_sharded(size, mesh):
  sizes = variant(size)
  depth = sizes.pop('depth')
  config = MEViTConfig(classes=600, frames=32, space_blocks=depth // 3, motion_blocks=depth - depth // 3 - 1, **sizes)
  init = functools.partial(init_state, build_model(config), OPTIMIZER)
  state = jax.eval_shape(init, jax.random.key(0))
  shardings = arrays(param_shardings(state, mesh_of(mesh)))
  for name, x in arrays(state).items():
    if x.size * x.dtype.itemsize > 2**20:
      assert math.prod(shardings[name].shard_shape(x.shape)) == x.size // math.prod(expected_shards(name, mesh)), name


def expected_shards(name, mesh):
  """Returns the mesh axes that shard a parameter: fsdp and tensor in blocks, fsdp elsewhere."""
  return mesh[2:] if '/blocks/' in name else mesh[2:3]


def test_parameters_are_initialized_sharded():
  """The init program has no array as large as a full weight matrix."""
  config = dataclasses.replace(CONFIG, width=64, mlp_dim=256, dtype='float32', motion_init='zero')
  mesh = mesh_of((1, 1, 8, 1))
  init = functools.partial(init_state, build_model(config), OPTIMIZER)
  shardings = param_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
  text = jax.jit(init, out_shardings=shardings).lower(jax.random.key(0)).compile().as_text()
  largest = max(math.prod(map(int, sides.split(','))) for sides in re.findall(r'f32\[([\d,]+)\]', text))
  assert largest <= 64 * 256 // 8


def test_host_arrays_are_copied_as_shards():
  mesh = mesh_of((1, 2, 2, 2))
  params = first_params(dataclasses.replace(CONFIG, dtype='float32'))
  sharded = arrays(shard_params(params, mesh))
  for name, sharding in arrays(param_shardings(params, mesh)).items():
    assert sharded[name].sharding == sharding
    np.testing.assert_array_equal(sharded[name], arrays(params)[name])
