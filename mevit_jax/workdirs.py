"""The workdir of a run: whether the run may continue there, its config.json, and its lock."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from mevit_jax.checkpoint.reader import is_started, read_run
from mevit_jax.checkpoint.workdir import is_shared, read_workdir, write_workdir
from mevit_jax.config import experiment
from mevit_jax.config.experiment import Config
from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError
from mevit_jax.experiment import Run
from mevit_jax.files import lock_folder
from mevit_jax.parallel.distributed import allgather_bytes, is_main_process

# Fields that may change when a run resumes: execution, logging and evaluation.
_MAY_CHANGE = (
  *experiment.EXECUTION_FIELDS, 'mesh.', 'evaluation.', 'data.workers', 'data.data_dir', 'model.classes',
  'training.log_every', 'training.save_every', 'training.keep', 'training.evaluate_every', 'training.profile',
  'training.on_nonfinite', 'training.patience',
)  # fmt: skip


def is_described(run: Run) -> bool:
  """Returns whether the config.json of the workdir is intact and has the run's epochs, which may have been raised."""
  try:
    saved = read_workdir(run.workdir)
  except UserError:
    return False
  return saved['config']['training']['epochs'] == run.config.training.epochs


def check_workdir(run: Run) -> None:
  """Raises a UserError if the workdir belongs to a different run (model, dataset, optimizer, seed, batch size)."""
  if run.workdir.exists() and not run.workdir.is_dir():
    raise UserError(f'{run.workdir} is a file: use another workdir')
  if not is_started(run.workdir):
    return
  if is_shared(run.workdir):
    raise UserError(f'{run.workdir} is an exported model, not a run: start from it with --config.init_from')
  saved, requested = read_run(run.workdir), run.metadata
  before = experiment.from_dict(saved['config'])  # parsed again, so that fields added since have their defaults
  found = experiment.differences(experiment.to_dict(before), requested['config'])
  may_change = list(_MAY_CHANGE)
  if any((run.workdir / 'checkpoints').glob('*')):  # the initial weights are not read again
    may_change.append('init_')
  if run.config.optimizer.schedule == 'steps' and run.config.training.epochs > before.training.epochs:
    may_change.append('training.epochs')  # the learning rates of all steps so far stay as they were
  found = [_explain(line, run.config) for line in found if not line.startswith(tuple(may_change))]
  found += datasets.differences(saved, requested)
  if found:
    raise UserError(
      f'{run.workdir} belongs to a different run (saved -> requested): {"; ".join(found[:5])}; use another workdir, '
      f'or start a new run from it: --config.init_from={run.workdir}'
    )


def _explain(difference: str, config: Config) -> str:
  """Adds to a difference why it matters, if that is not obvious."""
  if not difference.startswith('training.epochs'):
    return difference
  cosine = config.optimizer.schedule == 'cosine'
  return f'{difference} ({"the cosine schedule depends on them" if cosine else "they may only be raised"})'


def check_hosts(run: Run, *, new: bool) -> None:
  """Raises a UserError unless all processes have the same run and see the same workdir; also a barrier."""
  first, *others = (json.loads(mine) for mine in allgather_bytes(json.dumps({**run.metadata, 'new': new}).encode()))
  for process, other in enumerate(others, 1):
    if other['new'] != first['new']:
      raise UserError(
        f'process {process} sees a different workdir {run.workdir} than process 0: all hosts must share it'
      )
    found = experiment.differences(first, other)
    if found:
      raise UserError(
        f'process {process} has a different config than process 0 (process 0 -> it): {"; ".join(found[:5])}'
      )


@contextlib.contextmanager
def lock_workdir(workdir: Path, *, new: bool) -> Iterator[None]:
  """Locks a workdir from process 0, against other trainings and conversions; evaluations need no lock.

  Args:
    workdir: workdir of the run.
    new: whether the workdir held no run when this command looked.

  Raises:
    UserError: another command trains in the workdir, or has started to since this command looked.
  """
  if not is_main_process():
    yield
    return
  with lock_folder(workdir, f'another command is training in {workdir}'):
    if new and is_started(workdir):
      raise UserError(f'another command has trained in {workdir} meanwhile; run the same command again to resume')
    yield


def create_workdir(run: Run) -> None:
  """Writes the workdir's config.json from process 0; raises a UserError on processes that do not see it."""
  if is_main_process():
    write_workdir(run.workdir, run.metadata)
  allgather_bytes(b'')  # barrier: it is written
  last = time.monotonic() + 40  # network file systems cache missing files
  while not (run.workdir / 'config.json').exists():
    if time.monotonic() > last:
      raise UserError(f'{run.workdir} is not the folder that process 0 writes to: all hosts must share the workdir')
    time.sleep(1)
