"""Functions for worker processes that crash or hang; in a module because workers cannot import test modules."""

import os
import signal
import time


def perform(action):
  """Crashes, hangs, raises, or returns the action and the process id."""
  if action == 'crash':
    os.kill(os.getpid(), signal.SIGKILL)
  if action == 'hang':
    time.sleep(60)
  if action == 'raise':
    raise ValueError('as requested')
  return action, os.getpid()


def make_example(file):
  """`files.make_example`, but crashes or hangs on files with such names."""
  from mevit_jax.datasets.builders import files  # imported here because it takes seconds
  from mevit_jax.video.transcode import Encoding

  perform(os.path.basename(file.video.path).split('.')[0])
  return files.make_example(file, Encoding('keep'))
