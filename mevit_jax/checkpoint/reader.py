"""Loading checkpoints: verified with their checksums, typed, parameters restored on first access."""

import dataclasses
import functools
import json
import logging
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open

from mevit_jax.checkpoint.checksums import verify_checksums
from mevit_jax.checkpoint.workdir import DamagedError, check_metadata, is_shared, read_workdir
from mevit_jax.config.data import Normalization
from mevit_jax.config.experiment import Config, from_dict
from mevit_jax.errors import UserError
from mevit_jax.files import read_checked_json, read_metrics, write_checked_json
from mevit_jax.models.functional import Params, build_model, parameter_shapes
from mevit_jax.parallel.distributed import is_main_process
from mevit_jax.parallel.placement import abstract_with_shardings, shard_params

_log = logging.getLogger(__name__)
Weights = Literal['ema', 'raw']
_NONE, _ALL_DAMAGED = -1, -2


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
    converted: parameters of another library's model, which no checkpoint holds.
  """

  folder: Path
  config: Config
  class_names: tuple[str, ...]
  dataset: DatasetInfo
  step: int
  weights: Weights
  metadata: dict[str, Any]
  mesh: jax.sharding.Mesh | None = None
  converted: Params | None = None

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
    if self.converted is not None or is_shared(self.folder):
      params = _read_shared(self.folder, self.abstract) if self.converted is None else self.converted
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
  metadata = read_run(workdir)
  if is_shared(workdir):
    folder, number, kind = _open_shared(workdir, step, weights, metadata)
  else:
    number = _last(workdir) if step == 'last' else _find_step(workdir, step)
    folder = workdir.resolve() / 'checkpoints' / str(number)
    metadata = read_metadata(folder)
    kind = _choose_weights(folder, weights)
  config, class_names = from_dict(metadata['config']), tuple(metadata['class_names'])
  if is_shared(workdir) and len(class_names) != config.model.classes:
    raise UserError(f'{folder} has {len(class_names)} class names for {config.model.classes} classes in its config')
  return Checkpoint(
    folder=folder,
    config=config,
    class_names=class_names,
    dataset=DatasetInfo(metadata['config']['data']['dataset'], metadata['fingerprint']),
    step=number,
    weights=kind,
    metadata=metadata,
    mesh=mesh,
  )


def read_run(workdir: Path) -> dict[str, Any]:
  """Reads the metadata of a run from config.json, or from its latest checkpoint if that file is damaged or missing.

  Raises:
    UserError: not a workdir, or an unsupported format.
  """
  missing = not (workdir / 'config.json').exists()
  try:
    return read_workdir(workdir)
  except UserError as error:
    if not saved_steps(workdir) or not (missing or isinstance(error, DamagedError)):
      raise
    step = _last(workdir)
    _log.warning('%s; using the metadata of checkpoint %d instead', error, step)
    return read_metadata(workdir.resolve() / 'checkpoints' / str(step))


def is_started(workdir: Path) -> bool:
  """Returns whether a workdir holds a run: its config.json, or checkpoints."""
  return (workdir / 'config.json').exists() or bool(saved_steps(workdir))


def read_metadata(folder: Path) -> dict[str, Any]:
  """Reads everything that a checkpoint states about itself; raises a UserError for another format."""
  return check_metadata(json.loads((folder / 'metadata' / 'metadata').read_text()), folder)


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
  problem = verify_checksums(folder, required=('config.json', 'model.safetensors'))
  if problem:
    raise UserError(f'{folder} is damaged, download it again: {problem}')
  try:
    number, kind = int(metadata['checkpoint']['step']), metadata['checkpoint']['weights']
  except (LookupError, TypeError, ValueError):
    raise UserError(
      f'{folder / "config.json"} was not written by mevit_jax: it does not state its checkpoint'
    ) from None
  if step not in ('last', str(number)):
    raise UserError(f'{folder} has only the checkpoint of step {number}, not {step}')
  if weights not in ('auto', kind):
    raise UserError(f'{folder} has only {kind} parameters, not {weights}')
  return folder, number, kind


def _read_shared(folder: Path, abstract: Params) -> Params:
  """Reads the parameters of a shared model; a UserError if they are not those of its config."""
  path, shapes = folder / 'model.safetensors', parameter_shapes(abstract)
  try:
    with safe_open(path, framework='np') as file:
      names = file.keys()
      found = {name: (tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()) for name in names}
      for name in sorted({*shapes, *found}):
        if (expected := (shapes.get(name), 'F32')) != found.get(name):
          stated = f'{expected[0]} in its config' if name in shapes else 'not in its config'
          saved = f'{found[name][0]} of {found[name][1]}' if name in found else 'absent'
          raise UserError(f'{path} does not fit {folder / "config.json"}: {name} is {saved}, and {stated}')
      arrays = [file.get_tensor(name) for name in shapes]
  except (SafetensorError, OSError) as error:
    raise UserError(f'{path} is damaged, download it again: {str(error).splitlines()[0]}') from None
  return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def latest_intact(workdir: Path) -> tuple[int | None, list[int]]:
  """Finds the latest checkpoint whose checksums match; process 0 verifies, all processes get its result.

  Returns:
    Its step (None if there are no checkpoints), and, on process 0, the steps of newer, damaged checkpoints.

  Raises:
    UserError: all checkpoints are damaged.
  """
  steps, folder = saved_steps(workdir), workdir / 'checkpoints'
  latest, problems = _ALL_DAMAGED if steps else _NONE, dict[int, str]()
  if is_main_process():
    for step in reversed(steps):
      problem = verify_checksums(folder / str(step))
      if not problem:
        latest = step
        break
      problems[step] = problem
  latest = _broadcast(latest)
  if latest == _ALL_DAMAGED:
    reasons = '; '.join(f'{step}: {problem}' for step, problem in problems.items())
    raise UserError(
      f'all checkpoints in {folder} are damaged; none was changed; move them away to start again: {reasons}'
    )
  for step, problem in problems.items():
    _log.warning('checkpoint %s is damaged, using step %d instead: %s', folder / str(step), latest, problem)
  return (None if latest == _NONE else latest), [*problems]


def saved_steps(workdir: Path) -> list[int]:
  """Returns the steps that have a checkpoint, intact or damaged, sorted."""
  folder = workdir / 'checkpoints'
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def restore_item(folder: Path, name: str, abstract: Any) -> Any:
  """Restores one item of a checkpoint with the shapes, dtypes and shardings of `abstract`."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(folder / name, abstract)
  except Exception as error:  # Orbax raises errors of any type
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    raise UserError(f'checkpoint {folder} cannot be restored: {name}: {reason}') from error


