"""Worker processes: signals, crashes and their error messages."""

import contextlib
import itertools
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mevit_jax.data.pipeline import train_batches
from mevit_jax.data.sampling import Sampling
from mevit_jax.errors import UserError
from tests.data.test_pipeline import CLIP, Videos, assert_equal, train


def test_workers_ignore_sigterm_and_a_killed_one_is_reported():
  with contextlib.closing(train_batches(Videos(), CLIP, Sampling(5), batch_size=4, workers=2)) as batches:
    seen = [next(batches) for _ in range(2)]  # one from each worker: both have started
    children = psutil.Process().children()
    workers = [p for p in children if any('spawn_main' in word for word in p.cmdline())]
    assert len(workers) == 2
    for worker in workers:
      worker.send_signal(signal.SIGINT)
      worker.send_signal(signal.SIGTERM)
    seen += [next(batches) for _ in range(8)]
    assert_equal(seen, train(10))
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
