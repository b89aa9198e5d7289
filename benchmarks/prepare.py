"""How fast videos are prepared, how that grows with processes, and how much memory it takes.

  python -m benchmarks.prepare                                      videos/s, one process against two
  python -m benchmarks.prepare --video=FILE.mp4 --videos=200        of copies of that file
  python -m benchmarks.prepare --gigabytes=3 --videos=1000 --workers=2 --repeats=1      memory
  python -m benchmarks.prepare --encoding=h264                      encoded again

Files are copies of one video that differ in a box of padding behind it, so that no two have the same
bytes. Each run is the whole command, from nothing, in processes of its own; the runs with different
numbers of workers take turns. The peer decodes the same files in a plain PyAV loop and writes nothing.
CPU is of all processes: it tells what a quiet machine would do, whoever else works on this one.
"""

import dataclasses
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import psutil
from absl import flags

from mevit_jax.cli import command

VIDEO = flags.DEFINE_string('video', None, 'An mp4 file; if not given one is made: 300 frames of 340x256.')
VIDEOS = flags.DEFINE_integer('videos', 100, 'How many files.', lower_bound=4)
GIGABYTES = flags.DEFINE_float('gigabytes', 0, 'Pad the files until they are this much together; 0: as they are.')
WORKERS = flags.DEFINE_list('workers', ['1', '2'], 'Numbers of processes to compare.')
REPEATS = flags.DEFINE_integer('repeats', 3, 'How often; medians are told.', lower_bound=1)
ENCODING = flags.DEFINE_string('encoding', 'keep', 'As of the command prepare.')
FOLDER = flags.DEFINE_string(
  'folder', None, 'Where files and datasets are made, and removed; a temporary one if not given.'
)
JSON = flags.DEFINE_string('json', None, 'Write the figures to this file too.')

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Run:
  """Of one command: seconds on the clock and of CPU, and the peaks of memory in MB."""

  seconds: float
  cpu: float
  parent: float
  worker: float
  together: float


