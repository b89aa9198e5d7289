"""Processes that take calls: results come back, what dies is replaced, nothing outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest

from mevit_jax.datasets import tasks
from mevit_jax.datasets.processes import DIED, in_processes
from tests.helpers import trouble


def calls(*whats):
  return deque((what,) for what in whats)


def results(todo, workers):
  return [(call[0], result) for call, result in in_processes(trouble.answer, todo, workers) if call is not None]


def alive(pid):
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def test_without_workers_it_is_this_process():
  assert results(calls(1, 2, 3), 0) == [(i, (i, os.getpid())) for i in (1, 2, 3)]


def test_a_process_that_dies_costs_its_call_alone():
  done = dict(results(calls(1, 'crash', 2, 3, 4, 5), 2))
  assert done.pop('crash') == DIED
  assert {what: answer[0] for what, answer in done.items()} == {i: i for i in range(1, 6)}
  assert not any(alive(answer[1]) for answer in done.values())


def test_more_calls_may_come_meanwhile_and_an_error_ends_it():
  todo = calls('crash')
  seen = []

  def work():
    for call, result in in_processes(trouble.answer, todo, 1):
      if call is not None:
        seen.append(result if result == DIED else result[0])
        todo.append(('raise' if len(seen) > 2 else len(seen),))

  with pytest.raises(ValueError, match='as told') as caught:
    work()
  assert seen == [DIED, 1, 2]
  assert 'trouble.py' in caught.value.__notes__[0]  # where it was, in the other process


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
  program = (
    'import collections, trouble\n'
    'from mevit_jax.datasets.processes import in_processes\n'
    'if __name__ == "__main__":\n'
    '  for call, result in in_processes(trouble.answer, collections.deque([(1,), ("hang",)]), 1):\n'
    '    if call: print(result[1], flush=True)\n'
  )
  script = tmp_path / 'parent.py'
  script.write_text(program)
  path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
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


def test_a_note_that_is_still_empty_counts_nothing(tmp_path):
  """Of a shard that has just been begun, read by the process that says how far all of them are."""
  (tmp_path / 'begun.doing').touch()
  (tmp_path / 'further.doing').write_text(f'{3:9} {0:20.3f}')
  assert tasks._at_work(tmp_path) == 3
