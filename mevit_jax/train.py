"""Trains a model into a workdir, or goes on where it stopped; evaluates at intervals and at the end."""

import collections
import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from mevit_jax.data import datasets, pipeline
from mevit_jax.errors import UserError
from mevit_jax.evaluate import evaluate_params, predict_split
from mevit_jax.parallel.hosts import global_batch, host_rows
from mevit_jax.parallel.placement import by_rows
from mevit_jax.recipes import Recipe
from mevit_jax.runs import Run, check_workdir, fresh_state, prepare_run, print_summary, restored_state
from mevit_jax.training.checkpoint import Checkpoints, write_workdir
from mevit_jax.training.state import TrainState
from mevit_jax.training.unreadable import Unreadable
from mevit_jax.training.writer import Progress, Writer

# Steps that may be under way at once: enough to keep the devices busy, and few enough to bound memory.
_AHEAD = 2


def train(recipe: Recipe, workdir: str) -> dict[str, Any]:
  """Trains, from the newest checkpoint of the workdir if there is one; returns the last evaluation's results.

  Raises:
    UserError: for what a recipe, a dataset or a workdir can have wrong, before anything is written.
  """
  run = prepare_run(recipe, Path(workdir).expanduser())
  check_workdir(run)
  print_summary(run)
  fresh = None
  if not (run.workdir / 'config.json').exists():
    fresh = fresh_state(run)  # before anything is written: the weights it starts from may not load
    write_workdir(run.workdir, run.about)
  checkpoints = Checkpoints(run.workdir, recipe.training.keep)
  try:
    saved = checkpoints.latest is not None
    return _loop(run, restored_state(run, checkpoints) if saved else fresh or fresh_state(run), checkpoints)
  finally:
    checkpoints.close()


def dry_run(recipe: Recipe, workdir: str) -> None:
  """Sends one batch through training and evaluation, and says what it took; writes nothing."""
  run = prepare_run(recipe, Path(workdir).expanduser())
  check_workdir(run)
  print_summary(run)
  recipe, rows = run.recipe, by_rows(run.mesh)
  print(parameter_overview.get_parameter_overview(run.model.abstract, include_stats=False))
  state = fresh_state(run)
  with contextlib.closing(_batches(run, 0)) as batches:
    for what in ('compiled and ran a training step', 'ran a second one'):
      start = time.monotonic()
      batch = _inputs(next(batches), rows)
      state, metrics = run.step(state, batch)
      print(f'{what}: loss {float(metrics["loss"]):.4f}, {time.monotonic() - start:.1f} s with its data', flush=True)
  start = time.monotonic()
  split = datasets.open_split(recipe.data.data_dir, recipe.data.dataset, recipe.evaluation.split)
  some = [split.source[i] for i in range(min(len(split), recipe.evaluation.batch_size))]
  predict_split(recipe, run.predict, run.mesh, state.params, dataclasses.replace(split, source=some))
  print(f'compiled and ran an evaluation step: {time.monotonic() - start:.1f} s with its data')


def _loop(run: Run, state: TrainState, checkpoints: Checkpoints) -> dict[str, Any]:
  """Runs the steps from the state on; ends with a checkpoint and an evaluation."""
  training, rows = run.recipe.training, by_rows(run.mesh)
  first = int(state.step)
  writer = Writer(run.workdir, first)
  batches = _batches(run, first)
  progress = Progress(first, run.steps, run.steps_per_epoch, training.batch_size)
  profiled = _profiled(training.profile, first, run.steps)
  unreadable = Unreadable()
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
      unreadable.look(batch)
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
        _log(run, step, metrics, progress, writer, unreadable.take())
      start = time.monotonic()
      if saves:
        checkpoints.save(state, run.about)
      if _evaluation_is_due(run, step):
        results = _evaluate(run, state, step, writer)
        progress.apart(time.monotonic() - start)
  finally:
    batches.close()
    writer.close()
  return results or evaluate_params(run.recipe, run.predict, run.workdir, run.mesh, state.params, first, picture=True)


def _evaluation_is_due(run: Run, step: int) -> bool:
  every = run.recipe.training.evaluate_every
  return step == run.steps or (every > 0 and step % every == 0)


def _evaluate(run: Run, state: TrainState, step: int, writer: Writer) -> dict[str, Any]:
  """Evaluates the state, and writes the accuracy to the metrics too."""
  last = step == run.steps
  results = evaluate_params(run.recipe, run.predict, run.workdir, run.mesh, state.params, step, picture=last)
  if 'top1' in results:  # a split without labels has none
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
    repeats=run.recipe.data.repeats,
    balance=run.recipe.data.balance,
    labels=run.split.labels,
    start_step=start_step,
    rows=host_rows(by_rows(run.mesh), training.batch_size),
    workers=run.recipe.data.workers,
  )


def _inputs(batch, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
  """What the training step takes of a batch, on the devices."""
  return global_batch({'video': batch['video'], 'label': batch['label']}, sharding)


def _log(run: Run, step: int, metrics, progress: Progress, writer: Writer, unreadable: int) -> None:
  """Writes and prints the means over the steps since the last line."""
  means = {name: float(np.mean([one[name] for one in metrics])) for name in metrics[0]}
  metrics.clear()
  if not np.isfinite(means['loss']):
    raise UserError(
      f'the loss is {means["loss"]} at step {step}: lower the learning rate or clip the gradient '
      '(optimizer.learning_rate, .clip_norm); the checkpoints before it are kept'
    )
  values = {**means, **progress.measure(step), 'learning_rate': float(run.schedule(step - 1))}
  values['unreadable'] = unreadable
  writer.write(step, values, 'train')
  print(progress.line(step, values), flush=True)


def _profiled(steps: tuple[int, ...], first: int, last: int) -> range:
  """The steps to profile: those asked for that are still ahead."""
  return range(max(steps[0], first + 1), min(steps[1], last) + 1) if steps else range(0)


def _end_profile(run: Run, steps: range, metrics: dict) -> None:
  jax.block_until_ready(metrics)  # what is under way belongs to it
  jax.profiler.stop_trace()
  print(f'profile of steps {steps[0]} to {steps[-1]}: {run.workdir / "profile"}', flush=True)
