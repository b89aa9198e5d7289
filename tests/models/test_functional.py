"""Modules as functions of plain params."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.models.functional import build_model, count_parameters, parameter_shapes
from tests.helpers.naive import random_params, random_video

ROOT = Path(__file__).parents[2]
CONFIG = MEViTConfig(
  classes=5,
  frames=2,
  image_size=(2, 3),
  patch_size=1,
  width=8,
  heads=2,
  mlp_dim=12,
  space_blocks=1,
  motion_blocks=2,
  class_blocks=1,
)
MODEL = build_model(CONFIG)
VIDEO = random_video(CONFIG)


def test_params_are_nested_dicts_of_float32_with_the_abstract_shapes():
  params = jax.jit(MODEL.init)(jax.random.key(0))
  assert jax.tree.structure(params) == jax.tree.structure(MODEL.abstract)
  assert parameter_shapes(params) == parameter_shapes(MODEL.abstract)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('float32')}
  assert all(all(np.shape(leaf)) for leaf in jax.tree.leaves(params))  # no array of size zero
  branches = [params]
  for branch in branches:
    assert type(branch) is dict
    branches += [one for one in branch.values() if not isinstance(one, jax.Array)]
  # With the default motion_init the output projection is zero.
  assert not np.any(params['motion']['blocks']['motion_attention']['out']['kernel'])


@pytest.mark.parametrize('unroll', [0, 1])
def test_unstacked_blocks_are_accepted(unroll):
  """Params with unstacked blocks give the same model; they stay stacked where blocks run as a loop."""
  model = build_model(dataclasses.replace(CONFIG, unroll=unroll))
  params = random_params(MODEL)
  apart = model.unstack(params)
  assert isinstance(apart['motion']['blocks']['mlp']['up']['kernel'], tuple) == (unroll == 0)
  np.testing.assert_allclose(
    jax.jit(model.apply)(apart, VIDEO), jax.jit(model.apply)(params, VIDEO), rtol=1e-6, atol=1e-6
  )
  apart.pop('head')
  with pytest.raises(ValueError, match="missing \\['head/bias'"):
    model.apply(apart, VIDEO)


def test_an_empty_stage_has_no_params():
  def stages(**blocks):
    fields = {'space_blocks': 0, 'motion_blocks': 0, 'class_blocks': 0, **blocks}
    return set(build_model(MEViTConfig(classes=5, **fields)).abstract) & {'space', 'motion', 'class'}

  assert stages(space_blocks=1) == {'space'}
  assert stages(motion_blocks=1, class_blocks=1) == {'motion', 'class'}


def test_a_model_without_classes_is_an_error():
  with pytest.raises(UserError, match=r'`model\.classes` is 0'):
    build_model(dataclasses.replace(CONFIG, classes=0))


def test_parameter_names_and_counts():
  names = parameter_shapes(MODEL.abstract)
  assert names['motion/blocks/motion_attention/query/kernel'] == (2, 8, 2, 4)
  assert count_parameters(MODEL.abstract) == sum(map(np.prod, names.values()))


def spoiled(how):
  """Returns invalid params with nearly the same leaves in the same order, which merging by position would accept."""
  params = random_params(MODEL)
  head = params.pop('head')
  if how == 'misnamed':
    return {**params, 'heap': head}
  if how == 'missing':
    return params
  if how == 'misshapen':
    return {**params, 'head': {**head, 'kernel': head['kernel'].T}}
  return {**params, 'head': head, 'heap': head}


@pytest.mark.parametrize(
  ('how', 'words'),
  [
    ('misnamed', ["missing ['head/bias', 'head/kernel']", "unknown ['heap/bias', 'heap/kernel']"]),
    ('missing', ["missing ['head/bias', 'head/kernel']", 'unknown []']),
    ('unknown', ['missing []', "unknown ['heap/bias', 'heap/kernel']"]),
    ('misshapen', ['missing []', 'head/kernel: (5, 8), not (8, 5)']),
  ],
)
@pytest.mark.parametrize('function', [MODEL.apply, MODEL.tokens], ids=['apply', 'tokens'])
def test_params_of_a_different_model_are_refused_by_name(function, how, words):
  with pytest.raises(ValueError, match='the params do not match the model') as error:
    function(spoiled(how), VIDEO)
  assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
  ('video', 'words'),
  [
    (VIDEO[0], ['b t h w 3', '(b, 2, 2, 3, 3)', '(2, 2, 3, 3)']),
    (VIDEO[:, :1], ['(b, 2, 2, 3, 3)', '(2, 1, 2, 3, 3)']),
    (VIDEO.swapaxes(2, 3), ['(b, 2, 2, 3, 3)', '(2, 2, 3, 2, 3)']),
    (VIDEO.astype('uint8'), ['normalized', 'uint8']),
  ],
  ids=['one clip', 'frames', 'sides swapped', 'uint8'],
)
def test_video_of_a_different_shape_is_refused(video, words):
  with pytest.raises(ValueError, match=r'the video must (have shape|be normalized)') as error:
    MODEL.apply(random_params(MODEL), video)
  assert all(word in str(error.value) for word in words), str(error.value)


# Imports.

ONLY_JAX_AND_FLAX = """
import sys
from flax import nnx

ours = {'mevit_jax', *sys.stdlib_module_names, *(name.partition('.')[0] for name in sys.modules)}
class Refuse:
  def find_spec(self, name, *_):
    if name.partition('.')[0] not in ours:
      raise ImportError(f'{name} is neither jax nor flax, nor what they import')
sys.meta_path.insert(0, Refuse())

import mevit_jax.models.functional
from mevit_jax import MEViTConfig, build_model
build_model(MEViTConfig(classes=5))
"""
LAZY = """
import sys
import mevit_jax
assert not {'jax', 'flax', 'numpy'} & set(sys.modules)
assert [name for name in sys.modules if name.startswith('mevit_jax')] == ['mevit_jax']
from mevit_jax import UserError
assert 'jax' not in sys.modules
"""


@pytest.mark.parametrize('code', [ONLY_JAX_AND_FLAX, LAZY], ids=['only jax and flax', 'lazy'])
def test_models_import_only_jax_and_flax_and_the_package_is_lazy(code):
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
