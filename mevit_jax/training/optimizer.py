"""Optimisers and schedules: TimeSformer's SGD in steps, and AdamW with a cosine."""

import dataclasses
import re
from typing import Literal, get_args

import jax
import numpy as np
import optax

from mevit_jax.errors import UserError

# The model's stages, in the order of their blocks.
_STAGES = ('space', 'motion', 'classify')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How parameters are updated; epochs are counted in training examples.

  Attributes:
    name: 'sgd' (Nesterov momentum; weight decay is part of the gradient) or 'adamw' (decoupled weight decay).
    learning_rate: at `base_batch_size`; it is proportional to the global batch (Goyal et al. 2017).
    base_batch_size: the global batch that `learning_rate` is for.
    momentum: of SGD.
    beta1: of AdamW, the decay of the gradient's mean.
    beta2: of AdamW, the decay of the gradient's square.
    weight_decay: rate.
    no_decay: a regular expression; parameters whose path it matches (re.search) are not decayed. '' decays all.
    freeze: a regular expression; parameters whose path it matches are not trained: '^(?!head)' trains the head alone.
    layer_decay: what the learning rate is multiplied by for every block below the head (Clark et al. 2020); 1 is none.
    schedule: 'steps' (times `decay_factor` at each of `decay_epochs`) or 'cosine' (to zero at the end).
    decay_epochs: where the learning rate falls.
    decay_factor: by how much it falls there.
    warmup_epochs: the learning rate rises linearly from zero at first.
    clip_norm: the gradient's largest global norm; 0 does not clip.
  """

  name: Literal['sgd', 'adamw'] = 'sgd'
  learning_rate: float = 0.005
  base_batch_size: int = 64
  momentum: float = 0.9
  beta1: float = 0.9
  beta2: float = 0.999
  weight_decay: float = 1e-4
  no_decay: str = ''
  freeze: str = ''
  layer_decay: float = 1.0
  schedule: Literal['steps', 'cosine'] = 'steps'
  decay_epochs: tuple[float, ...] = (11.0, 14.0)
  decay_factor: float = 0.1
  warmup_epochs: float = 0.0
  clip_norm: float = 0.0

  def __post_init__(self):
    for field in ('name', 'schedule'):
      choices = get_args(type(self).__annotations__[field])
      if getattr(self, field) not in choices:
        raise UserError(f'optimizer.{field} must be one of {list(choices)}, not {getattr(self, field)!r}')
    for field in ('learning_rate', 'weight_decay', 'warmup_epochs', 'clip_norm'):
      if getattr(self, field) < 0:
        raise UserError(f'optimizer.{field} must not be negative, and is {getattr(self, field)}')
    for field in ('momentum', 'beta1', 'beta2'):
      if not 0 <= getattr(self, field) < 1:
        raise UserError(f'optimizer.{field} must be in [0, 1), not {getattr(self, field)}')
    if self.decay_factor <= 0:
      raise UserError(f'optimizer.decay_factor must be positive, not {self.decay_factor}')
    if self.base_batch_size < 1:
      raise UserError(f'optimizer.base_batch_size must be positive, not {self.base_batch_size}')
    if not 0 < self.layer_decay <= 1:
      raise UserError(f'optimizer.layer_decay must be in (0, 1], not {self.layer_decay}')
    for field in ('no_decay', 'freeze'):
      try:
        re.compile(getattr(self, field))
      except re.error as error:
        raise UserError(f'optimizer.{field} is no regular expression: {error}') from None


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
