"""A generator of videos with numbered frames: codecs x containers x what recorders, cutters and joiners do to files."""

import contextlib
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from tests.helpers.videos import decode_all, make_video, picture

FRAMES, RATE, GOP = 40, 25, 10
_X265 = f'log-level=none:keyint={GOP}:min-keyint={GOP}:scenecut=0'
_PYRAMID = {'bf': '3', 'b-pyramid': 'normal', 'refs': '4', 'sc_threshold': '0'}

CODECS: dict[str, dict[str, Any]] = {
  'h264': {'codec': 'libx264', 'options': {'bf': '0'}},
  'h264 B pyramid': {'codec': 'libx264', 'options': _PYRAMID},
  'h264 open GOP': {'codec': 'libx264', 'options': _PYRAMID | {'x264-params': 'open-gop=1'}},
  'h264 intra refresh': {'codec': 'libx264', 'options': {'bf': '0', 'x264-params': f'intra-refresh=1:keyint={GOP}'}},
  'h264 one keyframe': {'codec': 'libx264', 'options': {'bf': '0'}, 'keyframes': 1000},
  'h264 interlaced': {'codec': 'libx264', 'options': {'x264-params': 'interlaced=1:bframes=2'}},
  'hevc': {'codec': 'libx265', 'options': {'x265-params': f'{_X265}:bframes=3:open-gop=0'}},
  'hevc open GOP': {'codec': 'libx265', 'options': {'x265-params': f'{_X265}:bframes=3:open-gop=1'}},
  'vp8': {'codec': 'libvpx', 'options': {'auto-alt-ref': '1', 'lag-in-frames': '8'}},
  'vp9': {'codec': 'libvpx-vp9', 'options': {'lag-in-frames': '8', 'cpu-used': '8', 'row-mt': '0'}},
  'mpeg4': {'codec': 'mpeg4', 'options': {'bf': '2'}},
  'mpeg2': {'codec': 'mpeg2video', 'options': {'bf': '2'}},
  'mjpeg': {'codec': 'mjpeg', 'pixels': 'yuvj420p'},
}
_OPTIONS = {'fragmented': {'movflags': 'frag_keyframe+empty_moov'}}
CONTAINERS: dict[str, tuple[str, ...]] = {  # and the codecs that they hold, by prefix
  'mp4': ('h264', 'hevc', 'vp9', 'mpeg4', 'mpeg2', 'mjpeg'),
  'fragmented': ('h264', 'hevc', 'vp9', 'mpeg4'),
  'mov': ('h264', 'hevc', 'mpeg4', 'mpeg2', 'mjpeg'),
  'matroska': ('h264', 'hevc', 'vp8', 'vp9', 'mpeg4', 'mpeg2', 'mjpeg'),
  'webm': ('vp8', 'vp9'),
  'avi': ('h264', 'mpeg4', 'mjpeg'),
  'flv': ('h264', 'hevc'),
  'mpegts': ('h264', 'hevc', 'mpeg2'),
  'vob': ('mpeg2',),
  'nut': ('h264', 'hevc', 'vp8', 'mpeg4', 'mpeg2', 'mjpeg'),
}
STORE_DISPLAY_TIMES = ('mp4', 'fragmented', 'mov', 'matroska', 'webm', 'flv', 'nut')


@dataclass(frozen=True)
class Generated:
  """A file, and what decoding it whole gives.

  Attributes:
    data: the file.
    frames: its frames by a plain PyAV loop, RGB uint8 `h w 3` each, in display orientation.
    times: display time of each frame in seconds, from 0.
    defined: number of the first frame whose content is defined: references of those before it may be missing.
  """

  data: bytes
  frames: list[np.ndarray]
  times: np.ndarray
  defined: int = 0


def _encode(codec: str, container: str, numbers: Sequence[int] = range(FRAMES), **changes: Any) -> bytes:
  settings = {'keyframes': GOP, **CODECS[codec], **changes}
  settings['container_options'] = _OPTIONS.get(container, {})
  return make_video(
    [picture(number) for number in numbers],
    container={'fragmented': 'mp4'}.get(container, container),
    rate=RATE,
    **settings,
  )


def _with_dts(codec: str, container: str, numbers: Sequence[int] = range(FRAMES)) -> bytes:
  """Encodes to a container that stores times of decoding, for `_remux`: the target itself where it does."""
  if container not in ('avi', 'mpegts', 'vob'):
    container = 'webm' if codec == 'vp8' else 'mp4'
  return _encode(codec, container, numbers)


def _remux(data: bytes, container: str, first: int = 0, shift: float = 0.0) -> bytes:
  """Copies the packets from number `first` on, `shift` seconds later."""
  file, options = io.BytesIO(), {'avoid_negative_ts': 'disabled', **_OPTIONS.get(container, {})}
  name = {'fragmented': 'mp4'}.get(container, container)
  with av.open(io.BytesIO(data)) as source, av.open(file, 'w', format=name, options=options) as output:
    copy = output.add_stream_from_template(source.streams.video[0])
    packets = [packet for packet in source.demux(video=0) if packet.size]
    for packet in packets[first:]:
      ticks = round(shift / packet.time_base)
      packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
      packet.stream = copy
      output.mux(packet)
  return file.getvalue()


