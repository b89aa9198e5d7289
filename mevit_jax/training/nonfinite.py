"""A look at every step's metrics once it is done; training runs a few steps ahead of it."""

import collections
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from mevit_jax.errors import UserError

# Updates dropped in a row, after which even a run that goes on ends.
_IN_A_ROW = 10


class NonFiniteError(UserError):
  """The loss or its gradient is not finite: training must end."""


class Watch:
  """Waits for steps, collects their metrics, and finds those whose update was dropped.

  Args:
    stops: whether the first of these ends the run (or ten in a row do).
    name: the ids of the videos of a batch's `used`.
  """

  def __init__(self, stops: bool, name: Callable[[np.ndarray], list[str]]):
    self._stops, self._name = stops, name
    self._under_way: collections.deque[tuple[int, np.ndarray, Mapping[str, jax.Array]]] = collections.deque()
    self._done: list[dict[str, float]] = []
    self._in_a_row = 0

  def add(self, step: int, used: np.ndarray, metrics: Mapping[str, jax.Array]) -> None:
    """A step that has begun, and which videos it was given."""
    self._under_way.append((step, used, metrics))

  def settle(self, ahead: int = 0) -> None:
    """Waits until at most so many steps are under way.

    Raises:
      NonFiniteError: one's loss or gradient is not finite, and the run must end.
    """
    while len(self._under_way) > ahead:
      step, used, metrics = self._under_way.popleft()
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
      self._done.append(values)
      self._in_a_row = self._in_a_row + 1 if values['skipped'] else 0
      if values['skipped']:
        self._say(step, used, values)

  def means(self) -> dict[str, float]:
    """The metrics' means over the steps since the last call, and how many are left out: their update was dropped."""
    done, self._done = self._done, []
    used = [one for one in done if not one['skipped']]
    means = {name: float(np.mean([one[name] for one in used])) if used else math.nan for name in done[0]}
    return {**means, 'skipped': len(done) - len(used)}

  def _say(self, step: int, used: np.ndarray, values: dict[str, float]) -> None:
    what = f'loss {values["loss"]:g}, gradient norm {values["gradient_norm"]:g}'
    print(f'step {step}: {what}: its update was dropped; its videos: {" ".join(self._name(used))}', flush=True)
    if self._stops:
      raise NonFiniteError(
        f'{what} at step {step}: the state before it is saved, and the same command takes the same step again; lower '
        'optimizer.learning_rate, set optimizer.clip_norm, or go on without such batches: training.on_nonfinite=skip'
      )
    if self._in_a_row == _IN_A_ROW:
      raise NonFiniteError(f'{what} at step {step}, the last of {_IN_A_ROW} in a row that were dropped')
