"""How fast batches come, from threads and from worker processes, and whether memory stays flat.

  python -m benchmarks.pipeline                                  # a video made here, 340x256, 280 frames
  python -m benchmarks.pipeline clip.mp4 other.mp4 --workers 0 1 2 4 --repeats 1 2
  python -m benchmarks.pipeline --data_dir=data --dataset=mine   # a prepared dataset's training split
  python -m benchmarks.pipeline --memory                         # resident memory over 10,000 small clips

Each setting is measured in every round, one after the other, and its median is shown. Beside the time on the clock
stands CPU time, of this process and of all workers: where others use the machine, that is the figure to read.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

from mevit_jax.data import datasets, pipeline, video
from mevit_jax.data.clips import ClipConfig


@dataclass(frozen=True)
class Files:
  """Video files as a dataset, each of them again and again."""

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
  """An H.264 file of a textured picture that drifts, with some noise: about as hard to decode as a real one."""
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
  """This process and its children."""
  return [psutil.Process(), *psutil.Process().children(recursive=True)]


def cpu_seconds() -> float:
  """CPU time of this process and of its children that live."""
  return sum(sum(process.cpu_times()[:2]) for process in processes())


def measure(source: pipeline.Source, clip: ClipConfig, workers: int, repeats: int, batch: int, steps: int) -> dict:
  """One run: seconds until the first batch, then clips a second and CPU time over `steps` batches."""
  begin = time.monotonic()
  batches = pipeline.train_batches(source, clip, batch_size=batch, seed=0, repeats=repeats, workers=workers)
  with contextlib.closing(batches):
    next(batches)
    first = time.monotonic() - begin
    for _ in range(2 * max(workers, 1)):  # what was made ahead does not count
      next(batches)
    start, cpu = time.monotonic(), cpu_seconds()
    for _ in range(steps):
      next(batches)
    seconds, cpu = time.monotonic() - start, cpu_seconds() - cpu
  clips = steps * batch
  return {'first_batch_s': first, 'clips_per_s': clips / seconds, 'cpu_ms_per_clip': 1000 * cpu / clips}


def speed(source: pipeline.Source, clip: ClipConfig, options: argparse.Namespace) -> list[dict]:
  """A row a setting: medians over rounds."""
  settings = [(workers, repeats) for repeats in options.repeats for workers in options.workers]
  runs: dict[tuple[int, int], list[dict]] = {setting: [] for setting in settings}
  for _ in range(options.rounds):
    for setting in settings:
      runs[setting].append(measure(source, clip, *setting, options.batch_size, options.steps))
  rows = []
  print(f'{"workers":>8} {"repeats":>8} {"clips/s":>9} {"x one":>6} {"CPU ms/clip":>12} {"first batch s":>14}')
  for workers, repeats in settings:
    medians = {name: statistics.median(run[name] for run in runs[workers, repeats]) for name in runs[settings[0]][0]}
    one = runs.get((1, repeats))
    pairs = zip(runs[workers, repeats], one, strict=True) if one else ()
    ratio = statistics.median([a['clips_per_s'] / b['clips_per_s'] for a, b in pairs] or [float('nan')])
    rows.append({'workers': workers, 'repeats': repeats, 'times_one_worker': ratio, **medians})
    print(
      f'{workers or "threads":>8} {repeats:8} {medians["clips_per_s"]:9.1f} {ratio:6.2f} '
      f'{medians["cpu_ms_per_clip"]:12.1f} {medians["first_batch_s"]:14.1f}'
    )
  return rows


def memory(source: pipeline.Source, clip: ClipConfig, options: argparse.Namespace) -> list[dict]:
  """A row each tenth of the clips: resident memory of this process and of its workers."""
  rows, workers, batch = [], options.workers[-1], options.batch_size
  print(f'{"clips":>8} {"this process MiB":>17} {"workers MiB":>12}   ({workers or "no"} worker processes)')
  batches = pipeline.train_batches(source, clip, batch_size=batch, seed=0, repeats=options.repeats[0], workers=workers)
  with contextlib.closing(batches):
    for step in range(1, options.clips // batch + 1):
      next(batches)
      if step % max(1, options.clips // batch // 10) == 0:
        resident = [process.memory_info().rss / 2**20 for process in processes()]
        rows.append({'clips': step * batch, 'parent_mib': resident[0], 'workers_mib': sum(resident[1:])})
        print(f'{step * batch:8} {resident[0]:17.0f} {sum(resident[1:]):12.0f}', flush=True)
  return rows


def main() -> None:
  """Reads the arguments, measures, prints."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('videos', nargs='*', type=Path, help='files to read instead of one made here')
  parser.add_argument('--data_dir', default='data', help='of prepared datasets')
  parser.add_argument('--dataset', help='a prepared dataset to read instead')
  parser.add_argument('--workers', nargs='+', type=int, default=[0, 1, 2, 4], help='0: threads of this process')
  parser.add_argument('--repeats', nargs='+', type=int, default=[1], help='clips a video that is drawn gives')
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--frames', type=int, default=8)
  parser.add_argument('--stride', type=int, default=32)
  parser.add_argument('--size', type=int, help='of a clip, in pixels: 224, and 32 for --memory')
  parser.add_argument('--steps', type=int, default=12, help='batches that are timed')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--memory', action='store_true', help='memory over time, with the last of --workers')
  parser.add_argument('--clips', type=int, default=10_000, help='for --memory')
  parser.add_argument('--json', type=Path, help='where to write the figures too')
  options = parser.parse_args()
  size = options.size or (32 if options.memory else 224)
  clip = ClipConfig(options.frames, (size, size), stride=options.stride, short_side=(size * 8 // 7, size * 10 // 7))
  if options.dataset:
    source: pipeline.Source = datasets.open_split(options.data_dir, options.dataset, 'train').source
  else:
    files = [path.read_bytes() for path in options.videos]
    files = files or [make_video(48, 64, 60) if options.memory else make_video(256, 340, 280)]
    source = Files(tuple((data, video.inspect(data)) for data in files))
  print(
    f'{options.frames} frames, stride {options.stride}, {size}x{size} uint8; batches of {options.batch_size}; '
    f'{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}'
  )
  rows = memory(source, clip, options) if options.memory else speed(source, clip, options)
  if options.json:
    options.json.write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
  main()
