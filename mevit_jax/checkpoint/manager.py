"""CheckpointManager of everything that resuming needs: written by Orbax, sealed with checksums."""

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
from mevit_jax.files import write_json
from mevit_jax.parallel.distributed import is_main_process


class State(Protocol):
  """What the manager needs of a training state."""

  @property
  def step(self) -> Any:
    """Number of batches seen."""

  def items(self) -> dict[str, Any]:
    """Trees to save, by name."""

  def restored(self, items: dict[str, Any], step: int) -> Any:
    """State with these trees, restored from the checkpoint of a step."""


class CheckpointManager:
  """The checkpoints of a run, which goes on from the newest good one; saving goes on in the background.

  A checkpoint holds `params`, `opt_state`, `ema` where there is one, `about` (JSON: step, recipe, class names, dataset
  fingerprint, format) and the checksums of its files. It gets its name when all that is written. Newer ones that are
  damaged are moved aside, to STEP.damaged: their steps will be saved again.

  Args:
    workdir: that they are of.
    keep: how many of the newest stay.
    keep_best: whether that of the best evaluation stays too.

  Attributes:
    latest: the newest one's step, or None.

  Raises:
    UserError: there are checkpoints, and none is whole.
  """

  def __init__(self, workdir: Path, keep: int, keep_best: bool = True):
    self._workdir, self._folder = workdir, (workdir / 'checkpoints').resolve()
    self._keep, self._keep_best = keep, keep_best
    self.latest, damaged = latest_intact(workdir)
    for step in damaged:
      aside = self._folder / f'{step}.damaged'
      shutil.rmtree(aside, ignore_errors=True)
      (self._folder / str(step)).rename(aside)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('damaged checkpoints are aside')
    options = ocp.CheckpointManagerOptions(
      preservation_policy=_Newest(self),
      # By its name this comes too late. In fact it is called, on process 0, when all is written and nothing renamed.
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)
    steps = sorted(self._manager.all_steps())
    for step in set(steps) - self.kept(steps):  # a run that was killed had no time to
      self._manager.delete(step)

  def save(self, state: State, about: dict[str, Any]) -> None:
    """Starts saving; the state may be donated to the next step once this returns.

    Raises:
      UserError: it does not fit on the disk, or the one before could not be written.
    """
    step = int(state.step)
    if step == self.latest:
      return
    self._check_space(state)
    items = {name: ocp.args.StandardSave(tree) for name, tree in state.items().items()}
    about = {**about, 'step': step, 'format': FORMAT}
    with self._writing():
      self._manager.wait_until_finished()  # the one before is sealed under its own name
      self._saving = step
      self._manager.save(step, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items))
    self.latest = step

  def restore(self, abstract: State) -> Any:
    """The newest state, each array placed as `abstract` says (shapes, dtypes and shardings)."""
    folder = self._folder / str(self.latest)
    items = {name: restore_item(folder, name, tree) for name, tree in abstract.items().items()}
    assert self.latest is not None
    return abstract.restored(items, self.latest)

  def record_evaluation(self, step: int, top1: float, evaluation: str) -> None:
    """Notes in `best.json` that this step is the best so far, if it is; its checkpoint then stays."""
    best = read_best(self._workdir)
    there = (self._folder / str(best.get('step'))).is_dir()
    if there and best['evaluation'] == evaluation and best['step'] != step and top1 <= best['top1']:
      return
    if is_main_process():
      write_json(self._workdir / 'best.json', {'step': step, 'top1': top1, 'evaluation': evaluation})

  def kept(self, steps: Sequence[int]) -> set[int]:
    """Which of the steps, oldest first, stay."""
    best = read_best(self._workdir).get('step') if self._keep_best else None
    return {step for i, step in enumerate(steps) if i >= len(steps) - self._keep or step == best}

  def close(self) -> None:
    """Waits for what is being saved."""
    with self._writing():
      self._manager.wait_until_finished()
    self._manager.close()

  def _seal(self) -> None:
    """Called by Orbax, in the background."""
    unfinished = self._folder.glob(f'{self._saving}.orbax-checkpoint-tmp*')
    write_checksums(
      next(unfinished, self._folder / str(self._saving))
    )  # where nothing can be renamed, it has its name already

  def _check_space(self, state: State) -> None:
    """Looks before Orbax does, which would leave a traceback of every thread that ran out of space."""
    needed = sum(x.nbytes for x in jax.tree.leaves(state.items()))
    free = shutil.disk_usage(self._folder).free
    if free < needed:
      raise UserError(
        f'no space on the disk: a checkpoint takes {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free at '
        f'{self._workdir}; make room, and run the same command again to go on from step {self.latest or 0}'
      )

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # of any kind, from Orbax's threads
      reason = (str(error).strip() or repr(error)).splitlines()[0]
      raise UserError(f'{self._workdir / "checkpoints"} cannot be written: {reason}') from error


class _Newest(checkpoint_managers.PreservationPolicy):
  """Orbax deletes the others, once a new checkpoint is whole."""

  def __init__(self, checkpoints: CheckpointManager):
    self._checkpoints = checkpoints

  def should_preserve(self, checkpoints, *, context):
    """See Orbax."""
    del context
    kept = self._checkpoints.kept([one.step for one in checkpoints])
    return [one.step in kept for one in checkpoints]
