"""Training state as one tree."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from mevit_jax.models.functional import Model, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Training state after `step` batches; `step` is also the position in the data.

  Attributes:
    step: number of batches, int32 scalar.
    params: model parameters.
    opt_state: optimizer state.
    ema: EMA of the parameters, or None.
    skipped: number of consecutive most recent updates that were dropped, int32 scalar.
  """

  step: jax.Array
  params: Params
  opt_state: optax.OptState
  ema: Params | None
  skipped: jax.Array

  def items(self) -> dict[str, Any]:
    """Returns the trees that a checkpoint saves, by name."""
    items = {'params': self.params, 'opt_state': self.opt_state, 'ema': self.ema}
    return {name: tree for name, tree in items.items() if tree is not None}

  def restored(self, items: dict[str, Any], step: int) -> 'TrainState':
    """Returns the state of a checkpoint; `self` is abstract and has the shardings of the scalars."""
    scalars = {
      name: jax.device_put(jnp.asarray(value, like.dtype), like.sharding)
      for name, value, like in (('step', step, self.step), ('skipped', 0, self.skipped))
    }
    return TrainState(**{'ema': None, **items, **scalars})


def create_state(optimizer: optax.GradientTransformation, params: Params, ema: bool = False) -> TrainState:
  """Builds the state before the first step from params, which are also the initial EMA."""
  zero = jnp.zeros((), jnp.int32)
  ema_params = jax.tree.map(jnp.copy, params) if ema else None  # a copy: donated buffers must not be shared
  return TrainState(zero, params, optimizer.init(params), ema_params, jnp.copy(zero))


def init_state(model: Model, optimizer: optax.GradientTransformation, key: jax.Array, ema: bool = False) -> TrainState:
  """Builds the state before the first step from random params.

  Jit it with output shardings to initialize every shard on its own device.
  """
  return create_state(optimizer, model.init(key), ema)


def select_params(state: TrainState, weights: str = 'auto') -> tuple[Literal['ema', 'raw'], Params]:
  """Returns the params selected by 'ema', 'raw' or 'auto' (EMA if available), and which of 'ema' and 'raw' they are."""
  if state.ema is None or weights == 'raw':
    return 'raw', state.params
  return 'ema', state.ema
