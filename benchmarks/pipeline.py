"""Speed of the data pipeline with threads and with worker processes, and its memory over time.

  python -m benchmarks.pipeline                                  # a synthetic video, 340x256, 280 frames
  python -m benchmarks.pipeline clip.mp4 other.mp4 --workers=0,1,2,4 --repeats=1,2
  python -m benchmarks.pipeline --data_dir=data --dataset=mine   # a prepared dataset's training split
  python -m benchmarks.pipeline --memory                         # resident memory over 10,000 small clips

Each setting is measured in every round, one after the other; the table shows medians. CPU time includes all workers and
is the number to compare on a shared machine.
"""

import contextlib
import io
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
from absl import flags

from mevit_jax.cli.command import run
from mevit_jax.config.data import ClipConfig
from mevit_jax.data import pipeline
from mevit_jax.data.sampling import Sampling
from mevit_jax.datasets import reader as datasets
from mevit_jax.files import write_json
from mevit_jax.video import decode as video

_DATA_DIR = flags.DEFINE_string('data_dir', 'data', 'Folder of prepared datasets.')
_DATASET = flags.DEFINE_string('dataset', '', 'Prepared dataset to read instead of files.')
_WORKERS = flags.DEFINE_list('workers', '0,1,2,4', 'Numbers of worker processes; 0 uses threads of this process.')
_REPEATS = flags.DEFINE_list('repeats', '1', 'Clips per decoded video (data.repeated_augmentation).')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'Clips per batch.', lower_bound=1)
_FRAMES = flags.DEFINE_integer('frames', 8, 'Frames per clip.', lower_bound=1)
_STRIDE = flags.DEFINE_integer('stride', 32, 'Distance between two frames of a clip.', lower_bound=1)
_SIZE = flags.DEFINE_integer('size', 0, 'Side length of a clip in pixels; 0 is 224, or 32 with --memory.')
_STEPS = flags.DEFINE_integer('steps', 12, 'Timed batches.', lower_bound=1)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Timed rounds.', lower_bound=1)
_MEMORY = flags.DEFINE_bool('memory', False, 'Measure memory over time, with the last of --workers.')
_CLIPS = flags.DEFINE_integer('clips', 10_000, 'Number of clips with --memory.')
_JSON = flags.DEFINE_string('json', '', 'JSON file to write the results to.')


@dataclass(frozen=True)
class Files:
  """A dataset that repeats some video files."""

  files: tuple[tuple[bytes, video.VideoInfo], ...]
  length: int = 1000

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> dict[str, Any]:
    data, info = self.files[index % len(self.files)]
    return {
      'video': data,
      'label': 0,
      'id': f'video{index % len(self.files)}',
      'num_frames': info.num_frames,
      'duration': info.duration,
    }


