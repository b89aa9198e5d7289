"""Builds an experiment from its config: dataset, model, optimizer, mesh and compiled steps."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mevit_jax.augment.clip import mirror_labels
from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.reader import is_started, read_run
from mevit_jax.config import experiment, resolve
from mevit_jax.config.experiment import Config
from mevit_jax.config.model import count_flops
from mevit_jax.data import pipeline, sampling
from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError
from mevit_jax.models.functional import ENCODER, Model, Params, build_model, count_parameters
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
  before = experiment.from_dict(read_run(workdir)['config']) if is_started(workdir) else None
  weights, source = _source(config, workdir, before)
  normalization = before.data.normalization if before else split.normalization
  dataset = resolve.Dataset(split.dataset, split.class_names, normalization)
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


def _source(config: Config, workdir: Path, before: Config | None) -> tuple[Source | None, resolve.Source | None]:
  """Opens the weights that the run starts from; if the workdir holds a run, takes its config `before` instead."""
  if before:
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
