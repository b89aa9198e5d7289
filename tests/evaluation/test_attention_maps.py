"""Attention maps against the model's attention and against matrices over all tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.config.model import MEViTConfig
from mevit_jax.evaluation import attention_maps
from mevit_jax.models.attention import attend, motion_attention, space_attention
from mevit_jax.models.functional import build_model
from mevit_jax.models.order import from_block_order
from tests.helpers.naive import random_params, random_video


def tiny(grid, frames, stages, block_size, **fields):
  """Config of a grid of patches of one pixel."""
  space, motion, classify = stages
  sizes = {'classes': 3, 'width': 8, 'heads': 2, 'mlp_dim': 12, 'dtype': 'float32', 'patch_size': 1}
  blocks = {'space_blocks': space, 'motion_blocks': motion, 'class_blocks': classify, 'block_size': block_size}
  return MEViTConfig(**sizes, **blocks, frames=frames, image_size=grid, **fields)


CONFIGS = {
  'three stages, M=2 divides one side': tiny((5, 4), 3, (1, 2, 2), 2),
  'class token from the input, M=3 divides neither side': tiny((7, 4), 2, (1, 1, 0), 3),
  'time first, class token left out of motion': tiny(
    (3, 5), 3, (0, 2, 0), 2, attention_order='time_space', class_token_in_motion=False
  ),
  'frame tokens, three stages': tiny((5, 4), 2, (1, 1, 1), 2, frame_tokens=2),
  'frame tokens instead of the class token': tiny((3, 5), 3, (1, 1, 0), 2, frame_tokens=3),
}


def attention_layers(config, blocks):
  """Returns every block with the name of each of its attentions."""
  return [(block, name) for block in blocks for name in attention_maps.attention_names(block, config)]


def added(block, name, config):
  """Returns the input of a block's output projection, for patches in raster order and for the class token.

  In space attention, the frame tokens are behind the patches.
  """
  patches, token = block[name]
  if name == 'class':
    return None, attend(*patches)[:, 0]
  output, token_output = (space_attention if name == 'space' else motion_attention)(patches, token, config)
  flat = output.reshape(*output.shape[:3], -1)  # b t n+f h·k
  raster = from_block_order(flat[:, :, : config.patches], config)  # b t rows columns h·k
  both = [part.reshape(2, -1, *output.shape[-2:]) for part in (raster, flat[:, :, config.patches :])]
  return jnp.concatenate(both, axis=1), token_output


@pytest.fixture(scope='module', params=CONFIGS.values(), ids=CONFIGS.keys())
def traced(request, exact_and_fast):
  """Returns, for random params and two clips: config, inputs of the blocks, groups, updates, and the maps."""
  config, model = request.param, build_model(request.param)
  params, video = random_params(model), random_video(config, seed=1)

  def everything(params, video):
    blocks = model.trace(params, video, slice(None))
    groups = [attention_maps.attention_groups(block, name, config) for block, name in attention_layers(config, blocks)]
    adds = [added(block, name, config) for block, name in attention_layers(config, blocks)]
    return (
      blocks,
      groups,
      adds,
      attention_maps.attention_rollout(blocks, config),
      attention_maps.class_token_attention(blocks[-1], config),
    )

  return config, *jax.tree.map(np.asarray, jax.jit(everything)(params, video))


def test_weights_sum_to_one_and_reproduce_the_attention_output(traced):
  config, blocks, attentions, adds, *_ = traced
  for (_, name), groups, (patches, token) in zip(attention_layers(config, blocks), attentions, adds, strict=True):
    found = np.zeros((2, attention_maps.count_tokens(config), config.heads, config.width // config.heads))
    asked = np.zeros(attention_maps.count_tokens(config))
    for weights, values, queries, keys in groups:
      assert weights.shape == (2, len(queries), config.heads, queries.shape[1], keys.shape[1])
      np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
      output = np.einsum('bghqs,bgshk->bgqhk', weights, values)
      for g, members in enumerate(queries):
        found[:, members] += output[:, g]
        asked[members] += 1
    found /= np.maximum(asked, 1)[:, None, None]
    assert (patches is None) == (name == 'class')
    if patches is not None:
      np.testing.assert_allclose(found[:, : patches.shape[1]], patches, atol=1e-5)
    assert (asked[-1] > 0) == (token is not None)
    if token is not None:
      np.testing.assert_allclose(found[:, -1], token, atol=1e-5)


def matrix(config, block, name, clip):
  """Returns an attention over all tokens, `tokens tokens`, averaged over heads: eqs. 6, 8 and 10 token by token."""
  patches, token = jax.tree.map(lambda x: np.asarray(x[clip], np.float64), block[name])
  places = list(np.ndindex(config.frames, *config.grid))
  if config.frame_tokens:
    places += [(t, None, i) for t, i in np.ndindex(config.frames, config.frame_tokens)]
  last, size, patch_count = len(places), config.block_size, config.frames * config.patches
  group = {
    'space': lambda t, row, column: t,
    'motion': lambda t, row, column: (row // size, column // size),
    'class': lambda t, row, column: 'all',
  }[name]

  def listed(which):  # `h k` by position
    flat = patches[which].reshape(config.frames, -1, config.width).astype(np.float32)
    raster = np.asarray(from_block_order(flat[:, : config.patches], config)).reshape(patch_count, config.heads, -1)
    others = flat[:, config.patches :].reshape(-1, *raster.shape[1:])
    others = np.concatenate([others, np.zeros((last - patch_count - len(others), *raster.shape[1:]), np.float32)])
    return np.concatenate([raster, others, np.zeros_like(raster[:1]) if token is None else token[which][None]])

  k = listed(1)
  q = np.concatenate([np.zeros_like(k[:-1]), patches[0]]) if name == 'class' else listed(0)
  found = np.eye(last + 1)  # a token that is not a query keeps its value
  taking_part = list(enumerate(places if name == 'space' else places[:patch_count]))
  groups = {group(*x) for _, x in taking_part}
  members = {g: [i for i, x in taking_part if group(*x) == g] + [last] * (token is not None) for g in groups}

  def row(i, keys):
    logits = np.einsum('hk,shk->hs', q[i], k[keys]) / math.sqrt(q.shape[-1])
    alpha = np.exp(logits)
    out = np.zeros(last + 1)
    out[keys] = (alpha / alpha.sum(1, keepdims=True)).mean(0)
    return out

  if name != 'class':
    for i, x in taking_part:
      found[i] = row(i, members[group(*x)])
  if name == 'class' or token is not None:
    found[last] = np.mean([row(last, members[g]) for g in groups], axis=0)
  return found


def test_propagation_equals_the_full_matrix_and_rollout_their_product(traced):
  config, blocks, attentions, _, rollout, class_attention = traced
  tokens, clip = attention_maps.count_tokens(config), 1
  one_by_one = jax.jit(jax.vmap(attention_maps.propagate_relevance, (0, None)))
  product = np.eye(tokens)
  for (block, name), groups in zip(attention_layers(config, blocks), attentions, strict=True):
    groups = [group._replace(weights=group.weights[clip:][:1]) for group in groups]
    expected = matrix(config, block, name, clip)
    np.testing.assert_allclose(one_by_one(np.eye(tokens)[:, None], groups)[:, 0], expected, atol=1e-5)
    product = (expected + np.eye(tokens)) / 2 @ product
  replaced = config.frame_tokens and not config.class_blocks
  first = [config.frames * config.patches + t * config.frame_tokens for t in range(config.frames)] if replaced else [-1]
  np.testing.assert_allclose(rollout[clip], product[first].mean(0), atol=1e-5)
  assert not np.allclose(rollout[0], rollout[1], atol=1e-4)
  expected = matrix(config, blocks[-1], 'class' if config.class_blocks else 'space', clip)[first].mean(0)
  np.testing.assert_allclose(class_attention[clip], expected, atol=1e-5)


def test_maps_have_the_shape_of_the_grid():
  config = CONFIGS['three stages, M=2 divides one side']
  relevance = attention_maps.one_hot_relevance(1 * 20 + 3 * 4 + 2, 1, config)
  assert np.argwhere(attention_maps.to_grid(relevance, config)).tolist() == [[0, 1, 3, 2]]
