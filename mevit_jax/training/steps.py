"""Training and evaluation step: pure functions, jitted by the caller with donated state."""

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
from mevit_jax.config.training import TrainingConfig
from mevit_jax.models.functional import Model, Params
from mevit_jax.training.losses import count_correct, cross_entropy, smooth_targets
from mevit_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]
LossAndCorrect = tuple[jax.Array, jax.Array]
ValueAndGradient = tuple[LossAndCorrect, Params]


def make_train_step(
  model: Model,
  optimizer: optax.GradientTransformation,
  *,
  training: TrainingConfig,
  augmentation: AugmentConfig,
  normalization: Normalization,
  mirrors: Sequence[int],
  sharding: NamedSharding | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """Builds the training step: (state, batch) -> (state, metrics).

  A batch is `video` uint8 `b t h w 3` and `label` int32 `b`. Randomness is keyed by (seed, step, example), so it does
  not depend on devices or hosts. With k microbatches (`training.accumulate`) the gradient is the mean over them;
  microbatch i is examples i, i + k, ... (pairs of examples with mixup or CutMix), so that every microbatch is spread
  over all devices. Metrics are scalars over the batch; with mixup or CutMix the accuracy is that of the label with the
  larger weight.

  If the loss or the gradient is not finite, the update is dropped and the metric `skipped` is 1. If
  `training.on_nonfinite` is 'stop', all following updates are dropped too, since the host reads metrics late.

  Args:
    model: model to train.
    optimizer: optimizer of `state.opt_state`.
    training: training config: label smoothing, accumulation, seed, EMA decay, handling of non-finite values.
    augmentation: augmentation config.
    normalization: pixel mean and standard deviation.
    mirrors: label of each class's mirror image, see `mirror_labels`.
    sharding: batch sharding; each device augments its shard without communication.
  """
  prepare = _make_prepare(model, augmentation, mirrors, normalization, training.label_smoothing, sharding)
  unit = 2 if augmentation.mixes else 1
  return _make_step(_make_gradient(model.apply, prepare, training.accumulate, unit), optimizer, training)


def make_encode_step(
  model: Model,
  *,
  training: TrainingConfig,
  augmentation: AugmentConfig,
  normalization: Normalization,
  mirrors: Sequence[int],
  sharding: NamedSharding | None = None,
) -> Callable[[Params, Batch, jax.Array], Batch]:
  """Builds the part of the training step that a frozen encoder needs once: (params, batch, step) -> batch of features.

  The batch of features has `video` `b t n+f d`, the features of the augmented clips, and `label` `b classes`, their
  targets; both are those of `make_train_step` at this step. Arguments as there.
  """
  prepare = _make_prepare(model, augmentation, mirrors, normalization, training.label_smoothing, sharding)

  def encode(params: Params, batch: Batch, step: jax.Array) -> Batch:
    augment_key, _ = jax.random.split(_step_key(training, step))
    indices = jnp.arange(batch['label'].shape[0])
    video, targets = prepare(batch['video'], batch['label'], indices, augment_key)
    return {'video': model.encode(params, video), 'label': targets}

  return encode


def make_feature_step(
  model: Model, optimizer: optax.GradientTransformation, training: TrainingConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """Builds the training step from features, batches of `make_encode_step`, instead of clips."""

  def prepare(features: jax.Array, targets: jax.Array, *_: jax.Array) -> tuple[jax.Array, jax.Array]:
    return features, targets

  return _make_step(_make_gradient(model.classify, prepare, training.accumulate, unit=1), optimizer, training)


def _step_key(training: TrainingConfig, step: jax.Array) -> jax.Array:
  return jax.random.fold_in(jax.random.key(training.seed), step)


def _make_step(
  compute_gradient: Callable, optimizer: optax.GradientTransformation, training: TrainingConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """Builds a training step from a gradient, see `_make_gradient`."""
  stop = training.on_nonfinite == 'stop'

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
    key = _step_key(training, state.step)
    (loss, correct), gradient = compute_gradient(state.params, batch, key)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = optax.tree.norm(gradient)
    applied = jnp.isfinite(loss) & jnp.isfinite(norm) & ((state.skipped == 0) | (not stop))
    accuracy = correct / batch['label'].shape[0]
    metrics = {'loss': loss, 'accuracy': accuracy, 'gradient_norm': norm, 'skipped': ~applied}
    return _next_state(state, params, opt_state, training.ema, applied), metrics

  return step


def _next_state(
  state: TrainState, params: Params, opt_state: optax.OptState, ema: float, applied: jax.Array
) -> TrainState:
  """Builds the state after a batch: new params and optimizer state if the update is applied, else the old ones.

  The EMA decay is min(ema, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage, so that the initial
  params are soon forgotten.
  """
  decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
  ema_params = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - decay)
  old, new = (state.params, state.opt_state, state.ema), (params, opt_state, ema_params)
  params, opt_state, ema_params = jax.tree.map(partial(jnp.where, applied), new, old)
  return TrainState(state.step + 1, params, opt_state, ema_params, jnp.where(applied, 0, state.skipped + 1))


def make_evaluation_step(model: Model, normalization: Normalization) -> Callable[[Params, jax.Array], jax.Array]:
  """Builds the evaluation step: (params, video uint8 `b v t h w 3`) -> logits `b v classes`, float32."""

  def step(params: Params, video: jax.Array) -> jax.Array:
    def logits(view: jax.Array) -> jax.Array:
      return model.apply(params, normalize(view, normalization, model.config.dtype))

    # Views in sequence: the memory is that of one view.
    return jax.lax.map(logits, video.swapaxes(0, 1)).swapaxes(0, 1)  # b v classes

  return step


def _make_prepare(
  model: Model,
  augmentation: AugmentConfig,
  mirrors: Sequence[int],
  normalization: Normalization,
  label_smoothing: float,
  sharding: NamedSharding | None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Builds preprocessing: (video, labels, indices in the batch, key) -> (model input, targets `b classes`)."""
  config, a = model.config, augmentation

  def prepare(video: jax.Array, labels: jax.Array, indices: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    augment_keys, mix_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    video, labels = augment(video, labels, augment_keys, a, mirrors, normalization)
    targets = smooth_targets(labels, config.classes, label_smoothing)
    if a.mixes:
      video, targets = mix(video, targets, mix_keys, a.mixup, a.cutmix, a.mix_probability, a.cutmix_share)
    return normalize(video, normalization, config.dtype), targets

  if sharding is None:
    return prepare
  batch = sharding.spec
  return jax.shard_map(prepare, mesh=sharding.mesh, in_specs=(batch, batch, batch, PartitionSpec()), out_specs=batch)


def _make_gradient(apply: Callable, prepare: Callable, accumulate: int, unit: int) -> Callable:
  """Builds the gradient: (params, batch, key) -> ((mean loss, number correct), gradient)."""

  def compute_loss(
    params: Params, video: jax.Array, labels: jax.Array, indices: jax.Array, key: jax.Array
  ) -> LossAndCorrect:
    augment_key, model_key = jax.random.split(key)
    video, targets = prepare(video, labels, indices, augment_key)
    logits = apply(params, video, jax.random.fold_in(model_key, indices[0]))  # b classes
    return cross_entropy(logits, targets), count_correct(logits, targets.argmax(-1))

  def compute_gradient(params: Params, batch: Batch, key: jax.Array) -> ValueAndGradient:
    inputs = (batch['video'], batch['label'], jnp.arange(batch['label'].shape[0]))
    value_and_grad_of = jax.value_and_grad(compute_loss, has_aux=True)
    if accumulate == 1:
      return value_and_grad_of(params, *inputs, key)
    return _accumulate(lambda microbatch: value_and_grad_of(params, *microbatch, key), inputs, accumulate, unit)

  return compute_gradient


def _accumulate(
  value_and_grad_of: Callable[[tuple], ValueAndGradient], inputs: tuple, microbatches: int, unit: int
) -> ValueAndGradient:
  """Returns the mean loss and gradient, and the number correct, over microbatches of whole units of examples."""

  def to_microbatches(x: jax.Array) -> jax.Array:
    units = x.reshape(-1, microbatches, unit, *x.shape[1:])  # b/ku k u ...
    return units.swapaxes(0, 1).reshape(microbatches, -1, *x.shape[1:])  # k b/k ...

  split = jax.tree.map(to_microbatches, inputs)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad_of, jax.tree.map(lambda x: x[0], split))
  )
  summed, _ = jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, value_and_grad_of(x)), None), zeros, split)
  (loss, correct), gradient = summed
  return (loss / microbatches, correct), jax.tree.map(lambda x: x / microbatches, gradient)
