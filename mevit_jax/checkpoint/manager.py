"""Saving and restoring everything that resuming needs, with Orbax and checksums."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from mevit_jax.checkpoint.checksums import write_checksums
from mevit_jax.checkpoint.reader import latest_intact, read_best, restore_item
from mevit_jax.checkpoint.workdir import FORMAT
from mevit_jax.errors import UserError
from mevit_jax.files import write_checked_json
from mevit_jax.parallel.distributed import is_main_process


class State(Protocol):
  """Interface of a training state to the manager."""

  @property
  def step(self) -> Any:
    """Number of batches seen."""

  def items(self) -> dict[str, Any]:
    """Returns the trees to save, by name."""

  def restored(self, items: dict[str, Any], step: int) -> Any:
    """Returns the state of a checkpoint."""


class CheckpointManager:
  """The checkpoints of a run; saving is asynchronous.

  A checkpoint holds `params`, `opt_state`, `ema` (if enabled), `metadata` (JSON: step, config, class names, dataset
  fingerprint, format) and the checksums of its files. It gets its name after everything is written. Damaged checkpoints
  newer than the latest intact one are renamed to STEP.damaged: training saves their steps again.

  Args:
    workdir: workdir of the run.
    keep: number of most recent checkpoints to keep.
    keep_best: whether to also keep the checkpoint of the best evaluation.

  Attributes:
    latest: step of the latest intact checkpoint, or None.

  Raises:
    UserError: all checkpoints are damaged.
  """

  def __init__(self, workdir: Path, keep: int, keep_best: bool = True):
    self._workdir, self._folder = workdir, (workdir / 'checkpoints').resolve()
    self._keep, self._keep_best = keep, keep_best
    self.latest, damaged = latest_intact(workdir)
    for step in damaged:
      renamed = self._folder / f'{step}.damaged'
      shutil.rmtree(renamed, ignore_errors=True)
      (self._folder / str(step)).rename(renamed)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('damaged checkpoints are renamed')
    options = ocp.CheckpointManagerOptions(
      preservation_policy=_KeepLatestAndBest(self),
      # Despite its name, process 0 calls it after all files are written and before the checkpoint is renamed.
      async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)
    steps = sorted(self._manager.all_steps())
    for step in set(steps) - self.kept(steps):  # an earlier run was killed before it deleted them
      self._manager.delete(step)

  def save(self, state: State, metadata: dict[str, Any]) -> None:
    """Starts saving; the state may be donated to the next step once this returns.

    Raises:
      UserError: the disk is too full, or the previous checkpoint could not be written.
    """
    step = int(state.step)
    if step == self.latest:
      return
    self._check_space(state)
    items = {name: ocp.args.StandardSave(tree) for name, tree in state.items().items()}
    metadata = {**metadata, 'step': step, 'format': FORMAT}
    with self._writing():
      self._manager.wait_until_finished()  # before `_saving` changes
      self._saving = step
      self._manager.save(step, args=ocp.args.Composite(metadata=ocp.args.JsonSave(metadata), **items))
    self.latest = step

  def restore(self, abstract: State) -> Any:
    """Returns the latest state, with the shapes, dtypes and shardings of `abstract`."""
    assert self.latest is not None
    folder = self._folder / str(self.latest)
    items = {name: restore_item(folder, name, tree) for name, tree in abstract.items().items()}
    return abstract.restored(items, self.latest)

  def record_evaluation(self, step: int, top1: float, evaluation: str) -> None:
    """Writes best.json if this step is the best so far; its checkpoint is then kept."""
    best = read_best(self._workdir)
    exists = (self._folder / str(best.get('step'))).is_dir()
    if exists and best['evaluation'] == evaluation and best['step'] != step and top1 <= best['top1']:
      return
    if is_main_process():
      write_checked_json(self._workdir / 'best.json', {'step': step, 'top1': top1, 'evaluation': evaluation})

  def kept(self, steps: Sequence[int]) -> set[int]:
    """Returns which of the steps, sorted, are kept."""
    best = read_best(self._workdir).get('step') if self._keep_best else None
    return {step for i, step in enumerate(steps) if i >= len(steps) - self._keep or step == best}

  def close(self) -> None:
    """Waits until saving has finished."""
    with self._writing():
      self._manager.wait_until_finished()
    self._manager.close()

  def _write_checksums(self) -> None:
    """Runs in Orbax's background thread."""
    temporary = self._folder.glob(f'{self._saving}.orbax-checkpoint-tmp*')
    # File systems that cannot rename have no temporary folder.
    write_checksums(next(temporary, self._folder / str(self._saving)))

  def _check_space(self, state: State) -> None:
    """Checks before Orbax does, whose threads would each print a traceback."""
    needed = sum(x.nbytes for x in jax.tree.leaves(state.items()))
    free = shutil.disk_usage(self._folder).free
    if free < needed:
      raise UserError(
        f'no space left on the disk: a checkpoint needs {needed / 2**20:.1f} MiB, but {free / 2**20:.1f} MiB are free '
        f'at {self._workdir}; free some space and run the same command again to resume from step {self.latest or 0}'
      )

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax's threads raise errors of any type
      reason = (str(error).strip() or repr(error)).splitlines()[0]
      raise UserError(f'{self._workdir / "checkpoints"} cannot be written: {reason}') from error


class _KeepLatestAndBest(checkpoint_managers.PreservationPolicy):
  """Lets Orbax delete the other checkpoints after a new one is complete."""

  def __init__(self, manager: CheckpointManager):
    self._manager = manager

  def should_preserve(
    self,
    checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
    *,
    context: checkpoint_managers.PreservationContext,
  ) -> Sequence[bool]:
    """Implements Orbax's interface."""
    del context
    kept = self._manager.kept([checkpoint.step for checkpoint in checkpoints])
    return [checkpoint.step in kept for checkpoint in checkpoints]
