"""Cost of decoding a clip: CPU, bytes and fidelity, compared with other decoders.

  python -m benchmarks.decode [VIDEO...] [--clips=20] [--frontier] [--json=FILE]

Every clip is decoded from encoded bytes: 8 frames, `stride` 32, a random crop of each, resized by the same function to
8 x 224 x 224 x 3 uint8. All rows read the same random clips in interleaved order, in one process and one thread. CPU
time is the median per clip; `x decord` is the median over clips of the speed relative to decord on the original (to the
first available row if decord is not installed). PSNR is relative to the original's clips. Before timing, each reader
must return the frames of a plain decoding loop. Frames of a video whose pixels are not square are compared after
scaling them to square ones, which only ours does itself.

Without VIDEO, a synthetic video is used. --frontier adds other encodings at the same resolution. Decoders that are not
installed are listed and skipped (requirements-benchmarks.txt).
"""

import importlib
import io
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from absl import flags

from mevit_jax.cli.command import run
from mevit_jax.config.data import ClipConfig
from mevit_jax.files import write_json
from mevit_jax.video.clips import crop_resize, train_box, train_times
from mevit_jax.video.decode import decode, inspect
from mevit_jax.video.transcode import Encoding, reencode

_CLIPS = flags.DEFINE_integer('clips', 20, 'Random clips per video.', lower_bound=1)
_FRONTIER = flags.DEFINE_bool('frontier', False, 'Also measure other encodings of the video.')
_JSON = flags.DEFINE_string('json', '', 'JSON file to write the results to.')

# (bytes of a file, indices of frames, their times in seconds) -> frames `t h w 3`.
Reader = Callable[[bytes, list[int], np.ndarray], Sequence[np.ndarray]]


@dataclass
class Row:
  """A reader and the encoding that it reads; `error` is the reason for skipping it, or ''."""

  name: str
  read: Reader
  data: bytes
  exact: bool = True  # the original's frames are expected
  error: str = ''
  seconds: list[float] = field(default_factory=list)
  squares: list[float] = field(default_factory=list)


def make_read_ours(num_frames: int) -> Reader:
  """Returns our reader of a video with this number of frames, which a prepared dataset knows."""
  return lambda data, indices, times: decode(data, times, num_frames)


def read_pyav(data: bytes, indices: list[int], times: np.ndarray) -> Sequence[np.ndarray]:
  """Decodes all frames up to the last one requested."""
  frames = {}
  with av.open(io.BytesIO(data)) as container:
    container.streams.video[0].thread_type = 'NONE'
    for index, frame in enumerate(container.decode(video=0)):
      if index in indices:
        frames[index] = frame.to_ndarray(format='rgb24')
      if index == max(indices):
        break
  return [frames[index] for index in indices]


def read_decord(data: bytes, indices: list[int], times: np.ndarray) -> Sequence[np.ndarray]:
  decord = importlib.import_module('decord')
  return decord.VideoReader(io.BytesIO(data), num_threads=1).get_batch(indices).asnumpy()


def read_torchcodec(data: bytes, indices: list[int], times: np.ndarray) -> Sequence[np.ndarray]:
  decoders = importlib.import_module('torchcodec.decoders')
  reader = decoders.VideoDecoder(data, dimension_order='NHWC', num_ffmpeg_threads=1)
  return reader.get_frames_at(indices).data.numpy()


def read_torchcodec_approximate(data: bytes, indices: list[int], times: np.ndarray) -> Sequence[np.ndarray]:
  """Decodes without scanning the file first: an index is then a time at the mean frame rate."""
  decoders = importlib.import_module('torchcodec.decoders')
  reader = decoders.VideoDecoder(data, dimension_order='NHWC', num_ffmpeg_threads=1, seek_mode='approximate')
  return reader.get_frames_at(indices).data.numpy()


