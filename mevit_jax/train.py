"""Trains a model into a workdir, or goes on where it stopped; evaluates at intervals and at the end."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from mevit_jax import recipes
from mevit_jax.data import datasets, pipeline
from mevit_jax.errors import UserError
from mevit_jax.evaluate import describe_dataset, evaluate_params, predict_split
from mevit_jax.models.config import count_flops
from mevit_jax.models.functional import Model, build_model, count_parameters
from mevit_jax.parallel.hosts import global_batch, host_rows
from mevit_jax.parallel.mesh import make_mesh
from mevit_jax.parallel.placement import by_rows, place, placed
from mevit_jax.recipes import Recipe
from mevit_jax.training.augment import mirror_labels
from mevit_jax.training.checkpoint import Checkpoints, read_workdir, write_workdir
from mevit_jax.training.optimizer import make_optimizer, make_schedule
from mevit_jax.training.state import TrainState, init_state
from mevit_jax.training.steps import make_train_step
from mevit_jax.training.writer import Progress, Writer

# What may differ when a workdir is resumed: where and how fast it runs, and how often it is looked at.
_MAY_DIFFER = (
  'mesh.', 'evaluation.', 'data.workers', 'data.data_dir', 'model.unroll', 'model.remat', 'model.classes',
  'training.log_every', 'training.save_every', 'training.keep', 'training.evaluate_every', 'training.profile',
)  # fmt: skip
# Steps that may be under way at once: enough to keep the devices busy, and few enough to bound memory.
_AHEAD = 2


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
  step: Callable[[TrainState, Any], tuple[TrainState, dict]]


def train(recipe: Recipe, workdir: str) -> dict[str, Any]:
  """Trains, from the newest checkpoint of the workdir if there is one; returns the last evaluation's results.

  Raises:
    UserError: for what a recipe, a dataset or a workdir can have wrong, before anything is written.
  """
  run = prepare_run(recipe, Path(workdir).expanduser())
  about = _about(run)
  _check_workdir(run, about)
  _print_summary(run)
  if not (run.workdir / 'config.json').exists():
    write_workdir(run.workdir, about)
  checkpoints = Checkpoints(run.workdir, recipe.training.keep)
  try:
    state = _first_state(run, checkpoints)
    return _loop(run, state, checkpoints, about)
  finally:
    checkpoints.close()


def dry_run(recipe: Recipe, workdir: str) -> None:
  """Sends one batch through training and evaluation, and says what it took; writes nothing."""
  run = prepare_run(recipe, Path(workdir).expanduser())
  _check_workdir(run, _about(run))
  _print_summary(run)
  recipe, rows = run.recipe, by_rows(run.mesh)
  print(parameter_overview.get_parameter_overview(run.model.abstract, include_stats=False))
  state = run.init(jax.random.key(recipe.training.seed))
  with contextlib.closing(_batches(run, 0)) as batches:
    for what in ('compiled and ran a training step', 'ran a second one'):
      start = time.monotonic()
      batch = _inputs(next(batches), rows)
      state, metrics = run.step(state, batch)
      print(f'{what}: loss {float(metrics["loss"]):.4f}, {time.monotonic() - start:.1f} s with its data', flush=True)
  start = time.monotonic()
  split = datasets.open_split(recipe.data.data_dir, recipe.data.dataset, recipe.evaluation.split)
  some = [split.source[i] for i in range(min(len(split), recipe.evaluation.batch_size))]
  predict_split(recipe, run.model, run.mesh, state.params, dataclasses.replace(split, source=some))
  print(f'compiled and ran an evaluation step: {time.monotonic() - start:.1f} s with its data')


def prepare_run(recipe: Recipe, workdir: Path) -> Run:
  """Opens the data and builds model, optimiser and step; computes and writes nothing."""
  split = datasets.open_split(recipe.data.data_dir, recipe.data.dataset, recipe.data.train_split)
  datasets.open_split(recipe.data.data_dir, recipe.data.dataset, recipe.evaluation.split)
  recipe = recipes.with_classes(recipe, split.class_names)
  training = recipe.training
  mesh = make_mesh(recipe.mesh)
  rows = by_rows(mesh)
  host_rows(rows, training.batch_size)
  host_rows(rows, recipe.evaluation.batch_size, 'evaluation.batch_size')
  if training.batch_size // training.accumulate % mesh.size:
    raise UserError(
      f'training.batch_size {training.batch_size} in {training.accumulate} parts (training.accumulate) '
      f'is not divisible by the {mesh.size} devices that share it'
    )
  model = build_model(recipe.model)
  steps_per_epoch = len(split) / training.batch_size
  steps = max(1, round(training.epochs * steps_per_epoch))
  schedule = make_schedule(recipe.optimizer, training.batch_size, steps_per_epoch, steps)
  optimizer = make_optimizer(recipe.optimizer, schedule)
  init = partial(init_state, model, optimizer)
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
  )
  return Run(
    recipe, workdir, split, model, mesh, steps, steps_per_epoch, schedule,
    init=jax.jit(init, out_shardings=shardings),
    step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
  )  # fmt: skip


def _loop(run: Run, state: TrainState, checkpoints: Checkpoints, about: dict[str, Any]) -> dict[str, Any]:
  """Runs the steps from the state on; ends with a checkpoint and an evaluation."""
  training, rows = run.recipe.training, by_rows(run.mesh)
  first = int(state.step)
  writer = Writer(run.workdir, first)
  batches = _batches(run, first)
  progress = Progress(first, run.steps, run.steps_per_epoch, training.batch_size)
  profiled = _profiled(training.profile, first, run.steps)
  metrics: collections.deque[dict] = collections.deque(maxlen=training.log_every)
  results: dict[str, Any] = {}
  try:
    if first and _evaluation_is_due(run, first) and not writer.has(first, run.recipe.evaluation.name):
      results = _evaluate(run, state, first, writer)  # the run was killed before it had done so
    for step in range(first + 1, run.steps + 1):
      if profiled and step == profiled[0]:
        jax.profiler.start_trace(str(run.workdir / 'profile'))
      start = time.monotonic()
      batch = next(batches)
      progress.waited(time.monotonic() - start)
      _name_unreadable(run, batch)
      state, step_metrics = run.step(state, _inputs(batch, rows))
      metrics.append(step_metrics)
      if step == first + 1:  # compiled now: the line of progress speaks of what comes after
        jax.block_until_ready(step_metrics)
        progress.begin(step)
      elif len(metrics) > _AHEAD:
        jax.block_until_ready(metrics[-1 - _AHEAD])
      if profiled and step == profiled[-1]:
        _end_profile(run, profiled, step_metrics)
      saves = step % training.save_every == 0 or step == run.steps
      if step % training.log_every == 0 or saves:  # a resumed run has the same lines: none spans a checkpoint
        _log(run, step, metrics, progress, writer)
      start = time.monotonic()
      if saves:
        checkpoints.save(state, about)
      if _evaluation_is_due(run, step):
        results = _evaluate(run, state, step, writer)
        progress.apart(time.monotonic() - start)
  finally:
    batches.close()
    writer.close()
  return results or evaluate_params(run.recipe, run.model, run.workdir, run.mesh, state.params, first, picture=True)


def _evaluation_is_due(run: Run, step: int) -> bool:
  every = run.recipe.training.evaluate_every
  return step == run.steps or (every > 0 and step % every == 0)


def _evaluate(run: Run, state: TrainState, step: int, writer: Writer) -> dict[str, Any]:
  """Evaluates the state, and writes the accuracy to the metrics too."""
  last = step == run.steps
  results = evaluate_params(run.recipe, run.model, run.workdir, run.mesh, state.params, step, picture=last)
  writer.write(step, {name: results[name] for name in ('top1', 'top5')}, run.recipe.evaluation.name)
  return results


def _batches(run: Run, start_step: int):
  """This host's rows of every batch from a step on."""
  training = run.recipe.training
  return pipeline.train_batches(
    run.split.source,
    run.recipe.clip,
    batch_size=training.batch_size,
    seed=training.seed,
    start_step=start_step,
    rows=host_rows(by_rows(run.mesh), training.batch_size),
    workers=run.recipe.data.workers,
  )


