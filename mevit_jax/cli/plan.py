"""Says what a recipe takes on TPUs or GPUs that are not there, before they are paid for.

  mevit plan --config=configs/k400.py --topology=v5e:16x16
  mevit plan --config=configs/k400.py:L/16 --topology=v5e:4x4,v5p:4x4x4,v6e:16x16 --batch=64,256
  mevit plan --config=configs/k400.py --topology=h200:8 --json

Compiles the real training and evaluation steps ahead of time, with the compiler of those chips, on any Linux machine
(pip install -r requirements-plan.txt): memory, arithmetic, collectives, the time of a step, hours. Minutes a step. The
mesh is the recipe's: --config.mesh.fsdp=16. With --config.mesh.slice=2 there are two slices of the topology.

Time is the compiler's own estimate of cycles, and the collectives' bytes over the links, between all hidden behind the
arithmetic and none. For GPUs there is no such estimate: memory and collectives, and that everything compiles. Nothing
here knows of slow hosts, of waiting for videos, nor of what a chip really does with its cycles.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from mevit_jax import experiment as runs
from mevit_jax.cli import command
from mevit_jax.config import experiment
from mevit_jax.config import flags as config_flags
from mevit_jax.config.experiment import Config
from mevit_jax.config.model import count_flops
from mevit_jax.config.resolve import Dataset, resolve
from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError
from mevit_jax.experiment import Run
from mevit_jax.parallel.mesh import batch_shards, make_mesh
from mevit_jax.parallel.placement import batch_sharding, placed
from mevit_jax.planning import chips, report
from mevit_jax.planning.environment import prepare_process
from mevit_jax.planning.estimate import StepPlan, bytes_a_device, plan_step

REQUIRED = ('config', 'topology')  # flags

# Classes and training videos as published; a prepared dataset says its own.
_PUBLISHED = {'kinetics400': (400, 246_245), 'kinetics600': (600, 392_622), 'something_something_v2': (174, 168_913)}


def plan(
  recipe: Config,
  topology: chips.Topology,
  devices: Sequence[jax.Device],
  batch: int = 0,
  evaluation: bool = True,
) -> report.Plan:
  """Compiles a recipe's steps for these devices.

  Args:
    recipe: of the run.
    topology: of the devices.
    devices: that need not be there.
    batch: the global batch; 0 is the recipe's, or as many more as the devices divide.
    evaluation: whether to compile the evaluation step too.

  Raises:
    UserError: the mesh does not fit the devices, the batch or the model, or the dataset is not known.
  """
  asked = recipe.training.batch_size
  run = _run_on(recipe, devices, batch or _up(asked, batch_unit(recipe, devices)))
  training, protocol = run.config.training, run.config.evaluation
  return report.Plan(
    topology=topology.name,
    chips=run.mesh.size,
    mesh={name: size for name, size in run.mesh.shape.items() if size > 1},
    batch=training.batch_size,
    asked=batch or asked,
    learning_rate=runs.peak_learning_rate(run),
    steps=run.steps,
    epochs=training.epochs,
    videos=len(run.split),
    train=plan_train(run, topology),
    evaluation=plan_evaluation(run, topology) if evaluation else None,
    evaluation_batch=protocol.batch_size,
    views=protocol.clips * protocol.crops,
  )


def plan_train(run: Run, topology: chips.Topology) -> StepPlan:
  """The training step."""
  state, batch = _state_of(run), run.config.training.batch_size
  video, label = _video(run, batch), _rows(run, (batch,), jnp.int32)
  sizes = {
    'parameters': bytes_a_device(state.params),
    'optimiser': bytes_a_device(state.opt_state),
    'batch': bytes_a_device((video, label)),
  }
  lowered = run.step.lower(state, {'video': video, 'label': label})
  # Backwards is twice forwards; what is computed again for want of memory is not counted as work done.
  return plan_step(lowered, topology, run.mesh, sizes, 3 * batch * count_flops(run.config.model))


def plan_evaluation(run: Run, topology: chips.Topology) -> StepPlan:
  """The evaluation step, of all views."""
  protocol, params = run.config.evaluation, _state_of(run).params
  views = protocol.clips * protocol.crops
  video = _video(run, protocol.batch_size, views)
  sizes = {'parameters': bytes_a_device(params), 'batch': bytes_a_device(video)}
  lowered = run.predict.lower(params, video)
  return plan_step(lowered, topology, run.mesh, sizes, protocol.batch_size * views * count_flops(run.config.model))


def largest_batch(recipe: Config, topology: chips.Topology, devices: Sequence[jax.Device]) -> int:
  """The largest global batch whose training step fits: compiled, and the next larger one did not."""
  unit = batch_unit(recipe, devices)

  def fits(units: int) -> bool:
    step = plan_train(_run_on(recipe, devices, units * unit), topology)
    print(f'  batch {units * unit}: {report.memory_of(step)}', file=sys.stderr, flush=True)
    return step.fits

  if not fits(1):
    raise UserError(f'not even a batch of {unit} fits on {topology.name}: try mesh.fsdp, model.remat, accumulate')
  below, above = 1, 2
  while fits(above):
    below, above = above, 2 * above
  while above - below > 1:
    middle = (below + above) // 2
    below, above = (middle, above) if fits(middle) else (below, middle)
  return below * unit


def batch_unit(recipe: Config, devices: Sequence[jax.Device]) -> int:
  """The fewest rows that the devices divide; all batches are multiples of it."""
  return batch_shards(make_mesh(recipe.mesh, devices)) * recipe.training.accumulate


def _run_on(recipe: Config, devices: Sequence[jax.Device], batch: int) -> Run:
  """The recipe's run on these devices, with this batch."""
  split, mesh = _split_of(recipe), make_mesh(recipe.mesh, devices)
  recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, batch_size=batch))
  recipe, _ = resolve(recipe, Dataset(split.dataset, split.class_names), devices=batch_shards(mesh))
  return runs.build_run(recipe, Path(), split, mesh)