def read_opencv(data: bytes, indices: list[int], times: np.ndarray) -> Sequence[np.ndarray]:
  """Grabs frames up to the last one requested, from a temporary file, since OpenCV reads files only."""
  cv2 = importlib.import_module('cv2')
  frames = {}
  with tempfile.NamedTemporaryFile(suffix='.mp4') as file:
    file.write(data)
    file.flush()
    capture = cv2.VideoCapture(file.name, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    for index in range(max(indices) + 1):
      capture.grab()
      if index in indices:
        frames[index] = cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
    capture.release()
  return [frames[index] for index in indices]


READERS = {
  'decord': read_decord,
  'PyAV, a plain loop': read_pyav,
  'torchcodec': read_torchcodec,
  'torchcodec, approximate': read_torchcodec_approximate,
  'OpenCV': read_opencv,
}

# Encodings that were compared: codec, keyframe interval, options.
_PSNR = {'tune': 'psnr', 'preset': 'veryfast', 'crf': '23', 'sc_threshold': '0'}
_PLAIN = _PSNR | {'bf': '0', 'refs': '1'}
_FAST = _PLAIN | {'coder': 'vlc', 'weightp': 'none'}
_PYRAMID = _PSNR | {'b-pyramid': 'normal', 'b_strategy': '0'}
ENCODINGS: dict[str, tuple[str, int, dict[str, str]]] = {
  **{f'h264, every {k}': ('libx264', k, _FAST) for k in (1, 2, 4, 6, 8, 12, 16, 32)},
  **{f'h264, every 6, crf {crf}': ('libx264', 6, _FAST | {'crf': str(crf)}) for crf in (20, 26)},
  **{f'h264, every 6, {p}': ('libx264', 6, _FAST | {'preset': p}) for p in ('superfast', 'fast', 'slow')},
  'h264, every 6, no deblocking': ('libx264', 6, _FAST | {'tune': 'psnr,fastdecode'}),
  'h264, every 6, for the eye': ('libx264', 6, {k: v for k, v in _FAST.items() if k != 'tune'}),
  'h264, every 6, CABAC': ('libx264', 6, _PLAIN),
  'h264, every 12, CABAC': ('libx264', 12, _PLAIN),
  'h264, every 8, B pyramid': ('libx264', 8, _PYRAMID | {'bf': '6'}),
  'h264, every 16, B pyramid': ('libx264', 16, _PYRAMID | {'bf': '14'}),
  'h264, every 16, B pyramid, no CABAC': ('libx264', 16, _PYRAMID | {'bf': '14', 'coder': 'vlc'}),
  'h264, every 32, B pyramid': ('libx264', 32, _PYRAMID | {'bf': '15'}),
  'hevc, every 6': (
    'libx265',
    6,
    {'preset': 'fast', 'tune': 'psnr', 'crf': '23', 'x265-params': 'bframes=0:log-level=none'},
  ),
  'vp9, every 6': ('libvpx-vp9', 6, {'crf': '26', 'b': '0', 'cpu-used': '4', 'lag-in-frames': '0'}),
  'jpeg, q 3': ('mjpeg', 1, {'qmin': '3', 'qmax': '3'}),
  'jpeg, q 8': ('mjpeg', 1, {'qmin': '8', 'qmax': '8'}),
}


def encode(data: bytes, codec: str, keyframes: int, options: dict[str, str]) -> bytes:
  """Transcodes a video at its resolution, keeping its timestamps."""
  file = io.BytesIO()
  with av.open(io.BytesIO(data)) as source, av.open(file, 'w', format='matroska' if codec == 'mjpeg' else 'mp4') as out:
    video = source.streams.video[0]
    stream = out.add_stream(codec, rate=video.average_rate, options=options)
    stream.width, stream.height = video.width // 2 * 2, video.height // 2 * 2
    stream.pix_fmt = 'yuvj420p' if codec == 'mjpeg' else 'yuv420p'
    context = stream.codec_context
    context.gop_size, context.thread_count, context.time_base = keyframes, 1, video.time_base
    if codec == 'mjpeg':
      context.qmin, context.qmax = int(options['qmin']), int(options['qmax'])
    for frame in source.decode(video):
      picture = frame.reformat(stream.width, stream.height, stream.pix_fmt)
      picture = av.VideoFrame.from_ndarray(picture.to_ndarray(), stream.pix_fmt)  # forgets its picture type
      picture.pts, picture.time_base = frame.pts, frame.time_base
      out.mux(stream.encode(picture))
    out.mux(stream.encode())
  return file.getvalue()


def make_video(frames: int = 300, height: int = 256, width: int = 340) -> bytes:
  """Encodes ten seconds of moving, panning, noisy video as H.264 with the default keyframe interval."""
  rng, file = np.random.default_rng(0), io.BytesIO()
  scene = np.zeros((height * 2, width * 2, 3))
  for cell in (4, 16, 64):
    coarse = rng.normal(0, 12 * math.sqrt(cell / 4), (scene.shape[0] // cell + 1, scene.shape[1] // cell + 1, 3))
    scene += coarse.repeat(cell, 0).repeat(cell, 1)[: scene.shape[0], : scene.shape[1]]
  with av.open(file, 'w', format='mp4') as out:
    stream = out.add_stream('libx264', rate=30, options={'crf': '21'})
    stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
    for index in range(frames):
      y, x = (np.array([height, width]) * (0.5 + 0.4 * np.sin(index / np.array([37, 53])))).astype(int)
      picture = scene[y : y + height, x : x + width] + 128 + rng.normal(0, 3, (height, width, 3))
      top, left = index * 3 % (height - 60), index * 5 % (width - 60)
      picture[top : top + 60, left : left + 60] = scene[:60, :60] + 90
      out.mux(stream.encode(av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8))))
    out.mux(stream.encode())
  return file.getvalue()


def make_rows(data: bytes, frontier: bool) -> list[Row]:
  """Lists the readers of the original, ours with our encoding, and with `frontier` ours with other encodings."""
  encoding, read_ours = Encoding('h264'), make_read_ours(inspect(data).num_frames)
  rows = [Row(name, read, data) for name, read in READERS.items()]
  rows.append(Row('ours', read_ours, data))
  rows.append(
    Row(
      f'ours, encoded as h264 (short side {encoding.short_side})', read_ours, reencode(data, encoding)[0], exact=False
    )
  )
  for name, settings in ENCODINGS.items() if frontier else ():
    rows.append(Row(name, read_ours, encode(data, *settings), exact=False))
  return rows


def measure(data: bytes, rows: Sequence[Row], clips: int) -> None:
  """Checks every reader, then times all of them on the same random clips, interleaved."""
  info, config, rng = inspect(data), ClipConfig(), np.random.default_rng(0)
  with av.open(io.BytesIO(data)) as container:
    seconds = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
  starts = np.array(seconds) - seconds[0]
  for clip in range(-1, clips):  # the first clip warms up and is checked
    times = train_times(rng, config, info.duration, info.num_frames)
    indices = np.maximum(np.searchsorted(starts, times + 1e-6, side='right') - 1, 0).tolist()
    box = np.array(train_box(rng, config, info.height, info.width)) / np.tile([info.width, info.height], 2)
    plain = _square(read_pyav(data, indices, times), info.width)
    expected = _clip(plain, box, config.size)
    for row in (row for row in rows if not row.error):
      try:
        if clip < 0:
          _check(row, _square(row.read(row.data, indices, times), info.width), plain)
        start = time.process_time()
        result = _clip(row.read(row.data, indices, times), box, config.size)
        elapsed = time.process_time() - start
      except Exception as error:  # of any library: the others continue
        row.error = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        continue
      if clip >= 0:
        row.seconds.append(elapsed)
        row.squares.append(float(np.mean((result.astype(np.float32) - expected) ** 2)))


def _clip(frames: Sequence[np.ndarray], box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  height, width = frames[0].shape[:2]
  left, top, right, bottom = (box * np.tile([width, height], 2)).tolist()
  return np.stack([crop_resize(frame, (left, top, right, bottom), size) for frame in frames])  # t h w 3


def _square(frames: Sequence[np.ndarray], width: int) -> Sequence[np.ndarray]:
  """Scales frames of the original to the width at which their pixels are square."""
  size = width, frames[0].shape[0]
  return [av.VideoFrame.from_ndarray(frame).to_ndarray(width=size[0], height=size[1]) for frame in frames]


def _check(row: Row, frames: Sequence[np.ndarray], plain: Sequence[np.ndarray]) -> None:
  """Raises a ValueError if a reader of the original returns other frames; rounding of colors may differ."""
  if row.exact:
    gaps = [float(np.abs(a.astype(np.int16) - b).mean()) for a, b in zip(frames, plain, strict=True)]
    if max(gaps) > 3:
      raise ValueError(f'frames differ from those of a plain loop by {max(gaps):.1f} levels')


def figures(rows: Sequence[Row], size: int) -> list[dict[str, Any]]:
  """Returns the results of all rows, as they are printed and written."""
  base = next(row for row in rows if not row.error)
  result = []
  for row in rows:
    if row.error:
      result.append({'name': row.name, 'skipped': row.error})
      continue
    error = float(np.mean(row.squares))
    result.append(
      {
        'name': row.name,
        'bytes': len(row.data) / size,
        'cpu_ms': float(np.median(row.seconds)) * 1e3,
        'clips_per_core_second': 1 / float(np.median(row.seconds)),
        'base': base.name,
        'speedup': float(np.median(np.divide(base.seconds, row.seconds))),
        'psnr': 10 * math.log10(255**2 / error) if error else math.inf,
      }
    )
  return result


def show(name: str, about: str, table: Sequence[dict[str, Any]]) -> None:
  """Prints the results of one video as a table."""
  width = max(len(row['name']) for row in table)
  base = next(row['base'] for row in table if 'base' in row)
  print(f'\n{name}: {about}')
  print(f'{"":{width}}  bytes  CPU ms/clip  clips/s/core  x {base}  PSNR dB')
  for row in table:
    if 'skipped' in row:
      print(f'{row["name"]:{width}}  skipped: {row["skipped"]}')
    else:
      print(
        f'{row["name"]:{width}} {row["bytes"]:5.2f}x {row["cpu_ms"]:12.1f} {row["clips_per_core_second"]:13.1f}'
        f' {row["speedup"]:{len(base) + 3}.2f} {row["psnr"]:8.1f}'
      )


def main(argv: Sequence[str]) -> None:
  """Measures the given videos, or a synthetic one."""
  videos = {name: Path(name).read_bytes() for name in argv[1:]} or {'synthetic': make_video()}
  result = {}
  for name, data in videos.items():
    info = inspect(data)
    rows = make_rows(data, _FRONTIER.value)
    measure(data, rows, _CLIPS.value)
    about = f'{info.width}x{info.height}, {info.num_frames} frames, {info.codec}, {len(data)} bytes'
    result[name] = figures(rows, len(data))
    show(name, about, result[name])
  if _JSON.value:
    write_json(_JSON.value, result)


if __name__ == '__main__':
  run(main)
