"""Optimizers against their papers in float64, and learning rate schedules against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.config.optimizer import OptimizerConfig
from mevit_jax.errors import UserError
from mevit_jax.training.optimizer import check_patterns, make_optimizer, make_schedule

RATES = (0.1, 0.1, 0.02, 0.3)  # share of the steps


def schedule(step):
  return jnp.asarray(RATES)[step]


@pytest.fixture(scope='module')
def problem():
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4)}
  gradients = [{name: rng.normal(size=x.shape) for name, x in params.items()} for _ in RATES]
  return params, gradients


def run(config, params, gradients):
  """Yields the params after each step."""
  optimizer = make_optimizer(config, schedule)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  state = optimizer.init(params)
  for gradient in gradients:
    updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, params)
    params = jax.tree.map(jnp.add, params, updates)
    yield params


def clipped(gradient, limit):
  norm = np.sqrt(sum((x**2).sum() for x in gradient.values()))
  return {name: x * min(1, limit / norm) for name, x in gradient.items()}


def sgd(params, gradients, momentum, decay):
  """torch.optim.SGD(nesterov=True): weight decay is added to the gradient."""
  buffers = dict.fromkeys(params, 0.0)
  for rate, gradient in zip(RATES, gradients, strict=True):
    for name in params:
      g = gradient[name] + decay[name] * params[name]
      buffers[name] = momentum * buffers[name] + g
      params = {**params, name: params[name] - rate * (g + momentum * buffers[name])}
    yield params


def adamw(params, gradients, beta1, beta2, decay):
  """Loshchilov and Hutter 2019, algorithm 2, with the learning rate as the decay's schedule."""
  means, squares = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
  for t, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), 1):
    for name, g in gradient.items():
      means[name] = beta1 * means[name] + (1 - beta1) * g
      squares[name] = beta2 * squares[name] + (1 - beta2) * g**2
      step = means[name] / (1 - beta1**t) / (np.sqrt(squares[name] / (1 - beta2**t)) + 1e-8)
      params = {**params, name: params[name] - rate * (step + decay[name] * params[name])}
    yield params


