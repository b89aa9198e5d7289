"""The step functions: pure, jitted by the caller with donated state."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from mevit_jax.models.functional import Model, Params
from mevit_jax.training.augment import AugmentConfig, augment, normalise
from mevit_jax.training.objectives import count_correct, cross_entropy, smooth_targets
from mevit_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]


def make_train_step(
  model: Model,
  optimizer: optax.GradientTransformation,
  *,
  augmentation: AugmentConfig,
  mirrors: Sequence[int],
  mean: Sequence[float],
  std: Sequence[float],
  label_smoothing: float,
  accumulate: int,
  seed: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """The training step: (state, batch) -> (state, metrics).

  A batch is `video` uint8 `b t h w 3` and `label` int32 `b`. Randomness is keyed by (seed, step, row), so that it does
  not depend on devices or hosts. With `accumulate` = k the gradient is the mean over k parts of the batch, part i being
  rows i, i + k, ...: each device works on its own rows in every part. Metrics are sums over the batch and scalars.
  """

  def loss_of(params: Params, video: jax.Array, labels: jax.Array, rows: jax.Array, key: jax.Array):
    augment_key, model_key = jax.random.split(key)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(augment_key, rows)
    video, labels = augment(video, labels, row_keys, augmentation, mirrors)
    video = normalise(video, mean, std, model.config.dtype)
    logits = model.apply(params, video, jax.random.fold_in(model_key, rows[0]))  # b classes
    targets = smooth_targets(labels, model.config.classes, label_smoothing)
    return cross_entropy(logits, targets), count_correct(logits, labels)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    rows = jnp.arange(batch['label'].shape[0])
    inputs = (batch['video'], batch['label'], rows)
    grad_of = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate == 1:
      (loss, correct), gradient = grad_of(state.params, *inputs, key)
    else:
      (loss, correct), gradient = _accumulated(lambda part: grad_of(state.params, *part, key), inputs, accumulate)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      'loss': loss,
      'accuracy': correct / rows.size,
      'gradient_norm': optax.tree.norm(gradient),
    }
    return TrainState(state.step + 1, params, opt_state), metrics

  return step


def make_evaluation_step(
  model: Model, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Params, jax.Array], jax.Array]:
  """The evaluation step: (params, video uint8 `b v t h w 3`) -> logits `b v classes`, float32."""

  def step(params: Params, video: jax.Array) -> jax.Array:
    def logits(view: jax.Array) -> jax.Array:
      return model.apply(params, normalise(view, mean, std, model.config.dtype))

    # One view after the other: memory is that of one, for any number of them.
    return jax.lax.map(logits, video.swapaxes(0, 1)).swapaxes(0, 1)  # b v classes

  return step


def _accumulated(grad_of: Callable, inputs: tuple, parts: int):
  """The mean loss and gradient, and the sum of what is correct, over parts of a batch; a loop, compiled once."""
  split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), inputs)  # k b/k ...
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_of, jax.tree.map(lambda x: x[0], split))
  )
  summed, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, grad_of(part)), None), zeros, split)
  (loss, correct), gradient = summed
  return (loss / parts, correct), jax.tree.map(lambda x: x / parts, gradient)
