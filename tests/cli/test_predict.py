"""The predict command: finding videos, and the output of their predictions."""

import csv
import io
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mevit_jax import Predictor
from mevit_jax import predict as predict_module
from mevit_jax.cli import predict
from mevit_jax.errors import UserError
from mevit_jax.inference.batch import find_videos
from mevit_jax.video.decode import decode, inspect
from tests.helpers.videos import make_video
from tests.helpers.workdirs import VIEWS, random_run, validation_videos

pytestmark = pytest.mark.usefixtures('compile_once')

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def workdir(tiny, compile_once, tmp_path_factory):
  return random_run(tiny(**VIEWS, **{'evaluation.average': 'logits'}), tmp_path_factory.mktemp('runs') / 'run')


@pytest.fixture(scope='module')
def predictor(workdir):
  return Predictor(workdir, batch_size=4)


@pytest.fixture(scope='module')
def videos(shapes_dir):
  return validation_videos(shapes_dir)


FLAGS = {
  'checkpoint': 'last',
  'weights': 'auto',
  'top': 3,
  'json': False,
  'csv': None,
  'figure': None,
  'overlay': None,
  'window': None,
  'every': None,
  'clips': None,
  'crops': None,
  'batch_size': 4,
}


@pytest.fixture
def command(workdir, monkeypatch, capsys):
  """Function from arguments and flags to the command's standard output and error."""

  def run(*arguments, **options):
    flags = types.SimpleNamespace(**{**FLAGS, 'model': str(workdir), **options})
    monkeypatch.setattr(predict.flags, 'FLAGS', flags)
    predict.main(['predict', *map(str, arguments)])
    return capsys.readouterr()

  return run


@pytest.fixture
def folder(videos, tmp_path):
  """Folder with three videos, one of them in a subfolder, a text file, and an invalid video."""
  names = list(videos)
  (tmp_path / 'videos/more').mkdir(parents=True)
  for name, place in zip(names, ('a.mp4', 'more/b.MP4', 'c.mp4'), strict=False):
    (tmp_path / 'videos' / place).write_bytes(videos[name])
  (tmp_path / 'videos/notes.txt').write_text('no video')
  (tmp_path / 'videos/d.webm').write_text('nor this')
  return tmp_path / 'videos'


def test_find_videos(folder, monkeypatch):
  monkeypatch.chdir(folder)
  assert [*find_videos(['.'])] == ['a.mp4', 'c.mp4', 'd.webm', 'more/b.MP4']
  assert [*find_videos(['c.mp4', '*.mp4', 'gone.mp4'])] == ['c.mp4', 'a.mp4', 'gone.mp4']
  assert [*find_videos(['**/*.MP4', 'notes.txt'])] == ['more/b.MP4', 'notes.txt']
  (folder / 'a[1].mp4').write_bytes(b'')
  assert [*find_videos(['a[1].mp4'])] == ['a[1].mp4']
  (folder / 'empty').mkdir()
  for argument, what in (('empty', 'no videos in empty'), ('*.avi', r'no files match \*.avi')):
    with pytest.raises(UserError, match=what):
      find_videos([argument])


