"""Stochastic depth: drops examples, with rates that increase with depth and independent draws per update."""

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
  """Returns for every update, in order, the rate of its block and its output layer: path, index in the stage."""
  depths = (config.space_blocks, config.motion_blocks, config.class_blocks)
  blocks = [(stage, i) for stage, depth in zip(UPDATES, depths, strict=True) for i in range(depth)]
  for block, (stage, i) in enumerate(blocks):
    for name in UPDATES[stage]:
      layer = 'down' if name == 'mlp' else 'out'
      yield config.drop_path * block / (len(blocks) - 1), f'{stage}/blocks/{name}/{layer}', i


def alone(config, params, path, i):
  """Returns params with which only one update changes the tokens."""
  for other in {other for _, other, _ in updates(config)}:
    keep = i if other == path else None
    params = edited(params, other, lambda x, keep=keep: np.stack([one * (j == keep) for j, one in enumerate(x)]))
  return params


@functools.cache
def drawn(class_blocks):
  """Returns for every update its rate and the tokens `example, number` without it, with it, and in training."""
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
  """Returns which examples lack the update."""
  return np.abs(trained - without).max(1) < np.abs(update - without).max(1) / 2


@pytest.mark.parametrize('class_blocks', [0, 1])
def test_drop_path_drops_examples_and_keeps_the_expectation(class_blocks):
  for rate, without, update, trained in drawn(class_blocks):
    drop = dropped(without, update, trained)
    assert np.abs(drop.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / EXAMPLES)
    scaled = without + (update - without) / (1 - rate)
    np.testing.assert_allclose(trained, np.where(drop[:, None], without, scaled), atol=1e-5)


def test_rates_increase_from_zero_to_the_configured_rate():
  assert [float(rate) for rate, *_ in drawn(1)] == [0, 0, 0.25, 0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize('class_blocks', [0, 1])
def test_updates_are_dropped_independently(class_blocks):
  drops = [dropped(*tokens) for rate, *tokens in drawn(class_blocks) if rate > 0]
  for a, b in itertools.permutations(drops, 2):
    assert np.any(a & ~b)  # with one shared draw, the examples of the lower rate would be a subset
