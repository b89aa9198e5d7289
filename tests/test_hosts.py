"""Many hosts: real processes that train together, fail together, and go on as one; how they find each other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import portpicker
import pytest

from mevit_jax import recipes, train
from mevit_jax.errors import UserError
from mevit_jax.parallel import distributed

ROOT = Path(__file__).parents[1]
NAME = 'validation-1x1'

# Runs main.py as one of several processes, with an accident on its way: (process, what, step).
HOST = """
import json, os, runpy, signal, sys
from mevit_jax import train
_, accident, *sys.argv = sys.argv
process, what, step = json.loads(accident)

def happens():
  if what == 'raise':
    raise OSError(5, 'Input/output error', '/a/bad/disk')
  os.kill(os.getpid(), {'kill': signal.SIGKILL, 'stop': signal.SIGSTOP}[what])

inputs, seen = train._inputs, [0]
def with_accident(batch, sharding):
  seen[0] += 1
  if seen[0] == step and f'--process_id={process}' in sys.argv:
    happens()
  return inputs(batch, sharding)
train._inputs = with_accident
runpy.run_path('main.py', run_name='__main__')
"""


@pytest.fixture
def start(tmp_path):
  """A function: a recipe for each process, a workdir, an accident -> the processes of one run, a device each."""
  started = []

  def processes(settings, workdir, accident=(0, '', 0), mode='train'):
    port = portpicker.pick_unused_port()
    environment = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=1', 'JAX_PLATFORMS': 'cpu'}
    for i, recipe in enumerate(settings):
      config = tmp_path / f'config{i}.py'
      values = json.dumps(recipes.to_dict(recipe))
      config.write_text(
        'import json\nfrom mevit_jax.recipes import default_config\n'
        f'def get_config():\n  config = default_config()\n  config.update(json.loads({values!r}))\n  return config\n'
      )
      command = [
        sys.executable, '-c', HOST, json.dumps(accident), 'main.py', f'--config={config}', f'--workdir={workdir}',
        f'--mode={mode}', f'--coordinator=127.0.0.1:{port}', f'--processes={len(settings)}', f'--process_id={i}',
      ]  # fmt: skip
      started.append(
        subprocess.Popen(
          command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
      )
    return started[-len(settings) :]

  yield processes
  for process in started:
    process.kill()
    process.communicate()


def ends(processes, timeout=300):
  """Of every process: its exit status, what it printed, its errors, and when it ended."""
  found = []
  for process in processes:
    output, errors = process.communicate(timeout=timeout)
    found.append((process.returncode, output, errors, time.monotonic()))
  return found


def stored(workdir, item='params'):
  """The arrays of the newest checkpoint, by name."""
  import orbax.checkpoint as ocp

  newest = max((path for path in (workdir / 'checkpoints').iterdir()), key=lambda path: int(path.name))
  with ocp.StandardCheckpointer() as checkpointer:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = checkpointer.metadata(newest / item).item_metadata.tree
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    return int(newest.name), jax.tree.map(np.asarray, checkpointer.restore(newest / item, shapes))
