"""Converts pretrained weights into a workdir or, without a dataset, into a shared model."""

import contextlib
import logging
from pathlib import Path

from mevit_jax import experiment, workdirs
from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.reader import is_started, saved_steps
from mevit_jax.checkpoint.workdir import versions, write_workdir
from mevit_jax.config.experiment import Config
from mevit_jax.errors import UserError
from mevit_jax.inference.shared import write_shared_model
from mevit_jax.pretrained.models import convert_model
from mevit_jax.pretrained.source import Source, open_source

_log = logging.getLogger(__name__)


def convert(config: Config, workdir: str) -> Path:
  """Writes a workdir with one checkpoint, of step 0, from the weights `config.init_from`; returns its path.

  Without the dataset, a source that names its classes is written as a shared model, as `convert_alone` does. If a
  conversion is interrupted, the same command repeats it.

  Raises:
    UserError: the weights, the config, its dataset or the workdir are invalid; then nothing is written.
  """
  folder = Path(workdir).expanduser()
  _check_no_checkpoints(folder)
  if not _has_dataset(config):
    source = experiment.open_init(config)
    if source.info.class_names and config.init_head != 'fresh':
      path = f'{config.data.data_dir}/{config.data.dataset}'
      _log.info('no dataset at %s: keeping the %d classes of %s', path, source.info.classes, source.name)
      return _write_shared(source, folder, config)
  run = experiment.prepare_run(config, folder)
  workdirs.check_workdir(run)
  state = experiment.initial_state(run)
  with workdirs.lock_workdir(folder, new=not is_started(folder)):
    _check_no_checkpoints(folder)
    write_workdir(folder, run.metadata)
    with contextlib.closing(CheckpointManager(folder, run.config.training.keep)) as checkpoints:
      checkpoints.save(state, run.metadata)
  return folder


def convert_alone(name: str, folder: str) -> Path:
  """Writes a classifier of another library as a shared model that computes the same, with its own classes.

  Args:
    name: weights whose head names its classes: a folder, or a name on the hub.
    folder: folder to write, new or empty.

  Raises:
    UserError: the weights cannot be read or do not name their classes, or the folder cannot be written.
  """
  path = Path(folder).expanduser()
  _check_no_checkpoints(path)
  return _write_shared(open_source(name), path, None)


def _write_shared(source: Source, folder: Path, config: Config | None) -> Path:
  checkpoint, loaded = convert_model(source, config)
  _log.info(loaded.report())
  origin = {'checkpoint': {'step': checkpoint.step, 'weights': checkpoint.weights}, 'versions': versions()}
  write_shared_model(folder, checkpoint.params, {**checkpoint.metadata, **origin}, [])
  return folder


def _has_dataset(config: Config) -> bool:
  data = config.data
  return bool(data.dataset) and (Path(data.data_dir).expanduser() / data.dataset).is_dir()


def _check_no_checkpoints(folder: Path) -> None:
  if saved_steps(folder):
    raise UserError(f'{folder} already has checkpoints: choose another --workdir')
