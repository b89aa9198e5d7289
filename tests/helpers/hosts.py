"""Several processes of main.py on this machine as one multi-process run, with injected faults."""

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

# Runs main.py as one of several processes and injects a fault: (process, kind, batch).
SCRIPT = """
import json, os, runpy, signal, sys, time
from mevit_jax.parallel import hosts
_, fault, *sys.argv = sys.argv
process, kind, batch_number = json.loads(fault)

def inject():
  print(f'fault at {time.time()}', file=sys.stderr, flush=True)
  if kind == 'raise':
    raise OSError(5, 'Input/output error', '/a/bad/disk')
  os.kill(os.getpid(), {'kill': signal.SIGKILL, 'stop': signal.SIGSTOP, 'slow term': signal.SIGTERM}[kind])

if kind == 'late':
  from mevit_jax.parallel import distributed
  distributed._CONNECT_TIMEOUT = 3
global_batch, batches = hosts.global_batch, [0]
def with_fault(batch, sharding):
  batches[0] += 1
  if kind == 'slow term':  # the other process has time to learn of the signal
    time.sleep(0.3)
  if batches[0] == batch_number and f'--process_id={process}' in sys.argv:
    inject()
  return global_batch(batch, sharding)
hosts.global_batch = with_fault
runpy.run_path('main.py', run_name='__main__')
"""


def starting(tmp_path):
  """Yields a function that starts the processes of a run: (config of each process, workdir, fault) -> processes."""
  started = []

  def processes(configs, workdir, fault=(0, '', 0), mode='train', devices=1):
    port = portpicker.pick_unused_port()
    flags = f'--xla_force_host_platform_device_count={devices}'
    environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
    for i, config in enumerate(configs):
      config_file = tmp_path / f'config{i}.py'
      values = json.dumps(experiment.to_dict(config))
      config_file.write_text(
        'import json\nfrom mevit_jax.config.flags import default_config\n'
        f'def get_config():\n  config = default_config()\n  config.update(json.loads({values!r}))\n  return config\n'
      )
      command = [
        sys.executable, '-c', SCRIPT, json.dumps(fault), 'main.py', f'--config={config_file}', f'--workdir={workdir}',
        f'--mode={mode}', f'--coordinator=127.0.0.1:{port}', f'--processes={len(configs)}', f'--process_id={i}',
      ]  # fmt: skip
      started.append(
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      )
    return started[-len(configs) :]

  yield processes
  for process in started:
    process.kill()
    process.communicate()


@dataclasses.dataclass
class ProcessResult:
  """Exit status, stdout, stderr and exit time (seconds) of a process."""

  status: int
  output: str
  errors: str
  time: float

  @property
  def fault_time(self):
    """Time at which the fault was injected into this process."""
    return float(re.search(r'fault at ([\d.]+)', self.errors)[1])


def wait(processes):
  """Waits for processes; returns their results."""
  results = []
  for process in processes:
    output, errors = process.communicate(timeout=300)
    results.append(ProcessResult(process.returncode, output, errors, time.time()))
  return results
