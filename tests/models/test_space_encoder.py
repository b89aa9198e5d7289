"""Models whose embedding and space stage are an encoder of single frames."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.models.functional import build_model
from mevit_jax.training.optimizer import stop_frozen_gradients

pytestmark = pytest.mark.usefixtures('compile_once')

CONFIG = MEViTConfig(
  classes=5, frames=3, image_size=(8, 8), patch_size=(4, 4), width=16, heads=2, mlp_dim=32, space_blocks=2,
  motion_blocks=1, class_blocks=1, frame_tokens=2, space_encoder=True, motion_init='random', dtype='float32',
)  # fmt: skip
VIDEO = np.random.default_rng(0).standard_normal((2, 3, 8, 8, 3), np.float32)
ENCODER = '^(embedding|frame_tokens|pre_norm|space)'
VARIANTS = [
  {},
  {'motion_blocks': 0},
  {'class_blocks': 0},
  {'frame_tokens': 0, 'pre_norm': True},
]


def case(**changes):
  model = build_model(dataclasses.replace(CONFIG, **changes))
  params = jax.jit(model.init)(jax.random.key(0))
  head = jax.random.normal(jax.random.key(1), params['head']['kernel'].shape)
  return model, {**params, 'head': {**params['head'], 'kernel': head}}


@pytest.mark.parametrize('changes', VARIANTS)
def test_apply_is_classify_of_encode(changes):
  model, params = case(**changes)
  features = jax.jit(model.encode)(params, VIDEO)
  tokens = model.config.patches + model.config.frame_tokens
  assert features.shape == (2, 3, tokens, 16)
  np.testing.assert_allclose(jax.jit(model.classify)(params, features), jax.jit(model.apply)(params, VIDEO), atol=1e-5)


def test_features_of_a_frame_depend_on_no_other_frame():
  model, params = case()
  features = jax.jit(model.encode)(params, VIDEO)
  reversed_features = jax.jit(model.encode)(params, VIDEO[:, ::-1])
  np.testing.assert_allclose(features[:, ::-1], reversed_features, atol=1e-6)


@pytest.mark.parametrize('changes', VARIANTS[:2])
def test_logits_depend_on_the_order_of_frames(changes):
  model, params = case(**changes)
  forward, backward = jax.jit(model.apply)(params, VIDEO), jax.jit(model.apply)(params, VIDEO[:, ::-1])
  assert np.abs(forward - backward).max() > 1e-2


def test_new_motion_blocks_add_nothing_at_first():
  model, params = case(motion_init='zero')
  still, _ = case(motion_blocks=0)
  without = {name: part for name, part in params.items() if name != 'motion'}
  np.testing.assert_allclose(jax.jit(model.apply)(params, VIDEO), jax.jit(still.apply)(without, VIDEO), atol=1e-6)


def test_no_backward_pass_goes_through_a_frozen_encoder():
  model, params = case(space_blocks=8, motion_blocks=0)
  frozen = stop_frozen_gradients(model, ENCODER)

  def loss(apply):
    return lambda params, video: apply(params, video).sum()

  def flops(function):
    return jax.jit(function).lower(params, VIDEO).compile().cost_analysis()['flops']

  forward, backward = flops(loss(frozen.apply)), flops(jax.grad(loss(frozen.apply)))
  assert backward < 1.5 * forward < flops(jax.grad(loss(model.apply)))
  gradient = jax.jit(jax.grad(loss(frozen.apply)))(params, VIDEO)
  expected = jax.jit(jax.grad(loss(model.apply)))(params, VIDEO)
  for name in ('embedding', 'frame_tokens', 'space', 'space_norm'):
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient[name]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(expected[name]))
  for name in ('time_position', 'class', 'norm', 'head'):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient[name], expected[name])


def test_stochastic_depth_leaves_the_encoder_alone():
  model, params = case(drop_path=0.5)
  features = jax.jit(model.encode)(params, VIDEO)
  key = jax.random.key(3)
  dropped = jax.jit(model.apply)(params, VIDEO, key)
  np.testing.assert_allclose(dropped, jax.jit(model.classify)(params, features, key), atol=1e-5)
  assert np.abs(dropped - jax.jit(model.apply)(params, VIDEO)).max() > 1e-2


@pytest.mark.parametrize('changes', [{'space_blocks': 0}, {'class_blocks': 0, 'frame_tokens': 0}])
def test_a_space_encoder_needs_blocks_and_tokens_of_its_own(changes):
  with pytest.raises(UserError, match=r'model\.space_encoder needs'):
    dataclasses.replace(CONFIG, **changes)


def test_default_models_have_no_parameters_of_a_space_encoder():
  abstract = build_model(dataclasses.replace(CONFIG, space_encoder=False)).abstract
  assert {'space_norm', 'time_position'}.isdisjoint(abstract)
  assert jnp.issubdtype(abstract['embedding']['time'].dtype, jnp.floating)
