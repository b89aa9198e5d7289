"""Step functions: the gradient of the mean loss for any number of microbatches and devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.config.augment import AugmentConfig
from mevit_jax.config.data import Normalization
from mevit_jax.config.mesh import MeshConfig
from mevit_jax.config.model import MEViTConfig
from mevit_jax.config.optimizer import OptimizerConfig
from mevit_jax.config.training import TrainingConfig
from mevit_jax.models.functional import build_model, parameter_shapes
from mevit_jax.parallel.mesh import make_mesh
from mevit_jax.parallel.placement import batch_sharding, param_shardings
from mevit_jax.training.losses import count_correct, smooth_targets
from mevit_jax.training.optimizer import make_optimizer
from mevit_jax.training.state import create_state
from mevit_jax.training.steps import make_evaluation_step, make_train_step

pytestmark = pytest.mark.usefixtures('compile_once')

CLASSES, BATCH, RATE = 5, 32, 0.1
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
NORMALIZATION = Normalization(MEAN, STD)
CONFIG = MEViTConfig(
  classes=CLASSES, frames=2, image_size=(8, 8), patch_size=(4, 4), width=8, heads=2, mlp_dim=16,
  space_blocks=0, motion_blocks=1, class_blocks=0, dtype='float32',
)  # fmt: skip
DROPPING = dataclasses.replace(CONFIG, space_blocks=2, motion_blocks=0, drop_path=0.5)
OPTIMIZER = make_optimizer(OptimizerConfig(weight_decay=0.01), lambda step: RATE)
VIDEO = np.random.default_rng(0).integers(0, 256, (BATCH, 2, 8, 8, 3), np.uint8)
LABELS = np.random.default_rng(1).integers(0, CLASSES, BATCH).astype(np.int32)
BATCHED = {'video': VIDEO, 'label': LABELS}
PLAIN, FLIPS = AugmentConfig(), AugmentConfig(flip=True)
ALL = AugmentConfig(flip=True, color_jitter=0.8, mixup=0.8, cutmix=1.0)


@functools.cache
def compiled_step(config, devices, accumulate, augmentation):
  mesh = make_mesh(MeshConfig(data=devices))
  rows = batch_sharding(mesh)
  step = make_train_step(
    build_model(config), OPTIMIZER,
    training=TrainingConfig(label_smoothing=0.2, accumulate=accumulate, seed=4, batch_size=BATCH),
    augmentation=augmentation, normalization=NORMALIZATION, mirrors=(1, 0, 2, 3, -1), sharding=rows,
  )  # fmt: skip
  shardings = param_shardings(first_state(config), mesh)
  step = jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, None))
  return step.lower(first_state(config), BATCHED).compile()


@functools.cache
def step_once(config=CONFIG, devices=1, accumulate=1, augmentation=FLIPS, step=0):
  """Runs one step on `devices` devices with `accumulate` microbatches; returns state and metrics."""
  state = dataclasses.replace(first_state(config), step=np.int32(step))
  compiled = compiled_step(config, devices, accumulate, augmentation)
  return compiled(*jax.device_put((state, BATCHED), compiled.input_shardings[0]))


@functools.cache
def first_state(config=CONFIG, ema=False):
  """Builds a state with random params: a zero head would stop the gradient."""
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), build_model(config).abstract)
  return create_state(OPTIMIZER, params, ema)


def named(params):
  """Returns params by name, except for key biases, whose exact gradient is zero."""
  leaves = zip(parameter_shapes(params), jax.tree.leaves(params), strict=True)
  return {name: np.asarray(x) for name, x in leaves if not name.endswith('key/bias')}


def assert_same_update(params, others, tolerance=2e-6):
  """Compares params; `tolerance` is relative to the largest parameter."""
  largest = max(np.abs(x).max() for x in named(others).values())
  for name, other in named(others).items():
    np.testing.assert_allclose(named(params)[name], other, rtol=1e-6, atol=tolerance * largest, err_msg=name)


def test_a_step_is_sgd_on_the_mean_cross_entropy():
  before, (state, metrics) = first_state().params, step_once(augmentation=PLAIN)
  targets = 0.8 * np.eye(CLASSES)[LABELS] + 0.2 / CLASSES
  video = ((VIDEO / 255 - np.asarray(MEAN)) / np.asarray(STD)).astype(np.float32)

  model = build_model(CONFIG)

  def loss_of(params):
    logits = model.apply(params, video)
    return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean(), logits

  (loss, logits), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(before)
  # The first step of Nesterov's momentum: 1.9 times the gradient, including weight decay.
  expected = jax.tree.map(lambda p, g: p - RATE * 1.9 * (g + 0.01 * p), before, gradient)
  assert_same_update(state.params, expected)
  assert int(state.step) == 1
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  np.testing.assert_allclose(metrics['accuracy'], (np.argmax(logits, -1) == LABELS).mean(), rtol=1e-6)
  norm = np.sqrt(sum((np.float64(x) ** 2).sum() for x in jax.tree.leaves(gradient)))
  np.testing.assert_allclose(metrics['gradient_norm'], norm, rtol=1e-5)


@pytest.mark.parametrize(('devices', 'accumulate'), [(8, 1), (8, 2), (1, 4)])
def test_sharding_and_accumulation_do_not_change_the_update(devices, accumulate):
  """Including flips: randomness is keyed by example."""
  state, metrics = step_once(CONFIG, devices, accumulate)
  expected, others = step_once()
  assert_same_update(state.params, expected.params)
  assert_same_update(state.opt_state[1].trace, expected.opt_state[1].trace)
  np.testing.assert_allclose(metrics['loss'], others['loss'], rtol=1e-6)
  assert float(metrics['accuracy']) == float(others['accuracy'])
  np.testing.assert_allclose(metrics['gradient_norm'], others['gradient_norm'], rtol=1e-5)


def test_sharding_and_accumulation_do_not_change_augmentation():
  """Mixed pairs stay together, and clips are not communicated between devices."""
  state, metrics = step_once(CONFIG, 8, 2, ALL)
  expected, others = step_once(augmentation=ALL)
  assert_same_update(state.params, expected.params)
  np.testing.assert_allclose(metrics['loss'], others['loss'], rtol=1e-6)
  assert float(metrics['accuracy']) == float(others['accuracy'])
  compiled = compiled_step(CONFIG, 8, 2, ALL).as_text()
  sent = re.findall(r' (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(', compiled)
  assert set(sent) == {'all-reduce'}
  assert 'u8[4,2,8,8,3]' in compiled  # clips of one device


def test_flips_change_the_loss():
  assert abs(step_once()[1]['loss'] - step_once(augmentation=PLAIN)[1]['loss']) > 1e-4


def test_sharding_does_not_change_drop_path():
  one, many = (step_once(DROPPING, devices, augmentation=PLAIN) for devices in (1, 8))
  assert_same_update(many[0].params, one[0].params)


def test_drop_path_depends_on_the_step():
  one, other = (step_once(DROPPING, augmentation=PLAIN, step=step)[1]['loss'] for step in (0, 1))
  assert abs(one - other) > 1e-4


@functools.cache
def poisoned_step(stop):
  """Builds a step with EMA whose loss is NaN for a black batch."""
  model = build_model(CONFIG)

  def apply(params, video, key=None):
    return model.apply(params, video, key) * jnp.where((video == video[0, 0, 0, 0]).all(), jnp.nan, 1)

  return jax.jit(
    make_train_step(
      dataclasses.replace(model, apply=apply), OPTIMIZER,
      training=TrainingConfig(label_smoothing=0.2, seed=4, ema=0.9, on_nonfinite='stop' if stop else 'skip'),
      augmentation=AugmentConfig(), normalization=NORMALIZATION, mirrors=range(CLASSES),
    ),
    donate_argnums=0,
  )  # fmt: skip


def run_steps(batches, stop=False):
  """Runs good ('g') and poisoned ('p') batches; returns the state and a string of dropped updates."""
  state, skipped = jax.tree.map(jnp.copy, first_state(ema=True)), ''  # it is donated
  for kind in batches:
    video = VIDEO if kind == 'g' else np.zeros_like(VIDEO)
    state, metrics = poisoned_step(stop)(state, {'video': video, 'label': LABELS})
    skipped += str(int(metrics['skipped']))
  return state, skipped


def assert_same_bits(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_non_finite_update_changes_only_the_step():
  (state, skipped), (expected, none) = run_steps('gp'), run_steps('g')
  assert (skipped, none) == ('01', '0')
  assert (int(state.step), int(state.skipped)) == (2, 1)
  assert_same_bits(dataclasses.replace(state, step=expected.step, skipped=expected.skipped), expected)
  state, skipped = run_steps('gppg')
  assert (skipped, int(state.step), int(state.skipped)) == ('0110', 4, 0)
  assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)])).all()


def test_updates_after_a_stop_are_dropped():
  """The host reads metrics late, and still saves the state before the non-finite step."""
  (state, skipped), (expected, _) = run_steps('gpgg', stop=True), run_steps('g', stop=True)
  assert skipped == '0111'
  found = dataclasses.replace(state, step=state.step - state.skipped, skipped=jnp.zeros_like(state.skipped))
  assert_same_bits(found, expected)


def test_ema_follows_its_recurrence():
  """Decay as in TensorFlow: min(0.9, (1 + n) / (10 + n)) after n updates, initialized with the parameters."""
  mean = named(first_state(ema=True).ema)
  for n in range(3):
    decay = min(0.9, (1 + n) / (10 + n))
    params = named(run_steps('g' * (n + 1))[0].params)
    mean = {name: decay * x + (1 - decay) * params[name] for name, x in mean.items()}
  found = named(run_steps('ggg')[0].ema)
  for name, x in mean.items():
    np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6, err_msg=name)
  assert any(np.abs(found[name] - params[name]).max() > 1e-3 for name in found)


def test_label_smoothing_follows_its_definition():
  targets = smooth_targets(jnp.asarray([0, 2]), 4, 0.2)
  np.testing.assert_allclose(targets, [[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]], rtol=1e-6)
  np.testing.assert_array_equal(smooth_targets(jnp.asarray([1]), 3, 0.0), [[0, 1, 0]])


def test_ties_go_to_the_lowest_class():
  logits = jnp.asarray([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
  assert count_correct(logits, jnp.asarray([0, 1])) == 2
  assert count_correct(logits, jnp.asarray([1, 2])) == 0


@pytest.mark.parametrize('devices', [1, 8])
def test_evaluation_gives_the_logits_of_every_view(devices):
  video = VIDEO.reshape(-1, 2, *VIDEO.shape[1:])  # b v t h w 3
  mesh = make_mesh(MeshConfig(data=devices))
  params = jax.device_put(first_state().params, param_shardings(first_state().params, mesh))
  step = jax.jit(make_evaluation_step(build_model(CONFIG), NORMALIZATION), out_shardings=batch_sharding(mesh))
  output = step(params, jax.device_put(video, batch_sharding(mesh)))
  pixels = ((VIDEO / 255 - np.asarray(MEAN)) / np.asarray(STD)).astype(np.float32)
  expected = np.asarray(jax.jit(build_model(CONFIG).apply)(first_state().params, pixels)).reshape(-1, 2, CLASSES)
  np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
  assert output.dtype == jnp.float32
