"""Builds an experiment from its config: dataset, model, optimizer, mesh and compiled steps."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mevit_jax.augment.clip import mirror_labels
from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.reader import read_run, saved_steps
from mevit_jax.checkpoint.workdir import is_shared, read_workdir, write_workdir
from mevit_jax.config import experiment, resolve
from mevit_jax.config.data import Normalization
from mevit_jax.config.experiment import Config
from mevit_jax.config.model import count_flops
from mevit_jax.data import pipeline, sampling
from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError
from mevit_jax.files import lock_folder
from mevit_jax.models.functional import ENCODER, Model, Params, build_model, count_parameters
from mevit_jax.parallel.distributed import allgather_bytes, is_main_process
from mevit_jax.parallel.hosts import process_batch_slice
from mevit_jax.parallel.mesh import batch_shards, make_mesh
from mevit_jax.parallel.placement import (
  abstract_with_shardings,
  batch_sharding,
  constrain_batch,
  param_shardings,
  shard_attention,
  shard_params,
)
from mevit_jax.pretrained.hub import same_model
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.source import Source, open_source
from mevit_jax.training.optimizer import (
  check_frozen,
  check_patterns,
  make_optimizer,
  make_schedule,
  stop_frozen_gradients,
)
from mevit_jax.training.state import TrainState, create_state, init_state
from mevit_jax.training.steps import make_encode_step, make_evaluation_step, make_feature_step, make_train_step

# Fields that may change when a run resumes: execution, logging and evaluation.
_MAY_CHANGE = (
  *experiment.EXECUTION_FIELDS, 'mesh.', 'evaluation.', 'data.workers', 'data.data_dir', 'model.classes',
  'training.log_every', 'training.save_every', 'training.keep', 'training.evaluate_every', 'training.profile',
  'training.on_nonfinite', 'training.patience',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """An experiment before its first step: everything that its resolved config describes."""

  config: Config
  workdir: Path
  split: datasets.Split
  model: Model
  mesh: jax.sharding.Mesh
  steps: int
  steps_per_epoch: float
  schedule: Callable[[int], Any]
  init: Callable[[jax.Array], TrainState]
  begin: Callable[[Params], TrainState]
  step: jax.stages.Wrapped  # (state, batch) -> state, metrics
  predict: jax.stages.Wrapped  # (params, video) -> logits
  encode: jax.stages.Wrapped  # (params, batch, step) -> batch of features; with training.cache_features
  source: Source | None = None  # pretrained weights of a new run

  @property
  def metadata(self) -> dict[str, Any]:
    """Metadata of the workdir and its checkpoints."""
    return {
      'config': experiment.to_dict(self.config),
      'class_names': list(self.split.class_names),
      'fingerprint': self.split.fingerprint,
      'videos': dict(self.split.videos),
    }


def prepare_run(config: Config, workdir: Path) -> Run:
  """Opens the dataset, resolves the config and builds the run; computes and writes nothing.

  Raises:
    UserError: the config, its dataset, weights or devices do not fit together.
  """
  split = datasets.open_split(config.data.data_dir, config.data.dataset, config.data.train_split)
  split.verify()
  datasets.open_split(config.data.data_dir, config.data.dataset, config.evaluation.split).verify()
  if unlabeled := int((split.labels < 0).sum()):
    raise UserError(f'{unlabeled:,} videos of {split} have no label: choose another data.train_split')
  mesh = make_mesh(config.mesh)
  weights, source = _source(config, workdir)
  dataset = resolve.Dataset(split.dataset, split.class_names, _saved_normalization(workdir) or split.normalization)
  config = resolve_config(config, mesh, dataset, source)
  return dataclasses.replace(build_run(config, workdir, split, mesh), source=weights)


def resolve_config(
  config: Config,
  mesh: jax.sharding.Mesh,
  dataset: resolve.Dataset | None = None,
  source: resolve.Source | None = None,
  *,
  evaluate: bool = False,
) -> Config:
  """Resolves a config for a mesh (see `resolve.resolve`) and prints the changes."""
  config, changes = resolve.resolve(config, dataset, source, batch_shards(mesh), evaluate=evaluate)
  if changes:
    print(resolve.describe(changes), flush=True)
  return config


def build_run(config: Config, workdir: Path, split: datasets.Split, mesh: jax.sharding.Mesh) -> Run:
  """Builds the run of a resolved config; the mesh may describe devices that this machine does not have."""
  training = config.training
  pipeline.check_batch(training.batch_size, config.data.repeated_augmentation)
  rows = batch_sharding(mesh)
  process_batch_slice(rows, training.batch_size)
  if training.batch_size // training.accumulate % batch_shards(mesh):
    raise UserError(
      f'training.batch_size {training.batch_size} / training.accumulate {training.accumulate} is not divisible by '
      f'{batch_shards(mesh)} devices; use a multiple of {training.accumulate * batch_shards(mesh)}'
    )
  if config.augment.mixes and training.batch_size // training.accumulate // batch_shards(mesh) % 2:
    raise UserError(
      f'augment.mixup and augment.cutmix mix pairs of examples per device: training.batch_size {training.batch_size} '
      f'must be a multiple of {2 * training.accumulate * batch_shards(mesh)} '
      f'(2 x training.accumulate {training.accumulate} x {batch_shards(mesh)} devices)'
    )
  if config.evaluation.weights == 'ema' and not training.ema:
    raise UserError("evaluation.weights is 'ema', but training.ema is 0: set training.ema, such as 0.9999")
  model = build_model(config.model, constrain_batch(mesh), shard_attention(mesh))
  check_patterns(config.optimizer, model.abstract)
  steps_per_epoch = len(split) * config.data.repeated_augmentation / training.batch_size
  steps = max(1, round(training.epochs * steps_per_epoch))
  schedule = make_schedule(config.optimizer, training.batch_size, steps_per_epoch, steps)
  optimizer = make_optimizer(config.optimizer, schedule)
  init = partial(init_state, model, optimizer, ema=training.ema > 0)
  shardings = param_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
  preprocessing: dict[str, Any] = {
    'training': training,
    'augmentation': config.augment,
    'normalization': config.data.normalization,
    'mirrors': mirror_labels(split.class_names),
    'sharding': rows,
  }
  trained = stop_frozen_gradients(model, config.optimizer.freeze)
  if training.cache_features:
    check_frozen(config.optimizer, model.abstract, ENCODER)
    step = make_feature_step(trained, optimizer, training)
  else:
    step = make_train_step(trained, optimizer, **preprocessing)
  return Run(
    config, workdir, split, model, mesh, steps, steps_per_epoch, schedule,
    init=jax.jit(init, out_shardings=shardings),
    begin=jax.jit(partial(create_state, optimizer, ema=training.ema > 0), donate_argnums=0, out_shardings=shardings),
    step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
    encode=jax.jit(make_encode_step(model, **preprocessing), out_shardings=rows),
    predict=jax.jit(make_evaluation_step(model, normalization=config.data.normalization), out_shardings=rows),
  )  # fmt: skip


def _source(config: Config, workdir: Path) -> tuple[Source | None, resolve.Source | None]:
  """Opens the weights that the run starts from; for a workdir that exists, reads its config instead."""
  if is_started(workdir):
    before = experiment.from_dict(read_run(workdir)['config'])
    if not before.init_from:
      return None, None
    return None, resolve.Source(
      str(workdir),
      resolve.weight_fields(before.model),
      before.data.normalization,
      trained=None if config.init_from else before,
      init_from=before.init_from if same_model(config.init_from, before.init_from) else '',
      encoder=resolve.encoder_fields(before.model),
    )
  if not config.init_from:
    return None, None
  source = open_init(config)
  if source.info.normalization is None:
    print(f'{config.init_from} does not state its normalization: keeping {config.data.normalization}', flush=True)
  info = source.info
  return source, resolve.Source(
    config.init_from,
    info.model_fields,
    info.normalization,
    init_from=source.name,
    encoder=info.encoder_fields,
  )


def open_init(config: Config) -> Source:
  """Opens the weights that `init_from` and the fields beside it name."""
  heads = None if config.model.space_encoder else config.model.heads  # an encoder determines it
  return open_source(config.init_from, heads, config.init_channel_order, config.init_weights)


def _saved_normalization(workdir: Path) -> Normalization | None:
  """Returns the normalization of a run that a workdir holds; None if it holds none."""
  return experiment.from_dict(read_run(workdir)['config']).data.normalization if is_started(workdir) else None


def initial_state(run: Run) -> TrainState:
  """Returns the initial state, with pretrained weights if the config names any."""
  key = jax.random.key(run.config.training.seed)
  if not run.config.init_from:
    return run.init(key)
  source = run.source or open_init(run.config)
  loaded = load(source, run.model, class_names=run.split.class_names, head=run.config.init_head, key=key)
  print(loaded.report(), flush=True)
  return run.begin(shard_params(loaded.params, run.mesh))


def restore_state(run: Run, checkpoints: CheckpointManager) -> TrainState:
  """Restores the latest checkpoint on the run's devices."""
  abstract = jax.eval_shape(run.init, jax.random.key(0))
  print(f'resuming from step {checkpoints.latest} of {run.workdir}', flush=True)
  return checkpoints.restore(abstract_with_shardings(abstract, run.mesh))