def _inputs(batch, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
  """What the training step takes of a batch, on the devices."""
  return global_batch({'video': batch['video'], 'label': batch['label']}, sharding)


def _log(run: Run, step: int, metrics, progress: Progress, writer: Writer) -> None:
  """Writes and prints the means over the steps since the last line."""
  means = {name: float(np.mean([one[name] for one in metrics])) for name in metrics[0]}
  metrics.clear()
  values = {**means, **progress.measure(step), 'learning_rate': float(run.schedule(step - 1))}
  writer.write(step, values, 'train')
  print(progress.line(step, values), flush=True)


def _name_unreadable(run: Run, batch) -> None:
  for asked, used in zip(batch['index'], batch['used'], strict=True):
    if asked != used:
      video, other = (run.split.source[int(i)]['id'] for i in (asked, used))
      print(f'unreadable video {video} was replaced by {other}', flush=True)


def _profiled(steps: tuple[int, ...], first: int, last: int) -> range:
  """The steps to profile: those asked for that are still ahead."""
  return range(max(steps[0], first + 1), min(steps[1], last) + 1) if steps else range(0)


def _end_profile(run: Run, steps: range, metrics: dict) -> None:
  jax.block_until_ready(metrics)  # what is under way belongs to it
  jax.profiler.stop_trace()
  print(f'profile of steps {steps[0]} to {steps[-1]}: {run.workdir / "profile"}', flush=True)


def _first_state(run: Run, checkpoints: Checkpoints) -> TrainState:
  """The newest checkpoint's state, or a fresh one."""
  key = jax.random.key(run.recipe.training.seed)
  if checkpoints.latest is None:
    return run.init(key)
  print(f'resuming from step {checkpoints.latest} of {run.workdir}', flush=True)
  return checkpoints.restore(placed(jax.eval_shape(run.init, key), run.mesh))


def _about(run: Run) -> dict[str, Any]:
  return {
    'recipe': recipes.to_dict(run.recipe),
    'class_names': list(run.split.class_names),
    'fingerprint': run.split.fingerprint,
  }


def _check_workdir(run: Run, about: dict[str, Any]) -> None:
  """Refuses a workdir of another model, dataset, optimiser, seed or batch."""
  if not (run.workdir / 'config.json').exists():
    if (run.workdir / 'checkpoints').exists():
      raise UserError(f'{run.workdir} has checkpoints but no config.json: use another workdir')
    return
  before = read_workdir(run.workdir)
  found = recipes.differences(before['recipe'], about['recipe'])
  found = [line for line in found if not line.startswith(_MAY_DIFFER)]
  if before['class_names'] != about['class_names']:
    names = zip(before['class_names'], about['class_names'], strict=False)
    found.append('class names: ' + next((f'{a!r}, and {b!r}' for a, b in names if a != b), 'another number of them'))
  if before['fingerprint'] != about['fingerprint']:
    found.append(f'dataset fingerprint: {before["fingerprint"][:12]}, and {about["fingerprint"][:12]}')
  if found:
    raise UserError(f'{run.workdir} is of another run (there, and now): {"; ".join(found[:5])}. Use another workdir')


def _print_summary(run: Run) -> None:
  """Says what is trained, on what, and for how long."""
  recipe, devices = run.recipe, run.mesh.devices.ravel()
  flops, parameters = count_flops(recipe.model), count_parameters(run.model.abstract)
  model = recipe.model
  print(
    f'model: {model.space_blocks} space + {model.motion_blocks} motion + {model.class_blocks} class blocks, '
    f'block size {model.block_size}, {model.frames} frames of {model.image_size[0]}x{model.image_size[1]}; '
    f'{parameters:,} parameters, {flops / 1e9:.4g} GFLOPs a view ({flops / 2e9:.4g} G multiply-adds)\n'
    f'data: {describe_dataset(run.split)}, {recipe.data.sampling} clips\n'
    f'training: {run.steps} steps of {recipe.training.batch_size} clips ({recipe.training.epochs:g} epochs), '
    f'{recipe.optimizer.name}, learning rate {float(run.schedule(min(run.steps - 1, _peak_step(run)))):.3g}, '
    f'{len(devices)} x {devices[0].device_kind}',
    flush=True,
  )


def _peak_step(run: Run) -> int:
  return round(run.recipe.optimizer.warmup_epochs * run.steps_per_epoch)
