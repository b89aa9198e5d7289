"""Speed, scaling and memory of dataset preparation.

  python -m benchmarks.prepare                                      videos/s, one process against two
  python -m benchmarks.prepare --video=FILE.mp4 --videos=200        copies of that file
  python -m benchmarks.prepare --gigabytes=3 --videos=1000 --workers=2 --repeats=1      memory
  python -m benchmarks.prepare --encoding=h264                      transcoded

Files are copies of one video with different padding appended, so that no two are identical. Each run is the complete
command in new processes; runs with different numbers of workers are interleaved. The baseline decodes the same files in
a plain PyAV loop and writes nothing. CPU time includes all processes and is the number to compare on a shared machine.
"""

import dataclasses
import io
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
from mevit_jax.files import write_json

VIDEO = flags.DEFINE_string('video', None, 'An mp4 file; by default a synthetic one: 300 frames of 340x256.')
VIDEOS = flags.DEFINE_integer('videos', 100, 'Number of files.', lower_bound=4)
GIGABYTES = flags.DEFINE_float('gigabytes', 0, 'Pad the files to this total size; 0 keeps them.')
WORKERS = flags.DEFINE_list('workers', ['1', '2'], 'Numbers of processes to compare.')
REPEATS = flags.DEFINE_integer('repeats', 3, 'Rounds; the table shows medians.', lower_bound=1)
ENCODING = flags.DEFINE_string('encoding', 'keep', '--encoding of mevit prepare.')
FOLDER = flags.DEFINE_string('folder', None, "Folder for temporary files; by default the system's.")
JSON = flags.DEFINE_string('json', None, 'JSON file to write the results to.')

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Run:
  """Measurements of one command: wall-clock and CPU seconds, peak memory in MB."""

  seconds: float
  cpu: float
  parent: float
  worker: float
  together: float


def make_video() -> bytes:
  """Encodes 300 frames of a ramp with moving noise, about the size of a Kinetics clip."""
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
  """Writes copies of a video with different padding, and a CSV of them; returns their total size in bytes."""
  expected = int(GIGABYTES.value * 1e9 / VIDEOS.value)
  rows = ['path,label,split']
  for i in range(VIDEOS.value):
    padding = i.to_bytes(8, 'big') + bytes(max(0, expected - len(data) - 16))
    box = (8 + len(padding)).to_bytes(4, 'big') + b'free' + padding
    (folder / f'{i}.mp4').write_bytes(data + box)
    rows.append(f'{i}.mp4,class {i % 2},{"validation" if i % 10 < 2 else "train"}')
  (folder / 'list.csv').write_text('\n'.join(rows))
  return sum(path.stat().st_size for path in folder.glob('*.mp4'))


def plain_loop(folder: Path) -> float:
  """Measures the CPU seconds per video of a plain decoding loop."""
  paths = sorted(folder.glob('*.mp4'))[:20]
  before = time.process_time()
  for path in paths:
    with av.open(str(path)) as container:
      container.streams.video[0].thread_type = 'NONE'
      assert sum(1 for _ in container.decode(video=0))
  return (time.process_time() - before) / len(paths)


def prepare(folder: Path, workers: str) -> Run:
  """Runs the command and measures it."""
  arguments = [sys.executable, '-m', 'mevit_jax', 'prepare', 'video_folder', folder / 'list.csv', '--name=copies']
  arguments += [f'--data_dir={folder / "data"}', f'--workers={workers}', f'--encoding={ENCODING.value}']
  began = time.monotonic()
  peaks: dict[int, float] = {}
  together = 0.0
  with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
    parent = psutil.Process(process.pid)
    # As a zombie, the process can still be asked for its resource usage.
    while parent.status() != psutil.STATUS_ZOMBIE:
      now = {}
      for child in (parent, *children(parent)):
        now[child.pid] = memory(child.pid)
        peaks[child.pid] = max(peaks.get(child.pid, 0), now[child.pid])
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
  """Returns the descendants of a process; none if it has just ended."""
  try:
    return process.children(recursive=True)
  except psutil.NoSuchProcess:
    return []


def memory(pid: int) -> float:
  """Returns the resident memory of a process in MB; 0 if it has just ended."""
  try:
    return psutil.Process(pid).memory_info().rss / 1e6
  except psutil.NoSuchProcess:
    return 0.0


def main(argv: Sequence[str]) -> None:
  """Runs the command with every number of workers and prints a table."""
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
      loop.append(plain_loop(folder))
      for workers in runs:
        run = prepare(folder, workers)
        runs[workers].append(run)
        print(
          f'{workers:>8}{run.seconds:9.1f}{VIDEOS.value / run.seconds:10.1f}{1e3 * run.cpu / VIDEOS.value:14.1f}'
          f'{run.parent:11.0f}{run.worker:11.0f}{run.together:8.0f}',
          flush=True,
        )
    plain = statistics.median(loop)
    print(f'a PyAV loop: {1e3 * plain:.1f} ms of CPU per video')
    figures = {'videos': VIDEOS.value, 'bytes': size, 'encoding': ENCODING.value, 'loop_cpu': plain}
    first = next(iter(runs))
    for workers, worker_runs in runs.items():
      cpu = statistics.median(run.cpu for run in worker_runs) / VIDEOS.value
      pairs = zip(runs[first], worker_runs, strict=True)
      ratio = statistics.median(single.seconds / many.seconds for single, many in pairs)
      print(
        f'{workers} workers: {ratio:.2f} x the speed of {first}, CPU {cpu / plain:.2f} x the loop; '
        f'medians of {len(worker_runs)}'
      )
      figures[workers] = {'speed_up': ratio, 'runs': [dataclasses.asdict(run) for run in worker_runs]}
    if JSON.value:
      write_json(JSON.value, figures)
  finally:
    shutil.rmtree(folder)


if __name__ == '__main__':
  command.run(main)
