"""Compiles a config's training and evaluation steps for accelerators that this machine does not have."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from mevit_jax.config.experiment import Config
from mevit_jax.config.model import count_flops
from mevit_jax.config.resolve import Dataset, resolve
from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError
from mevit_jax.experiment import Run, build_run, peak_learning_rate
from mevit_jax.parallel.mesh import batch_shards, make_mesh
from mevit_jax.parallel.placement import abstract_with_shardings, batch_sharding
from mevit_jax.planning.chips import Topology
from mevit_jax.planning.estimate import StepPlan, bytes_per_device, plan_step
from mevit_jax.planning.report import Plan, describe_memory
from mevit_jax.training.state import TrainState

_LOGGER = logging.getLogger(__name__)

# Classes and training videos as published; the values of a prepared dataset take precedence.
_PUBLISHED = {'kinetics400': (400, 246_245), 'kinetics600': (600, 392_622), 'something_something_v2': (174, 168_913)}


def plan(
  config: Config,
  topology: Topology,
  devices: Sequence[jax.Device],
  batch_size: int = 0,
  evaluation: bool = True,
) -> Plan:
  """Compiles a config's steps for devices and estimates their cost.

  Args:
    config: config of the run.
    topology: topology of the devices.
    devices: devices to compile for; abstract ones suffice.
    batch_size: global batch size; 0 rounds the config's up to the next multiple of `batch_multiple`.
    evaluation: compile the evaluation step too.

  Raises:
    UserError: the mesh does not fit the devices, the batch or the model, or the size of the dataset is unknown.
  """
  requested = batch_size or config.training.batch_size
  multiple = batch_multiple(config, devices)
  run = _build_run(config, devices, batch_size or -(-requested // multiple) * multiple)
  training, protocol = run.config.training, run.config.evaluation
  return Plan(
    topology=topology.name,
    chips=run.mesh.size,
    mesh={name: size for name, size in run.mesh.shape.items() if size > 1},
    batch_size=training.batch_size,
    requested_batch_size=requested,
    learning_rate=peak_learning_rate(run),
    steps=run.steps,
    epochs=training.epochs,
    videos=len(run.split),
    train=plan_train(run, topology),
    evaluation=plan_evaluation(run, topology) if evaluation else None,
    evaluation_batch_size=protocol.batch_size,
    views=protocol.clips * protocol.crops,
  )


def plan_train(run: Run, topology: Topology) -> StepPlan:
  """Compiles the training step and estimates its cost."""
  state, batch_size = _abstract_state(run), run.config.training.batch_size
  video, label = _abstract_video(run, batch_size), _abstract_batch(run, (batch_size,), jnp.int32)
  sizes = {
    'parameters': bytes_per_device(state.params),
    'optimizer state': bytes_per_device(state.opt_state),
    'batch': bytes_per_device((video, label)),
  }
  lowered = run.step.lower(state, {'video': video, 'label': label})
  # The backward pass has twice the FLOPs of the forward pass; rematerialization does not count as model FLOPs.
  return plan_step(lowered, topology, run.mesh, sizes, 3 * batch_size * count_flops(run.config.model))


def plan_evaluation(run: Run, topology: Topology) -> StepPlan:
  """Compiles the evaluation step, with all views of a batch of videos, and estimates its cost."""
  protocol, params = run.config.evaluation, _abstract_state(run).params
  views = protocol.clips * protocol.crops
  video = _abstract_video(run, protocol.batch_size, views)
  sizes = {'parameters': bytes_per_device(params), 'batch': bytes_per_device(video)}
  lowered = run.predict.lower(params, video)
  return plan_step(lowered, topology, run.mesh, sizes, protocol.batch_size * views * count_flops(run.config.model))


def find_largest_batch(config: Config, topology: Topology, devices: Sequence[jax.Device]) -> int:
  """Finds the largest global batch size whose training step fits, by compiling the step in a binary search.

  Raises:
    UserError: the smallest batch does not fit.
  """
  multiple = batch_multiple(config, devices)

  def fits(multiples: int) -> bool:
    step = plan_train(_build_run(config, devices, multiples * multiple), topology)
    _LOGGER.info('  batch size %d: %s', multiples * multiple, describe_memory(step))
    return step.fits

  if not fits(1):
    raise UserError(
      f'training.batch_size {multiple}, the smallest for this mesh, does not fit on {topology.name}: '
      'increase mesh.fsdp, or set model.remat'
    )
  low, high = 1, 2
  while fits(high):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low * multiple


def batch_multiple(config: Config, devices: Sequence[jax.Device]) -> int:
  """Returns the number that divides every valid batch size: batch shards x microbatches."""
  return batch_shards(make_mesh(config.mesh, devices)) * config.training.accumulate


def _build_run(config: Config, devices: Sequence[jax.Device], batch_size: int) -> Run:
  """Builds the run of a config with a batch size on devices."""
  split, mesh = _training_split(config), make_mesh(config.mesh, devices)
  config = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=batch_size))
  config, _ = resolve(config, Dataset(split.dataset, split.class_names), devices=batch_shards(mesh))
  return build_run(config, Path(), split, mesh)


def _training_split(config: Config) -> datasets.Split:
  """Opens the training split, or returns a stand-in of its published size: no video is read."""
  data = config.data
  if data.dataset and (Path(data.data_dir).expanduser() / data.dataset).is_dir():
    return datasets.open_split(data.data_dir, data.dataset, data.train_split)
  if data.dataset not in _PUBLISHED:
    raise UserError(
      f'data.dataset {data.dataset!r} is not in {data.data_dir}, and its size is unknown: prepare it, or use '
      f'--config.data.dataset={"|".join(_PUBLISHED)}'
    )
  classes, videos = _PUBLISHED[data.dataset]
  names = tuple(f'class {i}' for i in range(classes))
  split = data.train_split
  return datasets.Split([{}] * videos, names, 'published', split, data.dataset, Path(data.data_dir), {split: videos})


def _abstract_state(run: Run) -> TrainState:
  return abstract_with_shardings(jax.eval_shape(run.init, jax.random.key(0)), run.mesh)


def _abstract_video(run: Run, batch_size: int, *views: int) -> jax.ShapeDtypeStruct:
  model = run.config.model
  return _abstract_batch(run, (batch_size, *views, model.frames, *model.image_size, 3), jnp.uint8)  # b v t h w 3


def _abstract_batch(run: Run, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(run.mesh))
