"""What the compilers for absent chips want in the environment: some of it is read before Python is."""

import importlib.util
import os
import sys
from pathlib import Path


def variables() -> dict[str, str]:
  """The environment's."""
  wanted = {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',  # do not ask the cloud which TPU this is
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # two plans at once
    'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',  # these two keep libtpu from complaining that it finds no TPU
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  }
  nvidia = importlib.util.find_spec('nvidia')
  folders = [Path(folder) / 'cu13' / 'lib' for folder in nvidia.submodule_search_locations or ()] if nvidia else []
  if found := [str(folder) for folder in folders if folder.is_dir()]:
    wanted['LD_LIBRARY_PATH'] = os.pathsep.join(found)
  return wanted


def prepare_process(command: str) -> None:
  """Starts this process again, as `python -m mevit_jax COMMAND`, unless the environment is as the compilers want it."""
  wanted = variables()
  if any(os.environ.get(name) != value for name, value in wanted.items()):
    os.execve(sys.executable, [sys.executable, '-m', 'mevit_jax', command, *sys.argv[1:]], {**os.environ, **wanted})