def _ordinary(codec: str, container: str) -> bytes | None:
  return _encode(codec, container)


def _offset(seconds: float) -> Callable[[str, str], bytes | None]:
  def make(codec: str, container: str) -> bytes | None:
    return None if container == 'avi' else _remux(_with_dts(codec, container), container, shift=seconds)

  return make


def _leading(codec: str, container: str) -> bytes | None:
  """A recording that begins in the middle of a group of pictures."""
  if codec in ('h264 one keyframe', 'mjpeg'):
    return None
  return _remux(_with_dts(codec, container), container, first=3)


def _open_start(codec: str, container: str) -> bytes | None:
  """A recording that begins at a keyframe, whose leading frames refer to frames before it."""
  if not codec.endswith('open GOP'):
    return None
  data = _with_dts(codec, container)
  with av.open(io.BytesIO(data)) as source:
    keyframes = [index for index, packet in enumerate(source.demux(video=0)) if packet.is_keyframe]
  return _remux(data, container, first=keyframes[1])


def _edit_list(codec: str, container: str) -> bytes | None:
  """A cut without re-encoding: an edit list discards the frames before the cut."""
  return _remux(_with_dts(codec, container), container, shift=-5 / RATE) if container in ('mp4', 'mov') else None


def _joined(gap: float | None) -> Callable[[str, str], bytes | None]:
  """Two recordings one after the other; the second one's clock starts `gap` seconds after the first one's."""

  def make(codec: str, container: str) -> bytes | None:
    if container not in ('mpegts', 'vob'):
      return None
    numbers, start = (range(FRAMES), range(FRAMES, 2 * FRAMES)), 2000.0
    if gap is None:
      return b''.join(_encode(codec, container, part) for part in numbers)
    shifts = zip(numbers, (start, start + gap), strict=True)
    return b''.join(_remux(_with_dts(codec, container, part), container, shift=shift) for part, shift in shifts)

  return make


def _variable_rate(codec: str, container: str) -> bytes | None:
  if container not in ('mp4', 'mov', 'matroska', 'webm') or codec in ('mpeg2', 'mpeg4', 'mjpeg', 'h264 interlaced'):
    return None
  gaps = np.random.default_rng(0).choice([10, 40, 200, 1500], FRAMES - 1)
  return _encode(codec, container, stamps=[0, *np.cumsum(gaps).tolist()])


def _rotation(codec: str, container: str) -> bytes | None:
  return _encode(codec, container, rotation=90) if container in ('mp4', 'mov', 'fragmented') else None


FEATURES: dict[str, Callable[[str, str], bytes | None]] = {
  'ordinary': _ordinary,
  'offset 5 s': _offset(5),
  'offset 3000 s': _offset(3000),
  'leading frames': _leading,
  'open start': _open_start,
  'edit list': _edit_list,
  'clock restarts': _joined(None),
  'clock jumps on': _joined(1000),
  'clock jumps back': _joined(-1000),
  'variable rate': _variable_rate,
  'rotation': _rotation,
}


def _decode_valid(data: bytes) -> tuple[list[np.ndarray], np.ndarray]:
  """Decodes every packet that is valid."""
  frames: list[av.VideoFrame] = []
  with av.open(io.BytesIO(data)) as container:
    for packet in container.demux(video=0):
      with contextlib.suppress(av.InvalidDataError):
        frames += packet.decode()
  return [frame.to_ndarray(format='rgb24') for frame in frames], np.array(
    [float(frame.pts * frame.time_base) for frame in frames]
  )


def cases() -> list[tuple[str, str, str]]:
  """Returns all combinations of codec, container and feature; `generate` returns None for those that do not exist."""
  return [
    (codec, container, feature)
    for feature, container, codec in itertools.product(FEATURES, CONTAINERS, CODECS)
    if codec.split()[0] in CONTAINERS[container]
  ]


def generate(codec: str, container: str, feature: str) -> Generated | None:
  """Makes a file and decodes it whole."""
  data = FEATURES[feature](codec, container)
  if data is None:
    return None
  try:
    frames, times = decode_all(data)
  except av.InvalidDataError:  # a decoder that does not skip packets whose references are missing
    frames, times = _decode_valid(data)
  if feature == 'rotation':
    frames = [np.rot90(frame) for frame in frames]
  if feature.startswith('clock'):
    return Generated(data, frames, np.arange(len(frames)) / RATE)
  if container not in STORE_DISPLAY_TIMES:
    times = np.sort(times)  # estimated by FFmpeg, in the order of packets
  if feature == 'leading frames':  # decoders guess what is missing, drop it or fail
    return Generated(data, frames, times - times.min(), GOP - 3)
  return Generated(data, frames, times - times.min())


def middles(times: np.ndarray) -> np.ndarray:
  """Returns a time within the display of every frame."""
  order = np.sort(times)
  return order + np.append(np.diff(order), 1 / RATE) / 2
