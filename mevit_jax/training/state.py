"""Everything that training changes, as one tree."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax

from mevit_jax.models.functional import Model, Params


@partial(jax.tree_util.register_dataclass, data_fields=['step', 'params', 'opt_state'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state after `step` updates, which is also the position in the data: batch `step` is next.

  Attributes:
    step: int32, a scalar.
    params: of the model.
    opt_state: of the optimiser.
  """

  step: jax.Array
  params: Params
  opt_state: optax.OptState


def begin_state(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
  """The state before the first step, with these params."""
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def init_state(model: Model, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
  """Likewise, from scratch; jit it with output shardings, and no parameter is ever whole on one device."""
  return begin_state(optimizer, model.init(key))
