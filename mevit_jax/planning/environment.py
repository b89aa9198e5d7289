"""Environment variables of the ahead-of-time compilers; some are read before Python starts."""

import importlib.util
import os
import sys
from pathlib import Path


def variables() -> dict[str, str]:
  """Returns the environment variables for ahead-of-time compilation."""
  values = {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',  # do not query the metadata server for the TPU type
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # several plans at once
    'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',  # with the next one: no libtpu warnings about a missing TPU
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  }
  nvidia = importlib.util.find_spec('nvidia')
  folders = [Path(folder) / 'cu13' / 'lib' for folder in nvidia.submodule_search_locations or ()] if nvidia else []
  if libraries := [str(folder) for folder in folders if folder.is_dir()]:
    values['LD_LIBRARY_PATH'] = os.pathsep.join(libraries)
  return values


def prepare_process(module: str, *arguments: str) -> None:
  """Restarts this process as `python -m MODULE ARGUMENTS FLAGS` unless the environment variables are already set."""
  values = variables()
  if any(os.environ.get(name) != value for name, value in values.items()):
    command = [sys.executable, '-m', module, *arguments, *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, **values})
