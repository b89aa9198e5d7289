"""Fault injection: kills a small run at random moments, and damages files of a run and a dataset.

  python -m benchmarks.fault_injection --kills=100
  python -m benchmarks.fault_injection --kills=0 --faults=1000      # see benchmarks/damage.py

Each time, `main.py` is started on the same workdir and ended after a random time with SIGKILL, SIGTERM or SIGINT: while
it starts, between steps, while it writes a checkpoint or while it evaluates. A run that finishes is compared bitwise
with an uninterrupted one; then the next run starts. Prints a table; fails if a bit or an exit code differs. --minutes
limits the time.

Damaged files: fails if one of them changes a result without a word, or ends a command with more than one line.
"""

import collections
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks import damage
from mevit_jax.checkpoint.reader import load_checkpoint, read_best, saved_steps
from mevit_jax.cli import command
from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import moving_shapes

ROOT = Path(__file__).parents[1]
EVALUATE_EVERY = 25
# A checkpoint every five steps: one is being written most of the time.
CONFIG = {
  'model.width': 32, 'model.mlp_dim': 64, 'model.frames': 4, 'model.space_blocks': 0, 'model.motion_blocks': 1,
  'model.class_blocks': 0, 'training.batch_size': 8, 'training.log_every': 1, 'training.save_every': 5,
  'training.evaluate_every': EVALUATE_EVERY, 'training.ema': 0.99, 'evaluation.batch_size': 16,
}  # fmt: skip
VIDEOS = {'train': 64, 'validation': 32}


@dataclasses.dataclass
class Tally:
  """Counts over all runs.

  Attributes:
    kills: number of kills by (signal, activity of the run).
    repeated: number of steps that were repeated after each kill.
    failures: violations of the promises, one line each.
    finished: number of finished runs.
  """

  kills: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  repeated: list[int] = dataclasses.field(default_factory=list)
  failures: list[str] = dataclasses.field(default_factory=list)
  finished: int = 0

  def table(self) -> str:
    """Formats the counts as a table."""
    activities = ('starting', 'training', 'writing a checkpoint', 'evaluating')
    rows = [('', *activities)]
    for name in ('SIGKILL', 'SIGTERM', 'SIGINT'):
      rows.append((name, *(str(self.kills[name, activity]) for activity in activities)))
    lines = ['  '.join(cell.rjust(max(8, len(head))) for cell, head in zip(row, rows[0], strict=True)) for row in rows]
    repeated = (
      f'steps repeated after a kill: median {np.median(self.repeated or [0]):.0f}, maximum {max(self.repeated or [0])}'
    )
    return '\n'.join([*lines, f'{self.kills.total()} kills, {self.finished} finished runs', repeated])