def _up(number: int, unit: int) -> int:
  return -(-number // unit) * unit


def _split_of(recipe: Config) -> datasets.Split:
  """The training split, or one of its size: the videos themselves are not needed."""
  data = recipe.data
  if (Path(data.data_dir).expanduser() / data.dataset).is_dir() and data.dataset:
    return datasets.open_split(data.data_dir, data.dataset, data.train_split)
  if data.dataset not in _PUBLISHED:
    raise UserError(
      f'how many videos {data.dataset!r} has is not known: prepare it in {data.data_dir}, or take one of '
      f'{", ".join(_PUBLISHED)} in its place (--config.data.dataset)'
    )
  classes, videos = _PUBLISHED[data.dataset]
  names = tuple(f'class {i}' for i in range(classes))
  split = data.train_split
  return datasets.Split([{}] * videos, names, 'published', split, data.dataset, Path(data.data_dir), {split: videos})


def _state_of(run: Run):
  return placed(jax.eval_shape(run.init, jax.random.key(0)), run.mesh)


def _video(run: Run, batch: int, *views: int) -> jax.ShapeDtypeStruct:
  model = run.config.model
  return _rows(run, (batch, *views, model.frames, *model.image_size, 3), jnp.uint8)


def _rows(run: Run, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(run.mesh))


def _batches(recipe: Config, topology: chips.Topology, devices: Sequence[jax.Device]) -> list[int]:
  """The batches that the flags ask for on these devices; 0 is the recipe's."""
  if flags.FLAGS.largest_batch:
    return [largest_batch(recipe, topology, devices)]
  if wrong := [batch for batch in flags.FLAGS.batch if not batch.isdecimal()]:
    raise UserError(f'--batch is one or more numbers, not {wrong[0]!r}')
  return [int(batch) for batch in flags.FLAGS.batch] or [flags.FLAGS.batch_per_chip * len(devices)]


def main(argv: Sequence[str]) -> None:
  """Plans every topology with every batch, and prints a report or JSON."""
  command.no_arguments(argv)
  prepare_process('plan')
  recipe = experiment.from_dict(flags.FLAGS.config)
  plans: list[report.Plan] = []
  for topology in map(chips.parse, flags.FLAGS.topology):
    devices = chips.devices_of(topology, recipe.mesh.slice)
    for batch in _batches(recipe, topology, devices):
      plans.append(plan(recipe, topology, devices, batch, flags.FLAGS.evaluation))
      if not flags.FLAGS.json:
        print(report.describe(plans[-1], topology.chip), flush=True)
  if flags.FLAGS.json:
    print(json.dumps([report.to_dict(one) for one in plans], indent=2))
  elif len(plans) > 1:
    print(report.table(plans))
  if not flags.FLAGS.json:
    print(report.NOT_KNOWN)


def define_flags() -> None:
  """Defines the flags of this command."""
  config_flags.define_config_flag()
  flags.DEFINE_list('topology', None, 'Chips: v5e:16x16, v5p:4x4x4, v6e:4x4, h200:8, h100:8, a100:2x8 (hosts x GPUs).')
  flags.DEFINE_list('batch', [], "Global batches; the recipe's, or as many more as the chips divide, if none is given.")
  flags.DEFINE_integer('batch_per_chip', 0, 'In place of --batch: so many rows a chip, for weak scaling.', 0)
  flags.DEFINE_boolean('largest_batch', False, 'Search for the largest batch that fits; compiles a few times.')
  flags.DEFINE_boolean('evaluation', True, 'Compile the evaluation step too.')
  flags.DEFINE_boolean('json', False, 'Print JSON alone.')