def make_video(height: int, width: int, frames: int) -> bytes:
  """Encodes a drifting texture with noise as H.264, about as expensive to decode as a real video."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 255, (height // 8, 2 * width // 8, 3), np.uint8)
  texture = coarse.repeat(8, 0).repeat(8, 1).astype(np.int16)  # h 2w 3
  file = io.BytesIO()
  with av.open(file, 'w', format='mp4') as output:
    stream = output.add_stream('libx264', rate=28, options={'crf': '26'})
    stream.height, stream.width, stream.pix_fmt = texture.shape[0], width, 'yuv420p'
    for index in range(frames):
      at = index % width
      noisy = texture[:, at : at + width] + rng.integers(-12, 12, (texture.shape[0], width, 1), np.int16)
      output.mux(stream.encode(av.VideoFrame.from_ndarray(noisy.clip(0, 255).astype(np.uint8))))
    output.mux(stream.encode())
  return file.getvalue()


def processes() -> list[psutil.Process]:
  """Returns this process and its children."""
  return [psutil.Process(), *psutil.Process().children(recursive=True)]


def cpu_seconds() -> float:
  """Returns the CPU time of this process and of its running children."""
  return sum(sum(process.cpu_times()[:2]) for process in processes())


def measure(source: pipeline.Source, clip: ClipConfig, workers: int, repeats: int, batch: int, steps: int) -> dict:
  """Measures the time to the first batch, then clips per second and CPU time over `steps` batches."""
  begin = time.monotonic()
  batches = pipeline.train_batches(source, clip, Sampling(repeats=repeats), batch_size=batch, workers=workers)
  with contextlib.closing(batches):
    next(batches)
    first = time.monotonic() - begin
    for _ in range(2 * max(workers, 1)):  # prefetched batches do not count
      next(batches)
    start, cpu = time.monotonic(), cpu_seconds()
    for _ in range(steps):
      next(batches)
    seconds, cpu = time.monotonic() - start, cpu_seconds() - cpu
  clips = steps * batch
  return {'first_batch_s': first, 'clips_per_s': clips / seconds, 'cpu_ms_per_clip': 1000 * cpu / clips}


def speed(source: pipeline.Source, clip: ClipConfig) -> list[dict]:
  """Measures every setting; returns a row of medians for each."""
  settings = [(int(workers), int(repeats)) for repeats in _REPEATS.value for workers in _WORKERS.value]
  runs: dict[tuple[int, int], list[dict]] = {setting: [] for setting in settings}
  for _ in range(_ROUNDS.value):
    for setting in settings:
      runs[setting].append(measure(source, clip, *setting, _BATCH_SIZE.value, _STEPS.value))
  rows = []
  print(f'{"workers":>8} {"repeats":>8} {"clips/s":>9} {"speedup":>7} {"CPU ms/clip":>12} {"first batch s":>14}')
  for workers, repeats in settings:
    medians = {name: statistics.median(run[name] for run in runs[workers, repeats]) for name in runs[settings[0]][0]}
    single = runs.get((1, repeats))
    pairs = zip(runs[workers, repeats], single, strict=True) if single else ()
    ratio = statistics.median([a['clips_per_s'] / b['clips_per_s'] for a, b in pairs] or [float('nan')])
    rows.append({'workers': workers, 'repeats': repeats, 'speedup_over_one_worker': ratio, **medians})
    print(
      f'{workers or "threads":>8} {repeats:8} {medians["clips_per_s"]:9.1f} {ratio:7.2f} '
      f'{medians["cpu_ms_per_clip"]:12.1f} {medians["first_batch_s"]:14.1f}'
    )
  return rows


def memory(source: pipeline.Source, clip: ClipConfig) -> list[dict]:
  """Measures resident memory of this process and of its workers; returns a row per tenth of the clips."""
  rows, workers, batch, count = [], int(_WORKERS.value[-1]), _BATCH_SIZE.value, _CLIPS.value
  repeats = int(_REPEATS.value[0])
  print(f'{"clips":>8} {"this process MiB":>17} {"workers MiB":>12}   ({workers or "no"} worker processes)')
  batches = pipeline.train_batches(source, clip, Sampling(repeats=repeats), batch_size=batch, workers=workers)
  with contextlib.closing(batches):
    for step in range(1, count // batch + 1):
      next(batches)
      if step % max(1, count // batch // 10) == 0:
        resident = [process.memory_info().rss / 2**20 for process in processes()]
        rows.append({'clips': step * batch, 'parent_mib': resident[0], 'workers_mib': sum(resident[1:])})
        print(f'{step * batch:8} {resident[0]:17.0f} {sum(resident[1:]):12.0f}', flush=True)
  return rows


def main(argv: Sequence[str]) -> None:
  """Measures and prints a table."""
  size = _SIZE.value or (32 if _MEMORY.value else 224)
  clip = ClipConfig(_FRAMES.value, (size, size), stride=_STRIDE.value, short_side=(size * 8 // 7, size * 10 // 7))
  source: pipeline.Source
  if _DATASET.value:
    source = datasets.open_split(_DATA_DIR.value, _DATASET.value, 'train').source
  else:
    files = [Path(path).read_bytes() for path in argv[1:]]
    files = files or [make_video(48, 64, 60) if _MEMORY.value else make_video(256, 340, 280)]
    source = Files(tuple((data, video.inspect(data)) for data in files))
  print(
    f'{clip.frames} frames, stride {clip.stride}, {size}x{size} uint8; batches of {_BATCH_SIZE.value}; '
    f'{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}'
  )
  rows = memory(source, clip) if _MEMORY.value else speed(source, clip)
  if _JSON.value:
    write_json(_JSON.value, rows)


if __name__ == '__main__':
  run(main)
