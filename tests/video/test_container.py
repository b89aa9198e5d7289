"""Files that are not what they say: nothing but the bytes of a given file is read, and a refusal is one line."""

import functools
import io
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mevit_jax.video.container import VideoError, open_video, read_regular
from mevit_jax.video.decode import decode, inspect
from mevit_jax.video.reader import FileReader
from mevit_jax.video.transcode import Encoding, reencode
from mevit_jax.video.write import write_overlay
from tests.helpers.videos import make_video, number, picture

OPENERS = {
  'inspect': inspect,
  'decode': lambda file: decode(file if isinstance(file, bytes) else file.read_bytes(), np.zeros(1)),
  'reader': FileReader,
  'reencode': lambda file: reencode(file if isinstance(file, bytes) else file.read_bytes(), Encoding('h264')),
  'overlay': lambda file: write_overlay(Path('overlay.mp4'), file, lambda frame, seconds: frame),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The current folder. The files that others may name are pipes: opening one would block until the test fails."""
  monkeypatch.chdir(tmp_path)
  os.mkfifo('secret.mp4')
  os.mkfifo('secret.ts')
  return tmp_path


def _still(kind: str) -> bytes:
  file = io.BytesIO()
  Image.fromarray(picture(1)).save(file, kind)
  return file.getvalue()


def _playlist(url: str) -> str:
  return f'#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.3,\n{url}\n#EXT-X-ENDLIST\n'


def _with_external_data(path: str) -> bytes:
  """A MOV file whose pictures are in another file: its data reference is an alias of a path."""
  name, text = path.rsplit('/', 1)[-1].encode(), path.encode()
  alias = bytearray(150)
  alias[10:12], alias[50 : 51 + len(name)] = b'\x01x', bytes([len(name)]) + name
  record = struct.pack('>hH', 2, len(text)) + text + bytes(len(text) % 2)
  record += struct.pack('>hH', 18, len(text)) + text + bytes(len(text) % 2) + struct.pack('>hH', -1, 0)
  entry = struct.pack('>I4sI', 12 + len(alias) + len(record), b'alis', 0) + bytes(alias) + record
  data = make_video()
  start = data.index(b'dref') - 4
  size = struct.unpack('>I', data[start : start + 4])[0]
  reference = struct.pack('>I4sII', 16 + len(entry), b'dref', 0, 1) + entry
  result = bytearray(data[:start] + reference + data[start + size :])
  for box in (b'dinf', b'minf', b'mdia', b'trak', b'moov'):  # the boxes around it
    position = data.index(box) - 4
    old = struct.unpack('>I', data[position : position + 4])[0]
    result[position : position + 4] = struct.pack('>I', old + len(reference) - size)
  return bytes(result)


HOSTILE = {
  'ffconcat': 'ffconcat version 1.0\nfile secret.mp4\n',
  'ffconcat of an absolute path': 'ffconcat version 1.0\nfile {folder}/secret.mp4\n',
  'm3u8': _playlist('secret.ts'),
  'm3u8 of an absolute path': _playlist('{folder}/secret.ts'),
  'm3u8 of a file address': _playlist('file://{folder}/secret.ts'),
  'm3u8 of a web address': _playlist('http://127.0.0.1:{port}/secret.ts'),
  'nested m3u8': '#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nhttp://127.0.0.1:{port}/a.m3u8\n',
  'sdp': 'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n'
  'a=rtpmap:96 H264/90000\n',
  'dash': '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
  'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT1S"><Period><AdaptationSet '
  'mimeType="video/mp4"><Representation id="0" codecs="avc1.42" bandwidth="1000"><BaseURL>secret.mp4</BaseURL>'
  '</Representation></AdaptationSet></Period></MPD>',
  'asx': '[Reference]\nRef1=http://127.0.0.1:{port}/a\n',
  'ram': 'rtsp://127.0.0.1:{port}/x\n',
  'vobsub': '# VobSub index file, v7 (do not modify this line!)\n',
  'srt': '1\n00:00:00,000 --> 00:00:01,000\nhello\n',
  'text': 'hello\n' * 99,
}

# Opens files as a video by all openers, and prints the errors and Python's file and socket events.
AUDITED = """
import sys
from pathlib import Path
from tests.video.test_container import OPENERS

def record(event, arguments):
  if event.startswith('socket.') or (event == 'open' and 'secret' in str(arguments[0])):
    print('EVENT', event, arguments[0])

sys.addaudithook(record)
for name in sys.argv[1:]:
  for opener in OPENERS.values():
    try:
      print('ACCEPTED', name, opener(Path(name)))
    except Exception as error:
      print(type(error).__name__, error)
"""


@pytest.mark.parametrize('extension', ['.mp4', ''])
def test_no_other_file_and_no_address_is_opened(folder, extension):
  """Also not by FFmpeg itself, which Python does not see: its opens would block, and its connections would arrive."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    server.settimeout(0)
    port, names = server.getsockname()[1], []
    for number, (kind, text) in enumerate(HOSTILE.items()):
      names.append(f'{number}{extension or "." + kind.split()[-1]}')
      Path(names[-1]).write_text(text.replace('{folder}', str(folder)).replace('{port}', str(port)))
    names.append('external.mov')
    Path(names[-1]).write_bytes(_with_external_data(f'{folder}/secret.mp4'))
    done = subprocess.run(
      [sys.executable, '-c', AUDITED, *names],
      capture_output=True,
      text=True,
      check=True,
      env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
      timeout=60,
    )
    with pytest.raises(BlockingIOError):
      server.accept()
  assert done.stderr == ''
  assert [line.split(maxsplit=1)[0] for line in done.stdout.splitlines()] == ['VideoError'] * len(names) * len(OPENERS)


@pytest.mark.parametrize('kind', [*HOSTILE, 'jpeg', 'png', 'bmp', 'webp', 'tiff'])
@pytest.mark.parametrize('opener', OPENERS.values(), ids=OPENERS)
def test_a_refusal_is_one_line(folder, kind, opener, capfd):
  data = _still(kind) if kind not in HOSTILE else HOSTILE[kind].replace('{folder}', str(folder)).encode()
  for file in (data, Path('a.mp4')):
    Path('a.mp4').write_bytes(data)
    with pytest.raises(VideoError, match=r'^not a video') as error:
      opener(file)
    assert '\n' not in str(error.value)
  assert capfd.readouterr().err == ''


def test_pictures_in_another_file_are_not_read(folder):
  with pytest.raises(VideoError, match='no video packets: they are in another file'):
    inspect(_with_external_data(f'{folder}/secret.mp4'))


@pytest.mark.parametrize('opener', [inspect, FileReader, lambda path: read_regular(path, 10**6)])
def test_only_regular_files_are_opened(tmp_path, opener):
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'zero').symlink_to('/dev/zero')
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(str(tmp_path / 'socket'))
    for name, kind in (('pipe', 'a named pipe'), ('zero', 'a device'), ('socket', 'a socket')):
      with pytest.raises(VideoError, match=f'^{kind}, not a video file$'):
        opener(tmp_path / name)
  with pytest.raises(IsADirectoryError):
    opener(tmp_path)
  with pytest.raises(FileNotFoundError):
    opener(tmp_path / 'missing')


