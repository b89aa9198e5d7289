"""Metric output: metrics.jsonl, TensorBoard events and log lines."""

import contextlib
import json
import math
import os
import socket
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from mevit_jax.errors import UserError
from mevit_jax.files import append_line, read_metrics, write_text, writing
from mevit_jax.parallel.distributed import is_main_process


class MetricWriter:
  """Writes metrics to WORKDIR/metrics.jsonl and as TensorBoard events, on the main process only.

  A killed run may have written metrics of steps after its last checkpoint: metrics after `step` are removed, since a
  resumed run writes them again.

  Raises:
    UserError: a file cannot be written, for example because the disk is full; metrics.jsonl then ends with a full line.
  """

  def __init__(self, workdir: Path, step: int):
    self._path, self._folder = workdir / 'metrics.jsonl', workdir / 'tensorboard'
    lines = [line for line in read_metrics(self._path) if line['step'] <= step]
    self._last = lines[-2:]
    self._is_main = is_main_process()
    if not self._is_main:
      return
    write_text(self._path, ''.join(f'{json.dumps(line)}\n' for line in lines))
    with writing(self._folder):
      self._folder.mkdir(exist_ok=True)
      # Not SummaryWriter: its thread dies on a full disk, and then every write waits for it.
      name = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}'
      self._events = RecordWriter(str(self._folder / name))
    purge = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))  # of later steps
    try:
      self._write_events(Event(file_version='brain.Event:2'), purge)
    except UserError:
      self.close()
      raise

  def write(self, step: int, metrics: dict[str, float], prefix: str) -> None:
    """Writes the metrics of a step under the names 'prefix/name'."""
    if not self._is_main:
      return
    named = {f'{prefix}/{name}': float(value) for name, value in metrics.items()}
    # JSON has no NaN; every parser reads null.
    values = {name: value if math.isfinite(value) else None for name, value in named.items()}
    append_line(self._path, json.dumps({'step': step, **values}))
    finite = {name: value for name, value in named.items() if math.isfinite(value)}
    self._write_events(*(Event(step=step, summary=scalar(name, value)) for name, value in finite.items()))

  def _write_events(self, *events: Event) -> None:
    with writing(self._folder):
      for event in events:
        event.wall_time = time.time()
        self._events.write(event.SerializeToString())
      self._events.flush()

  def has_metrics(self, step: int, prefix: str) -> bool:
    """Returns whether metrics with this prefix were already written at `step`, from which the run resumed."""
    return any(line['step'] == step and any(name.startswith(f'{prefix}/') for name in line) for line in self._last)

  def close(self) -> None:
    """Closes the files; every line is written already."""
    if self._is_main:
      with contextlib.suppress(OSError):  # on a full disk, `write` has reported it
        self._events.close()


class Throughput:
  """Measures training speed, the fraction of time spent waiting for data, and the remaining time.

  Args:
    first: step from which training starts or resumes.
    last: total number of steps.
    steps_per_epoch: steps per epoch.
    batch_size: clips per step.
    classes: number of classes, for the loss and accuracy of guessing beside the model's; 0 leaves these out.
  """

  def __init__(self, first: int, last: int, steps_per_epoch: float, batch_size: int, classes: int = 0):
    self._first, self._last, self._classes = first, last, classes
    self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
    self._step, self._waited, self._paused = first, 0.0, 0.0
    self._start = self._since = time.monotonic()

  def add_wait(self, seconds: float) -> None:
    """Adds time spent waiting for a batch."""
    self._waited += seconds

  def start(self, step: int) -> None:
    """Restarts the measurement after `step`: the time of the first step is mostly compilation."""
    self._first = self._step = step
    self._start = self._since = time.monotonic()
    self._waited = 0.0

  def add_pause(self, seconds: float) -> None:
    """Excludes time that is not training, such as evaluation."""
    self._paused += seconds
    self._since += seconds

  def measure(self, step: int) -> dict[str, float]:
    """Returns clips per second and the fraction of time waiting for data, both since the last call, and the epoch.

    The speed is NaN if the only step is the one that compiled.
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
    """Formats a log line."""
    loss, accuracy = '', ''
    if self._classes:
      loss, accuracy = f' (ln C {math.log(self._classes):.2f})', f' (chance {100 / self._classes:.1f} %)'
    head = (
      f'step {step}/{self._last}  epoch {metrics["epoch"]:.1f}  loss {metrics["loss"]:.4f}{loss}  '
      f'accuracy {100 * metrics["accuracy"]:.1f} %{accuracy}  '
    )
    if metrics['skipped']:
      head += f'skipped {metrics["skipped"]:.0f}  '
    done = step - self._first
    if done == 0:
      return f'{head}(compiled; speed is measured from here on)'
    return (
      f'{head}{metrics["clips_per_second"]:.0f} clips/s  '
      f'data wait {100 * metrics["data_wait"]:.0f} %  ETA {self._format_left(step)}'
    )

  def estimate(self, step: int) -> str:
    """Formats the time that training takes, as the first steps after `start` suggest."""
    seconds = (time.monotonic() - self._start - self._paused) / (step - self._first)
    return (
      f'{seconds:.3g} s per step: the remaining {self._last - step:,} steps take until about '
      f'{self._format_left(step)}, besides evaluations'
    )

  def _format_left(self, step: int) -> str:
    """Formats the time of the end and the duration until then: '14:05 (2.1 h)'."""
    done = step - self._first
    seconds = (time.monotonic() - self._start - self._paused) * (self._last - step) / done
    eta = time.strftime('%H:%M' if seconds < 20 * 3600 else '%a %H:%M', time.localtime(time.time() + seconds))
    return f'{eta} ({_format_duration(seconds)})'


def _format_duration(seconds: float) -> str:
  """Formats a duration in its largest unit."""
  seconds = round(seconds)
  if seconds < 90:
    return f'{seconds} s'
  if seconds < 90 * 60:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'
