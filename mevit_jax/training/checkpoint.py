"""Checkpoints of everything that resuming needs, by Orbax, and the workdir that holds them."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mevit_jax.errors import UserError
from mevit_jax.training.state import TrainState

# Of the workdir: its files, and what stands in a checkpoint.
FORMAT = 1


class Checkpoints:
  """The checkpoints of a workdir; saving goes on in the background, a checkpoint counts once it is whole.

  A checkpoint holds `params`, `opt_state` and `about` (JSON: step, recipe, class names, dataset fingerprint, format).

  Args:
    workdir: that they are of.
    keep: how many of the newest stay; None is for reading only, and writes nothing.
  """

  def __init__(self, workdir: Path, keep: int | None = None):
    folder = (workdir / 'checkpoints').resolve()
    if keep is None and not folder.is_dir():
      raise UserError(f'{workdir} has no checkpoint: train into it first')
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
    self._manager = ocp.CheckpointManager(folder, options=options)
    self._workdir = workdir

  @property
  def latest(self) -> int | None:
    """The newest whole checkpoint's step, or None."""
    return self._manager.latest_step()

  def save(self, state: TrainState, about: dict[str, Any]) -> None:
    """Starts saving; the state may be donated to the next step once this returns.

    Raises:
      UserError: it does not fit on the disk, or the one before could not be written.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._check_space(state)
    args = ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      opt_state=ocp.args.StandardSave(state.opt_state),
      about=ocp.args.JsonSave({**about, 'step': step, 'format': FORMAT}),
    )
    with self._writing():
      self._manager.save(step, args=args)

  def restore(self, abstract: TrainState) -> TrainState:
    """The newest state, each array placed as `abstract` says (shapes, dtypes and shardings)."""
    step = self._newest()
    args = ocp.args.Composite(
      params=ocp.args.StandardRestore(abstract.params), opt_state=ocp.args.StandardRestore(abstract.opt_state)
    )
    items = self._restore(step, args)
    start = jax.device_put(jax.numpy.asarray(step, abstract.step.dtype), abstract.step.sharding)
    return TrainState(start, items['params'], items['opt_state'])

  def restore_params(self, abstract: Any) -> tuple[int, Any]:
    """The newest step and its params, each array placed as `abstract` says."""
    step = self._newest()
    return step, self._restore(step, ocp.args.Composite(params=ocp.args.StandardRestore(abstract)))['params']

  def about(self) -> dict[str, Any]:
    """What the newest checkpoint says of itself."""
    step = self._newest()
    about = self._restore(step, ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
    return _checked(about, self._workdir / 'checkpoints' / str(step))

  def close(self) -> None:
    """Waits for what is being saved."""
    with self._writing():
      self._manager.wait_until_finished()
    self._manager.close()

  def _check_space(self, state: TrainState) -> None:
    """Looks before Orbax does, which would leave a traceback of every thread that ran out of space."""
    needed = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    free = shutil.disk_usage(self._manager.directory).free
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

  def _newest(self) -> int:
    step = self.latest
    if step is None:
      raise UserError(f'{self._workdir} has no checkpoint: train into it first')
    return step

  def _restore(self, step: int, args: ocp.args.Composite) -> Any:
    try:
      return self._manager.restore(step, args=args)
    except Exception as error:  # nothing narrower will do: Orbax raises that where an array's file is too short
      reason = (str(error).strip() or repr(error)).splitlines()[0]
      where = self._workdir / 'checkpoints' / str(step)
      raise UserError(f'checkpoint {where} cannot be restored, remove it to use the one before: {reason}') from error


def read_workdir(workdir: Path) -> dict[str, Any]:
  """What `config.json` of a workdir holds: recipe, class_names, fingerprint, format."""
  path = workdir / 'config.json'
  if not path.exists():
    raise UserError(f'{workdir} is no workdir: it has no config.json')
  try:
    about = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise UserError(f'{path} is damaged: {error}') from None
  return _checked(about, path)


def _checked(about: Any, where: Path) -> dict[str, Any]:
  """What a workdir or a checkpoint says of itself; a UserError if that is of another version, or nothing of ours."""
  if not isinstance(about, dict) or not {'recipe', 'class_names', 'fingerprint'} <= about.keys():
    raise UserError(f'{where} is not of a workdir of mevit_jax, or damaged')
  if about.get('format') != FORMAT:
    raise UserError(f'{where} has format {about.get("format")}, this version of mevit_jax reads {FORMAT}')
  return about


def write_workdir(workdir: Path, about: dict[str, Any]) -> None:
  """Makes a workdir: writes its `config.json`, whole or not at all."""
  workdir.mkdir(parents=True, exist_ok=True)
  temporary = workdir / 'config.json.tmp'
  temporary.write_text(json.dumps({**about, 'format': FORMAT}, indent=2) + '\n')
  temporary.rename(workdir / 'config.json')