class Session:
  """A process that runs `main.py`; a thread reads its output."""

  def __init__(self, folder: Path, workdir: Path, steps: int):
    fields = {**CONFIG, 'data.data_dir': folder / 'data', 'training.epochs': float(steps * 8 / VIDEOS['train'])}
    arguments = [sys.executable, 'main.py', '--config=configs/demo.py', f'--workdir={workdir}']
    environment = {
      **{name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'},
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    self.process = subprocess.Popen(
      [*arguments, *(f'--config.{name}={value}' for name, value in fields.items())],
      cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    self.lines: list[str] = []
    self.resumed = self.step = 0
    self.training = threading.Event()
    self._reader = threading.Thread(target=self._read, args=(self.process.stdout,))
    self._reader.start()

  def _read(self, output: Iterable[str]) -> None:
    for line in output:
      self.lines.append(line.rstrip())
      if match := re.match(r'(resuming from )?step (\d+)', line):
        self.step = int(match[2])
        if match[1]:
          self.resumed = self.step
        else:
          self.training.set()
    self.training.set()

  def wait(self) -> int:
    """Waits for the process and returns its exit code."""
    code = self.process.wait(timeout=600)
    self._reader.join()
    return code

  def activity(self, workdir: Path) -> str:
    """Returns what the run is doing."""
    if not self.training.is_set():
      return 'starting'
    if any((workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp')):
      return 'writing a checkpoint'
    return 'evaluating' if self.step % EVALUATE_EVERY == 0 else 'training'


def kill(session: Session, workdir: Path, random_: random.Random, tally: Tally) -> bool:
  """Sends a signal at a random moment; returns False if the run had already finished."""
  if random_.random() < 0.1:
    time.sleep(random_.uniform(0, 5))
  else:
    session.training.wait()
    time.sleep(random_.uniform(0, 3))
  number = random_.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], [6, 3, 1])[0]
  activity = session.activity(workdir)
  session.process.send_signal(number)
  code = session.wait()
  if code == 0:
    return False
  tally.kills[number.name, activity] += 1
  stopped = [line for line in session.lines if line.startswith('stopped by')]
  if number == signal.SIGKILL or activity == 'starting':
    # Before training starts there is nothing to save: Python's own exit codes (1 if Ctrl-C interrupts an import).
    expected = code in (-number, 128 + number) or (number == signal.SIGINT and code == 1)
  else:
    expected = code == 128 + number and len(stopped) == 1
  if not expected:
    tally.failures.append(f'{number.name} while {activity}: exit code {code}, {session.lines[-3:]}')
  return True


def final_arrays(workdir: Path) -> dict[str, bytes]:
  """Returns the bytes of the final parameters and EMA parameters of a run."""
  checkpoints = {weights: load_checkpoint(workdir, weights=weights) for weights in ('raw', 'ema')}
  trees = {weights: {'step': np.asarray(x.step), 'params': x.params} for weights, x in checkpoints.items()}
  return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree.leaves_with_path(trees)}


def run(folder: Path, kills: int, steps: int, seed: int, minutes: float) -> Tally:
  """Kills runs `kills` times, or for `minutes`, and lets the last run finish; writes into an empty folder."""
  end = time.monotonic() + 60 * minutes
  shards.write(moving_shapes.build(folder / 'data', VIDEOS, frames=16, size=32))
  if code := (reference := Session(folder, folder / 'reference', steps)).wait():
    raise RuntimeError(f'exit code {code}: {reference.lines[-3:]}')
  expected, random_, tally, number = final_arrays(folder / 'reference'), random.Random(seed), Tally(), 0
  reached = 0
  while not (enough := tally.kills.total() >= kills or time.monotonic() > end) or reached:
    workdir = folder / f'killed{number}'
    session = Session(folder, workdir, steps)
    ended = enough or not kill(session, workdir, random_, tally)
    code = session.wait()
    tally.failures += [line for line in session.lines if 'damaged' in line or ('Traceback' in line and code != 1)]
    if reached and session.resumed:
      tally.repeated.append(reached - session.resumed)
    reached = session.step or reached
    if not ended:
      continue
    if code:
      raise RuntimeError(f'exit code {code}: {session.lines[-3:]}')
    result = final_arrays(workdir)
    tally.failures += [f'{workdir.name}: {name} differs' for name, x in expected.items() if result[name] != x]
    # A checkpoint saved on a signal can replace a regular one; their number and the best one must be the same.
    if (len(saved_steps(workdir)), read_best(workdir)) != (
      len(saved_steps(folder / 'reference')),
      read_best(folder / 'reference'),
    ):
      tally.failures.append(
        f'{workdir.name} keeps other checkpoints: {saved_steps(workdir)}, best {read_best(workdir)}'
      )
    shutil.rmtree(workdir)
    tally.finished, number, reached = tally.finished + 1, number + 1, 0
    print(f'{tally.table()}\n', flush=True)
  return tally


def main(argv: Sequence[str]) -> None:
  """Runs the faults and the kills and prints their tables."""
  command.no_arguments(argv)
  if flags.FLAGS.faults:
    with tempfile.TemporaryDirectory() as folder:
      table, failures = damage.run(Path(folder), flags.FLAGS.faults, flags.FLAGS.seed)
    print(table)
    _exit_with(failures)
  if not flags.FLAGS.kills:
    return
  with tempfile.TemporaryDirectory() as folder:
    tally = run(Path(folder), flags.FLAGS.kills, flags.FLAGS.steps, flags.FLAGS.seed, flags.FLAGS.minutes)
  print(tally.table())
  _exit_with(tally.failures)
  print('parameters and EMA parameters are bitwise those of the uninterrupted run')


def _exit_with(failures: Sequence[str]) -> None:
  if failures:
    sys.exit('\n'.join(failures))


if __name__ == '__main__':
  flags.DEFINE_integer('kills', 100, 'Number of kills.')
  flags.DEFINE_integer('faults', 0, 'Number of damaged files.')
  flags.DEFINE_integer('steps', 150, 'Training steps per run.')
  flags.DEFINE_float('minutes', 60.0, 'Time limit for new kills.')
  flags.DEFINE_integer('seed', 0, 'Seed of the moments and signals.')
  command.run(main)