def test_many_files_are_printed_as_json_lines(command, folder, predictor, tmp_path):
  output = command(folder, folder / 'gone.mp4', csv=tmp_path / 'out.csv', figure=tmp_path / 'out.png')
  expected = {name: predictor.predict(folder / name).top(3) for name in ('a.mp4', 'c.mp4', 'more/b.MP4')}
  lines = []
  for name, top in expected.items():
    lines += [str(folder / name), *(f'  {100 * p:5.1f} %  {label}' for label, p in top)]
  assert output.out.splitlines() == lines
  errors = output.err.splitlines()
  assert errors[0].startswith(f'{folder / "d.webm"}: not a video')
  assert errors[1] == f'{folder / "gone.mp4"}: No such file or directory'
  assert errors[2].startswith('3 of 5 videos predicted; cold start ')
  with (tmp_path / 'out.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [Path(row['video']).name for row in rows] == ['a.mp4', 'c.mp4', 'd.webm', 'b.MP4', 'gone.mp4']
  assert [row['prediction'] for row in rows if not row['error']] == [top[0][0] for top in expected.values()]
  assert [float(row['end']) for row in rows if not row['error']] == [pytest.approx(8 / 30, abs=1e-3)] * 3
  with Image.open(tmp_path / 'out.png') as image:
    assert image.format == 'PNG'


def test_timeline_of_a_long_video(command, videos, predictor, tmp_path):
  frames = [frame for data in videos.values() for frame in decode(data, (np.arange(8) + 0.5) / 30)]
  (tmp_path / 'long.mp4').write_bytes(make_video(frames, size=(24, 24)))
  windows = {'window': 8 / 30, 'every': 4 / 30}
  output = command(
    tmp_path / 'long.mp4', json=True, overlay=tmp_path / 'out.mp4', figure=tmp_path / 'out.png', **windows
  )
  found = json.loads(output.out)
  expected = predictor.timeline(tmp_path / 'long.mp4', **windows)
  assert [(one['start'], one['end']) for one in found['predictions']] == [
    (pytest.approx(part.start, abs=1e-6), pytest.approx(part.end, abs=1e-6)) for part in expected
  ]
  for one, part in zip(found['predictions'], expected, strict=True):
    assert [top['label'] for top in one['top']] == [label for label, _ in part.top(3)]
  stretches = found['timeline']
  assert (stretches[0]['start'], stretches[-1]['end']) == (0, pytest.approx(len(frames) / 30))
  assert all(a['end'] == b['start'] and a['label'] != b['label'] for a, b in itertools.pairwise(stretches))
  assert inspect((tmp_path / 'out.mp4').read_bytes()).num_frames == len(frames)
  assert (tmp_path / 'out.png').exists()
  words = command(tmp_path / 'long.mp4', **windows).out.splitlines()
  assert [line.split()[-1] for line in words[1:]] == [one['label'] for one in stretches]


def test_progress_of_a_long_video(command, videos, monkeypatch, tmp_path):
  frames = [frame for data in videos.values() for frame in decode(data, (np.arange(8) + 0.5) / 30)]
  (tmp_path / 'long.mp4').write_bytes(make_video(frames[:40], size=(24, 24)))
  windows = {'window': 8 / 30, 'overlay': tmp_path / 'out.mp4'}
  quiet = command(tmp_path / 'long.mp4', **windows)
  monkeypatch.setattr(predict_module, '_QUIET_SECONDS', -1)
  output = command(tmp_path / 'long.mp4', **windows)
  assert output.out == quiet.out
  lines = output.err.splitlines()
  first, last = (line for line in lines if 'windows' in line)
  assert first == 'windows predicted: 4 of 5'
  assert last.startswith('windows predicted: 5 of 5')
  assert next(line for line in lines if 'overlay' in line) == 'overlay seconds: 0 of 2'
  assert len(quiet.err.splitlines()) == 1


def test_video_from_standard_input(command, videos, monkeypatch, predictor):
  data = next(iter(videos.values()))
  monkeypatch.setattr('sys.stdin', types.SimpleNamespace(buffer=io.BytesIO(data)))
  found = json.loads(command('-', json=True).out)
  assert (found['video'], found['predictions'][0]['top'][0]['label']) == (
    'standard input',
    predictor.predict(data).label,
  )


def test_invalid_arguments_are_one_line_errors(command, folder):
  for arguments, options, what in (
    ((), {}, 'give videos'),
    ((folder,), {'overlay': 'out.mp4'}, '--overlay writes one video, but 4 were given'),
    ((folder,), {'csv': str(folder / 'gone/out.csv')}, 'the folder .* does not exist'),
    ((folder,), {'csv': str(folder)}, 'is a folder: name a file'),
    ((folder,), {'figure': 'out.jpg'}, r'--figure=out\.jpg: the file name must end with \.png or \.svg or \.pdf'),
    ((folder / 'd.webm',), {'overlay': 'out.webm'}, r'must end with \.mp4'),
    ((folder,), {'csv': str(folder / 'd.webm')}, r'd\.webm is one of the input videos: choose another name'),
    ((folder,), {'model': str(folder)}, r'is no(t a)? workdir'),
  ):
    with pytest.raises(UserError, match=what):
      command(*arguments, **options)


def test_exit_status(workdir, folder):
  """If no video could be read the exit status is 1, and one line per video states the reason."""
  command = [sys.executable, '-m', 'mevit_jax', 'predict', str(folder / 'd.webm'), 'gone.mp4', f'--workdir={workdir}']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (1, '')
  first, second, last = done.stderr.splitlines()
  assert first.startswith(f'{folder / "d.webm"}: not a video')
  assert second == 'gone.mp4: No such file or directory'
  assert last.startswith('0 of 2 videos predicted')