def read_best(workdir: Path) -> dict[str, Any]:
  """Reads best.json: step, top1 and evaluation; {} if there is none.

  If it is damaged or missing, the accuracies in metrics.jsonl tell.
  """
  path = workdir / 'best.json'
  try:
    return _read_best_json(path)
  except (FileNotFoundError, ValueError) as error:
    best = _best_of_metrics(workdir)
    if best or path.exists():
      reason = 'missing' if isinstance(error, FileNotFoundError) else f'damaged ({error})'
      _log.warning('%s is %s; metrics.jsonl names step %s as the best', path, reason, best.get('step'))
    return best


def _read_best_json(path: Path) -> dict[str, Any]:
  """Reads best.json; raises a FileNotFoundError, or a ValueError if it is damaged."""
  best = read_checked_json(path)
  if best.keys() != {'step', 'top1', 'evaluation'}:
    raise ValueError('it is another file')
  return best


def restore_best(workdir: Path) -> None:
  """Writes best.json again if it is damaged or missing, and metrics.jsonl names the best step."""
  try:
    _read_best_json(workdir / 'best.json')
  except (FileNotFoundError, ValueError):
    if best := read_best(workdir):
      write_checked_json(workdir / 'best.json', best)


def _best_of_metrics(workdir: Path) -> dict[str, Any]:
  """Returns the first step with the highest top-1 of the latest evaluation protocol; {} if none was logged."""
  lines = read_metrics(workdir / 'metrics.jsonl')
  logged = [(line, name) for line in lines for name in line if name.endswith('/top1') and line[name] is not None]
  if not logged:
    return {}
  _, latest = logged[-1]
  line = max((line for line, name in logged if name == latest), key=lambda line: line[latest])
  return {'step': line['step'], 'top1': line[latest], 'evaluation': latest.removesuffix('/top1')}


def _find_step(workdir: Path, step: str) -> int:
  """Returns the step that 'best' or '500' names, if its checkpoint is intact."""
  wanted = str(read_best(workdir).get('step', '')) if step == 'best' else step
  saved = [str(number) for number in saved_steps(workdir)]
  if wanted not in saved:
    missing = 'best checkpoint: no evaluation ran during training' if not wanted else f'checkpoint {wanted}'
    raise UserError(f'{workdir} has no {missing}; its checkpoints: {", ".join(saved) or "none"}')
  folder = workdir / 'checkpoints' / wanted
  problem = verify_checksums(folder) if is_main_process() else ''
  if _broadcast(int(bool(problem))):
    raise UserError(f"checkpoint {folder} is damaged; 'last' uses the latest intact one: {problem}")
  return int(wanted)


def _broadcast(value: int) -> int:
  """Returns process 0's value."""
  return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value
