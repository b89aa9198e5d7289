"""The training step over meshes of every shape: the same numbers, weights in parts, no activation allgather_bytes."""

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
from mevit_jax.parallel.placement import batch_sharding, constrain_batch, place, put
from mevit_jax.planning.hlo import read_program
from mevit_jax.training.optimizer import make_optimizer
from mevit_jax.training.state import TrainState, create_state, init_state
from mevit_jax.training.steps import make_train_step

pytestmark = pytest.mark.usefixtures('compile_once')

CLASSES, BATCH, STEPS = 24, 24, 20
LIMIT = 1000  # bytes; biases and norms are below it
# No two sizes are alike: what is allgather_bytes can be told by its shape.
CONFIG = MEViTConfig(
  classes=CLASSES, frames=2, image_size=(15, 10), patch_size=(5, 5), width=16, heads=8, mlp_dim=40,
  space_blocks=1, motion_blocks=1, class_blocks=1, block_size=2, motion_init='random', drop_path=0.2, dtype='float64',
)  # fmt: skip
OPTIMIZER = make_optimizer(OptimizerConfig(weight_decay=0.0), lambda step: 0.02)


def shapes_of(devices):
  """Every mesh of so many devices: (slice, data, fsdp, tensor)."""
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
  """Random everywhere, so that every parameter has a gradient."""
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(config.dtype), build_model(config).abstract)


@functools.cache
def trained(shape, **changes):
  """20 steps on a mesh: losses, the first gradient, the last params, and the program."""
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
    shardings = place(jax.eval_shape(begin, params), mesh)
    state = jax.jit(begin, out_shardings=shardings)(put(params, mesh))
    batch = global_batch(video_and_labels(), batch_sharding(mesh))
    compiled = jax.jit(step, out_shardings=(shardings, None)).lower(state, batch).compile()
    losses, gradient = [], None
    for _ in range(STEPS):
      state, metrics = compiled(state, batch)
      losses.append(float(metrics['loss']))
      gradient = gradient or named(state.opt_state[1].trace)  # the momentum of the first step
    return losses, gradient, named(state.params), read_program(compiled.as_text()), state


def named(tree):
  """By name, but for key biases: their gradient is zero in exact arithmetic."""
  leaves = zip(parameter_shapes(tree), jax.tree.leaves(tree), strict=True)
  return {name: np.asarray(x) for name, x in leaves if not name.endswith('key/bias')}


def assert_close(tree, expected, tolerance):
  """As close as `tolerance` of each tensor's largest."""
  assert tree.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(tree[name], x, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=name)


def assert_same_training(shape, **changes):
  """In float64: losses, one gradient, and the parameters after 20 steps."""
  losses, gradient, params, _, _ = trained(shape, **changes)
  # Each part of an accumulated batch drops paths of its own: there one device does the same.
  parts = {name: value for name, value in changes.items() if name == 'accumulate'}
  expected = trained((1, 1, 1, 1), **parts)
  assert expected[0][-1] < expected[0][0] - 0.1  # it learns: these are no numbers at rest
  np.testing.assert_allclose(losses, expected[0], rtol=1e-12)
  assert_close(gradient, expected[1], 1e-12)
  assert_close(params, expected[2], 1e-12)


