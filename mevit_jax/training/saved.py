"""What a workdir has saved: the checkpoint that is asked for, verified, and the params in it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from safetensors.numpy import load_file

from mevit_jax.errors import UserError
from mevit_jax.models.config import MEViTConfig
from mevit_jax.models.functional import Params, build_model, names_of
from mevit_jax.parallel.distributed import is_first
from mevit_jax.parallel.placement import placed, put
from mevit_jax.training.seal import damage
from mevit_jax.training.workdir import checked, is_shared, read_workdir

Weights = Literal['ema', 'raw']
_NONE, _NONE_GOOD = -1, -2


@dataclasses.dataclass(frozen=True)
class Saved:
  """A checkpoint that is whole: its folder, its step, and what it says of itself."""

  folder: Path
  about: dict[str, Any]

  @property
  def step(self) -> int:
    """The number of updates that its params have seen."""
    return int(self.folder.name)

  @property
  def abstract(self) -> Params:
    """Names, shapes and dtypes of its params."""
    return build_model(MEViTConfig(**self.about['recipe']['model'])).abstract

  def weights(self, wanted: str = 'auto') -> Weights:
    """Which of its params are meant: their running mean ('ema') or themselves ('raw'); 'auto' is the mean if there."""
    has = (self.folder / 'ema').is_dir()
    if wanted == 'ema' and not has:
      raise UserError(f'{self.folder} has no running mean of its params: it was trained with training.ema = 0')
    return 'ema' if has and wanted != 'raw' else 'raw'

  def params(self, weights: Weights, mesh: jax.sharding.Mesh | None = None) -> Params:
    """The params, placed on a mesh; without one they are on one device of this process."""
    if mesh is None:
      here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), self.abstract)
    else:
      abstract = placed(self.abstract, mesh)
    return restore_item(self.folder, 'ema' if weights == 'ema' else 'params', abstract)


@dataclasses.dataclass(frozen=True)
class Shared(Saved):
  """One set of params that was exported to be shared, see `serving/shared.py`: the folder itself is what was saved."""

  @property
  def step(self) -> int:
    """The number of updates that its params have seen."""
    return self.about['checkpoint']['step']

  def weights(self, wanted: str = 'auto') -> Weights:
    """Which params it has; a UserError if others are wanted."""
    has = self.about['checkpoint']['weights']
    if wanted not in ('auto', has):
      raise UserError(f'{self.folder} has {has} weights alone, and no {wanted} ones')
    return has

  def params(self, weights: Weights, mesh: jax.sharding.Mesh | None = None) -> Params:
    """The params, placed on a mesh; without one they are on one device of this process."""
    arrays, abstract = load_file(self.folder / 'model.safetensors'), self.abstract
    params = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in names_of(abstract)])
    return jax.device_put(params, jax.local_devices()[0]) if mesh is None else put(params, mesh)


def open_saved(workdir: Path, which: str = 'last') -> Saved:
  """A workdir's checkpoint: the 'last' good one, the 'best' on the validation split, or that of a step ('500').

  A folder that was exported to be shared has one.

  Raises:
    UserError: the folder is no workdir, or of another version; the checkpoint is not there, or damaged; for 'last', if
      all are.
  """
  about = read_workdir(workdir)
  if is_shared(workdir):
    return _open_shared(workdir, which, about)
  if which == 'last':
    step, _ = newest_good(workdir)
    if step is None:
      raise UserError(f'{workdir} has no checkpoint: train into it first')
  else:
    step = _named(workdir, which)
  folder = workdir.resolve() / 'checkpoints' / str(step)
  return Saved(folder, checked(json.loads((folder / 'about' / 'metadata').read_text()), folder))


def _open_shared(folder: Path, which: str, about: dict[str, Any]) -> Shared:
  what = damage(folder)
  if what:
    raise UserError(f'{folder} is damaged, get it again: {what}')
  shared = Shared(folder, about)
  if which not in ('last', str(shared.step)):
    raise UserError(f'{folder} has the checkpoint of step {shared.step} alone, and no {which}')
  return shared


def newest_good(workdir: Path) -> tuple[int | None, list[int]]:
  """The step of the newest checkpoint that is whole, and those of the newer ones that are not; prints what is wrong.

  Process 0 looks, and tells the others.

  Raises:
    UserError: there are checkpoints, and none is whole.
  """
  steps, folder = steps_of(workdir), workdir / 'checkpoints'
  found, bad = _NONE_GOOD if steps else _NONE, dict[int, str]()
  if is_first():
    for step in reversed(steps):
      bad[step] = damage(folder / str(step))
      if not bad[step]:
        found = step
        break
  found = _agreed(found)
  bad = {step: what for step, what in bad.items() if what}
  if found == _NONE_GOOD:
    reasons = '; '.join(f'{step}: {what}' for step, what in bad.items())
    raise UserError(
      f'no checkpoint in {folder} is whole, and none was touched; move them away to begin anew: {reasons}'
    )
  for step, what in bad.items():
    print(f'checkpoint {folder / str(step)} is damaged and not used, but that of step {found}: {what}', flush=True)
  return (None if found == _NONE else found), [*bad]


def steps_of(workdir: Path) -> list[int]:
  """The steps that have a checkpoint, damaged ones too."""
  folder = workdir / 'checkpoints'
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def restore_item(folder: Path, name: str, abstract: Any) -> Any:
  """A part of a checkpoint, each array placed as `abstract` says (shapes, dtypes and shardings)."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(folder / name, abstract)
  except Exception as error:  # nothing narrower will do: Orbax raises what its parts do
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    raise UserError(f'checkpoint {folder} cannot be restored: {name}: {reason}') from error


def best_of(workdir: Path) -> dict[str, Any]:
  """What `best.json` holds: step, top1 and evaluation; {} where there is none."""
  try:
    return json.loads((workdir / 'best.json').read_text())
  except (FileNotFoundError, json.JSONDecodeError):
    return {}


def _named(workdir: Path, which: str) -> int:
  """The step that 'best' or '500' means, if its checkpoint is whole."""
  wanted = str(best_of(workdir).get('step', '')) if which == 'best' else which
  there = [str(step) for step in steps_of(workdir)]
  if wanted not in there:
    what = 'no best checkpoint: none was evaluated while it trained' if not wanted else f'no checkpoint {wanted}'
    raise UserError(f'{workdir} has {what}; it has {", ".join(there) or "none"}')
  folder = workdir / 'checkpoints' / wanted
  what = damage(folder) if is_first() else ''
  if _agreed(int(bool(what))):
    raise UserError(f'checkpoint {folder} is damaged; last takes the newest good one: {what}')
  return int(wanted)


def _agreed(value: int) -> int:
  """What process 0 found."""
  return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value
