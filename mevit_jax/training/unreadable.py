"""Unreadable videos during training: counts and logs them, and ends training if there are too many."""

import collections
import logging
from collections.abc import Mapping

import numpy as np

from mevit_jax.errors import UserError
from mevit_jax.parallel.distributed import allgather_bytes

_logger = logging.getLogger(__name__)

# Every video was decoded during preparation; this many unreadable ones now mean a damaged disk.
_WINDOW, _MAX_UNREADABLE = 1000, 100  # clips


class UnreadableMonitor:
  """Monitors the batches of a run for clips that replace unreadable videos."""

  def __init__(self) -> None:
    self._logged: set[str] = set()
    self._recent: collections.deque[bool] = collections.deque(maxlen=_WINDOW)
    self._count = 0

  def add(self, batch: Mapping[str, np.ndarray]) -> None:
    """Counts the clips of a batch that replace unreadable videos, and logs each video once.

    Raises:
      UserError: more than 100 of the last 1,000 clips replace unreadable videos.
    """
    errors = batch['error'].tolist()
    for line in (line for error in errors for line in error.splitlines()):
      if line not in self._logged:
        self._logged.add(line)
        _logger.warning('unreadable video, replaced by another one: %s', line)
    replaced = [bool(error) for error in errors]
    self._count += sum(replaced)
    self._recent.extend(replaced)
    if sum(self._recent) > _MAX_UNREADABLE:
      raise UserError(
        f'{sum(self._recent)} of the last {len(self._recent):,} clips were unreadable, see the log above: '
        'the dataset is damaged; check its disk, or prepare it again'
      )

  def take(self) -> int:
    """Returns the number of replaced clips on all hosts since the last call; call it on all hosts."""
    count, self._count = self._count, 0
    return sum(int(host_count) for host_count in allgather_bytes(str(count).encode()))
