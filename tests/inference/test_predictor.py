"""Predictions equal those of evaluation, for every kind of input."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mevit_jax import Predictor, evaluate
from mevit_jax.errors import UserError
from mevit_jax.evaluation.results import read_results
from mevit_jax.video.container import VideoError
from mevit_jax.video.decode import decode, inspect
from tests.helpers.workdirs import VIEWS, of_format_1, random_run, validation_videos

pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture(scope='module')
def config(tiny, compile_once):
  """Config that averages the logits of the views."""
  return tiny(**VIEWS, **{'evaluation.average': 'logits'})


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
  return random_run(config, tmp_path_factory.mktemp('runs') / 'run')


@pytest.fixture(scope='module')
def predictor(workdir):
  return Predictor(workdir, batch_size=4)


@pytest.fixture(scope='module')
def videos(shapes_dir):
  return validation_videos(shapes_dir)


@pytest.fixture(scope='module')
def evaluated(config, workdir):
  """Returns the probabilities and logits of evaluation by id."""
  results = evaluate.evaluate(config, str(workdir))
  _, predictions, _ = read_results(workdir / 'evaluation' / results['protocol']['name'])
  return {
    video: (p, logits)
    for video, p, logits in zip(predictions.ids, predictions.probabilities, predictions.logits, strict=True)
  }


def close(prediction, probabilities):
  np.testing.assert_allclose(prediction.probabilities, probabilities, atol=1e-5, rtol=0)


def test_predictions_equal_those_of_evaluation(predictor, videos, evaluated):
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
  assert spread > 0.1  # otherwise swapped videos would go unnoticed


def test_all_kinds_of_input_give_equal_predictions(predictor, videos, evaluated, tmp_path):
  name, data = next(iter(videos.items()))
  (tmp_path / 'video.mp4').write_bytes(data)
  info = inspect(data)
  frames = np.stack(decode(data, (np.arange(info.num_frames) + 0.5) / info.fps))
  for video in (data, tmp_path / 'video.mp4', str(tmp_path / 'video.mp4')):
    close(predictor.predict(video), evaluated[name][0])
  close(predictor.predict(frames, fps=info.fps), evaluated[name][0])
  with pytest.raises(UserError, match='give fps'):
    predictor.predict(frames)


def test_threads_can_share_a_predictor(workdir, videos, evaluated):
  """Includes the first call, which compiles."""
  predictor = Predictor(workdir)
  asked = [*videos] * 3
  with ThreadPoolExecutor(8) as pool:
    for name, found in zip(asked, pool.map(lambda name: predictor.predict(videos[name]), asked), strict=True):
      close(found, evaluated[name][0])


def test_windows_equal_predictions_of_separate_videos(predictor, videos):
  """Each window equals the prediction of a video of its frames, independently of the rest of the batch."""
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
def test_invalid_windows_are_refused(predictor, videos, asked, what):
  with pytest.raises(UserError, match=what):
    next(predictor.predict_each([*videos.values()], **asked))


def test_unreadable_videos_have_an_error(predictor, videos, evaluated, tmp_path):
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


def test_a_single_video_instead_of_a_list(predictor):
  with pytest.raises(UserError, match='takes a list of videos'):
    next(predictor.predict_each('video.mp4'))


def test_closing_the_generator_ends_its_threads(predictor, videos):
  before = threading.active_count()
  following = predictor.predict_each([*videos.values()] * 20)
  next(following)
  following.close()
  assert threading.active_count() == before


def test_raw_and_ema_parameters_can_be_selected(workdir, videos, evaluated):
  raw = Predictor(workdir, weights='raw')
  assert (raw.weights, Predictor(workdir).weights) == ('raw', 'ema')
  name, data = next(iter(videos.items()))
  assert np.abs(raw.predict(data).probabilities - evaluated[name][0]).max() > 1e-3


def test_invalid_workdirs_are_refused(workdir, tmp_path):
  with pytest.raises(UserError, match=r'is no(t a)? workdir'):
    Predictor(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='no checkpoint 7'):
    Predictor(workdir, '7')
  with pytest.raises(UserError, match='clips must be at least 1'):
    Predictor(workdir, clips=0)
  with pytest.raises(UserError, match='format 1'):
    Predictor(of_format_1(workdir, tmp_path / 'older'))
  truncated = shutil.copytree(workdir, tmp_path / 'truncated')
  largest = max(
    (path for path in (truncated / 'checkpoints').rglob('*') if path.is_file()), key=lambda p: p.stat().st_size
  )
  largest.write_bytes(largest.read_bytes()[:-9])
  with pytest.raises(UserError, match=r'all checkpoints in .* are damaged'):
    Predictor(truncated)
