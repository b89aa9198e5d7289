"""The model against the paper's equations, evaluated token by token in float64."""

import jax
import numpy as np
import pytest

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.functional import build_model
from mevit_jax.models.order import from_block_order
from tests.helpers.naive import assert_close, forward, random_params, random_video


def tiny(grid, frames, stages, block_size, **fields):
  """Config with (space, motion, class) blocks, block size M, and patches of 2x1 pixels."""
  space, motion, class_blocks = stages
  sizes = {'classes': 5, 'width': 8, 'heads': 2, 'mlp_dim': 12, 'dtype': 'float32'}
  return MEViTConfig(
    **{**sizes, **fields},
    frames=frames,
    image_size=(2 * grid[0], grid[1]),
    patch_size=(2, 1),
    space_blocks=space,
    motion_blocks=motion,
    class_blocks=class_blocks,
    block_size=block_size,
  )


READINGS = {
  'three stages, M=2 divides one side': tiny((5, 4), 3, (1, 2, 2), 2, drop_path=0.5),
  'three stages, time first': tiny((3, 5), 2, (1, 1, 1), 2, attention_order='time_space'),
  'class token from the input, M=3 divides neither side': tiny((7, 4), 2, (1, 1, 0), 3, drop_path=0.5),
  'time first, M=3 larger than one side': tiny((2, 4), 3, (0, 2, 0), 3, attention_order='time_space'),
  'class token left out of motion': tiny((4, 5), 3, (0, 2, 0), 2, class_token_in_motion=False),
  'TimeSformer': tiny((3, 2), 3, (0, 2, 0), 1, attention_order='time_space', class_token_in_motion=False),
  'M is the whole grid': tiny((3, 2), 2, (0, 1, 1), 3),
  'space only, another eps': tiny((3, 5), 3, (2, 0, 0), 2, layer_norm_eps=0.1),
  'class attention only, another eps': tiny((3, 5), 1, (0, 0, 2), 1, layer_norm_eps=0.1),
  'frame tokens, three stages': tiny((5, 4), 3, (1, 1, 1), 2, frame_tokens=2),
  'frame tokens instead of the class token, time first': tiny(
    (3, 5), 3, (1, 1, 0), 2, frame_tokens=3, attention_order='time_space'
  ),
  'CLIP: pre-norm, QuickGELU': tiny((3, 2), 2, (1, 1, 0), 2, pre_norm=True, activation='quick_gelu'),
  'SigLIP: tanh GELU, pre-norm with a frame token': tiny(
    (3, 2), 2, (1, 1, 1), 2, activation='gelu_tanh', pre_norm=True, frame_tokens=1
  ),
  'DINOv3: rotary positions, registers': tiny((5, 3), 2, (1, 1, 1), 2, rotary_theta=100.0, frame_tokens=3, width=16),
}


@pytest.mark.parametrize('config', READINGS.values(), ids=READINGS.keys())
def test_model_equals_the_equations_of_the_paper(config):
  # Without a key nothing is dropped, for any rate.
  model = build_model(config)
  params, video = random_params(model), random_video(config)
  (patches, token), logits = jax.jit(lambda *x: (model.tokens(*x), model.apply(*x)))(params, video)
  raster = np.asarray(from_block_order(patches, config))  # b t rows columns d
  for i, clip in enumerate(video):
    places, *expected = forward(config, params, clip)
    read = {x: raster[i, t, row, column] for x in places for row, column, t in [x]}
    assert_close(np.stack(list(read.values())), np.stack(list(places.values())), 1e-5)
    assert_close([token[i], logits[i]], expected, 1e-5)
