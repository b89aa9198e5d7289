"""Stochastic depth: whole examples, rising rates, draws that are each update's own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.cases import case, edited

UPDATES = {
  'space': ('space_attention', 'mlp'),
  'motion': ('space_attention', 'motion_attention', 'mlp'),
  'class': ('class_attention', 'mlp'),
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
def drawn(class_blocks):
  """Of every update: its rate, the tokens `example, number` without it, with it and trained."""
  stages = {'space_blocks': class_blocks, 'motion_blocks': 2 - class_blocks, 'class_blocks': class_blocks}
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


@pytest.mark.parametrize('class_blocks', [0, 1])
def test_drop_path_drops_whole_examples_and_keeps_the_expectation(class_blocks):
  for rate, without, update, trained in drawn(class_blocks):
    drop = dropped(without, update, trained)
    assert np.abs(drop.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / EXAMPLES)
    scaled = without + (update - without) / (1 - rate)
    np.testing.assert_allclose(trained, np.where(drop[:, None], without, scaled), atol=1e-5)


def test_rates_rise_from_zero_at_the_first_block_to_the_configs_at_the_last():
  assert [float(rate) for rate, *_ in drawn(1)] == [0, 0, 0.25, 0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize('class_blocks', [0, 1])
def test_every_update_is_dropped_by_a_draw_of_its_own(class_blocks):
  drops = [dropped(*tokens) for rate, *tokens in drawn(class_blocks) if rate > 0]
  for a, b in itertools.permutations(drops, 2):
    assert np.any(a & ~b)  # of one draw, the lower rate's examples are among the higher's
