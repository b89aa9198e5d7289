"""Everything that training changes, as one tree."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from mevit_jax.models.functional import Model, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state after `step` batches, which is also the position in the data: batch `step` is next.

  Attributes:
    step: int32, a scalar.
    params: of the model.
    opt_state: of the optimiser.
    ema: the params' running mean, or None.
    skipped: int32, a scalar: of the last batches, how many in a row have left no trace: their update was dropped.
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
  """The state before the first step, with these params, whose running mean they are too."""
  zero = jnp.zeros((), jnp.int32)
  mean = jax.tree.map(jnp.copy, params) if ema else None  # a copy: donated buffers must not be shared
  return TrainState(zero, params, optimizer.init(params), mean, jnp.copy(zero))


def init_state(model: Model, optimizer: optax.GradientTransformation, key: jax.Array, ema: bool = False) -> TrainState:
  """Likewise, from scratch; jit it with output shardings, and no parameter is ever whole on one device."""
  return create_state(optimizer, model.init(key), ema)


def select_params(state: TrainState, wanted: str = 'auto') -> tuple[Literal['ema', 'raw'], Params]:
  """The params that 'ema' (their running mean), 'raw', or 'auto' (the mean if there is one) means, and which."""
  if state.ema is None or wanted == 'raw':
    return 'raw', state.params
  return 'ema', state.ema
