"""Worker processes: signals, crashes and their error messages."""

import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from mevit_jax.data.pipeline import eval_batches, train_batches
from mevit_jax.data.sampling import Sampling
from mevit_jax.data.shared_memory import SharedBatch
from mevit_jax.errors import UserError
from tests.data.test_pipeline import CLIP, Videos, assert_equal, train


def count_shared_batches(pid):
  """Returns the number of batches in shared memory that a process has a file descriptor of."""
  count = 0
  for path in Path(f'/proc/{pid}/fd').iterdir():
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
      count += 'mevit-batch' in os.readlink(path)
  return count


def test_workers_ignore_sigterm_and_a_killed_one_is_reported():
  with contextlib.closing(train_batches(Videos(), CLIP, Sampling(5), batch_size=4, workers=2)) as batches:
    seen = [next(batches) for _ in range(2)]  # one from each worker: both have started
    children = psutil.Process().children()
    running = [p for p in children if p.status() != psutil.STATUS_ZOMBIE]
    workers = [p for p in running if any('spawn_main' in word for word in p.cmdline())]
    assert len(workers) == 2
    for worker in workers:
      worker.send_signal(signal.SIGINT)
      worker.send_signal(signal.SIGTERM)
    seen += [next(batches) for _ in range(8)]
    assert_equal(seen, train(10))
    for worker in workers:  # it has closed the batches that were opened
      assert count_shared_batches(worker.pid) <= 4
    workers[1].kill()
    message = r"worker process [01] was killed by SIGKILL while reading video 'clip\d': .* memory.* data\.workers"
    with pytest.raises(UserError, match=message) as raised:
      list(itertools.islice(batches, 9))
    assert '\n' not in str(raised.value)


def test_workers_end_with_a_parent_that_was_killed():
  here = Path(__file__).parent
  program = (
    f'import sys; sys.path[:0] = [{str(here)!r}, {str(here.parents[1])!r}]\n'
    'import time, test_pipeline as t\n'
    'batches = t.train_batches(t.Videos(), t.CLIP, t.Sampling(5), batch_size=4, workers=1)\n'
    'next(batches); print("ready", flush=True); time.sleep(60)\n'
  )
  parent = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True)
  with parent:
    assert parent.stdout.readline() == 'ready\n'
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.kill()
  _, alive = psutil.wait_procs(children, timeout=20)
  assert not alive


def test_the_last_batch_outlives_its_worker():
  """Workers end once the last batch is received, which a slow evaluation opens later."""
  with contextlib.closing(eval_batches(Videos(), CLIP, batch_size=4, workers=1)) as batches:
    expected = list(eval_batches(Videos(), CLIP, batch_size=4))
    seen = [next(batches) for _ in expected[:-1]]
    workers = [p for p in psutil.Process().children() if any('spawn_main' in word for word in p.cmdline())]
    psutil.wait_procs(workers, timeout=100)
    seen += batches
  assert_equal(seen, expected)


def test_nothing_of_a_killed_process_group_stays_in_shared_memory():
  """Killed with all of its processes, so that none can clean up, a run leaves no memory behind."""
  here = Path(__file__).parent
  program = (
    f'import sys; sys.path[:0] = [{str(here)!r}, {str(here.parents[1])!r}]\n'
    'import time, test_pipeline as t\n'
    'batches = t.train_batches(t.Videos(), t.CLIP, t.Sampling(5), batch_size=4, workers=1)\n'
    'held = [next(batches) for _ in range(3)]; print("ready", flush=True); time.sleep(60)\n'
  )

  def named_memory() -> set[str]:
    return {path.name for path in Path('/dev/shm').iterdir() if not path.name.startswith('sem.')}

  before = named_memory()
  parent = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True, start_new_session=True)
  with parent:
    assert parent.stdout.readline() == 'ready\n'
    children = psutil.Process(parent.pid).children(recursive=True)
    os.killpg(parent.pid, signal.SIGKILL)
  psutil.wait_procs(children, timeout=20)
  assert named_memory() <= before


def test_shared_batches_hold_any_arrays():
  batch = {
    'a': np.arange(7, dtype=np.uint8),
    'empty': np.zeros((0, 3)),
    'text': np.array(['é', 'longer']),
    'fortran': np.asfortranarray(np.random.default_rng(0).normal(size=(3, 5))),
    'number': np.float32(2),
  }
  shared = SharedBatch(batch)
  opened = pickle.loads(pickle.dumps(shared)).open()
  os.close(shared.fd)
  assert_equal([opened], [batch])
  opened['a'] += 1  # writable, and alive without the descriptor
  assert opened['a'].tolist() == list(range(1, 8))
  assert all(array.ctypes.data % 64 == 0 for array in opened.values() if array.size > 1)
  with pytest.raises(FileNotFoundError):
    shared.open()
  with pytest.raises(FileNotFoundError):
    pickle.loads(pickle.dumps(shared)).open()
  nothing = SharedBatch({'nothing': None})
  assert nothing.open() == {'nothing': None}
  os.close(nothing.fd)
