"""Monitoring of step metrics, a few steps behind dispatch; handling of non-finite losses and gradients."""

import collections
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mevit_jax.errors import UserError

_logger = logging.getLogger(__name__)

# Consecutive dropped updates that end any run.
_MAX_CONSECUTIVE = 10
# Metrics that are counted, also over dropped updates; of the others the mean is taken.
_COUNTS = ('skipped', 'unreadable')


class NonFiniteError(UserError):
  """The loss or its gradient is not finite, and training must end."""


class StepMonitor:
  """Waits for steps, collects their metrics, and reports dropped updates.

  Args:
    stop: whether the first dropped update ends the run; otherwise ten consecutive ones do.
    video_ids: maps the dataset indices of a batch to video ids.
    window: `window` of the run that this one resumes.

  Attributes:
    window: sums over the steps that were drained since the last call of `means`, by name, and the number of applied
      updates, `steps`. Checkpoints hold it, so that a resumed run logs the same means.
  """

  def __init__(self, stop: bool, video_ids: Callable[[np.ndarray], list[str]], window: Mapping[str, float] = {}):
    self._stop, self._video_ids = stop, video_ids
    self.window = dict(window)
    self._pending: collections.deque[tuple[int, np.ndarray, Mapping[str, Any]]] = collections.deque()
    self._consecutive = 0

  def add(self, step: int, indices: np.ndarray, metrics: Mapping[str, Any]) -> None:
    """Adds a dispatched step, the dataset indices of its batch, and its metrics."""
    self._pending.append((step, indices, metrics))

  def drain(self, max_pending: int = 0) -> None:
    """Waits until at most `max_pending` steps are in flight.

    Raises:
      NonFiniteError: the loss or gradient of a step is not finite, and the run must end.
    """
    while len(self._pending) > max_pending:
      step, indices, metrics = self._pending.popleft()
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
      self._consecutive = self._consecutive + 1 if values['skipped'] else 0
      if not (values['skipped'] and self._stop):  # the run then resumes before this step
        self._accumulate(values)
      if values['skipped']:
        self._report(step, indices, values)

  def means(self) -> dict[str, float]:
    """Returns mean metrics over the applied updates since the last call, and counts over all updates."""
    window, self.window = self.window, {}
    steps = window.pop('steps')
    return {name: total if name in _COUNTS else total / steps if steps else math.nan for name, total in window.items()}

  def _accumulate(self, values: Mapping[str, float]) -> None:
    """Adds a step to the window."""
    for name, value in {**values, 'steps': not values['skipped']}.items():
      counted = name in _COUNTS or not values['skipped']
      self.window[name] = self.window.get(name, 0.0) + (value if counted else 0.0)

  def _report(self, step: int, indices: np.ndarray, values: dict[str, float]) -> None:
    """Logs a dropped update, and raises a NonFiniteError if it ends the run."""
    cause = f'loss {values["loss"]:g}, gradient norm {values["gradient_norm"]:g}'
    _logger.warning('step %d: %s: update dropped; videos: %s', step, cause, ' '.join(self._video_ids(indices)))
    if self._stop:
      raise NonFiniteError(
        f'{cause} at step {step}; the state before it is saved, and the same command repeats it: lower '
        '`optimizer.learning_rate`, set `optimizer.clip_norm`, or skip such batches with training.on_nonfinite=skip'
      )
    if self._consecutive == _MAX_CONSECUTIVE:
      raise NonFiniteError(f'{cause} at step {step}, the last of {_MAX_CONSECUTIVE} consecutive dropped updates')
