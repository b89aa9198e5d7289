"""Page faults of a step's temporary buffers, in a separate process."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from mevit_jax.training.malloc import configure_malloc
if sys.argv[1] == 'kept':
  configure_malloc()

@jax.jit
def step(x):
  return jnp.sin(x) @ x[0]  # an array of 64 MiB

x = jnp.ones((8192, 2048))
faults = []
for _ in range(25):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  jax.block_until_ready(step(x))
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[12])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='not with glibc')
def test_a_step_reuses_its_memory():
  def faults(how):
    command = [sys.executable, '-c', FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

  assert faults('kept') < 100 < 1000 < faults('as it is')  # page faults