def is_started(workdir: Path) -> bool:
  """Returns whether a workdir holds a run: its config.json, or checkpoints."""
  return (workdir / 'config.json').exists() or bool(saved_steps(workdir))


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


def print_summary(run: Run) -> None:
  """Prints model, data and training schedule."""
  config, devices = run.config, run.mesh.devices.ravel()
  flops, parameters = count_flops(config.model), count_parameters(run.model.abstract)
  model, data = config.model, config.data
  options = f', {data.repeated_augmentation} clips per video' if data.repeated_augmentation > 1 else ''
  if data.class_balance:
    options += f'; {sampling.describe(run.split.labels, run.split.class_names, data.class_balance)}'
  print(
    f'model: {model.space_blocks} space + {model.motion_blocks} motion + {model.class_blocks} class blocks, '
    f'block size {model.block_size}, {model.frames} frames of {model.image_size[0]}x{model.image_size[1]}; '
    f'{parameters:,} parameters, {flops / 1e9:.4g} GFLOPs per view ({flops / 2e9:.4g} G multiply-adds)\n'
    f'data: {run.split}, {data.sampling} clips{options}\n'
    f'training: {run.steps} steps of {config.training.batch_size} clips (training.epochs {config.training.epochs:g}), '
    f'{config.optimizer.name}, learning rate {peak_learning_rate(run):.3g}, '
    f'{len(devices)} x {devices[0].device_kind}',
    flush=True,
  )


def peak_learning_rate(run: Run) -> float:
  """Returns the learning rate after warm-up."""
  warmup = round(run.config.optimizer.warmup_epochs * run.steps_per_epoch)
  return float(run.schedule(min(run.steps - 1, warmup)))
