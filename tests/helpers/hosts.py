"""Several processes of main.py on this machine, as hosts of one run, and accidents on their way."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import portpicker

from mevit_jax.config import experiment

ROOT = Path(__file__).parents[2]

# Runs main.py as one of several processes, with an accident on its way: (process, what, batch).
HOST = """
import json, os, runpy, signal, sys, time
from mevit_jax.parallel import hosts
_, accident, *sys.argv = sys.argv
process, what, step = json.loads(accident)

def happens():
  print(f'accident at {time.time()}', file=sys.stderr, flush=True)
  if what == 'raise':
    raise OSError(5, 'Input/output error', '/a/bad/disk')
  os.kill(os.getpid(), {'kill': signal.SIGKILL, 'stop': signal.SIGSTOP, 'slow term': signal.SIGTERM}[what])

if what == 'late':
  from mevit_jax.parallel import distributed
  distributed._ARRIVE = 3
global_batch, seen = hosts.global_batch, [0]
def with_accident(batch, sharding):
  seen[0] += 1
  if what == 'slow term':  # there is time to hear of it
    time.sleep(0.3)
  if seen[0] == step and f'--process_id={process}' in sys.argv:
    happens()
  return global_batch(batch, sharding)
hosts.global_batch = with_accident
runpy.run_path('main.py', run_name='__main__')
"""


def starting(tmp_path):
  """Of a fixture: a function: a recipe for each process, a workdir, an accident -> the processes of one run."""
  started = []

  def processes(settings, workdir, accident=(0, '', 0), mode='train', devices=1):
    port = portpicker.pick_unused_port()
    flags = f'--xla_force_host_platform_device_count={devices}'
    environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
    for i, recipe in enumerate(settings):
      config = tmp_path / f'config{i}.py'
      values = json.dumps(experiment.to_dict(recipe))
      config.write_text(
        'import json\nfrom mevit_jax.config.flags import default_config\n'
        f'def get_config():\n  config = default_config()\n  config.update(json.loads({values!r}))\n  return config\n'
      )
      command = [
        sys.executable, '-c', HOST, json.dumps(accident), 'main.py', f'--config={config}', f'--workdir={workdir}',
        f'--mode={mode}', f'--coordinator=127.0.0.1:{port}', f'--processes={len(settings)}', f'--process_id={i}',
      ]  # fmt: skip
      started.append(
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      )
    return started[-len(settings) :]

  yield processes
  for process in started:
    process.kill()
    process.communicate()


@dataclasses.dataclass
class End:
  """How a process ended: status, what it printed, its errors, when that was, and when its accident was (seconds)."""

  status: int
  output: str
  errors: str
  time: float

  @property
  def accident(self):
    return float(re.search(r'accident at ([\d.]+)', self.errors)[1])


def ends(processes):
  """Waits for processes; how each ended."""
  found = []
  for process in processes:
    output, errors = process.communicate(timeout=300)
    found.append(End(process.returncode, output, errors, time.time()))
  return found
