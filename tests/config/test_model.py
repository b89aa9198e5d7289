"""Parameter and FLOP counts against independent counts, and invalid model configs."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.config.model import MEViTConfig, count_flops, variant
from mevit_jax.errors import UserError
from mevit_jax.models.functional import build_model, count_parameters

OURS = MEViTConfig(classes=400)  # B/16, 4+7+1 blocks, M=2, 8 frames
EARLY = {'space_blocks': 0, 'motion_blocks': 12, 'class_blocks': 0}  # with the class token from the input on
TIMESFORMER = MEViTConfig(classes=400, **EARLY, block_size=1, attention_order='time_space', class_token_in_motion=False)

# Parameters.


def parameters(config):
  return count_parameters(build_model(config).abstract)


def test_parameter_count_of_the_paper_model():
  d, f = 768, 3072
  norm = 2 * d
  attention = norm + 4 * (d * d + d)
  mlp = norm + d * f + f + f * d + d
  embedding = 16 * 16 * 3 * d + d + 196 * d + 8 * d
  ends = embedding + 2 * d + norm + d * 400 + 400  # the class token and its position; norm, head
  assert parameters(OURS) == ends + 12 * (attention + mlp) + 7 * attention
  assert parameters(TIMESFORMER) == ends + 12 * (2 * attention + mlp)


def test_parameter_count_of_timesformer():
  assert round(parameters(TIMESFORMER) / 1e6, 1) == 114.5  # temporal_fc is folded into the output projection


# FLOPs.


def products(jaxpr):
  """Returns the FLOPs of all matrix products that a program runs."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * int(np.prod([left[i] for i in contracted]))
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
      total += products(getattr(inner, 'jaxpr', inner)) if is_jaxpr(inner) else 0
  return total


def is_jaxpr(x):
  return hasattr(x, 'eqns') or hasattr(x, 'jaxpr')


@pytest.mark.parametrize(
  'config',
  [
    OURS,
    TIMESFORMER,
    dataclasses.replace(OURS, **EARLY, block_size=3),
    dataclasses.replace(OURS, image_size=(32, 80), block_size=4, class_blocks=2),
    dataclasses.replace(OURS, image_size=32, **EARLY, block_size=2, class_token_in_motion=False),
    dataclasses.replace(OURS, image_size=32, frame_tokens=5),
    dataclasses.replace(OURS, image_size=32, **EARLY, frame_tokens=1, pre_norm=True, rotary_theta=100.0),
  ],
  ids=[
    'ours',
    'TimeSformer',
    'M=3',
    'M divides neither side of 2x5',
    'M is the grid',
    'frame tokens',
    'rotary positions',
  ],
)
def test_flops_equal_those_of_the_matrix_products_in_the_program(config):
  model = build_model(dataclasses.replace(config, attention='plain'))  # otherwise it has those of all platforms
  video = jax.ShapeDtypeStruct((1, config.frames, *config.image_size, 3), jnp.float32)
  assert count_flops(config) == products(jax.make_jaxpr(model.apply)(model.abstract, video).jaxpr)


def test_flops_agree_with_xla_cost_analysis():
  config = MEViTConfig(
    classes=5, frames=2, image_size=6, patch_size=1, width=256, heads=2, mlp_dim=1024,
    space_blocks=1, motion_blocks=1, class_blocks=1, dtype='float32',
  )  # fmt: skip
  model = build_model(config)
  video = jax.ShapeDtypeStruct((1, 2, 6, 6, 3), jnp.float32)
  compiled = jax.jit(model.apply).lower(model.abstract, video).compile()
  assert 1 < compiled.cost_analysis()['flops'] / count_flops(config) < 1.06  # XLA also counts norms, GELU, ...


def test_flops_of_timesformer():
  d, patches = 768, 8 * 196
  space = 4 * d * d * (patches + 1) + 2 * d * 8 * 197**2
  time = 4 * d * d * patches + 2 * d * 196 * 8**2
  mlp = 2 * d * 4 * d * (patches + 1)
  macs = patches * 768 * d + 12 * (space + time + mlp) + d * 400
  assert count_flops(TIMESFORMER) == 2 * macs
  # With temporal_fc, the 196 GFLOPs (multiply-adds) per view that its authors state.
  assert round((macs + 12 * d * d * patches) / 1e9) == 196


