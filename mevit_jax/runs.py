"""All that a training run is made of before its first step: what train, convert and plan start from."""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mevit_jax import recipes
from mevit_jax.data import datasets, pipeline, sampling
from mevit_jax.errors import UserError
from mevit_jax.models.config import count_flops
from mevit_jax.models.functional import Model, Params, build_model, count_parameters
from mevit_jax.parallel.distributed import gathered, is_first
from mevit_jax.parallel.hosts import host_rows
from mevit_jax.parallel.mesh import make_mesh, row_shards
from mevit_jax.parallel.placement import by_rows, each_device, keep_rows, place, placed, put
from mevit_jax.recipes import Recipe
from mevit_jax.training.augment import mirror_labels
from mevit_jax.training.checkpoint import Checkpoints
from mevit_jax.training.optimizer import check_patterns, make_optimizer, make_schedule
from mevit_jax.training.state import TrainState, begin_state, init_state
from mevit_jax.training.steps import make_evaluation_step, make_train_step
from mevit_jax.training.workdir import is_shared, read_workdir, write_workdir
from mevit_jax.weights.load import inspect, load

# What may differ when a workdir is resumed: where and how fast it runs, and how often it is looked at.
_MAY_DIFFER = (
  *recipes.SAME_FUNCTION, 'mesh.', 'evaluation.', 'data.workers', 'data.data_dir', 'model.classes',
  'training.log_every', 'training.save_every', 'training.keep', 'training.evaluate_every', 'training.profile',
  'training.on_nonfinite',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """All that a training run is made of before its first step."""

  recipe: Recipe
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

  @property
  def about(self) -> dict[str, Any]:
    """What a workdir and its checkpoints say of the run."""
    return {
      'recipe': recipes.to_dict(self.recipe),
      'class_names': list(self.split.class_names),
      'fingerprint': self.split.fingerprint,
      'videos': dict(self.split.videos),
    }


def prepare_run(recipe: Recipe, workdir: Path) -> Run:
  """Opens the data and builds model, optimiser and step; computes and writes nothing."""
  split = datasets.open_split(recipe.data.data_dir, recipe.data.dataset, recipe.data.train_split)
  datasets.open_split(recipe.data.data_dir, recipe.data.dataset, recipe.evaluation.split)
  if unlabelled := int((split.labels < 0).sum()):
    raise UserError(f'{unlabelled:,} of {split} have no label, and cannot be trained on: see data.train_split')
  recipe = _with_source(recipes.with_classes(recipe, split.class_names), workdir)
  return build_run(recipe, workdir, split, make_mesh(recipe.mesh))


def build_run(recipe: Recipe, workdir: Path, split: datasets.Split, mesh: jax.sharding.Mesh) -> Run:
  """The run of a recipe whose dataset and devices are known; the devices need not be there."""
  training = recipe.training
  pipeline.check_batch(training.batch_size, recipe.data.repeats)
  rows = by_rows(mesh)
  host_rows(rows, training.batch_size)
  if training.batch_size // training.accumulate % row_shards(mesh):
    raise UserError(
      f'training.batch_size {training.batch_size} in {training.accumulate} parts (training.accumulate) '
      f'is not divisible by the {row_shards(mesh)} devices that share it'
    )
  if recipe.augment.mixes and training.batch_size // training.accumulate // row_shards(mesh) % 2:
    raise UserError(
      f'augment.mixup and augment.cutmix mix pairs of clips on one device: training.batch_size {training.batch_size} '
      f'must be a multiple of {2 * training.accumulate * row_shards(mesh)} '
      f'(2 x training.accumulate {training.accumulate} x {row_shards(mesh)} devices)'
    )
  recipe = dataclasses.replace(recipe, evaluation=recipe.evaluation.shared(row_shards(mesh)))
  if recipe.evaluation.weights == 'ema' and not training.ema:
    raise UserError("evaluation.weights is 'ema', and training.ema is 0: there will be no such weights")
  model = build_model(recipe.model, keep_rows(mesh), each_device(mesh))
  check_patterns(recipe.optimizer, model.abstract)
  steps_per_epoch = len(split) * recipe.data.repeats / training.batch_size
  steps = max(1, round(training.epochs * steps_per_epoch))
  schedule = make_schedule(recipe.optimizer, training.batch_size, steps_per_epoch, steps)
  optimizer = make_optimizer(recipe.optimizer, schedule)
  init = partial(init_state, model, optimizer, ema=training.ema > 0)
  shardings = place(jax.eval_shape(init, jax.random.key(0)), mesh)
  step = make_train_step(
    model,
    optimizer,
    augmentation=recipe.augment,
    mirrors=mirror_labels(split.class_names),
    mean=recipe.data.mean,
    std=recipe.data.std,
    label_smoothing=training.label_smoothing,
    accumulate=training.accumulate,
    seed=training.seed,
    sharding=rows,
    ema=training.ema,
    stops=training.on_nonfinite == 'stop',
  )
  return Run(
    recipe, workdir, split, model, mesh, steps, steps_per_epoch, schedule,
    init=jax.jit(init, out_shardings=shardings),
    begin=jax.jit(partial(begin_state, optimizer, ema=training.ema > 0), donate_argnums=0, out_shardings=shardings),
    step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
    predict=jax.jit(make_evaluation_step(model, mean=recipe.data.mean, std=recipe.data.std), out_shardings=rows),
  )  # fmt: skip


def _with_source(recipe: Recipe, workdir: Path) -> Recipe:
  """The recipe with eps, mean and std of the weights it starts from, or that its workdir started from."""
  if (workdir / 'config.json').exists():
    before = recipes.recipe_of(read_workdir(workdir)['recipe'])
    if not before.init_from:
      return recipe
    if not recipe.init_from:  # the workdir remembers what it started from
      names = ('init_from', 'init_head', 'init_channel_order')
      recipe = dataclasses.replace(recipe, **{name: getattr(before, name) for name in names})
    return recipes.with_source(recipe, before.model.layer_norm_eps, before.data.mean, before.data.std)
  if not recipe.init_from:
    return recipe
  info = inspect(recipe.init_from, recipe.init_channel_order)
  if info.mean is None or info.std is None:
    print(f'{recipe.init_from} does not say its mean and std: data.mean {recipe.data.mean}, data.std {recipe.data.std}')
  return recipes.with_source(recipe, info.layer_norm_eps, info.mean or recipe.data.mean, info.std or recipe.data.std)


def fresh_state(run: Run) -> TrainState:
  """The state before the first step, with the weights that the recipe starts from."""
  key = jax.random.key(run.recipe.training.seed)
  if not run.recipe.init_from:
    return run.init(key)
  loaded = load(
    run.recipe.init_from,
    run.model,
    class_names=run.split.class_names,
    head=run.recipe.init_head,
    channel_order=run.recipe.init_channel_order,
    key=key,
  )
  print(loaded.report(), flush=True)
  return run.begin(put(loaded.params, run.mesh))


def restored_state(run: Run, checkpoints: Checkpoints) -> TrainState:
  """The newest checkpoint's state, on the run's devices."""
  abstract = jax.eval_shape(run.init, jax.random.key(0))
  print(f'resuming from step {checkpoints.latest} of {run.workdir}', flush=True)
  return checkpoints.restore(placed(abstract, run.mesh))


def check_workdir(run: Run) -> None:
  """Refuses a workdir of another model, dataset, optimiser, seed or batch."""
  if run.workdir.exists() and not run.workdir.is_dir():
    raise UserError(f'{run.workdir} is a file: use another workdir')
  if not (run.workdir / 'config.json').exists():
    if (run.workdir / 'checkpoints').exists():
      raise UserError(f'{run.workdir} has checkpoints but no config.json: use another workdir')
    return
  if is_shared(run.workdir):
    raise UserError(f"{run.workdir} is no run, but one's exported weights: start from them by --config.init_from")
  before, about = read_workdir(run.workdir), run.about
  # As a recipe of today: fields that came later have their defaults.
  found = recipes.differences(recipes.to_dict(recipes.recipe_of(before['recipe'])), about['recipe'])
  started = any((run.workdir / 'checkpoints').glob('*'))  # then what it started from is read no more
  found = [line for line in found if not line.startswith((*_MAY_DIFFER, *(('init_',) if started else ())))]
  found += datasets.differences(before, about)
  if found:
    raise UserError(f'{run.workdir} is of another run (there, and now): {"; ".join(found[:5])}. Use another workdir')


def check_hosts(run: Run, *, new: bool) -> None:
  """Refuses hosts that would train other runs than the first one does; returns when all of them have come so far."""
  first, *others = (json.loads(mine) for mine in gathered(json.dumps({**run.about, 'new': new}).encode()))
  for process, other in enumerate(others, 1):
    if other['new'] != first['new']:
      raise UserError(f'process {process} sees another workdir {run.workdir} than process 0: they must share it')
    found = recipes.differences(first, other)
    if found:
      raise UserError(f'process {process} has another run than process 0 (there, and here): {"; ".join(found[:5])}')


def begin_workdir(run: Run) -> None:
  """Writes the workdir's config.json, by the first process; a UserError where another one does not see it."""
  if is_first():
    write_workdir(run.workdir, run.about)
  gathered(b'')  # it is written
  last = time.monotonic() + 40  # a network file system may remember that it was not there
  while not (run.workdir / 'config.json').exists():
    if time.monotonic() > last:
      raise UserError(f'{run.workdir} is not the one that process 0 writes: all hosts must share the workdir')
    time.sleep(1)


def print_summary(run: Run) -> None:
  """Says what is trained, on what, and for how long."""
  recipe, devices = run.recipe, run.mesh.devices.ravel()
  flops, parameters = count_flops(recipe.model), count_parameters(run.model.abstract)
  model, data = recipe.model, recipe.data
  each = f', {data.repeats} of each video drawn' if data.repeats > 1 else ''
  if data.balance:
    each += f'; {sampling.describe(run.split.labels, run.split.class_names, data.balance)}'
  print(
    f'model: {model.space_blocks} space + {model.motion_blocks} motion + {model.class_blocks} class blocks, '
    f'block size {model.block_size}, {model.frames} frames of {model.image_size[0]}x{model.image_size[1]}; '
    f'{parameters:,} parameters, {flops / 1e9:.4g} GFLOPs a view ({flops / 2e9:.4g} G multiply-adds)\n'
    f'data: {run.split}, {data.sampling} clips{each}\n'
    f'training: {run.steps} steps of {recipe.training.batch_size} clips ({recipe.training.epochs:g} epochs), '
    f'{recipe.optimizer.name}, learning rate {peak_learning_rate(run):.3g}, '
    f'{len(devices)} x {devices[0].device_kind}',
    flush=True,
  )


def peak_learning_rate(run: Run) -> float:
  """The learning rate once it has risen."""
  risen = round(run.recipe.optimizer.warmup_epochs * run.steps_per_epoch)
  return float(run.schedule(min(run.steps - 1, risen)))