def test_at_most_the_limit_is_read(tmp_path):
  (tmp_path / 'file').write_bytes(bytes(1000))
  assert read_regular(tmp_path / 'file', 1000) == bytes(1000)
  with pytest.raises(VideoError, match='1,000 bytes, more than the limit of 999 bytes'):
    read_regular(tmp_path / 'file', 999)
  if Path('/proc/version').exists():  # regular, of size 0
    with pytest.raises(VideoError, match='more than the limit of 5 bytes'):
      read_regular(Path('/proc/version'), 5)


@functools.cache
def _png(side: int) -> bytes:
  """A black square in a file that is smaller than its pixels by a thousand times."""

  def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

  compressor = zlib.compressobj(1)
  row = bytes(side * 3 + 1)
  pixels = b''.join([compressor.compress(row) for _ in range(side)]) + compressor.flush()
  header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


def _png_in_mov(sides: list[int], declared: int) -> bytes:
  file = io.BytesIO()
  with av.open(file, 'w', format='mov') as output:
    stream = output.add_stream('png', rate=30)
    stream.width = stream.height = declared
    stream.pix_fmt = 'rgb24'
    stream.codec_context.open()
    for index, side in enumerate(sides):
      packet = av.Packet(_png(side))
      packet.pts = packet.dts = index
      packet.time_base, packet.stream, packet.is_keyframe = stream.codec_context.time_base, stream, True
      output.mux(packet)
  return file.getvalue()


