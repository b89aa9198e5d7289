"""Predictions are those of evaluation, whoever asks and however the video comes; and what the command makes of them."""

import csv
import io
import itertools
import json
import shutil
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from workdirs import of_format_1, random_run

from mevit_jax import Predictor, evaluate, predict
from mevit_jax.data import datasets
from mevit_jax.data.container import VideoError
from mevit_jax.data.video import decode, inspect
from mevit_jax.errors import UserError
from mevit_jax.evaluation.results import read_results
from tests.data.videos import make_video

pytestmark = pytest.mark.usefixtures('compile_once')

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def recipe(tiny, compile_once):
  """One device, evaluated with two clips of two crops, whose logits are averaged."""
  return tiny(
    **{
      'mesh.data': 1,
      'evaluation.clips': 2,
      'evaluation.crops': 2,
      'evaluation.average': 'logits',
      'training.ema': 0.9,
    }
  )


@pytest.fixture(scope='module')
def workdir(recipe, tmp_path_factory):
  return random_run(recipe, tmp_path_factory.mktemp('runs') / 'run')


@pytest.fixture(scope='module')
def predictor(workdir):
  return Predictor(workdir, batch_size=4)


@pytest.fixture(scope='module')
def videos(shapes_dir):
  """The bytes of the validation videos, by id."""
  split = datasets.open_split(shapes_dir, 'moving_shapes', 'validation')
  return {example['id']: example['video'] for example in (split.source[i] for i in range(len(split)))}


@pytest.fixture(scope='module')
def evaluated(recipe, workdir):
  """What evaluation says of them: probabilities and logits by id."""
  results = evaluate.evaluate(recipe, str(workdir))
  _, found, _ = read_results(workdir / 'evaluation' / results['protocol']['name'])
  return {video: (p, logits) for video, p, logits in zip(found.ids, found.probabilities, found.logits, strict=True)}


def close(prediction, probabilities):
  np.testing.assert_allclose(prediction.probabilities, probabilities, atol=1e-5, rtol=0)


def test_predictions_are_those_of_evaluation(predictor, videos, evaluated):
  found = list(predictor.predict_each(list(videos.values())))
  assert [one.index for one in found] == list(range(len(videos)))
  for video, one in zip(videos, found, strict=True):
    probabilities, logits = evaluated[video]
    (prediction,) = one.predictions
    close(prediction, probabilities)
    np.testing.assert_allclose(prediction.logits, logits, atol=1e-5 * np.abs(logits).max(), rtol=0)
    assert prediction.label == prediction.names[probabilities.argmax()]
    assert prediction.top(3) == sorted(prediction.top(8), key=lambda pair: -pair[1])[:3]
  spread = np.ptp([p for p, _ in evaluated.values()], axis=0).max()
  assert spread > 0.1  # else it would not show that a video got another one's


def test_however_the_video_comes(predictor, videos, evaluated, tmp_path):
  name, data = next(iter(videos.items()))
  (tmp_path / 'video.mp4').write_bytes(data)
  info = inspect(data)
  frames = np.stack(decode(data, (np.arange(info.num_frames) + 0.5) / info.fps))
  for video in (data, tmp_path / 'video.mp4', str(tmp_path / 'video.mp4')):
    close(predictor.predict(video), evaluated[name][0])
  close(predictor.predict(frames, fps=info.fps), evaluated[name][0])
  with pytest.raises(UserError, match='give fps'):
    predictor.predict(frames)


def test_threads_share_a_predictor(workdir, videos, evaluated):
  """From the first call on, which compiles."""
  predictor = Predictor(workdir)
  asked = [*videos] * 3
  with ThreadPoolExecutor(8) as pool:
    for name, found in zip(asked, pool.map(lambda name: predictor.predict(videos[name]), asked), strict=True):
      close(found, evaluated[name][0])