def assert_same_path(path, expected):
  for params, others in zip(path, expected, strict=True):
    for name in others:
      np.testing.assert_allclose(params[name], others[name], rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize('no_decay', ['', 'bias$'])
def test_sgd_equals_torch(problem, no_decay):
  config = OptimizerConfig(momentum=0.8, weight_decay=0.3, no_decay=no_decay)
  decay = {'kernel': 0.3, 'bias': 0.0 if no_decay else 0.3}
  assert_same_path(run(config, *problem), sgd(*problem, 0.8, decay))


@pytest.mark.parametrize('no_decay', ['', 'bias$'])
def test_adamw_follows_the_paper(problem, no_decay):
  config = OptimizerConfig(name='adamw', beta1=0.7, beta2=0.9, weight_decay=0.3, no_decay=no_decay)
  decay = {'kernel': 0.3, 'bias': 0.0 if no_decay else 0.3}
  assert_same_path(run(config, *problem), adamw(*problem, 0.7, 0.9, decay))


def test_global_norm_clipping_precedes_weight_decay(problem):
  params, gradients = problem
  config = OptimizerConfig(momentum=0.8, weight_decay=0.3, clip_norm=2.0)
  cut = [clipped(gradient, 2.0) for gradient in gradients]
  assert not all(np.allclose(a['kernel'], b['kernel']) for a, b in zip(cut, gradients, strict=True))
  assert_same_path(run(config, params, gradients), sgd(params, cut, 0.8, {'kernel': 0.3, 'bias': 0.3}))


def test_a_small_gradient_is_not_clipped(problem):
  params, gradients = problem
  plain, limited = (run(OptimizerConfig(clip_norm=limit), params, gradients) for limit in (0.0, 100.0))
  assert_same_path(limited, plain)


def test_no_decay_patterns_match_full_names():
  params = {'motion': {'mlp': {'kernel': 1.0, 'bias': 1.0}}, 'embedding': {'time': 1.0, 'patch': 1.0}}
  config = OptimizerConfig(weight_decay=0.5, momentum=0.0, no_decay='bias$|embedding/(space|time)')
  after = next(run(config, params, [jax.tree.map(lambda x: 0.0, params)]))  # the rate is 0.1
  expected = {'motion': {'mlp': {'kernel': 0.95, 'bias': 1.0}}, 'embedding': {'time': 1.0, 'patch': 0.95}}
  assert jax.tree.map(float, after) == jax.tree.map(pytest.approx, expected)


def test_frozen_parameters_are_constant_and_excluded_from_the_norm(problem):
  params, gradients = problem
  config = OptimizerConfig(weight_decay=0.3, clip_norm=2.0, freeze='^kernel')
  alone = [[{'bias': x['bias']} for x in one] for one in ([params], gradients)]
  expected = sgd(alone[0][0], [clipped(gradient, 2.0) for gradient in alone[1]], 0.9, {'bias': 0.3})
  for after, other in zip(run(config, params, gradients), expected, strict=True):
    np.testing.assert_array_equal(after['kernel'], np.float32(params['kernel']))
    np.testing.assert_allclose(after['bias'], other['bias'], rtol=2e-5, atol=2e-6)


def test_layer_decay_is_a_power_of_the_distance_to_the_head():
  stages = {'space': np.zeros((2, 3)), 'motion': np.zeros((1, 3)), 'class': np.zeros((2, 3))}
  params = {'embedding': {'patch': np.zeros(3)}, **{name: {'x': x} for name, x in stages.items()}, 'head': np.zeros(3)}
  config = OptimizerConfig(weight_decay=0.0, momentum=0.0, layer_decay=0.5)
  after = next(run(config, params, [jax.tree.map(np.ones_like, params)]))  # the rate is 0.1
  powers = {'embedding': 6, 'space': (5, 4), 'motion': (3,), 'class': (2, 1), 'head': 0}
  for name, power in powers.items():
    (value,) = jax.tree.leaves(after[name])
    expected = -0.1 * 0.5 ** np.asarray(power, np.float32)
    np.testing.assert_allclose(value, np.broadcast_to(expected[..., None], value.shape), rtol=1e-6, err_msg=name)


def rates(config, batch_size=64, steps_per_epoch=10, steps=150):
  return np.asarray(jax.vmap(make_schedule(config, batch_size, steps_per_epoch, steps))(jnp.arange(steps + 1)))


def test_step_decay_schedule():
  values = rates(OptimizerConfig())
  np.testing.assert_allclose(values[:110], 0.005, rtol=1e-6)
  np.testing.assert_allclose(values[110:140], 0.0005, rtol=1e-6)
  np.testing.assert_allclose(values[140:150], 0.00005, rtol=1e-6)


def test_schedule_of_fractional_epochs():
  values = rates(OptimizerConfig(decay_epochs=(0.5, 1.0)), steps_per_epoch=2.6, steps=4)  # at 1.3 and 2.6 steps
  np.testing.assert_allclose(values, [0.005, 0.0005, 0.0005, 0.00005, 0.00005], rtol=1e-6)


@pytest.mark.parametrize('schedule', ['steps', 'cosine'])
def test_linear_scaling_with_the_global_batch_size(schedule):
  config = OptimizerConfig(schedule=schedule, warmup_epochs=1.0)
  np.testing.assert_allclose(rates(config, batch_size=1024), 16 * rates(config), rtol=1e-6)


def test_cosine_schedule():
  values = rates(OptimizerConfig(schedule='cosine'))
  np.testing.assert_allclose(values, 0.0025 * (1 + np.cos(np.pi * np.arange(151) / 150)), rtol=1e-5, atol=1e-9)
  assert values[150] == 0


def test_cosine_with_warmup_ends_at_zero():
  values = rates(OptimizerConfig(schedule='cosine', warmup_epochs=5.0))
  np.testing.assert_allclose(values[:51], 0.005 * np.minimum(1, np.arange(1, 52) / 50), rtol=1e-5)
  assert (np.diff(values[50:]) < 0).all()
  assert values[150] == 0


def test_warmup_does_not_shift_step_decay():
  plain, warm = rates(OptimizerConfig()), rates(OptimizerConfig(warmup_epochs=2.0))
  np.testing.assert_allclose(warm[:20], 0.005 * np.arange(1, 21) / 20, rtol=1e-5)
  np.testing.assert_array_equal(warm[20:], plain[20:])


@pytest.mark.parametrize(
  ('field', 'pattern', 'what'),
  [('freeze', '^heads', 'no parameter'), ('no_decay', 'biases', 'no parameter'), ('freeze', '.', 'every parameter')],
)
def test_patterns_without_effect_are_rejected(field, pattern, what):
  params = {'head': {'kernel': 0.0, 'bias': 0.0}, 'norm': {'scale': 0.0}}
  check_patterns(OptimizerConfig(freeze='^(?!head)', no_decay='bias$'), params)
  with pytest.raises(UserError, match=rf'optimizer\.{field}` .* matches {what}; examples of names: head/'):
    check_patterns(OptimizerConfig(**{field: pattern}), params)
