"""What a workdir has saved: the checkpoint that is asked for, verified, and the params in it."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from safetensors.numpy import load_file

from mevit_jax.checkpoint.checksums import verify_checksums
from mevit_jax.checkpoint.workdir import checked, is_shared, read_workdir
from mevit_jax.config.data import Normalization
from mevit_jax.config.experiment import Config, from_dict
from mevit_jax.errors import UserError
from mevit_jax.models.functional import Params, build_model, parameter_shapes
from mevit_jax.parallel.distributed import is_main_process
from mevit_jax.parallel.placement import abstract_with_shardings, shard_params

Weights = Literal['ema', 'raw']
_NONE, _NONE_GOOD = -1, -2


class DatasetInfo(NamedTuple):
  """Identity of a dataset: its name and the SHA-256 of its contents."""

  name: str
  fingerprint: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A verified checkpoint of a workdir, or a folder that `mevit export --to=mevit` wrote.

  Attributes:
    folder: folder of the checkpoint.
    config: config of the experiment.
    class_names: class i is the i-th name.
    dataset: dataset that it was trained on.
    step: number of updates of the parameters.
    weights: 'ema' or 'raw' parameters.
    metadata: everything that the checkpoint states about itself (JSON).
    mesh: devices to restore the parameters to; None is one local device.
  """

  folder: Path
  config: Config
  class_names: tuple[str, ...]
  dataset: DatasetInfo
  step: int
  weights: Weights
  metadata: dict[str, Any]
  mesh: jax.sharding.Mesh | None = None

  @property
  def normalization(self) -> Normalization:
    """Pixel mean and standard deviation that the model was trained with."""
    return self.config.data.normalization

  @property
  def abstract(self) -> Params:
    """Names, shapes and dtypes of the parameters."""
    return build_model(self.config.model).abstract

  @functools.cached_property
  def params(self) -> Params:
    """Parameters, restored on first access."""
    if is_shared(self.folder):
      arrays, abstract = load_file(self.folder / 'model.safetensors'), self.abstract
      params = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in parameter_shapes(abstract)])
      return jax.device_put(params, jax.local_devices()[0]) if self.mesh is None else shard_params(params, self.mesh)
    if self.mesh is None:
      here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), self.abstract)
    else:
      abstract = abstract_with_shardings(self.abstract, self.mesh)
    return restore_item(self.folder, 'ema' if self.weights == 'ema' else 'params', abstract)


def load_checkpoint(
  path: str | os.PathLike, step: str = 'last', weights: str = 'auto', mesh: jax.sharding.Mesh | None = None
) -> Checkpoint:
  """Loads and verifies a checkpoint; its parameters are read when first used.

  Args:
    path: workdir, or a folder that `mevit export --to=mevit` wrote.
    step: 'last' (the newest intact one), 'best' (on the validation split), or a number.
    weights: 'ema', 'raw', or 'auto': EMA parameters if there are any.
    mesh: devices to restore the parameters to; None is one local device.

  Raises:
    UserError: not a workdir, an unsupported format, no such checkpoint or weights, or the checkpoint is damaged.
  """
  workdir = Path(path).expanduser()
  metadata = read_workdir(workdir)
  if is_shared(workdir):
    folder, number, kind = _open_shared(workdir, step, weights, metadata)
  else:
    number = _last(workdir) if step == 'last' else _named(workdir, step)
    folder = workdir.resolve() / 'checkpoints' / str(number)
    metadata = checked(json.loads((folder / 'about' / 'metadata').read_text()), folder)
    kind = _choose_weights(folder, weights)
  return Checkpoint(
    folder=folder,
    config=from_dict(metadata['config']),
    class_names=tuple(metadata['class_names']),
    dataset=DatasetInfo(metadata['config']['data']['dataset'], metadata['fingerprint']),
    step=number,
    weights=kind,
    metadata=metadata,
    mesh=mesh,
  )


def _last(workdir: Path) -> int:
  step, _ = latest_intact(workdir)
  if step is None:
    raise UserError(f'{workdir} has no checkpoint: train into it first')
  return step


def _choose_weights(folder: Path, wanted: str) -> Weights:
  has_ema = (folder / 'ema').is_dir()
  if wanted == 'ema' and not has_ema:
    raise UserError(f'{folder} has no EMA parameters: it was trained with training.ema = 0')
  return 'ema' if has_ema and wanted != 'raw' else 'raw'


def _open_shared(folder: Path, step: str, weights: str, metadata: dict[str, Any]) -> tuple[Path, int, Weights]:
  problem = verify_checksums(folder)
  if problem:
    raise UserError(f'{folder} is damaged, download it again: {problem}')
  number, kind = metadata['checkpoint']['step'], metadata['checkpoint']['weights']
  if step not in ('last', str(number)):
    raise UserError(f'{folder} has only the checkpoint of step {number}, not {step}')
  if weights not in ('auto', kind):
    raise UserError(f'{folder} has only {kind} parameters, not {weights}')
  return folder, number, kind


def latest_intact(workdir: Path) -> tuple[int | None, list[int]]:
  """The step of the newest checkpoint that is whole, and those of the newer ones that are not; prints what is wrong.

  Process 0 looks, and tells the others.

  Raises:
    UserError: there are checkpoints, and none is whole.
  """
  steps, folder = steps_of(workdir), workdir / 'checkpoints'
  found, bad = _NONE_GOOD if steps else _NONE, dict[int, str]()
  if is_main_process():
    for step in reversed(steps):
      bad[step] = verify_checksums(folder / str(step))
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


def read_best(workdir: Path) -> dict[str, Any]:
  """What `best.json` holds: step, top1 and evaluation; {} where there is none."""
  try:
    return json.loads((workdir / 'best.json').read_text())
  except (FileNotFoundError, json.JSONDecodeError):
    return {}


def _named(workdir: Path, which: str) -> int:
  """The step that 'best' or '500' means, if its checkpoint is whole."""
  wanted = str(read_best(workdir).get('step', '')) if which == 'best' else which
  there = [str(step) for step in steps_of(workdir)]
  if wanted not in there:
    what = 'no best checkpoint: none was evaluated while it trained' if not wanted else f'no checkpoint {wanted}'
    raise UserError(f'{workdir} has {what}; it has {", ".join(there) or "none"}')
  folder = workdir / 'checkpoints' / wanted
  what = verify_checksums(folder) if is_main_process() else ''
  if _agreed(int(bool(what))):
    raise UserError(f'checkpoint {folder} is damaged; last takes the newest good one: {what}')
  return int(wanted)


def _agreed(value: int) -> int:
  """What process 0 found."""
  return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value