def test_windows(predictor, videos):
  """Each is predicted as the video of its frames alone would be, whatever else is in the batch."""
  names = list(videos)[:3]
  frames = np.concatenate([decode(videos[name], (np.arange(8) + 0.5) / 30) for name in names])
  timeline = predictor.timeline(frames, window=8 / 30, every=4 / 30, fps=30)
  assert [(round(30 * part.start), round(30 * part.end)) for part in timeline] == [
    (start, start + 8) for start in (0, 4, 8, 12, 16)
  ]
  found = list(predictor.predict_each([frames, frames[:12]], window=8 / 30, every=4 / 30, fps=30))
  assert [len(one.predictions) for one in found] == [5, 2]
  for one in found:
    for part, expected in zip(one.predictions, timeline, strict=False):
      close(part, expected.probabilities)
  (alone,) = predictor.timeline(frames[4:12], window=1, fps=30)
  close(alone, timeline[1].probabilities)
  a_clip = predictor.timeline(frames, every=1 / 3, fps=30)[0]
  assert (a_clip.start, a_clip.end) == (0, 4 / 30)
  assert timeline[0].logits.shape == (2, 8)  # one clip of a window, and the two crops


@pytest.mark.parametrize(
  ('asked', 'what'),
  [({'window': 0}, 'window must be'), ({'every': -1}, 'every must be'), ({'window': 0.01}, 'shorter than a clip')],
)
def test_windows_that_cannot_be(predictor, videos, asked, what):
  with pytest.raises(UserError, match=what):
    next(predictor.predict_each([*videos.values()], **asked))


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(predictor, videos, evaluated, tmp_path):
  (tmp_path / 'text.mp4').write_text('no video at all' * 100)
  names = list(videos)
  asked = [videos[names[0]], tmp_path / 'gone.mp4', b'', tmp_path / 'text.mp4', tmp_path, videos[names[1]]]
  found = list(predictor.predict_each(asked))
  assert [one.index for one in found] == list(range(6))
  assert ['' if one.predictions else one.error for one in found] == [
    '',
    'No such file or directory',
    'the file is empty',
    found[3].error,
    'Is a directory',
    '',
  ]
  assert found[3].error.startswith('not a video')
  close(found[0].predictions[0], evaluated[names[0]][0])
  close(found[5].predictions[0], evaluated[names[1]][0])
  with pytest.raises(VideoError, match='empty'):
    predictor.predict(b'')


def test_one_video_is_no_list(predictor):
  with pytest.raises(UserError, match='takes a list of videos'):
    next(predictor.predict_each('video.mp4'))


def test_left_alone_it_ends_its_threads(predictor, videos):
  before = threading.active_count()
  following = predictor.predict_each([*videos.values()] * 20)
  next(following)
  following.close()
  assert threading.active_count() == before


def test_which_params(workdir, videos, evaluated):
  raw = Predictor(workdir, weights='raw')
  assert (raw.weights, Predictor(workdir).weights) == ('raw', 'ema')
  name, data = next(iter(videos.items()))
  assert np.abs(raw.predict(data).probabilities - evaluated[name][0]).max() > 1e-3


def test_bad_workdirs(workdir, tmp_path):
  with pytest.raises(UserError, match='is no workdir'):
    Predictor(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='has no checkpoint 7; it has 0'):
    Predictor(workdir, '7')
  with pytest.raises(UserError, match='clips must be at least 1'):
    Predictor(workdir, clips=0)
  with pytest.raises(UserError, match='has format 1, this version'):
    Predictor(of_format_1(workdir, tmp_path / 'older'))
  torn = shutil.copytree(workdir, tmp_path / 'torn')
  largest = max((path for path in (torn / 'checkpoints').rglob('*') if path.is_file()), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-9])
  with pytest.raises(UserError, match=r'no checkpoint in .* is whole'):
    Predictor(torn)


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
  """A function: arguments and flags -> standard output and error of the command, which ends well."""

  def run(*arguments, **options):
    flags = types.SimpleNamespace(**{**FLAGS, 'workdir': str(workdir), **options})
    monkeypatch.setattr(predict.flags, 'FLAGS', flags)
    predict.main(['predict', *map(str, arguments)])
    return capsys.readouterr()

  return run


@pytest.fixture
def folder(videos, tmp_path):
  """Three videos, one of them deeper, a text, and one that is none."""
  names = list(videos)
  (tmp_path / 'videos/more').mkdir(parents=True)
  for name, place in zip(names, ('a.mp4', 'more/b.MP4', 'c.mp4'), strict=False):
    (tmp_path / 'videos' / place).write_bytes(videos[name])
  (tmp_path / 'videos/notes.txt').write_text('no video')
  (tmp_path / 'videos/d.webm').write_text('nor this')
  return tmp_path / 'videos'


