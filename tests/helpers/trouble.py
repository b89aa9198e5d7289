"""Functions that other processes call, and that end them: a test module's own may not be found there."""

import os
import signal
import time


def answer(what):
  """Does what it is told to."""
  if what == 'crash':
    os.kill(os.getpid(), signal.SIGKILL)
  if what == 'hang':
    time.sleep(60)
  if what == 'raise':
    raise ValueError('as told')
  return what, os.getpid()


def make(item):
  """`files.make`, which crashes or hangs on files whose names say so."""
  from mevit_jax.datasets.builders import files  # seconds, which not every test has to wait
  from mevit_jax.video.transcode import Encoding

  answer(os.path.basename(item.found.path).split('.')[0])
  return files.make(item, Encoding('keep'))
