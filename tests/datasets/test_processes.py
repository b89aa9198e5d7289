"""Worker processes: results are returned, crashed processes are replaced, none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest

from mevit_jax.datasets import tasks
from mevit_jax.datasets.processes import CRASHED, run_in_processes
from tests.helpers import trouble


def calls(*actions):
  return deque((action,) for action in actions)


def results(todo, workers):
  return [(call[0], result) for call, result in run_in_processes(trouble.perform, todo, workers) if call is not None]


def alive(pid):
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def test_without_workers_calls_run_in_this_process():
  assert results(calls(1, 2, 3), 0) == [(i, (i, os.getpid())) for i in (1, 2, 3)]


def test_a_crashed_process_loses_only_its_call():
  done = dict(results(calls(1, 'crash', 2, 3, 4, 5), 2))
  assert done.pop('crash') == CRASHED
  assert {action: result[0] for action, result in done.items()} == {i: i for i in range(1, 6)}
  assert not any(alive(result[1]) for result in done.values())


def test_calls_can_be_added_and_an_error_ends_the_run():
  todo = calls('crash')
  seen = []

  def work():
    for call, result in run_in_processes(trouble.perform, todo, 1):
      if call is not None:
        seen.append(result if result == CRASHED else result[0])
        todo.append(('raise' if len(seen) > 2 else len(seen),))

  with pytest.raises(ValueError, match='as requested') as caught:
    work()
  assert seen == [CRASHED, 1, 2]
  assert 'trouble.py' in caught.value.__notes__[0]  # the traceback in the other process


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
  program = (
    'import collections\nfrom tests.helpers import trouble\n'
    'from mevit_jax.datasets.processes import run_in_processes\n'
    'if __name__ == "__main__":\n'
    '  for call, result in run_in_processes(trouble.perform, collections.deque([(1,), ("hang",)]), 1):\n'
    '    if call: print(result[1], flush=True)\n'
  )
  script = tmp_path / 'parent.py'
  script.write_text(program)
  path = str(Path(__file__).parents[2])
  with subprocess.Popen(
    [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': path}
  ) as parent:
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert alive(worker)
    parent.send_signal(signal.SIGKILL)
  for _ in range(100):
    if not alive(worker):
      break
    time.sleep(0.05)
  assert not alive(worker)


def test_a_progress_file_that_is_still_empty_counts_nothing(tmp_path):
  """A shard that has just been started is read by the process that reports progress."""
  (tmp_path / 'begun.current').touch()
  (tmp_path / 'further.current').write_text(f'{3:9} {0:20.3f}')
  assert tasks._count_items_done(tmp_path) == 3
