"""Optimisers and schedules: TimeSformer's SGD in steps, and AdamW with a cosine."""

import dataclasses
import re
from typing import Literal, get_args

import jax
import optax

from mevit_jax.errors import UserError


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
    if self.base_batch_size < 1:
      raise UserError(f'optimizer.base_batch_size must be positive, not {self.base_batch_size}')
    try:
      re.compile(self.no_decay)
    except re.error as error:
      raise UserError(f'optimizer.no_decay is no regular expression: {error}') from None


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
  """The optimiser of a config, with this learning rate."""
  parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  decay = optax.add_decayed_weights(config.weight_decay, mask=lambda params: decayed(params, config.no_decay))
  if config.name == 'sgd':
    parts += [decay, optax.trace(config.momentum, nesterov=True)]
  else:
    parts += [optax.scale_by_adam(config.beta1, config.beta2), decay]
  return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def decayed(params, no_decay: str):
  """Which parameters weight decay reaches: a tree of booleans."""

  def reaches(path, _):
    return not (no_decay and re.search(no_decay, jax.tree_util.keystr(path, simple=True, separator='/')))

  return jax.tree_util.tree_map_with_path(reaches, params)
