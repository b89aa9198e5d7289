"""Conversion of pretrained weights into a workdir, or into a shared model where there is no dataset."""

import logging
from pathlib import Path

from mevit_jax import experiment
from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.workdir import versions, write_workdir
from mevit_jax.config.experiment import Config
from mevit_jax.errors import UserError
from mevit_jax.inference.shared import write_shared_model
from mevit_jax.pretrained.models import convert_model
from mevit_jax.pretrained.source import Source, open_source

_log = logging.getLogger(__name__)


def convert(config: Config, workdir: str) -> Path:
  """Writes a workdir with one checkpoint, of step 0, from the weights `config.init_from`; returns its path.

  If there is no dataset and the source names its classes, the result is a shared model, as of `convert_alone`.

  Raises:
    UserError: the weights, the config, its dataset or the workdir are invalid; then nothing is written.
  """
  folder = _check_folder(workdir)
  if not _has_dataset(config):
    source = experiment.open_init(config)
    if source.info.class_names and config.init_head != 'fresh':
      path = f'{config.data.data_dir}/{config.data.dataset}'
      _log.info('no dataset at %s: keeping the %d classes of %s', path, source.info.classes, source.name)
      return _write_shared(source, folder, config)
  run = experiment.prepare_run(config, folder)
  experiment.check_workdir(run)  # a workdir without checkpoints is from an interrupted conversion
  state = experiment.initial_state(run)
  write_workdir(folder, run.metadata)
  checkpoints = CheckpointManager(folder, run.config.training.keep)
  try:
    checkpoints.save(state, run.metadata)
  finally:
    checkpoints.close()
  return folder


def convert_alone(name: str, folder: str) -> Path:
  """Writes a classifier of another library as a shared model that computes the same, with its own classes.

  Args:
    name: weights whose head names its classes: a folder, or a name on the hub.
    folder: folder to write, new or empty.

  Raises:
    UserError: the weights cannot be read or do not name their classes, or the folder cannot be written.
  """
  return _write_shared(open_source(name), _check_folder(folder), None)


def _write_shared(source: Source, folder: Path, config: Config | None) -> Path:
  checkpoint, loaded = convert_model(source, config)
  _log.info(loaded.report())
  origin = {'checkpoint': {'step': checkpoint.step, 'weights': checkpoint.weights}, 'versions': versions()}
  write_shared_model(folder, checkpoint.params, {**checkpoint.metadata, **origin}, [])
  return folder


def _check_folder(workdir: str) -> Path:
  folder = Path(workdir).expanduser()
  if any(folder.glob('checkpoints/*')):
    raise UserError(f'{folder} already has checkpoints: choose another --workdir')
  return folder


def _has_dataset(config: Config) -> bool:
  data = config.data
  return bool(data.dataset) and (Path(data.data_dir).expanduser() / data.dataset).is_dir()
