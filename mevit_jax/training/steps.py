"""The step functions: pure, jitted by the caller with donated state."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mevit_jax.augment.clip import augment, normalize
from mevit_jax.augment.mixing import mix
from mevit_jax.config.augment import AugmentConfig
from mevit_jax.config.data import Normalization
from mevit_jax.models.functional import Model, Params
from mevit_jax.training.losses import count_correct, cross_entropy, smooth_targets
from mevit_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]


def make_train_step(
  model: Model,
  optimizer: optax.GradientTransformation,
  *,
  augmentation: AugmentConfig,
  mirrors: Sequence[int],
  normalization: Normalization,
  label_smoothing: float,
  accumulate: int,
  seed: int,
  sharding: NamedSharding | None = None,
  ema: float = 0.0,
  stops: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """The training step: (state, batch) -> (state, metrics).

  A batch is `video` uint8 `b t h w 3` and `label` int32 `b`. Randomness is keyed by (seed, step, row), so that it does
  not depend on devices or hosts. With `accumulate` = k the gradient is the mean over k parts of the batch, part i being
  rows i, i + k, ..., or pairs of rows where neighbours are mixed: each device works on its own rows in every part. With
  `sharding`, how rows are spread over devices, each augments its own and nothing is sent. Metrics are sums over the
  batch and scalars; under mixup and cutmix the accuracy is that of the label with the larger share.

  Where loss or gradient are not finite the update is dropped, and the metric `skipped` is 1. With `stops` so are all
  that follow, since the host, which is to end the run, looks at them late. `ema` is the decay of the params' running
  mean, if the state has one.
  """

  prepare = _make_inputs(model, augmentation, mirrors, normalization, label_smoothing, sharding)
  gradient_of = _make_gradient(model, prepare, accumulate, unit=2 if augmentation.mixes else 1)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    (loss, correct), gradient = gradient_of(state.params, batch, key)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = optax.tree.norm(gradient)
    applied = jnp.isfinite(loss) & jnp.isfinite(norm) & ((state.skipped == 0) | (not stops))
    accuracy = correct / batch['label'].shape[0]
    metrics = {'loss': loss, 'accuracy': accuracy, 'gradient_norm': norm, 'skipped': ~applied}
    return _advanced(state, params, opt_state, ema, applied), metrics

  return step


def _advanced(state: TrainState, params: Params, opt_state, ema: float, applied: jax.Array) -> TrainState:
  """The state after a batch: these params and this optimiser's state if they are to be applied, else what it was.

  The running mean's decay is min(ema, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage has it: it
  soon forgets where training began.
  """
  decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
  mean = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - decay)
  old, new = (state.params, state.opt_state, state.ema), (params, opt_state, mean)
  params, opt_state, mean = jax.tree.map(partial(jnp.where, applied), new, old)
  return TrainState(state.step + 1, params, opt_state, mean, jnp.where(applied, 0, state.skipped + 1))


def make_evaluation_step(model: Model, normalization: Normalization) -> Callable[[Params, jax.Array], jax.Array]:
  """The evaluation step: (params, video uint8 `b v t h w 3`) -> logits `b v classes`, float32."""

  def step(params: Params, video: jax.Array) -> jax.Array:
    def logits(view: jax.Array) -> jax.Array:
      return model.apply(params, normalize(view, normalization, model.config.dtype))

    # One view after the other: memory is that of one, for any number of them.
    return jax.lax.map(logits, video.swapaxes(0, 1)).swapaxes(0, 1)  # b v classes

  return step


def _make_inputs(
  model: Model,
  augmentation: AugmentConfig,
  mirrors: Sequence[int],
  normalization: Normalization,
  label_smoothing: float,
  sharding: NamedSharding | None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """(video, labels, the rows' numbers in the batch, key) -> what the model is given, and its targets `b classes`."""
  config, a = model.config, augmentation

  def inputs(video: jax.Array, labels: jax.Array, rows: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    augment_keys, mix_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    video, labels = augment(video, labels, augment_keys, a, mirrors, normalization)
    targets = smooth_targets(labels, config.classes, label_smoothing)
    if a.mixes:
      video, targets = mix(video, targets, mix_keys, a.mixup, a.cutmix, a.mix_probability, a.cutmix_share)
    return normalize(video, normalization, config.dtype), targets

  if sharding is None:
    return inputs
  rows = sharding.spec
  return jax.shard_map(inputs, mesh=sharding.mesh, in_specs=(rows, rows, rows, PartitionSpec()), out_specs=rows)


def _make_gradient(model: Model, prepare: Callable, accumulate: int, unit: int) -> Callable:
  """(params, batch, key) -> (the mean loss, how many are correct), gradient; `prepare` is of `_make_inputs`."""

  def loss_of(params: Params, video: jax.Array, labels: jax.Array, rows: jax.Array, key: jax.Array):
    augment_key, model_key = jax.random.split(key)
    video, targets = prepare(video, labels, rows, augment_key)
    logits = model.apply(params, video, jax.random.fold_in(model_key, rows[0]))  # b classes
    return cross_entropy(logits, targets), count_correct(logits, targets.argmax(-1))

  def gradient_of(params: Params, batch: Batch, key: jax.Array):
    inputs = (batch['video'], batch['label'], jnp.arange(batch['label'].shape[0]))
    grad_of = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate == 1:
      return grad_of(params, *inputs, key)
    return _accumulated(lambda part: grad_of(params, *part, key), inputs, accumulate, unit)

  return gradient_of


def _accumulated(grad_of: Callable, inputs: tuple, parts: int, unit: int):
  """The mean loss and gradient, and the sum of what is correct, over parts of a batch; a loop, compiled once."""

  def part(x: jax.Array) -> jax.Array:
    units = x.reshape(-1, parts, unit, *x.shape[1:])  # b/ku k u ...
    return units.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])  # k b/k ...

  split = jax.tree.map(part, inputs)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_of, jax.tree.map(lambda x: x[0], split))
  )
  summed, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, grad_of(part)), None), zeros, split)
  (loss, correct), gradient = summed
  return (loss / parts, correct), jax.tree.map(lambda x: x / parts, gradient)