def parts_of_parameters(shape):
  """What a device holds of the parameters, or is sent when they are allgather_bytes over fsdp: sorted sides, without 1s."""
  _, _, fsdp, tensor = shape
  found = set()
  for name, whole in parameter_shapes(build_model(CONFIG).abstract).items():
    whole = whole[1:] if '/blocks/' in name else whole  # one block's
    found |= {plain(whole), plain((math.prod(whole[:-1]), whole[-1]))}  # the patch embedding is used flat
  # Positions are the sum of two parameters; the optimiser's sums are one a parameter.
  found |= {plain((CONFIG.frames, math.prod(CONFIG.grid), CONFIG.width)), plain((CONFIG.frames, CONFIG.width)), ()}
  for _ in range(2):  # cut over fsdp, over tensor, or both
    found |= {
      plain((*sides[:i], sides[i] // parts, *sides[i + 1 :]))
      for sides in found for i in range(len(sides)) for parts in (fsdp, tensor) if sides[i] % parts == 0
    }  # fmt: skip
  return found


def plain(shape):
  return tuple(sorted(side for side in shape if side > 1))


def assert_collectives_as_they_should(shape):
  """Gradients are reduced, weights in parts are allgather_bytes, and sums over heads and hidden units are completed."""
  _, _, fsdp, tensor = shape
  made = collections.defaultdict(set)
  for collective in trained(shape)[3].collectives:
    made[collective.kind] |= {plain(one) for one in collective.shapes}
  weights = parts_of_parameters(shape)
  rows = BATCH // row_shards_of(shape)
  sums = {plain((rows, *rest)) for rest in ((2, 6, 16), (12, 16), (16,), (CLASSES,), ())} if tensor > 1 else set()
  # Where both cut weights, a part of the head's and of the embedding's is passed on; never an activation.
  kinds = {'all-reduce'} | ({'all-gather'} if fsdp > 1 else set())
  kinds |= {'collective-permute'} if fsdp > 1 and tensor > 1 else set()
  assert made.keys() <= kinds
  assert made['all-reduce'] <= weights | sums
  assert made['all-gather'] | made['collective-permute'] <= weights
  assert not weights & {plain((rows, 2, 6, 16)), plain((rows, 12, 16)), plain((rows, 2, 6, 40))}  # nor are told apart
  if fsdp > 1:
    assert made['all-gather'] >= {plain((16, 40 // tensor)), plain((16, 16 // tensor))}  # heads side by side
  if tensor > 1:
    assert plain((rows, 2, 6, 16)) in made['all-reduce']


def row_shards_of(shape):
  return math.prod(shape[:3])


def assert_in_parts(shape):
  """No parameter but vectors is whole on a device, nor what the optimiser keeps of it, where fsdp is to part them."""
  state = trained(shape)[4]
  assert isinstance(state, TrainState)
  for name, x in {**arrays(state.params), **arrays(state.opt_state)}.items():
    part = x.addressable_shards[0].data
    if x.nbytes > LIMIT:
      assert part.nbytes <= x.nbytes / shape[2], name


def arrays(tree):
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in paths}


def assert_all(shape):
  assert_same_training(shape)
  assert_collectives_as_they_should(shape)
  assert_in_parts(shape)


@pytest.mark.parametrize('shape', SOME)
def test_meshes_train_alike_in_parts(shape):
  assert_all(shape)


@pytest.mark.slow
@pytest.mark.parametrize('shape', [shape for shape in ALL if shape not in SOME])
def test_every_mesh_trains_alike_in_parts(shape):
  assert_all(shape)


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes', [{'accumulate': 3}, {'unroll': 1}, {'remat': 'block'}, {'unroll': 1, 'remat': 'residuals'}]
)
def test_parts_of_a_batch_loops_and_remat_over_a_mesh(changes):
  assert_same_training((1, 2, 2, 2) if 'accumulate' not in changes else (1, 2, 2, 1), **changes)


@pytest.mark.slow
@pytest.mark.parametrize('shape', SOME)
def test_meshes_train_alike_in_float32(shape):
  """As near as float32 goes: the gradients' own rounding is 1e-6 of their largest."""
  losses, gradient, _, _, _ = trained(shape, dtype='float32')
  expected = trained((1, 1, 1, 1), dtype='float32')
  np.testing.assert_allclose(losses[0], expected[0][0], rtol=1e-6)
  np.testing.assert_allclose(losses, expected[0], rtol=2e-6)
  assert_close(gradient, expected[1], 2e-6)


@pytest.mark.parametrize(('size', 'mesh'), [('B/16', (1, 1, 8, 1)), ('L/16', (1, 1, 4, 2)), ('H/14', (2, 1, 4, 1))])
def test_nothing_over_a_mebibyte_is_whole_on_a_device(size, mesh):
  sizes = variant(size)
  depth = sizes.pop('depth')
  config = MEViTConfig(classes=600, frames=32, space_blocks=depth // 3, motion_blocks=depth - depth // 3 - 1, **sizes)
  init = functools.partial(init_state, build_model(config), OPTIMIZER)
  state = jax.eval_shape(init, jax.random.key(0))
  shardings = arrays(place(state, mesh_of(mesh)))
  for name, x in arrays(state).items():
    if x.size * x.dtype.itemsize > 2**20:
      assert math.prod(shardings[name].shard_shape(x.shape)) == x.size // math.prod(parts_asked(name, mesh)), name


def parts_asked(name, mesh):
  """Blocks are cut over fsdp and tensor, what stands before and after them over fsdp."""
  return mesh[2:] if '/blocks/' in name else mesh[2:3]


def test_parameters_are_made_in_parts():
  """The program that makes a state holds no array as large as a whole weight matrix."""
  config = dataclasses.replace(CONFIG, width=64, mlp_dim=256, dtype='float32', motion_init='zero')
  mesh = mesh_of((1, 1, 8, 1))
  init = functools.partial(init_state, build_model(config), OPTIMIZER)
  shardings = place(jax.eval_shape(init, jax.random.key(0)), mesh)
  text = jax.jit(init, out_shardings=shardings).lower(jax.random.key(0)).compile().as_text()
  largest = max(math.prod(map(int, sides.split(','))) for sides in re.findall(r'f32\[([\d,]+)\]', text))
  assert largest <= 64 * 256 // 8


def test_host_arrays_are_put_in_parts():
  mesh = mesh_of((1, 2, 2, 2))
  params = first_params(dataclasses.replace(CONFIG, dtype='float32'))
  placed = put(params, mesh)
  for name, sharding in arrays(place(params, mesh)).items():
    assert arrays(placed)[name].sharding == sharding
    np.testing.assert_array_equal(arrays(placed)[name], arrays(params)[name])
