"""Optimizers and learning rate schedules: SGD or AdamW, with step or cosine decay."""

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
import optax

from mevit_jax.config.optimizer import OptimizerConfig
from mevit_jax.errors import UserError
from mevit_jax.models.functional import Model, Params
from mevit_jax.models.mevit import STAGES
from mevit_jax.trees import path_name


def make_schedule(config: OptimizerConfig, batch_size: int, steps_per_epoch: float, steps: int) -> optax.Schedule:
  """Builds the learning rate schedule for a global batch size."""
  peak = config.learning_rate * batch_size / config.base_batch_size
  warmup = round(config.warmup_epochs * steps_per_epoch)
  if config.schedule == 'cosine':
    decay = optax.cosine_decay_schedule(peak, max(1, steps - warmup))
  else:
    boundaries = {round(epoch * steps_per_epoch) - warmup: config.decay_factor for epoch in config.decay_epochs}
    decay = optax.piecewise_constant_schedule(peak, boundaries)
  # The first step is not 0: with `warmup` steps the rate is peak / warmup, then 2 peak / warmup, ...
  warmup_schedule = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
  return optax.join_schedules([warmup_schedule, decay], [warmup])


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Builds the optimizer of a config; frozen parameters have no state and are excluded from the gradient norm."""
  parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  decay = optax.add_decayed_weights(config.weight_decay, mask=lambda params: unmatched(params, config.no_decay))
  if config.name == 'sgd':
    parts += [decay, optax.trace(config.momentum, nesterov=True)]
  else:
    parts += [optax.scale_by_adam(config.beta1, config.beta2), decay]
  optimizer = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
  if config.freeze:
    partitions = {True: optimizer, False: optax.set_to_zero()}
    optimizer = optax.partition(partitions, lambda params: unmatched(params, config.freeze))
  # Layer decay comes last, where the updates of all stages are present, frozen or not.
  return optax.chain(optimizer, _scale_by_layer(config.layer_decay)) if config.layer_decay < 1 else optimizer


def stop_frozen_gradients(model: Model, pattern: str) -> Model:
  """Returns the model without gradients of frozen parameters: no backward pass goes through what precedes all others.

  Args:
    model: model to train.
    pattern: `optimizer.freeze`; '' returns the model as it is.
  """
  if not pattern:
    return model

  def stop(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def apply_frozen(params: Params, *args: Any) -> jax.Array:
      trained = unmatched(params, pattern)
      return apply(jax.tree.map(lambda x, t: x if t else jax.lax.stop_gradient(x), params, trained), *args)

    return apply_frozen

  return dataclasses.replace(model, apply=stop(model.apply), classify=stop(model.classify))


def check_patterns(config: OptimizerConfig, params: optax.Params) -> None:
  """Raises a UserError if a pattern matches no parameter, or freezes all: most likely a typo."""
  for field in ('no_decay', 'freeze'):
    pattern = getattr(config, field)
    trained = jax.tree.leaves(unmatched(params, pattern))
    if pattern and (all(trained) or (field == 'freeze' and not any(trained))):
      names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
      what = 'no parameter' if all(trained) else 'every parameter'
      raise UserError(f'`optimizer.{field}` {pattern!r} matches {what}; examples of names: {names[0]}, {names[-1]}')


def check_frozen(config: OptimizerConfig, params: optax.Params, names: Collection[str]) -> None:
  """Raises a UserError unless `optimizer.freeze` freezes all parameters with these top-level names."""
  frozen = jax.tree.map(lambda trained: not trained, unmatched(params, config.freeze))
  trained = [name for name in names if name in params and not all(jax.tree.leaves(frozen[name]))]
  if trained:
    raise UserError(
      f'`training.cache_features` needs a frozen encoder, but {", ".join(trained)} are trained: '
      f"use `optimizer.freeze` '^({'|'.join(names)})/?'"
    )


def unmatched(params: optax.Params, pattern: str) -> Any:
  """Returns a tree of booleans: True if the regular expression does not match the parameter's name (re.search)."""

  def is_unmatched(path: tuple, _: jax.Array) -> bool:
    return not (pattern and re.search(pattern, path_name(path)))

  return jax.tree_util.tree_map_with_path(is_unmatched, params)


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
  """Builds layer-wise decay: scales updates by 1 for norm and head, `decay` for the last block, decay² for the next."""

  def update(
    updates: dict[str, Any], state: optax.EmptyState, params: optax.Params | None = None
  ) -> tuple[dict[str, Any], optax.EmptyState]:
    del params
    first, scaled = 1, {}
    depth = sum(jax.tree.leaves(updates[stage])[0].shape[0] for stage in STAGES if stage in updates)
    for stage in STAGES:
      if stage in updates:
        blocks = jax.tree.leaves(updates[stage])[0].shape[0]
        scales = decay ** (depth + 1 - np.arange(first, first + blocks, dtype=np.float32))
        scaled[stage] = jax.tree.map(lambda x, s=scales: x * s.reshape(-1, *[1] * (x.ndim - 1)), updates[stage])
        first += blocks
    for name in updates.keys() - scaled.keys():
      scale = 1.0 if name in ('norm', 'head') else decay ** (depth + 1)
      scaled[name] = jax.tree.map(lambda x, s=scale: x * s, updates[name])
    return scaled, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
