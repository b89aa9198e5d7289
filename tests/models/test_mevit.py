"""What holds of a MEViT, whatever its weights."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import assert_close, random_params, random_video

from mevit_jax.models.attention import Heads, attend, motion_attention
from mevit_jax.models.config import MEViTConfig
from mevit_jax.models.functional import build_model, names_of, start_motion

TINY = MEViTConfig(
  classes=5,
  frames=2,
  image_size=(3, 2),
  patch_size=1,
  width=8,
  heads=2,
  mlp_dim=16,
  space_blocks=1,
  motion_blocks=1,
  class_blocks=1,
  dtype='float32',
)


@functools.cache
def case(**fields):
  """A model, random params and a video; the same params wherever their names and shapes are."""
  model = build_model(dataclasses.replace(TINY, **fields))
  return model, random_params(model), random_video(model.config)


def edited(params, path, change):
  """Params with a change at a path, which may stop at a branch."""
  name, _, rest = path.partition('/')
  new = edited(params[name], rest, change) if rest else jax.tree.map(change, params[name])
  return {**params, name: new}


def value_and_grad(model, params, video, key=None):
  def loss(params):
    logits = model.apply(params, video, key)
    return jnp.sum(jnp.sin(logits)), logits

  return jax.value_and_grad(loss, has_aux=True)(params)


# One loop, however it is compiled.


@functools.cache
def gradients(**fields):
  """Gradients of all but key biases, whose own is nothing but rounding."""
  model, params, video = case(space_blocks=2, motion_blocks=0, class_blocks=0, **fields)
  _, gradients = jax.jit(functools.partial(value_and_grad, model))(params, video)
  named = zip(names_of(gradients), jax.tree.leaves(gradients), strict=True)
  return {name: x for name, x in named if not name.endswith('key/bias')}


@pytest.mark.parametrize('fields', [{'unroll': 1}, {'remat': 'block'}, {'remat': 'residuals'}], ids=str)
def test_unroll_and_remat_leave_gradients_as_they_are(fields):
  assert_close(gradients(**fields), gradients(), 2e-6)


@pytest.mark.parametrize(('depths', 'unroll'), [((0, 2, 2), 1), ((3, 0, 0), 2)])
def test_a_scan_is_the_loop(depths, unroll):
  fields = dict(zip(('space_blocks', 'motion_blocks', 'class_blocks'), depths, strict=True))
  loop, params, video = case(**fields, drop_path=0.5)
  scan, _, _ = case(**fields, drop_path=0.5, unroll=unroll)
  outputs = (jax.jit(model.tokens)(params, video, jax.random.key(0)) for model in (scan, loop))
  assert_close(*outputs, 2e-6)


def test_remat_keeps_less_for_the_backward_pass():
  def kept(remat):
    model, params, video = case(motion_blocks=2, remat=remat)
    backward = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply(p, video), p)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))

  assert kept('block') < kept('residuals') < kept('none')


def test_jit_is_eager():
  model, params, video = case(space_blocks=0, motion_blocks=0)
  assert_close(jax.jit(model.apply)(params, video), model.apply(params, video), 1e-6)


# Motion attention.


def random_heads(*shape):
  rng = np.random.default_rng(0)
  return Heads(*rng.standard_normal((3, *shape, 2, 4)).astype(np.float32))


def motion(grid, block_size, frames=3, token=True):
  """A config, and heads of its patches and of a class token."""
  config = dataclasses.replace(TINY, image_size=grid, block_size=block_size)
  patches = random_heads(2, frames, grid[0] * grid[1])
  return config, patches, random_heads(2) if token else None


def joint(queries, keys, values, b):
  """What each of a list of places reads of them all, one example in float64: eqs. 3 and 4."""
  places = range(len(queries))
  k, v = ({x: np.float64(part[x][b]) for x in places} for part in (keys, values))
  return np.stack([naive.attend(np.float64(queries[x][b]), k, v, places) for x in places])


def test_the_whole_grid_as_block_is_joint_space_time_attention():
  config, patches, token = motion((2, 3), 3)
  output, token_output = motion_attention(patches, token, config)
  flat = (x.reshape(2, -1, 2, 4).swapaxes(0, 1) for x in patches)  # t·n b h k
  heads = [[one, *many] for one, many in zip(token, flat, strict=True)]
  for b in range(2):
    expected = joint(*heads, b)
    assert_close([token_output[b], output[b].reshape(-1, 2, 4)], [expected[0], expected[1:]], 1e-6)


def test_blocks_of_one_patch_are_time_attention():
  config, patches, _ = motion((2, 3), 1, token=False)
  output, _ = motion_attention(patches, None, config)
  for b in range(2):
    for p in range(6):
      expected = joint(*(x[:, :, p].swapaxes(0, 1) for x in patches), b)  # eq. 7
      assert_close(output[b, :, p], expected, 1e-6)


@pytest.mark.parametrize('what', ['equal blocks', 'patches within each block'])
def test_motion_attention_follows_a_permutation(what):
  config, patches, token = motion((5, 4), 2)  # four blocks of 2x2 patches, then two of 1x2
  rng = np.random.default_rng(1)
  blocks = np.split(np.arange(20), [4, 8, 12, 16, 18])
  if what == 'equal blocks':
    order = [np.concatenate([blocks[i] for i in [2, 3, 1, 0, 5, 4]])] * 3
  else:
    order = [np.concatenate([rng.permutation(block) for block in blocks]) for _ in range(3)]

  def permuted(x):
    return np.take_along_axis(np.asarray(x), np.stack(order)[None, :, :, None, None], axis=2)

  output, token_output = motion_attention(patches, token, config)
  moved = motion_attention(Heads(*map(permuted, patches)), token, config)
  assert_close(moved, (permuted(output), token_output), 1e-6)


def test_motion_attention_reads_its_own_block_only():
  config, patches, _ = motion((5, 4), 2, token=False)
  change = np.zeros((2, 3, 20, 2, 4), np.float32)
  change[:, 1, 16] = 1  # the first patch of the first of the two smaller blocks, in one frame
  before, _ = motion_attention(patches, None, config)
  after, _ = motion_attention(Heads(*(x + change for x in patches)), None, config)
  changed = np.any(np.asarray(before != after), axis=(0, 3, 4))  # t n
  assert changed[:, 16:18].all()
  assert changed.sum() == 3 * 2


# The start of training.


def without_motion(params):
  """The blocks of space and motion as blocks of space alone, with the same weights."""
  blocks = {**params['motion']['blocks']}
  del blocks['motion_attention']
  both = jax.tree.map(lambda *x: np.concatenate(x), params['space']['blocks'], blocks)
  return {**{k: v for k, v in params.items() if k != 'motion'}, 'space': {'blocks': both}}


@pytest.mark.parametrize('start', ['zero', 'copy'])
def test_motion_attention_adds_nothing_at_first(start):
  model, params, video = case(class_blocks=0)
  still, _, _ = case(space_blocks=2, motion_blocks=0, class_blocks=0)
  params = start_motion(params, start)
  tokens = jax.jit(model.tokens)(params, video)
  expected = jax.jit(still.tokens)(without_motion(params), video)
  distance = max(np.abs(a - e).max() for a, e in zip(tokens, expected, strict=True))
  assert distance < 1e-5 if start == 'zero' else distance > 0.1


def test_motion_attention_starts_from_space_attention():
  zero, copy, random = (start_motion(case()[1], start)['motion']['blocks'] for start in ('zero', 'copy', 'random'))
  space = random['space_attention']
  jax.tree.map(np.testing.assert_array_equal, copy['motion_attention'], space)
  for part in ('norm', 'query', 'key', 'value'):
    jax.tree.map(np.testing.assert_array_equal, zero['motion_attention'][part], space[part])
  assert not any(np.any(x) for x in jax.tree.leaves(zero['motion_attention']['out']))
  assert np.any(random['motion_attention']['query']['kernel'] != space['query']['kernel'])


def test_every_kernel_is_a_draw_of_its_own():
  model, _, _ = case(motion_start='random', space_blocks=2, motion_blocks=2, class_blocks=2)
  params = jax.jit(model.init)(jax.random.key(0))
  kernels = [
    np.ravel(kernel)
    for stage in ('space', 'motion', 'classify')
    for path, leaf in jax.tree_util.tree_leaves_with_path(params[stage])
    if 'kernel' in jax.tree_util.keystr(path)
    for kernel in leaf
  ]
  assert len({kernel.tobytes() for kernel in kernels}) == len(kernels) == 2 * (6 + 10 + 6)


def test_positions_start_at_the_scale_of_the_patches():
  config = dataclasses.replace(TINY, width=256, heads=8, image_size=(24, 24), patch_size=8)
  model = build_model(config)
  embedding = jax.jit(lambda key: model.init(key)['embedding'])(jax.random.key(0))
  pixels = random_video(config)[:, :, :8, :8]
  patches = np.einsum('bthwc,hwcd->btd', pixels, embedding['kernel'])
  for position in (embedding['space'], embedding['time']):
    np.testing.assert_allclose(np.std(position), np.std(patches), rtol=0.15)


# Stochastic depth.

UPDATES = {
  'space': ('space_attention', 'mlp'),
  'motion': ('space_attention', 'motion_attention', 'mlp'),
  'classify': ('class_attention', 'mlp'),
}
EXAMPLES = 400


def updates(config):
  """Every update of the tokens in their order: the rate of its block, and its output layer: path, i-th of stage."""
  depths = (config.space_blocks, config.motion_blocks, config.class_blocks)
  blocks = [(stage, i) for stage, depth in zip(UPDATES, depths, strict=True) for i in range(depth)]
  for block, (stage, i) in enumerate(blocks):
    for name in UPDATES[stage]:
      layer = 'down' if name == 'mlp' else 'out'
      yield config.drop_path * block / (len(blocks) - 1), f'{stage}/blocks/{name}/{layer}', i


def alone(config, params, path, i):
  """Params with which one update alone adds to the tokens."""
  for other in {other for _, other, _ in updates(config)}:
    keep = i if other == path else None
    params = edited(params, other, lambda x, keep=keep: np.stack([one * (j == keep) for j, one in enumerate(x)]))
  return params


@functools.cache
def drawn(classify):
  """Of every update: its rate, the tokens `example, number` without it, with it and trained."""
  stages = {'space_blocks': classify, 'motion_blocks': 2 - classify, 'class_blocks': classify}
  model, params, video = case(**stages, image_size=(2, 1), drop_path=0.5)
  video, key = np.repeat(video[:1], EXAMPLES, axis=0), jax.random.key(0)

  @jax.jit
  def run(params, key):
    patches, token = model.tokens(params, video, key)
    return jnp.concatenate([patches.reshape(EXAMPLES, -1), token], axis=1)

  without = run(alone(model.config, params, None, None), None)
  result = []
  for rate, path, i in updates(model.config):
    one = alone(model.config, params, path, i)
    result.append((rate, without, run(one, None), run(one, key)))
  return jax.tree.map(np.asarray, result)


def dropped(without, update, trained):
  """Which examples lack the update."""
  return np.abs(trained - without).max(1) < np.abs(update - without).max(1) / 2


@pytest.mark.parametrize('classify', [0, 1])
def test_drop_path_drops_whole_examples_and_keeps_the_expectation(classify):
  for rate, without, update, trained in drawn(classify):
    drop = dropped(without, update, trained)
    assert np.abs(drop.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / EXAMPLES)
    scaled = without + (update - without) / (1 - rate)
    np.testing.assert_allclose(trained, np.where(drop[:, None], without, scaled), atol=1e-5)


def test_rates_rise_from_zero_at_the_first_block_to_the_configs_at_the_last():
  assert [float(rate) for rate, *_ in drawn(1)] == [0, 0, 0.25, 0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize('classify', [0, 1])
def test_every_update_is_dropped_by_a_draw_of_its_own(classify):
  drops = [dropped(*tokens) for rate, *tokens in drawn(classify) if rate > 0]
  for a, b in itertools.permutations(drops, 2):
    assert np.any(a & ~b)  # of one draw, the lower rate's examples are among the higher's


# What reaches what.


def test_class_blocks_leave_the_patches_as_they_are():
  model, params, video = case()
  tokens = jax.jit(model.tokens)
  patches, token = tokens(params, video)
  other_patches, other_token = tokens(edited(params, 'classify', lambda x: 2 * x), video)
  np.testing.assert_array_equal(patches, other_patches)
  assert np.abs(token - other_token).max() > 0.1


def test_order_matters():
  first, params, video = case()
  second, _, _ = case(order='time_space')
  assert names_of(first.abstract) == names_of(second.abstract)
  distance = jax.jit(first.apply)(params, video) - jax.jit(second.apply)(params, video)
  assert np.abs(distance).max() > 0.1


@pytest.mark.parametrize('classify', [0, 1])
def test_every_parameter_has_a_gradient_but_key_biases(classify):
  model, params, video = case(class_blocks=classify)
  _, gradients = jax.jit(functools.partial(value_and_grad, model))(params, video)
  names = names_of(gradients)
  for name, gradient in zip(names, jax.tree.leaves(gradients), strict=True):
    assert np.all(np.isfinite(gradient)), name
    # A bias of all keys alike moves all logits of a softmax alike.
    assert (np.abs(gradient).max() > 1e-3) != name.endswith('key/bias'), name


# Precision.


def test_bfloat16_is_for_the_computation_alone():
  exact, params, video = case(drop_path=0.1)
  model, _, _ = case(drop_path=0.1, dtype='bfloat16')
  assert {leaf.dtype for leaf in jax.tree.leaves(model.abstract)} == {jnp.dtype('float32')}
  assert all(token.dtype == jnp.bfloat16 for token in jax.eval_shape(model.tokens, params, video))
  trained = jax.eval_shape(functools.partial(value_and_grad, model), params, video, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype('float32')}
  logits, expected = (jax.jit(one.apply)(params, video) for one in (model, exact))
  assert 0 < np.abs(logits - expected).max() < 0.03 * np.abs(expected).max()


def test_softmax_of_bfloat16_heads_is_float32():
  heads = [2 * x for x in random_heads(2, 16)]  # bfloat16 would move such logits by a few per cent
  heads = Heads(*(jnp.asarray(x, jnp.bfloat16) for x in heads))
  output = attend(*heads)  # b s h k
  for b in range(2):
    assert_close(output[b], joint(*(x.swapaxes(0, 1) for x in heads), b), 1.5 * 2**-8)


# The paper's models.

ROWS = {
  **{f'table 1, M={size}': (0, 12, 0, size, 8) for size in (1, 2, 3, 7, 14)},
  **{f'table 2, {i}+{j}': (0, i, j, 2, 8) for i, j in ((9, 3), (10, 2), (11, 1), (12, 1))},
  **{f'table 3, L_t={late}': (12 - late, late, 0, 2, 8) for late in (0, 2, 4, 8, 12)},
  'our model': (4, 7, 1, 2, 8),
  'our model (16x)': (4, 7, 1, 2, 16),
}


@pytest.mark.parametrize('row', ROWS.values(), ids=ROWS.keys())
def test_every_row_of_the_papers_tables_builds(row):
  space, motion, classify, size, frames = row
  config = MEViTConfig(
    classes=400,
    frames=frames,
    space_blocks=space,
    motion_blocks=motion,
    class_blocks=classify,
    block_size=size,
    unroll=1,
  )
  model = build_model(config)
  assert config.grid == (14, 14)
  video = jax.ShapeDtypeStruct((2, frames, 224, 224, 3), jnp.bfloat16)
  logits = jax.eval_shape(model.apply, model.abstract, video)
  assert (logits.shape, logits.dtype) == ((2, 400), jnp.float32)
  assert all(leaf.size for leaf in jax.tree.leaves(model.abstract))
