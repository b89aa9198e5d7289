"""Opening encoded video files: the only place that hands a file to FFmpeg.

A file may come from anybody. FFmpeg has demuxers for playlists and scripts that open other files and network addresses,
so only formats that hold the pictures themselves are accepted, and nothing but the file's own bytes can be read.
"""

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import av
import av.logging
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from mevit_jax.errors import UserError

av.logging.set_level(None)  # errors are raised; FFmpeg's own messages would flood the terminal

# FFmpeg's demuxers of formats that hold the pictures themselves. All others are refused: playlists and scripts (concat,
# hls, dash, imf, ...), streaming (sdp, rtsp, ...), image sequences, still images, text, devices.
FORMATS = (
  *('mov', 'matroska', 'avi', 'flv', 'mpegts', 'mpeg', 'asf', 'ogg', 'mxf', 'nut', 'dv', 'gif', 'apng'),
  *('h264', 'hevc', 'mpegvideo', 'm4v', 'av1', 'obu', 'ivf', 'mjpeg'),  # without a container
)
# Containers that store a presentation timestamp for every packet. For others FFmpeg estimates them, wrongly for AVI
# with reordered frames.
CONTAINERS_WITH_PTS = {'mov,mp4,m4a,3gp,3g2,mj2', 'matroska,webm'}
MAX_PIXELS = 2**26  # per frame: twice 8K. A frame of this size takes 200 MB as RGB
_PADDING = 2**21  # pixels by which decoders round up the sides of a frame, at most
_MAX_OBLONG = 0.02  # deviation of a pixel's aspect ratio from 1 that counts as square
_STILL_IMAGE = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
_KINDS = {
  stat.S_IFIFO: 'a named pipe',
  stat.S_IFSOCK: 'a socket',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
}

File = bytes | Path  # an encoded file: its bytes, or a path that is read in parts


class VideoError(UserError):
  """A video that cannot be used; the message is the reason, in one line."""


@contextlib.contextmanager
def open_video(file: File, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[InputContainer, VideoStream]]:
  """Opens a file and selects its main video stream.

  Args:
    file: the file.
    max_pixels: limit of height x width of a frame; the decoder refuses larger ones before it takes their memory.

  Raises:
    VideoError: the file is not a regular one, or has no video stream that can be decoded.
    OSError: the file cannot be read.
  """
  with contextlib.ExitStack() as stack:
    handle = stack.enter_context(open_regular(file) if isinstance(file, Path) else io.BytesIO(file))
    if not handle.read(1):
      raise VideoError('the file is empty')
    container = stack.enter_context(_open_container(handle, max_pixels))
    try:
      index = _main_stream(container)
    except VideoError as error:
      raise VideoError(_without_index(handle) or str(error)) from error
    if len(_candidates(container)) > 1:  # selecting it may have read packets
      container.close()
      container = stack.enter_context(_open_container(handle, max_pixels))
    stream = container.streams.video[index]
    _check_size(stream.height, square_width(stream, stream.width), max_pixels)
    stream.thread_type = 'NONE'  # worker processes provide the parallelism
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {'max_pixels': str(max_pixels + _PADDING)}
    yield container, stream


def open_regular(path: Path) -> BinaryIO:
  """Opens a regular file to read its bytes. Others may block (a pipe) or never end (a device).

  Raises:
    VideoError: the path is not a regular file.
    OSError: the file cannot be read.
  """
  _check_regular(path.stat().st_mode)
  # Without blocking, and checked again: the file may have been replaced in between.
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  handle = os.fdopen(descriptor, 'rb')
  try:
    _check_regular(os.fstat(descriptor).st_mode)
  except VideoError:
    handle.close()
    raise
  return handle


def read_regular(path: Path, max_bytes: int) -> bytes:
  """Returns the bytes of a regular file, of which it reads at most one more than allowed.

  Raises:
    VideoError: the path is not a regular file, or the file is larger than `max_bytes`.
    OSError: the file cannot be read.
  """
  with open_regular(path) as handle:
    size = os.fstat(handle.fileno()).st_size
    data = handle.read(max_bytes + 1) if size <= max_bytes else b''
  if size > max_bytes or len(data) > max_bytes:
    size = max(size, len(data))
    raise VideoError(f'{size:,} bytes, more than the limit of {max_bytes:,} bytes: cut it into clips')
  return data


