"""Videos that turn out unreadable while training: counted, named once each, and an end where there are too many."""

import collections
import sys
from collections.abc import Mapping

import numpy as np

from mevit_jax.errors import UserError
from mevit_jax.parallel.distributed import allgather_bytes, is_main_process

# Preparation has decoded every video: so many that are unreadable now are a damaged disk, not a few bad videos.
_WINDOW, _MOST = 1000, 100  # clips


class Unreadable:
  """Looks at the batches of a run."""

  def __init__(self):
    self._named: set[str] = set()
    self._recent: collections.deque[bool] = collections.deque(maxlen=_WINDOW)
    self._count = 0

  def look(self, batch: Mapping[str, np.ndarray]) -> None:
    """Counts the clips of a batch that stand in for an unreadable video, and names those that are new.

    Raises:
      UserError: there are more than 100 among the last 1,000 clips.
    """
    errors = batch['error'].tolist()
    for line in (line for error in errors for line in error.splitlines()):
      if line not in self._named:
        self._named.add(line)
        print(
          f'unreadable, and another one was taken: {line}',
          file=sys.stdout if is_main_process() else sys.stderr,
          flush=True,
        )
    replaced = [bool(error) for error in errors]
    self._count += sum(replaced)
    self._recent.extend(replaced)
    if sum(self._recent) > _MOST:
      raise UserError(
        f'{sum(self._recent)} of the last {len(self._recent):,} clips were of unreadable videos, named above: '
        'the dataset is damaged; see to its disk, or prepare it again'
      )

  def take(self) -> int:
    """How many clips were replaced since the last call, on all hosts; all of them call it."""
    count, self._count = self._count, 0
    return sum(int(each) for each in allgather_bytes(str(count).encode()))
