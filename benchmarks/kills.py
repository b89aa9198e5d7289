"""Kills a small run again and again, at random moments, and compares its end with that of a run nobody killed.

  python -m benchmarks.kills --kills=100

Each time, `main.py` is started on the same workdir, and after a random time ended with SIGKILL, SIGTERM or SIGINT:
while it starts, between steps, while a checkpoint is written or while it evaluates. A run that reaches its end is
compared, bit for bit, with one that was left alone; then the next one begins. Prints a table; fails if a bit or an exit
code differs. --minutes ends it earlier.
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

from mevit_jax.checkpoint.reader import load_checkpoint, read_best, steps_of
from mevit_jax.cli import command
from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import moving_shapes

ROOT = Path(__file__).parents[1]
EVALUATE_EVERY = 25
# A checkpoint every five steps: most of the time, one is being written.
RECIPE = {
  'model.width': 32, 'model.mlp_dim': 64, 'model.frames': 4, 'model.space_blocks': 0, 'model.motion_blocks': 1,
  'model.class_blocks': 0, 'training.batch_size': 8, 'training.log_every': 1, 'training.save_every': 5,
  'training.evaluate_every': EVALUATE_EVERY, 'training.ema': 0.99, 'evaluation.batch_size': 16,
}  # fmt: skip
VIDEOS = {'train': 64, 'validation': 32}


@dataclasses.dataclass
class Tally:
  """What happened, over all runs."""

  kills: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # (signal, moment)
  lost: list[int] = dataclasses.field(default_factory=list)  # steps, a kill
  complaints: list[str] = dataclasses.field(default_factory=list)
  finished: int = 0

  def table(self) -> str:
    """As lines."""
    moments = ('starting', 'training', 'writing a checkpoint', 'evaluating')
    rows = [('', *moments)]
    for name in ('SIGKILL', 'SIGTERM', 'SIGINT'):
      rows.append((name, *(str(self.kills[name, moment]) for moment in moments)))
    lines = ['  '.join(cell.rjust(max(8, len(head))) for cell, head in zip(row, rows[0], strict=True)) for row in rows]
    lost = f'steps done again after a kill: median {np.median(self.lost or [0]):.0f}, most {max(self.lost or [0])}'
    return '\n'.join([*lines, f'{self.kills.total()} kills, {self.finished} runs brought to their end', lost])


class Session:
  """One start of `main.py`; its lines are read as they come."""

  def __init__(self, folder: Path, workdir: Path, steps: int):
    fields = {**RECIPE, 'data.data_dir': folder / 'data', 'training.epochs': float(steps * 8 / VIDEOS['train'])}
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
    self.trains = threading.Event()
    self._reader = threading.Thread(target=self._read, args=(self.process.stdout,))
    self._reader.start()

  def _read(self, output: Iterable[str]) -> None:
    for line in output:
      self.lines.append(line.rstrip())
      if found := re.match(r'(resuming from )?step (\d+)', line):
        self.step = int(found[2])
        if found[1]:
          self.resumed = self.step
        else:
          self.trains.set()
    self.trains.set()

  def wait(self) -> int:
    """Its exit code."""
    code = self.process.wait(timeout=600)
    self._reader.join()
    return code

  def moment(self, workdir: Path) -> str:
    """What it is doing."""
    if not self.trains.is_set():
      return 'starting'
    if any((workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp')):
      return 'writing a checkpoint'
    return 'evaluating' if self.step % EVALUATE_EVERY == 0 else 'training'


def kill(session: Session, workdir: Path, random_: random.Random, tally: Tally) -> bool:
  """Ends a session at a random moment; False if it had reached its end by then."""
  if random_.random() < 0.1:
    time.sleep(random_.uniform(0, 5))
  else:
    session.trains.wait()
    time.sleep(random_.uniform(0, 3))
  number = random_.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], [6, 3, 1])[0]
  moment = session.moment(workdir)
  session.process.send_signal(number)
  code = session.wait()
  if code == 0:
    return False
  tally.kills[number.name, moment] += 1
  stopped = [line for line in session.lines if line.startswith('stopped by')]
  if number == signal.SIGKILL or moment == 'starting':
    # Before training begins nothing is there to save: what Python does of itself (1 where Ctrl-C meets an import).
    expected = code in (-number, 128 + number) or (number == signal.SIGINT and code == 1)
  else:
    expected = code == 128 + number and len(stopped) == 1
  if not expected:
    tally.complaints.append(f'{number.name} while {moment}: exit code {code}, {session.lines[-3:]}')
  return True


def bits(workdir: Path) -> dict[str, bytes]:
  """Parameters and their running mean at the end of a run."""
  saved = load_checkpoint(workdir)
  trees = {'step': np.asarray(saved.step), 'raw': saved.params('raw'), 'ema': saved.params('ema')}
  return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree.leaves_with_path(trees)}


def run(folder: Path, kills: int, steps: int, seed: int, minutes: float) -> Tally:
  """Kills so often, in a folder that is empty, and brings the last run to its end."""
  end = time.monotonic() + 60 * minutes
  shards.write(moving_shapes.build(folder / 'data', VIDEOS, frames=16, size=32))
  if code := (alone := Session(folder, folder / 'alone', steps)).wait():
    raise RuntimeError(f'exit code {code}: {alone.lines[-3:]}')
  expected, random_, tally, number = bits(folder / 'alone'), random.Random(seed), Tally(), 0
  reached = 0
  while not (enough := tally.kills.total() >= kills or time.monotonic() > end) or reached:
    workdir = folder / f'killed{number}'
    session = Session(folder, workdir, steps)
    ended = enough or not kill(session, workdir, random_, tally)
    code = session.wait()
    tally.complaints += [line for line in session.lines if 'damaged' in line or ('Traceback' in line and code != 1)]
    if reached and session.resumed:
      tally.lost.append(reached - session.resumed)
    reached = session.step or reached
    if not ended:
      continue
    if code:
      raise RuntimeError(f'exit code {code}: {session.lines[-3:]}')
    found = bits(workdir)
    tally.complaints += [f'{workdir.name}: {name} differs' for name, x in expected.items() if found[name] != x]
    # One that a signal asked for may stand where a regular one does; as many stay, and the best is the best.
    if (len(steps_of(workdir)), read_best(workdir)) != (len(steps_of(folder / 'alone')), read_best(folder / 'alone')):
      tally.complaints.append(f'{workdir.name} keeps others: {steps_of(workdir)}, best {read_best(workdir)}')
    shutil.rmtree(workdir)
    tally.finished, number, reached = tally.finished + 1, number + 1, 0
    print(f'{tally.table()}\n', flush=True)
  return tally


def main(argv: Sequence[str]) -> None:
  """Prints the table."""
  command.no_arguments(argv)
  with tempfile.TemporaryDirectory() as folder:
    tally = run(Path(folder), flags.FLAGS.kills, flags.FLAGS.steps, flags.FLAGS.seed, flags.FLAGS.minutes)
  print(tally.table())
  if tally.complaints:
    sys.exit('\n'.join(tally.complaints))
  print('parameters and running means: the same bits as those of the run nobody killed')


if __name__ == '__main__':
  flags.DEFINE_integer('kills', 100, 'How many.')
  flags.DEFINE_integer('steps', 150, 'Of a run.')
  flags.DEFINE_float('minutes', 60.0, 'After which no more are made.')
  flags.DEFINE_integer('seed', 0, 'Of the moments.')
  command.run(main)