def make_video() -> bytes:
  """300 frames of a moving ramp and noise: about as many bytes as a Kinetics clip has."""
  rng, file = np.random.default_rng(0), io.BytesIO()
  noise = rng.integers(0, 40, (256 + 300, 340, 3), np.uint8)
  ramp = (np.arange(340)[None, :, None] // 2).astype(np.uint8)
  with av.open(file, 'w', format='mp4') as output:
    stream = output.add_stream('libx264', rate=30, options={'crf': '28', 'preset': 'veryfast'})
    stream.height, stream.width, stream.pix_fmt = 256, 340, 'yuv420p'
    for i in range(300):
      output.mux(stream.encode(av.VideoFrame.from_ndarray(noise[i : i + 256] + ramp, format='rgb24')))
    output.mux(stream.encode())
  return file.getvalue()


def make_files(folder: Path, data: bytes) -> int:
  """Copies of a video, each with other bytes behind it, and a list of them; returns how many bytes they are."""
  wanted = int(GIGABYTES.value * 1e9 / VIDEOS.value)
  rows = ['path,label,split']
  for i in range(VIDEOS.value):
    padding = i.to_bytes(8, 'big') + bytes(max(0, wanted - len(data) - 16))
    box = (8 + len(padding)).to_bytes(4, 'big') + b'free' + padding
    (folder / f'{i}.mp4').write_bytes(data + box)
    rows.append(f'{i}.mp4,class {i % 2},{"validation" if i % 10 < 2 else "train"}')
  (folder / 'list.csv').write_text('\n'.join(rows))
  return sum(path.stat().st_size for path in folder.glob('*.mp4'))


def peer(folder: Path) -> float:
  """CPU seconds a video of a plain loop over frames."""
  paths = sorted(folder.glob('*.mp4'))[:20]
  before = time.process_time()
  for path in paths:
    with av.open(str(path)) as container:
      container.streams.video[0].thread_type = 'NONE'
      assert sum(1 for _ in container.decode(video=0))
  return (time.process_time() - before) / len(paths)


def prepare(folder: Path, workers: str) -> Run:
  """One whole command."""
  arguments = [sys.executable, '-m', 'mevit_jax', 'prepare', 'video_folder', folder / 'list.csv', '--name=copies']
  arguments += [f'--data_dir={folder / "data"}', f'--workers={workers}', f'--encoding={ENCODING.value}']
  began = time.monotonic()
  peaks: dict[int, float] = {}
  together = 0.0
  with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
    parent = psutil.Process(process.pid)
    # Not waited for: what a process used is known as long as it is not.
    while parent.status() != psutil.STATUS_ZOMBIE:
      now = {}
      for each in (parent, *children(parent)):
        now[each.pid] = memory(each.pid)
        peaks[each.pid] = max(peaks.get(each.pid, 0), now[each.pid])
      together = max(together, sum(now.values()))
      time.sleep(0.1)
    seconds = time.monotonic() - began
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    sys.exit('error: the command failed')
  shutil.rmtree(folder / 'data')
  worker = max(peak for pid, peak in peaks.items() if pid != process.pid)
  return Run(seconds, usage.ru_utime + usage.ru_stime, peaks[process.pid], worker, together)


def children(process: psutil.Process) -> list[psutil.Process]:
  try:
    return process.children(recursive=True)
  except psutil.NoSuchProcess:
    return []


def memory(pid: int) -> float:
  """MB that a process holds; 0 if it has just ended."""
  try:
    return psutil.Process(pid).memory_info().rss / 1e6
  except psutil.NoSuchProcess:
    return 0.0


def main(argv: Sequence[str]) -> None:
  command.no_arguments(argv)
  folder = Path(tempfile.mkdtemp(dir=FOLDER.value))
  try:
    data = Path(VIDEO.value).read_bytes() if VIDEO.value else make_video()
    size = make_files(folder, data)
    print(
      f'{VIDEOS.value} files of {size / VIDEOS.value / 1e6:.2f} MB, {size / 1e9:.2f} GB; encoding: {ENCODING.value}'
    )
    print(
      f'{"workers":>8}{"seconds":>9}{"videos/s":>10}{"CPU ms/video":>14}{"parent MB":>11}{"worker MB":>11}{"all MB":>8}'
    )
    runs: dict[str, list[Run]] = {workers: [] for workers in WORKERS.value}
    loop = []
    for _ in range(REPEATS.value):
      loop.append(peer(folder))
      for workers in runs:
        run = prepare(folder, workers)
        runs[workers].append(run)
        print(
          f'{workers:>8}{run.seconds:9.1f}{VIDEOS.value / run.seconds:10.1f}{1e3 * run.cpu / VIDEOS.value:14.1f}'
          f'{run.parent:11.0f}{run.worker:11.0f}{run.together:8.0f}',
          flush=True,
        )
    plain = statistics.median(loop)
    print(f'a PyAV loop: {1e3 * plain:.1f} ms of CPU a video')
    figures = {'videos': VIDEOS.value, 'bytes': size, 'encoding': ENCODING.value, 'loop_cpu': plain}
    first = next(iter(runs))
    for workers, each in runs.items():
      cpu = statistics.median(run.cpu for run in each) / VIDEOS.value
      ratio = statistics.median(one.seconds / many.seconds for one, many in zip(runs[first], each, strict=True))
      print(
        f'{workers} workers: {ratio:.2f} x as fast as {first}, CPU {cpu / plain:.2f} x the loop; medians of {len(each)}'
      )
      figures[workers] = {'speed_up': ratio, 'runs': [dataclasses.asdict(run) for run in each]}
    if JSON.value:
      Path(JSON.value).write_text(json.dumps(figures, indent=2) + '\n')
  finally:
    shutil.rmtree(folder)


if __name__ == '__main__':
  command.run(main)
