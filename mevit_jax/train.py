"""Trains a model into a workdir, or resumes training; evaluates at intervals and at the end."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from mevit_jax.batches import Batch, device_batch, open_batches
from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.reader import is_started, load_checkpoint, read_best
from mevit_jax.config.experiment import Config
from mevit_jax.datasets import reader as datasets
from mevit_jax.evaluate import Evaluator, evaluate_params, predict_split
from mevit_jax.evaluation.protocol import describe_crops
from mevit_jax.experiment import (
  Run,
  initial_state,
  prepare_run,
  print_summary,
  restore_state,
)
from mevit_jax.parallel.distributed import allgather_bytes, is_main_process, propagate_failure
from mevit_jax.training.compilation_cache import enable_compilation_cache
from mevit_jax.training.malloc import configure_malloc
from mevit_jax.training.metrics import MetricWriter, Throughput
from mevit_jax.training.nonfinite import NonFiniteError, StepMonitor
from mevit_jax.training.preemption import PreemptionHandler, StopError
from mevit_jax.training.state import TrainState, select_params
from mevit_jax.training.unreadable import UnreadableMonitor, sum_over_hosts
from mevit_jax.workdirs import check_hosts, check_workdir, create_workdir, is_described, lock_workdir

# Steps in flight: enough to keep the devices busy, few enough to bound memory.
MAX_INFLIGHT_STEPS = 2
# Steps after the one that compiles, by which the time that is left is estimated for the first time.
_ESTIMATE_STEPS = 3


def train(config: Config, workdir: str) -> dict[str, Any]:
  """Trains from the latest intact checkpoint of the workdir, if any; returns the results of the last evaluation.

  Raises:
    UserError: the config, the dataset or the workdir is invalid; nothing has been written then.
    SystemExit: a signal stopped the run; the code is 128 plus its number, so that schedulers restart the job.
  """
  configure_malloc()
  run = prepare_run(config, Path(workdir).expanduser())
  check_workdir(run)
  print_summary(run)
  sizes = datasets.read_sizes(run.split.directory, run.split.name)
  if hint := describe_crops(sizes, run.config.clip.size, run.config.evaluation.crops):
    print(hint, flush=True)
  new, described = not is_started(run.workdir), is_described(run)
  check_hosts(run, new=new)
  state = initial_state(run) if new else None  # before anything is written: loading the pretrained weights may fail
  with lock_workdir(run.workdir, new=new):
    if not described:
      create_workdir(run)
    enable_compilation_cache(run.workdir)
    return _train(run, state)


def _train(run: Run, state: TrainState | None) -> dict[str, Any]:
  """Trains in a locked workdir from the latest checkpoint, else from `state`, else from the initial state."""
  config = run.config
  checkpoints = CheckpointManager(run.workdir, config.training.keep, config.training.keep_best)
  try:
    # In this order: a second signal cannot interrupt saving, and other hosts learn of a failure before saving waits.
    with (
      PreemptionHandler() as stop,
      contextlib.closing(checkpoints),
      propagate_failure(but=(StopError, NonFiniteError)),
    ):
      if checkpoints.latest is not None:
        state = restore_state(run, checkpoints)
      state = state or initial_state(run)
      stop.check()
      results = _loop(run, state, checkpoints, stop)
  except StopError as stopped:
    at = f'at step {checkpoints.latest}, checkpoint saved' if checkpoints.latest else 'before its first step'
    print(f'stopped by {stopped.signal.name} {at}; run the same command to resume', flush=True)
    raise SystemExit(128 + stopped.signal) from None
  return _evaluate_best(run) if config.training.patience and 'top1' in results else results


def dry_run(config: Config, workdir: str) -> None:
  """Runs two training steps and one evaluation step and prints their times; writes nothing."""
  configure_malloc()
  run = prepare_run(config, Path(workdir).expanduser())
  check_workdir(run)
  print_summary(run)
  config = run.config
  print(parameter_overview.get_parameter_overview(run.model.abstract, include_stats=False))
  state = initial_state(run)
  with contextlib.closing(open_batches(run, state.params, 0)) as batches:
    for action in ('compiled and ran a training step', 'ran a second training step'):
      start = time.monotonic()
      state, metrics = run.step(state, device_batch(run, next(batches)))
      print(
        f'{action}: loss {float(metrics["loss"]):.4f}, {time.monotonic() - start:.1f} s with data loading',
        flush=True,
      )
  start = time.monotonic()
  split = datasets.open_split(config.data.data_dir, config.data.dataset, config.evaluation.split)
  examples = [split.source[i] for i in range(min(len(split), config.evaluation.batch_size))]
  evaluator = Evaluator(config, run.predict, run.workdir, run.mesh)
  predict_split(evaluator, state.params, dataclasses.replace(split, source=examples))
  print(f'compiled and ran an evaluation step: {time.monotonic() - start:.1f} s with data loading')


def _loop(run: Run, state: TrainState, checkpoints: CheckpointManager, stop: PreemptionHandler) -> dict[str, Any]:
  """Runs the remaining steps; ends with a checkpoint and an evaluation."""
  training = run.config.training
  first = int(state.step)
  writer = MetricWriter(run.workdir, first)
  batches = open_batches(run, state.params, first, stop.check)
  throughput = Throughput(first, run.steps, run.steps_per_epoch, training.batch_size, run.config.model.classes)
  profiled = _steps_to_profile(training.profile, first, run.steps)
  unreadable = UnreadableMonitor()
  monitor = StepMonitor(training.on_nonfinite == 'stop', partial(_ids, run), _saved_window(checkpoints))
  results: dict[str, Any] = {}
  try:
    if first and _evaluation_is_due(run, first) and not writer.has_metrics(first, run.config.evaluation.name):
      results = _evaluate(run, state, first, checkpoints, writer, stop)  # the run was killed before it did
    for step in range(first + 1, (first if _has_plateaued(run, first) else run.steps) + 1):
      if profiled and step == profiled[0]:
        jax.profiler.start_trace(str(run.workdir / 'profile'))
      batch = _next(batches, throughput)
      replaced = unreadable.add(batch)
      state, step_metrics = run.step(state, device_batch(run, batch))
      monitor.add(step, batch['used'].copy(), {**step_metrics, 'unreadable': replaced})
      del batch  # releases memory shared with a worker before the workers end
      monitor.drain(MAX_INFLIGHT_STEPS if step > first + 1 else 0)
      if step == first + 1:  # excludes compilation from the throughput
        throughput.start(step)
      if step == first + 1 + _ESTIMATE_STEPS < run.steps:
        monitor.drain()
        print(throughput.estimate(step), flush=True)
      if profiled and step == profiled[-1]:
        _end_profile(run, profiled, step_metrics)
      stops, evaluates = stop.should_stop(step), _evaluation_is_due(run, step)
      saves = step % training.save_every == 0 or evaluates
      if step % training.log_every == 0 or saves:
        monitor.drain()
        _log(run, step, monitor, throughput, writer)
      start = time.monotonic()
      if saves or stops:
        _save(state, monitor, checkpoints, run)
      if stops:
        stop.check()
      if evaluates:
        results = _evaluate(run, state, step, checkpoints, writer, stop)
        throughput.add_pause(time.monotonic() - start)
        if _has_plateaued(run, step):
          break
    return results or _evaluate_params(run, state, int(state.step), stop)
  except NonFiniteError:
    _save_before(state, monitor, checkpoints, run)
    raise
  finally:
    batches.close()
    writer.close()


def _next(batches: Iterator[Batch], throughput: Throughput) -> Batch:
  """Returns the next batch, and adds the wait for it to the throughput."""
  start = time.monotonic()
  batch = next(batches)
  throughput.add_wait(time.monotonic() - start)
  return batch


def _save(state: TrainState, monitor: StepMonitor, checkpoints: CheckpointManager, run: Run) -> None:
  """Saves the state, and the metrics since the last log line: that of a resumed run covers the same steps."""
  monitor.drain()
  _save_drained(state, monitor, checkpoints, run)


def _save_before(state: TrainState, monitor: StepMonitor, checkpoints: CheckpointManager, run: Run) -> None:
  """Saves the state before the step whose update was dropped."""
  if run.config.training.on_nonfinite == 'stop':  # all later updates were dropped too
    state = dataclasses.replace(state, step=state.step - state.skipped)
  else:
    monitor.drain()
  _save_drained(state, monitor, checkpoints, run)


def _save_drained(state: TrainState, monitor: StepMonitor, checkpoints: CheckpointManager, run: Run) -> None:
  metadata, window = run.metadata, monitor.window
  if window:
    metadata['window'] = {**window, 'unreadable': sum_over_hosts(window['unreadable'])}
  checkpoints.save(state, metadata)


def _saved_window(checkpoints: CheckpointManager) -> dict[str, float]:
  """Returns the metrics since the last log line of the run that this one resumes; process 0 has the counts of all."""
  window = checkpoints.read_window()
  return window if is_main_process() or not window else {**window, 'unreadable': 0}


def _evaluation_is_due(run: Run, step: int) -> bool:
  every = run.config.training.evaluate_every
  return step == run.steps or (every > 0 and step % every == 0)


def _has_plateaued(run: Run, step: int) -> bool:
  """Returns whether the last `training.patience` evaluations, up to this step, were not better than one before them."""
  training = run.config.training
  if not (training.patience and step and _evaluation_is_due(run, step)):
    return False
  best = json.loads(allgather_bytes(json.dumps(read_best(run.workdir)).encode())[0])  # as process 0 sees it
  plateaued = bool(best) and step - best['step'] >= training.patience * training.evaluate_every
  if plateaued and is_main_process():
    print(
      f'early stopping at step {step} of {run.steps}: no better top-1 than {100 * best["top1"]:.2f} % of step '
      f'{best["step"]} in {training.patience} evaluations (training.patience)',
      flush=True,
    )
  return plateaued


def _evaluate_best(run: Run) -> dict[str, Any]:
  """Evaluates the best checkpoint and writes its report."""
  evaluation = dataclasses.replace(run.config.evaluation, checkpoint='best')
  config = dataclasses.replace(run.config, evaluation=evaluation)
  best = load_checkpoint(run.workdir, 'best', evaluation.weights, run.mesh)
  evaluator = Evaluator(config, run.predict, run.workdir, run.mesh)
  return evaluate_params(evaluator, best.params, best.step, best.weights, report=True)


def _evaluate(
  run: Run, state: TrainState, step: int, checkpoints: CheckpointManager, writer: MetricWriter, stop: PreemptionHandler
) -> dict[str, Any]:
  """Evaluates the saved state and logs its accuracy."""
  results = _evaluate_params(run, state, step, stop)
  name = run.config.evaluation.name
  if 'top1' in results:  # absent without labels
    checkpoints.record_evaluation(step, results['top1'], name)  # before the metrics, which mark the evaluation as done
    baselines = {f'{kind}_baseline': baseline['top1'] for kind, baseline in results.get('baselines', {}).items()}
    writer.write(step, {key: results[key] for key in ('top1', 'top5', 'loss')} | baselines, name)
  return results


def _evaluate_params(run: Run, state: TrainState, step: int, stop: PreemptionHandler) -> dict[str, Any]:
  weights, params = select_params(state, run.config.evaluation.weights)
  with stop.during_evaluation(step) as check:
    evaluator = Evaluator(run.config, run.predict, run.workdir, run.mesh, check)
    return evaluate_params(evaluator, params, step, weights, report=step == run.steps)


def _log(run: Run, step: int, monitor: StepMonitor, throughput: Throughput, writer: MetricWriter) -> None:
  """Logs the means over the steps since the last log line."""
  means = monitor.means()
  means['unreadable'] = sum_over_hosts(means['unreadable'])
  values = {**means, **throughput.measure(step), 'learning_rate': float(run.schedule(step - 1))}
  writer.write(step, values, 'train')
  print(throughput.line(step, values), flush=True)


def _ids(run: Run, indices: np.ndarray) -> list[str]:
  return [run.split.source[int(i)]['id'] for i in indices]


def _steps_to_profile(steps: tuple[int, ...], first: int, last: int) -> range:
  """Returns the requested steps that have not run yet."""
  return range(max(steps[0], first + 1), min(steps[1], last) + 1) if steps else range(0)


def _end_profile(run: Run, steps: range, metrics: dict) -> None:
  jax.block_until_ready(metrics)  # includes steps in flight
  jax.profiler.stop_trace()
  print(f'profile of steps {steps[0]} to {steps[-1]}: {run.workdir / "profile"}', flush=True)