def _peak_memory() -> float:
  status = Path('/proc/self/status').read_text().split()
  return int(status[status.index('VmHWM:') + 1]) / 1024  # MB


@pytest.mark.parametrize('opener', OPENERS.values(), ids=OPENERS)
@pytest.mark.parametrize('declared', [64, 9000])
def test_frames_with_too_many_pixels_take_no_memory(tmp_path, monkeypatch, opener, declared):
  monkeypatch.chdir(tmp_path)
  data = _png_in_mov([9000, 9000], declared)  # 243 MB each as RGB
  Path('/proc/self/clear_refs').write_text('5')  # the peak starts again
  before = _peak_memory()
  with pytest.raises(VideoError, match=r'too many pixels|more than the limit'):
    opener(data)
  assert _peak_memory() - before < 100


def test_the_limit_of_pixels_is_exact():
  data = make_video(3)
  assert inspect(data, max_pixels=48 * 64).num_frames == 3
  with pytest.raises(VideoError, match='frames of 64x48 pixels, more than the limit of 3071 pixels'):
    inspect(data, max_pixels=48 * 64 - 1)
  with pytest.raises(VideoError, match='more than the limit'), open_video(data, max_pixels=100):
    pass


@pytest.mark.parametrize('container', ['mp4', 'mov'])
def test_a_cut_file_says_that_its_end_is_missing(container):
  data = make_video(container=container)
  assert inspect(data).num_frames == 40
  for size in (40, 2000, data.index(b'moov') - 4):
    with pytest.raises(VideoError, match=r'its end is missing, with the index \(the moov box\)'):
      inspect(data[:size])
  with pytest.raises(VideoError, match=r'its index \(the moov box\) is cut off'):
    inspect(data[: data.index(b'moov') + 100])


def _with_cover(container: str, position: int) -> bytes:
  """A video with a cover picture in an ordinary stream."""
  file = io.BytesIO()
  with av.open(io.BytesIO(make_video())) as video, av.open(file, 'w', format=container) as output:
    cover = output.add_stream('mjpeg', rate=1)
    cover.width, cover.height, cover.pix_fmt = 640, 480, 'yuvj420p'
    if position:
      output.add_stream_from_template(video.streams.video[0])
    pictures = cover.encode(av.VideoFrame.from_ndarray(picture(255, 480, 640)))
    copy = output.add_stream_from_template(video.streams.video[0])
    for packet in [*pictures, *cover.encode()]:
      output.mux(packet)
    for packet in video.demux(video=0):
      if packet.size:
        packet.stream = copy
        output.mux(packet)
  return file.getvalue()


@pytest.mark.parametrize('container', ['mp4', 'mov', 'matroska'])
def test_a_cover_picture_is_not_the_video(container):
  data = _with_cover(container, 0)
  with av.open(io.BytesIO(data)) as opened:
    assert len(opened.streams.video) == 2
  info = inspect(data)
  assert (info.num_frames, info.width, info.damage) == (40, 64, '')
  assert [number(frame) for frame in decode(data, np.array([0.1, 1.3]))] == [3, 39]
  assert FileReader(data).num_frames == 40
