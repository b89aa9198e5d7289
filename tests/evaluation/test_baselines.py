"""Baselines: the linear classifier against refitting without each video, and on a prepared dataset."""

import dataclasses
import json

import numpy as np
import pytest

from mevit_jax.datasets.reader import open_split
from mevit_jax.evaluation import baselines
from mevit_jax.evaluation.baselines import fit_linear, measure_baselines, video_features


@pytest.fixture
def dataset(shapes_dir):
  """Returns the validation split, without cached baselines."""
  split = open_split(shapes_dir, 'moving_shapes', 'validation')
  for path in split.directory.glob('baselines-*'):
    path.unlink()
  return split


def test_separable_features_are_separated():
  rng = np.random.default_rng(0)
  labels = np.arange(60) % 3
  features = rng.normal(0, 0.1, (60, 20)) + np.eye(3, 20)[labels] + 5
  linear = fit_linear(features, labels, classes=4)
  assert (linear.predict(features) == labels).all()
  assert linear.leave_one_out == 1


def test_leave_one_out_accuracy_is_that_of_refitting(monkeypatch):
  """The closed form for one regularization equals 24 ridge regressions by normal equations, with an intercept."""
  rng = np.random.default_rng(1)
  labels = rng.integers(0, 3, 24)
  features = rng.normal(size=(24, 5)) + 2 * np.eye(3, 5)[labels]
  monkeypatch.setattr(baselines, '_STRENGTHS', np.array([0.3]))
  found = fit_linear(features, labels, 3)
  centered = features - features.mean(axis=0)
  strength = 0.3 * np.linalg.eigvalsh(centered @ centered.T).clip(0).mean()
  correct = 0
  for i in range(24):
    others = np.arange(24) != i
    x, y = features[others], np.eye(3)[labels[others]]
    mean = x.mean(axis=0)
    # The intercept is not penalized: both sides are centered without the video.
    weights = np.linalg.solve((x - mean).T @ (x - mean) + strength * np.eye(5), (x - mean).T @ (y - y.mean(axis=0)))
    correct += ((features[i] - mean) @ weights + y.mean(axis=0)).argmax() == labels[i]
  assert found.leave_one_out == pytest.approx(correct / 24)
  assert 0.4 < found.leave_one_out < 1


def test_more_features_than_videos_without_a_signal_are_not_memorized():
  rng = np.random.default_rng(2)
  labels = np.arange(80) % 2
  assert fit_linear(rng.normal(size=(80, 500)), labels, 2).leave_one_out < 0.7


def test_features_see_motion():
  still = np.full((8, 8, 8, 3), 100, np.uint8)
  moving = still.copy()
  moving[4:] += 50
  assert video_features(still).shape == video_features(moving).shape == ((8 + 7) * 8 * 8 * 3,)
  assert (video_features(still)[8 * 8 * 8 * 3 :] == 0).all()
  assert (video_features(moving)[8 * 8 * 8 * 3 :] > 0).sum() == 8 * 8 * 3  # one difference of seven


def test_baselines_are_measured_once(dataset, shapes_dir, monkeypatch):
  found = measure_baselines(dataset, shapes_dir, 'train')
  classes = np.bincount(open_split(shapes_dir, 'moving_shapes', 'train').labels)
  expected = (dataset.labels == classes.argmax()).mean()
  assert found['majority']['top1'] == pytest.approx(expected)
  assert found['majority']['class'] == dataset.class_names[classes.argmax()]
  assert found['majority']['interval'][0] < expected < found['majority']['interval'][1]
  assert 0 <= found['linear']['top1'] <= 1
  monkeypatch.setattr(baselines, 'decode', None)  # reads no video again
  assert measure_baselines(dataset, shapes_dir, 'train') == json.loads(json.dumps(found))


def test_another_dataset_of_the_same_name_is_measured_again(dataset, shapes_dir):
  found = measure_baselines(dataset, shapes_dir, 'train')
  (path,) = dataset.directory.glob('baselines-*')
  cached = json.loads(path.read_text())
  for damage in ({**cached, 'key': {**cached['key'], 'fingerprint': 'of another'}}, [], {}):
    path.write_text(json.dumps(damage))
    assert measure_baselines(dataset, shapes_dir, 'train') == found
  path.write_text('{"key"')
  assert measure_baselines(dataset, shapes_dir, 'train') == found


def test_large_datasets_and_training_videos_have_no_baselines(dataset, shapes_dir, monkeypatch):
  assert measure_baselines(open_split(shapes_dir, 'moving_shapes', 'train'), shapes_dir, 'train') is None
  assert measure_baselines(dataset, shapes_dir, 'test') is None
  monkeypatch.setattr(baselines, 'MAX_VIDEOS', 23)
  assert measure_baselines(dataset, shapes_dir, 'train') is None


def test_unreadable_videos_are_left_out(dataset, shapes_dir):
  found = measure_baselines(dataset, shapes_dir, 'train')
  (path,) = dataset.directory.glob('baselines-*')
  path.unlink()
  broken = [{**example, 'video': b''} if i % 2 else example for i, example in enumerate(dataset.source)]
  halved = measure_baselines(dataclasses.replace(dataset, source=broken), shapes_dir, 'train')
  path.unlink()
  width = [part['majority']['interval'][1] - part['majority']['interval'][0] for part in (found, halved)]
  assert width[1] > width[0]  # of fewer videos