def test_flops_of_unequal_blocks_count_only_pairs_within_a_block():
  """Counts pairs patch by patch: M=3 on 14x14 has a last row and column of smaller blocks."""
  cells = collections.Counter((row // 3, column // 3) for row in range(14) for column in range(14))
  pairs = {
    3: sum((8 * patches + 1) ** 2 for patches in cells.values()),
    1: 196 * (8 + 1) ** 2,
  }
  three, one = (count_flops(dataclasses.replace(OURS, **EARLY, block_size=size)) for size in (3, 1))
  logits_and_sum = 2 * 2 * 768
  assert three - one == 12 * logits_and_sum * (pairs[3] - pairs[1])


# Variants.


@pytest.mark.parametrize(
  ('name', 'classes', 'published'),
  [
    ('Ti/16', 1000, 5_717_416),  # DeiT-Ti
    ('S/16', 1000, 22_050_664),  # DeiT-S
    ('B/16', 1000, 86_567_656),
    ('L/16', 1000, 304_326_632),
    ('H/14', 1000, 632_045_800),
  ],
)
def test_variants_have_the_published_sizes(name, classes, published):
  sizes = variant(name)
  depth = sizes.pop('depth')
  config = MEViTConfig(classes=classes, frames=1, space_blocks=depth, motion_blocks=0, class_blocks=0, **sizes)
  assert parameters(config) - config.width == published  # a ViT has no e_time


# Invalid configs.


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'block_size': 15}, ['block_size', '15', '14x14']),
    ({'block_size': 0}, ['block_size', '0']),
    ({'image_size': 225}, ['image_size', '225', 'patch_size', '16']),
    ({'image_size': (224, 8)}, ['image_size', '8', 'patch_size', '16']),
    ({'image_size': (224, 224, 3)}, ['image_size', '(224, 224, 3)']),
    ({'patch_size': 0}, ['patch_size', '0']),
    ({'heads': 7}, ['width', '768', 'heads', '7']),
    ({'heads': 0}, ['heads', '0']),
    ({'classes': -1}, ['classes', '-1']),
    ({'frames': -1}, ['frames', '-1']),
    (dict.fromkeys(EARLY, 0), ['space_blocks', 'motion_blocks', 'class_blocks', '0']),
    ({'motion_blocks': -1}, ['motion_blocks', '-1']),
    ({'attention_order': 'space-time'}, ['order', 'space_time', 'time_space', 'space-time']),
    ({'motion_init': 'none'}, ['motion_init', 'zero', 'copy', 'random', 'none']),
    ({'dtype': 'float16'}, ['dtype', 'float32', 'bfloat16', 'float16']),
    ({'remat': 'all'}, ['remat', 'none', 'block', 'residuals', 'all']),
    ({'drop_path': 1.0}, ['drop_path', '1.0']),
    ({'drop_path': -0.1}, ['drop_path', '-0.1']),
  ],
  ids=lambda x: str(x) if isinstance(x, dict) else '',
)
def test_invalid_configs_are_one_line_errors(fields, words):
  with pytest.raises(UserError) as error:
    dataclasses.replace(OURS, **fields)
  message = str(error.value)
  assert all(word in message for word in words), message
  assert '\n' not in message


@pytest.mark.parametrize('name', ['B', 'B16', 'X/16', 'B/', 'b/16', ''])
def test_unknown_variant_error_lists_the_known_ones(name):
  with pytest.raises(UserError, match=r'^no variant .*Ti, S, B, L, H.*B/16'):
    variant(name)


def test_block_size_can_exceed_one_side_of_the_grid():
  config = dataclasses.replace(OURS, image_size=(32, 80), block_size=5)
  assert config.blocks == ((1, 1, 2, 5),)


def test_sides_can_be_numbers_or_lists():
  fields = {'image_size': [64, 64], 'patch_size': [16]}
  config = dataclasses.replace(OURS, **fields)
  assert config == dataclasses.replace(OURS, image_size=64, patch_size=16)
  assert hash(config)
