"""Optimisers and schedules: TimeSformer's SGD in steps, and AdamW with a cosine."""

import re

import jax
import numpy as np
import optax

from mevit_jax.config.optimizer import OptimizerConfig
from mevit_jax.errors import UserError

# The model's stages, in the order of their blocks.
_STAGES = ('space', 'motion', 'classify')


def make_schedule(config: OptimizerConfig, batch_size: int, steps_per_epoch: float, steps: int) -> optax.Schedule:
  """The learning rate of each step, for this global batch."""
  peak = config.learning_rate * batch_size / config.base_batch_size
  warmup = round(config.warmup_epochs * steps_per_epoch)
  if config.schedule == 'cosine':
    after = optax.cosine_decay_schedule(peak, max(1, steps - warmup))
  else:
    falls = {round(epoch * steps_per_epoch) - warmup: config.decay_factor for epoch in config.decay_epochs}
    after = optax.piecewise_constant_schedule(peak, falls)
  # The first step already moves: with `warmup` steps the rate is peak / warmup, then 2 peak / warmup, ...
  rise = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
  return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  """The optimiser of a config, with this learning rate; frozen parameters have no state and no part in the norm."""
  parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  decay = optax.add_decayed_weights(config.weight_decay, mask=lambda params: unmatched(params, config.no_decay))
  if config.name == 'sgd':
    parts += [decay, optax.trace(config.momentum, nesterov=True)]
  else:
    parts += [optax.scale_by_adam(config.beta1, config.beta2), decay]
  optimizer = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
  if config.freeze:
    kinds = {True: optimizer, False: optax.set_to_zero()}
    optimizer = optax.partition(kinds, lambda params: unmatched(params, config.freeze))
  # Scaled last, where every stage is there, frozen or not.
  return optax.chain(optimizer, _scale_by_layer(config.layer_decay)) if config.layer_decay < 1 else optimizer


def check_patterns(config: OptimizerConfig, params) -> None:
  """Raises a UserError if a regular expression matches no parameter, or freezes all: a typo, most likely."""
  for field in ('no_decay', 'freeze'):
    pattern = getattr(config, field)
    trained = jax.tree.leaves(unmatched(params, pattern))
    if pattern and (all(trained) or (field == 'freeze' and not any(trained))):
      names = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in jax.tree.leaves_with_path(params)]
      what = 'no parameter' if all(trained) else 'every parameter'
      raise UserError(f'optimizer.{field} {pattern!r} matches {what}; their paths are like {names[0]}, {names[-1]}')


def unmatched(params, pattern: str):
  """Which parameters a regular expression does not match (re.search in their paths): a tree of booleans."""

  def other(path, _):
    return not (pattern and re.search(pattern, jax.tree_util.keystr(path, simple=True, separator='/')))

  return jax.tree_util.tree_map_with_path(other, params)


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
  """Scales updates by decay ** (blocks above): 1 for norm and head, the last block by `decay`, the embedding least."""

  def update(updates, state, params=None):
    del params
    first, scaled = 1, {}
    depth = sum(jax.tree.leaves(updates[stage])[0].shape[0] for stage in _STAGES if stage in updates)
    for stage in _STAGES:
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
