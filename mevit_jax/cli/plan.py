"""Estimates memory, step time and throughput on TPUs or GPUs that this machine does not have.

  mevit plan --config=configs/k400.py --topology=v5e:16x16
  mevit plan --config=configs/k400.py:L/16 --topology=v5e:4x4,v5p:4x4x4,v6e:16x16 --batch=64,256
  mevit plan --config=configs/k400.py --topology=h200:8 --json

Compiles the training and evaluation steps ahead of time with the compiler of those chips, on any Linux machine
(pip install libtpu), and reports memory, FLOPs, collectives, step time and hours. Compiling a step takes minutes. The
mesh is the config's: --config.mesh.fsdp=16. With --config.mesh.slice=2 there are two slices of the topology.

Step time is the compiler's cycle estimate plus the time of the collectives, from fully overlapped to not overlapped.
The GPU compiler has no cycle estimates: memory and collectives only. Slow hosts and data loading are not included.
"""

import json
import logging
import sys
from collections.abc import Sequence

import jax
from absl import flags

from mevit_jax.cli import command
from mevit_jax.config import experiment
from mevit_jax.config import flags as config_flags
from mevit_jax.config.experiment import Config
from mevit_jax.errors import UserError
from mevit_jax.plan import find_largest_batch, plan
from mevit_jax.planning import chips, report
from mevit_jax.planning.environment import prepare_process

REQUIRED = ('config', 'topology')  # flags


def define_flags() -> None:
  """Defines the flags of this command."""
  config_flags.define_config_flag()
  flags.DEFINE_list('topology', None, 'Chips: v5e:16x16, v5p:4x4x4, v6e:4x4, h200:8, h100:8, a100:2x8 (hosts x GPUs).')
  flags.DEFINE_list('batch', [], "Global batch sizes; default: the config's, rounded up to what the mesh can shard.")
  flags.DEFINE_integer('batch_per_chip', 0, 'Batch size per chip, instead of --batch, for weak scaling.', 0)
  flags.DEFINE_boolean('largest_batch', False, 'Search for the largest batch size that fits; compiles several times.')
  flags.DEFINE_boolean('evaluation', True, 'Compile the evaluation step too.')
  flags.DEFINE_boolean('json', False, 'Print only JSON.')


def main(argv: Sequence[str]) -> None:
  """Plans every topology with every batch size, and prints a report or JSON."""
  command.no_arguments(argv)
  prepare_process('mevit_jax', 'plan')
  _log_progress_to_stderr()
  values = flags.FLAGS
  config = experiment.from_dict(values.config)
  plans: list[report.Plan] = []
  for topology in map(chips.parse, values.topology):
    devices = chips.devices_of(topology, config.mesh.slice)
    for batch_size in _batch_sizes(config, topology, devices):
      plans.append(plan(config, topology, devices, batch_size, values.evaluation))
      if not values.json:
        print(report.describe(plans[-1], topology.chip), flush=True)
  if values.json:
    print(json.dumps([report.to_dict(entry) for entry in plans], indent=2))
    return
  if len(plans) > 1:
    print(report.table(plans))
  print(report.LIMITATIONS)


def _batch_sizes(config: Config, topology: chips.Topology, devices: Sequence[jax.Device]) -> list[int]:
  """Returns the batch sizes that the flags ask for; 0 is the config's."""
  values = flags.FLAGS
  if values.largest_batch:
    return [find_largest_batch(config, topology, devices)]
  if invalid := [value for value in values.batch if not value.isdecimal()]:
    raise UserError(f'--batch must be one or more integers, not {invalid[0]!r}')
  return [int(value) for value in values.batch] or [values.batch_per_chip * len(devices)]


def _log_progress_to_stderr() -> None:
  """Sends the log of this command to stderr: stdout may be JSON."""
  logger = logging.getLogger('mevit_jax')
  logger.handlers[:] = [logging.StreamHandler(sys.stderr)]
  logger.setLevel(logging.INFO)
  logger.propagate = False