def test_which_videos_are_meant(folder, monkeypatch):
  monkeypatch.chdir(folder)
  assert [*predict.find_videos(['.'])] == ['a.mp4', 'c.mp4', 'd.webm', 'more/b.MP4']
  assert [*predict.find_videos(['c.mp4', '*.mp4', 'gone.mp4'])] == ['c.mp4', 'a.mp4', 'gone.mp4']
  assert [*predict.find_videos(['**/*.MP4', 'notes.txt'])] == ['more/b.MP4', 'notes.txt']
  (folder / 'a[1].mp4').write_bytes(b'')
  assert [*predict.find_videos(['a[1].mp4'])] == ['a[1].mp4']
  (folder / 'empty').mkdir()
  for argument, what in (('empty', 'no videos in empty'), ('*.avi', r'no file is like \*.avi')):
    with pytest.raises(UserError, match=what):
      predict.find_videos([argument])


def test_many_files(command, folder, predictor, tmp_path):
  said = command(folder, folder / 'gone.mp4', csv=tmp_path / 'out.csv', figure=tmp_path / 'out.png')
  expected = {name: predictor.predict(folder / name).top(3) for name in ('a.mp4', 'c.mp4', 'more/b.MP4')}
  lines = []
  for name, top in expected.items():
    lines += [str(folder / name), *(f'  {100 * p:5.1f} %  {label}' for label, p in top)]
  assert said.out.splitlines() == lines
  errors = said.err.splitlines()
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


def test_a_timeline(command, videos, predictor, tmp_path):
  frames = [frame for data in videos.values() for frame in decode(data, (np.arange(8) + 0.5) / 30)]
  (tmp_path / 'long.mp4').write_bytes(make_video(frames, size=(24, 24)))
  asked = {'window': 8 / 30, 'every': 4 / 30}
  said = command(tmp_path / 'long.mp4', json=True, overlay=tmp_path / 'out.mp4', figure=tmp_path / 'out.png', **asked)
  found = json.loads(said.out)
  expected = predictor.timeline(tmp_path / 'long.mp4', **asked)
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
  words = command(tmp_path / 'long.mp4', **asked).out.splitlines()
  assert [line.split()[-1] for line in words[1:]] == [one['label'] for one in stretches]


def test_how_far_a_long_video_is(command, videos, monkeypatch, tmp_path):
  frames = [frame for data in videos.values() for frame in decode(data, (np.arange(8) + 0.5) / 30)]
  (tmp_path / 'long.mp4').write_bytes(make_video(frames[:40], size=(24, 24)))
  asked = {'window': 8 / 30, 'overlay': tmp_path / 'out.mp4'}
  quiet = command(tmp_path / 'long.mp4', **asked)
  monkeypatch.setattr(predict, '_SILENT', -1)
  said = command(tmp_path / 'long.mp4', **asked)
  assert said.out == quiet.out
  lines = said.err.splitlines()
  assert [line for line in lines if 'windows' in line] == ['4 of 5 windows']  # and the last one, which ends it
  assert [line for line in lines if 'overlay' in line][-1] == 'overlay: 0:01.3 of 0:01.3'
  assert len(quiet.err.splitlines()) == 1


def test_standard_input(command, videos, monkeypatch, predictor):
  data = next(iter(videos.values()))
  monkeypatch.setattr('sys.stdin', types.SimpleNamespace(buffer=io.BytesIO(data)))
  found = json.loads(command('-', json=True).out)
  assert (found['video'], found['predictions'][0]['top'][0]['label']) == (
    'standard input',
    predictor.predict(data).label,
  )


def test_what_is_refused(command, folder):
  for arguments, options, what in (
    ((), {}, 'name videos'),
    ((folder,), {'overlay': 'out.mp4'}, '--overlay writes one video, and 4 were given'),
    ((folder,), {'csv': str(folder / 'gone/out.csv')}, 'there is no folder'),
    ((folder,), {'workdir': str(folder)}, 'is no workdir'),
  ):
    with pytest.raises(UserError, match=what):
      command(*arguments, **options)


def test_a_process(workdir, folder):
  """Nothing could be read: the exit status is 1, and a line a video says why."""
  command = [sys.executable, '-m', 'mevit_jax.predict', str(folder / 'd.webm'), 'gone.mp4', f'--workdir={workdir}']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (1, '')
  first, second, last = done.stderr.splitlines()
  assert first.startswith(f'{folder / "d.webm"}: not a video')
  assert second == 'gone.mp4: No such file or directory'
  assert last.startswith('0 of 2 videos predicted')
