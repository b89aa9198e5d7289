"""Properties of the model for any weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.functional import build_model, init_motion, parameter_shapes
from tests.helpers.cases import TINY, case, edited
from tests.helpers.naive import assert_close, random_video


def value_and_grad(model, params, video, key=None):
  def loss(params):
    logits = model.apply(params, video, key)
    return jnp.sum(jnp.sin(logits)), logits

  return jax.value_and_grad(loss, has_aux=True)(params)


# Equal results for every way of compiling the loop over blocks.


@functools.cache
def gradients(**fields):
  """Returns the gradients except for key biases, whose exact gradient is zero."""
  model, params, video = case(space_blocks=2, motion_blocks=0, class_blocks=0, **fields)
  _, gradients = jax.jit(functools.partial(value_and_grad, model))(params, video)
  named = zip(parameter_shapes(gradients), jax.tree.leaves(gradients), strict=True)
  return {name: x for name, x in named if not name.endswith('key/bias')}


@pytest.mark.parametrize('fields', [{'unroll': 1}, {'remat': 'block'}, {'remat': 'residuals'}], ids=str)
def test_unroll_and_remat_do_not_change_gradients(fields):
  assert_close(gradients(**fields), gradients(), 2e-6)


@pytest.mark.parametrize(('depths', 'unroll'), [((0, 2, 2), 1), ((3, 0, 0), 2)])
def test_scan_equals_the_unrolled_loop(depths, unroll):
  fields = dict(zip(('space_blocks', 'motion_blocks', 'class_blocks'), depths, strict=True))
  loop, params, video = case(**fields, drop_path=0.5)
  scan, _, _ = case(**fields, drop_path=0.5, unroll=unroll)
  outputs = (jax.jit(model.tokens)(params, video, jax.random.key(0)) for model in (scan, loop))
  assert_close(*outputs, 2e-6)


def test_remat_stores_less_for_the_backward_pass():
  def kept(remat):
    model, params, video = case(motion_blocks=2, remat=remat)
    backward = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply(p, video), p)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))

  assert kept('block') < kept('residuals') < kept('none')


def test_jit_equals_eager():
  model, params, video = case(space_blocks=0, motion_blocks=0)
  assert_close(jax.jit(model.apply)(params, video), model.apply(params, video), 1e-6)


# Initialization.


def without_motion(params):
  """Returns space and motion blocks as space blocks with the same weights."""
  blocks = {**params['motion']['blocks']}
  del blocks['motion_attention']
  both = jax.tree.map(lambda *x: np.concatenate(x), params['space']['blocks'], blocks)
  return {**{k: v for k, v in params.items() if k != 'motion'}, 'space': {'blocks': both}}


@pytest.mark.parametrize('start', ['zero', 'copy'])
def test_motion_attention_adds_nothing_at_first(start):
  model, params, video = case(class_blocks=0)
  still, _, _ = case(space_blocks=2, motion_blocks=0, class_blocks=0)
  params = init_motion(params, dataclasses.replace(model.config, motion_init=start))
  tokens = jax.jit(model.tokens)(params, video)
  expected = jax.jit(still.tokens)(without_motion(params), video)
  distance = max(np.abs(a - e).max() for a, e in zip(tokens, expected, strict=True))
  assert distance < 1e-5 if start == 'zero' else distance > 0.1


def test_motion_attention_is_initialized_from_space_attention():
  model, params, _ = case()
  zero, copy, random = (
    init_motion(params, dataclasses.replace(model.config, motion_init=start))['motion']['blocks']
    for start in ('zero', 'copy', 'random')
  )
  space = random['space_attention']
  jax.tree.map(np.testing.assert_array_equal, copy['motion_attention'], space)
  for part in ('norm', 'query', 'key', 'value'):
    jax.tree.map(np.testing.assert_array_equal, zero['motion_attention'][part], space[part])
  assert not any(np.any(x) for x in jax.tree.leaves(zero['motion_attention']['out']))
  assert np.any(random['motion_attention']['query']['kernel'] != space['query']['kernel'])


def test_kernels_are_initialized_independently():
  model, _, _ = case(motion_init='random', space_blocks=2, motion_blocks=2, class_blocks=2)
  params = jax.jit(model.init)(jax.random.key(0))
  kernels = [
    np.ravel(kernel)
    for stage in ('space', 'motion', 'class')
    for path, leaf in jax.tree_util.tree_leaves_with_path(params[stage])
    if 'kernel' in jax.tree_util.keystr(path)
    for kernel in leaf
  ]
  assert len({kernel.tobytes() for kernel in kernels}) == len(kernels) == 2 * (6 + 10 + 6)


def test_positions_are_initialized_at_the_scale_of_the_patches():
  config = dataclasses.replace(TINY, width=256, heads=8, image_size=(24, 24), patch_size=8)
  model = build_model(config)
  embedding = jax.jit(lambda key: model.init(key)['embedding'])(jax.random.key(0))
  pixels = random_video(config)[:, :, :8, :8]
  patches = np.einsum('bthwc,hwcd->btd', pixels, embedding['kernel'])
  for position in (embedding['space'], embedding['time']):
    np.testing.assert_allclose(np.std(position), np.std(patches), rtol=0.15)


# Dependencies between tokens.


def test_class_blocks_do_not_change_patch_tokens():
  model, params, video = case()
  tokens = jax.jit(model.tokens)
  patches, token = tokens(params, video)
  other_patches, other_token = tokens(edited(params, 'class', lambda x: 2 * x), video)
  np.testing.assert_array_equal(patches, other_patches)
  assert np.abs(token - other_token).max() > 0.1


def test_the_order_of_frames_matters():
  first, params, video = case(motion_blocks=3)
  second, _, _ = case(motion_blocks=3, attention_order='time_space')
  assert parameter_shapes(first.abstract) == parameter_shapes(second.abstract)
  distance = jax.jit(first.apply)(params, video) - jax.jit(second.apply)(params, video)
  assert np.abs(distance).max() > 0.1


@pytest.mark.parametrize('class_blocks', [0, 1])
def test_every_parameter_except_key_biases_has_a_gradient(class_blocks):
  model, params, video = case(class_blocks=class_blocks)
  _, gradients = jax.jit(functools.partial(value_and_grad, model))(params, video)
  names = parameter_shapes(gradients)
  for name, gradient in zip(names, jax.tree.leaves(gradients), strict=True):
    assert np.all(np.isfinite(gradient)), name
    # A bias shared by all keys shifts all logits of a softmax equally.
    assert (np.abs(gradient).max() > 1e-3) != name.endswith('key/bias'), name


# Numerical precision.


def test_bfloat16_is_used_only_for_computation():
  exact, params, video = case(drop_path=0.1)
  model, _, _ = case(drop_path=0.1, dtype='bfloat16')
  assert {leaf.dtype for leaf in jax.tree.leaves(model.abstract)} == {jnp.dtype('float32')}
  assert all(token.dtype == jnp.bfloat16 for token in jax.eval_shape(model.tokens, params, video))
  trained = jax.eval_shape(functools.partial(value_and_grad, model), params, video, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype('float32')}
  logits, expected = (jax.jit(one.apply)(params, video) for one in (model, exact))
  assert 0 < np.abs(logits - expected).max() < 0.03 * np.abs(expected).max()


# Models of the paper.

ROWS = {
  **{f'table 1, M={size}': (0, 12, 0, size, 8) for size in (1, 2, 3, 7, 14)},
  **{f'table 2, {i}+{j}': (0, i, j, 2, 8) for i, j in ((9, 3), (10, 2), (11, 1), (12, 1))},
  **{f'table 3, L_t={late}': (12 - late, late, 0, 2, 8) for late in (0, 2, 4, 8, 12)},
  'our model': (4, 7, 1, 2, 8),
  'our model (16x)': (4, 7, 1, 2, 16),
}


@pytest.mark.parametrize('row', ROWS.values(), ids=ROWS.keys())
def test_every_model_of_the_papers_tables_builds(row):
  space, motion, class_blocks, size, frames = row
  config = MEViTConfig(
    classes=400,
    frames=frames,
    space_blocks=space,
    motion_blocks=motion,
    class_blocks=class_blocks,
    block_size=size,
    unroll=1,
  )
  model = build_model(config)
  assert config.grid == (14, 14)
  video = jax.ShapeDtypeStruct((2, frames, 224, 224, 3), jnp.bfloat16)
  logits = jax.eval_shape(model.apply, model.abstract, video)
  assert (logits.shape, logits.dtype) == ((2, 400), jnp.float32)
  assert all(leaf.size for leaf in jax.tree.leaves(model.abstract))
