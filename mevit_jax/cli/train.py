"""Trains a video classifier, or resumes training.

  mevit train --config=configs/demo.py --workdir=runs/demo
  mevit train --config=configs/k400.py --workdir=runs/k400 --config.data.data_dir=/data --config.model.block_size=2

Training resumes from the newest checkpoint in the workdir. SIGTERM and Ctrl-C save a checkpoint and exit with code 143
and 130; the same command then resumes. Every config field is a flag: --config.training.batch_size=32.

Multi-host runs start this same command once per process. TPU pods, SLURM's srun and launch/gke_jobset.yaml need no
further flags; elsewhere give --coordinator, --processes and --process_id. All hosts must share the workdir.
"""

from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from mevit_jax import train
from mevit_jax.cli import command
from mevit_jax.config import flags as config_flags
from mevit_jax.parallel import distributed

REQUIRED = ('config', 'workdir')


def define_flags() -> None:
  """Defines the flags of train and dry-run."""
  config_flags.define_config_flag()
  define_run_flags()


def define_run_flags() -> None:
  """Defines the flags that train, evaluate and dry-run share, besides the config."""
  flags.DEFINE_string('workdir', None, 'Folder of checkpoints, metrics and results.')
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0 in a multi-process run.')
  flags.DEFINE_integer('processes', None, 'Number of processes of the run.')
  flags.DEFINE_integer('process_id', None, 'Index of this process, starting at 0.')


def main(argv: Sequence[str]) -> None:
  """Trains with the config and workdir given by the flags."""
  run(train.train, argv)


def run(function: Callable[[Any, str], Any], argv: Sequence[str]) -> None:
  """Calls `function(config, workdir)` on every process of the run."""
  command.no_arguments(argv)
  values = flags.FLAGS
  with distributed.initialize(values.coordinator, values.processes, values.process_id):
    function(config_flags.parse_config(values.config), str(values.workdir))
