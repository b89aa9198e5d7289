"""Where metrics go: metrics.jsonl, TensorBoard events, and a line of progress."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import tensorboardX

from mevit_jax.parallel.distributed import is_main_process


class Writer:
  """Writes metrics to WORKDIR/metrics.jsonl and as TensorBoard events.

  Of many hosts the first one writes. A run that was killed may have written more than it saved: what stands after
  `step` is taken back, since it is written again.
  """

  def __init__(self, workdir: Path, step: int):
    path = workdir / 'metrics.jsonl'
    kept = [line for line in _whole_lines(path) if line['step'] <= step]
    self._last = kept[-2:]
    self._writes = is_main_process()
    if not self._writes:
      return
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(f'{json.dumps(line)}\n' for line in kept))
    temporary.rename(path)
    self._file = path.open('a')
    self._events = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1)

  def write(self, step: int, metrics: dict[str, float], prefix: str) -> None:
    """Writes the metrics of a step, named 'prefix/name'."""
    if not self._writes:
      return
    named = {f'{prefix}/{name}': float(value) for name, value in metrics.items()}
    # JSON has no NaN: null is what every reader takes.
    plain = {name: value if math.isfinite(value) else None for name, value in named.items()}
    self._file.write(json.dumps({'step': step, **plain}) + '\n')
    self._file.flush()
    for name, value in named.items():
      self._events.add_scalar(name, value, step)
    self._events.flush()

  def has(self, step: int, prefix: str) -> bool:
    """Whether the run that was killed had written metrics of this name, at the step that this one goes on from."""
    return any(line['step'] == step and any(name.startswith(f'{prefix}/') for name in line) for line in self._last)

  def close(self) -> None:
    """Ends both files."""
    if self._writes:
      self._file.close()
      self._events.close()


class Progress:
  """Says where training is: speed, share of time spent waiting for data, and when it will be done.

  Args:
    first: the step that training goes on from.
    last: the number of steps in all.
    steps_per_epoch: steps of one pass over the data.
    batch_size: clips of a step.
  """

  def __init__(self, first: int, last: int, steps_per_epoch: float, batch_size: int):
    self._first, self._last = first, last
    self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
    self._step, self._waited, self._apart = first, 0.0, 0.0
    self._start = self._since = time.monotonic()

  def waited(self, seconds: float) -> None:
    """Counts time spent waiting for a batch."""
    self._waited += seconds

  def begin(self, step: int) -> None:
    """Counts from here on: what took the steps until now was mostly compilation."""
    self._first = self._step = step
    self._start = self._since = time.monotonic()
    self._waited = 0.0

  def apart(self, seconds: float) -> None:
    """Counts time that is not training: evaluation."""
    self._apart += seconds
    self._since += seconds

  def measure(self, step: int) -> dict[str, float]:
    """Speed since the last call, in clips a second, and the share of that time spent waiting for data.

    There is no speed, but a NaN, where the only step is the one that compiled.
    """
    now = time.monotonic()
    elapsed = max(now - self._since, 1e-9)
    speed = {
      'clips_per_second': (step - self._step) * self._batch_size / elapsed if step > self._step else math.nan,
      'data_wait': min(1.0, self._waited / elapsed),
      'epoch': step / self._steps_per_epoch,
    }
    self._since, self._step, self._waited = now, step, 0.0
    return speed

  def line(self, step: int, metrics: dict[str, float]) -> str:
    """One line for people."""
    head = (
      f'step {step}/{self._last}  epoch {metrics["epoch"]:.1f}  loss {metrics["loss"]:.4f}  '
      f'accuracy {100 * metrics["accuracy"]:.1f} %  '
    )
    if metrics['skipped']:
      head += f'dropped {metrics["skipped"]:.0f}  '
    done = step - self._first
    if done == 0:
      return f'{head}(compiled: speed comes with the next line)'
    seconds = (time.monotonic() - self._start - self._apart) * (self._last - step) / done
    at = time.strftime('%H:%M' if seconds < 20 * 3600 else '%a %H:%M', time.localtime(time.time() + seconds))
    return (
      f'{head}{metrics["clips_per_second"]:.0f} clips/s  '
      f'waited for data {100 * metrics["data_wait"]:.0f} %  done at {at} (in {_duration(seconds)})'
    )


def _duration(seconds: float) -> str:
  seconds = round(seconds)
  if seconds < 90:
    return f'{seconds} s'
  if seconds < 90 * 60:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'


def _whole_lines(path: Path) -> Iterator[dict]:
  """The lines that were written to the end: the last one may have been cut."""
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(json.JSONDecodeError):
      yield json.loads(line)
