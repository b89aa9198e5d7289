"""Model.trace against the paper's equations, evaluated token by token in float64."""

import jax
import numpy as np
import pytest

from mevit_jax.models.functional import build_model
from mevit_jax.models.order import from_block_order
from tests.helpers.naive import CLASS, FRAME_TOKEN, assert_close, forward, random_params, random_video
from tests.models.test_equations import READINGS

NAMES = [
  'three stages, M=2 divides one side',
  'class token from the input, M=3 divides neither side',
  'time first, M=3 larger than one side',
  'class token left out of motion',
  'frame tokens, three stages',
  'DINOv3: rotary positions, registers',
]


def by_place(traced, kind, config):
  """Returns queries, keys and values of the first clip in the format of `naive`: {position: `h k`}."""
  patches, token = traced[kind]
  shape = config.frames, *config.grid, config.heads, config.width // config.heads
  found = []
  for which in range(3):
    places = {} if token is None else {CLASS: token[which][0]}
    if kind == 'class' and which == 0:
      places[CLASS] = patches.query[0, 0]
    else:
      flat = patches[which][0].reshape(config.frames, -1, config.width)  # t n h·k, or n+f
      for t, i in np.ndindex(config.frames, flat.shape[1] - config.patches):
        places[FRAME_TOKEN, i, t] = flat[t, config.patches + i].reshape(shape[-2:])
      flat = flat[:, : config.patches]
      raster = np.asarray(from_block_order(flat, config)).reshape(shape)  # t rows columns h k
      places |= {(row, column, t): raster[t, row, column] for t, row, column in np.ndindex(shape[:3])}
    found.append(places)
  return found


@pytest.mark.parametrize('name', NAMES)
def test_traces_of_every_block_equal_the_equations_of_the_paper(name):
  config = READINGS[name]
  model = build_model(config)
  params, video = random_params(model), random_video(config)
  traced = jax.jit(lambda *x: model.trace(*x, slice(None)))(params, video)
  seen = []
  forward(config, params, video[0], seen)
  assert len(traced) == len(seen) == config.depth
  for ours, naive in zip(traced, seen, strict=True):
    assert ours.keys() == naive.keys()
    for kind in ours:
      for found, expected in zip(by_place(ours, kind, config), naive[kind], strict=True):
        # Patches are not queries of class attention, and the class token is not a key.
        assert found.keys() == expected.keys() or kind == 'class'
        places = list(found)
        assert_close(np.stack([found[x] for x in places]), np.stack([expected[x] for x in places]), 1e-5)


def test_block_indices_can_be_negative():
  config = READINGS[NAMES[0]]
  model = build_model(config)
  params, video = random_params(model), random_video(config)
  every, last, fourth = jax.jit(lambda *x: [model.trace(*x, block) for block in (slice(None), -1, 3)])(params, video)
  assert [set(block) for block in every] == [{'space'}, *[{'space', 'motion'}] * 2, *[{'class'}] * 2]
  jax.tree.map(np.testing.assert_array_equal, last, every[4])
  jax.tree.map(np.testing.assert_array_equal, fourth, every[3])