def _check_regular(mode: int) -> None:
  if stat.S_ISDIR(mode):
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
  if not stat.S_ISREG(mode):
    raise VideoError(f'{_KINDS.get(stat.S_IFMT(mode), "not a regular file")}, not a video file')


def square_width(stream: VideoStream, width: int) -> int:
  """Returns the width at which a frame's pixels are square: FFmpeg's `scale=iw*sar:ih`.

  Videos that were scaled to even sides have pixels that are almost square, to keep their exact shape: 340x256 is left
  as it is.
  """
  aspect = stream.sample_aspect_ratio
  return max(1, int(width * aspect)) if aspect and abs(aspect - 1) > _MAX_OBLONG else width


def _check_size(height: int, width: int, max_pixels: int) -> None:
  if height * width > max_pixels:
    raise VideoError(
      f'frames of {width}x{height} pixels, more than the limit of {max_pixels} pixels; scale it down first'
    )


def _open_container(handle: BinaryIO, max_pixels: int) -> InputContainer:
  """Opens FFmpeg's container of a file object."""
  handle.seek(0)
  try:
    return av.open(
      _Bytes(handle),
      'r',
      metadata_errors='replace',
      options={'max_pixels': str(max_pixels + _PADDING)},  # of the decoders that look for a stream's format
      container_options={'format_whitelist': ','.join(FORMATS), 'protocol_whitelist': 'none'},
      io_open=_refuse_to_open,
    )
  except av.ArgumentError as error:  # the format is not one of FORMATS
    raise VideoError(
      'not a video in a supported container format: a still image, a playlist, text, or an unknown format'
    ) from error
  except av.FFmpegError as error:
    reason = _without_index(handle) or error_reason(error)
    raise VideoError(f'not a video that FFmpeg can open: {reason}') from error


class _Bytes:
  """File object without a name, whose extension FFmpeg would use to choose a demuxer."""

  def __init__(self, handle: BinaryIO):
    self.read, self.seek, self.tell = handle.read, handle.seek, handle.tell


def _refuse_to_open(*_: object) -> NoReturn:
  raise VideoError('it refers to another file')


def _without_index(handle: BinaryIO) -> str:
  """Returns the reason that an MP4 or MOV file without an index cannot be opened; '' for other files."""
  handle.seek(0)
  position, size, kind = 0, handle.seek(0, io.SEEK_END), b''
  while position + 8 <= size:
    handle.seek(position)
    header = handle.read(16)
    length, kind = int.from_bytes(header[:4], 'big'), header[4:8]
    length = int.from_bytes(header[8:16], 'big') if length == 1 else length or size - position
    if position == 0 and kind not in (b'ftyp', b'mdat', b'wide', b'free', b'skip'):
      return ''
    if kind == b'moov' and position + length > size:
      return 'its index (the moov box) is cut off: download or copy it again'
    if kind == b'moov' or length < 8:
      return ''
    position += length
  if not position:
    return ''
  missing = f'; at least {position - size} bytes' if position > size else ''
  return f'its end is missing, with the index (the moov box){missing}: download or copy it again'


def _candidates(container: InputContainer) -> list[VideoStream]:
  """Returns the video streams that can be decoded and are not marked as still images.

  Raises:
    VideoError: there are none.
  """
  streams = [stream for stream in container.streams.video if not stream.disposition & _STILL_IMAGE]
  if not streams:
    raise VideoError('no video stream')
  streams = [stream for stream in streams if stream.codec_context is not None]
  if not streams:
    raise VideoError('no decoder for its video stream')
  return streams


def _main_stream(container: InputContainer) -> int:
  """Returns the position among the video streams of the one to decode, the first in FFmpeg's order with two packets.

  A cover picture may be an ordinary stream, with one packet.
  """
  streams = _candidates(container)
  best = container.streams.best('video')
  streams.sort(key=lambda stream: (stream is not best, -stream.width * stream.height))
  if len(streams) > 1:
    counts = dict.fromkeys([stream.index for stream in streams], 0)
    with contextlib.suppress(av.FFmpegError, IndexError):  # of damaged files; see `Demuxer`
      for packet in container.demux(streams):
        counts[packet.stream_index] += bool(packet.size)
        if counts[streams[0].index] > 1:
          break
    streams.sort(key=lambda stream: counts[stream.index] < 2)
  return container.streams.video.index(streams[0])


def error_reason(error: av.FFmpegError) -> str:
  """Formats an FFmpeg error in one line."""
  return error.strerror or type(error).__name__
