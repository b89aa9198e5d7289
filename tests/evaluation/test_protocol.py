"""Evaluation protocol: every video once for any batch size and number of devices; unreadable videos are listed."""

import collections
import dataclasses
import re

import jax
import numpy as np
import pytest

from mevit_jax.config.data import ClipConfig
from mevit_jax.config.evaluation import EvaluationConfig
from mevit_jax.config.experiment import Config
from mevit_jax.config.mesh import MeshConfig
from mevit_jax.config.resolve import describe, resolve
from mevit_jax.data import pipeline
from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError
from mevit_jax.evaluation.protocol import Predictions, describe_crops, predict_all
from mevit_jax.parallel.hosts import process_batch_slice
from mevit_jax.parallel.mesh import make_mesh
from mevit_jax.parallel.placement import batch_sharding
from mevit_jax.video.clips import view_boxes

CLIP = ClipConfig(frames=2, size=(8, 8), stride=3, short_side=(8, 8))
WEIGHTS = np.random.default_rng(0).normal(size=(2 * 8 * 8 * 3, 8)).astype(np.float32)


def step(params, video):
  """Step function whose logits depend on every pixel."""
  pixels = video.reshape(*video.shape[:2], -1) / 255 - 0.5  # b v thwc
  return pixels @ params  # b v c


@dataclasses.dataclass(frozen=True)
class Some:
  """Source with the first videos of another one; the `unreadable` ones are unreadable."""

  source: object
  count: int
  unreadable: tuple[int, ...] = ()

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    example = self.source[index]
    return {**example, 'video': b'no video'} if index in self.unreadable else example


@pytest.fixture(scope='module')
def source(shapes_dir):
  return datasets.open_split(shapes_dir, 'moving_shapes', 'validation').source


def predict(source, batch_size, devices=1, report=lambda done: None):
  rows = batch_sharding(make_mesh(MeshConfig(data=devices)))
  batches = pipeline.eval_batches(
    source, CLIP, crops=2, clips=2, batch_size=batch_size, rows=process_batch_slice(rows, batch_size)
  )
  try:
    return predict_all(jax.jit(step, out_shardings=rows), WEIGHTS, batches, rows, report)
  finally:
    batches.close()


@pytest.mark.parametrize(
  ('count', 'batch_size', 'devices'),
  [(11, 4, 1), (11, 7, 1), (11, 64, 1), (11, 8, 8), (11, 64, 8), (8, 8, 8), (1, 8, 4)],
)
def test_every_video_is_evaluated_once(source, count, batch_size, devices):
  predictions = predict(Some(source, count), batch_size, devices)
  assert collections.Counter(predictions.ids.tolist()) == {source[i]['id']: 1 for i in range(count)}
  assert predictions.labels.tolist() == [source[i]['label'] for i in range(count)]
  assert predictions.readable.all()
  one_by_one = predict(Some(source, count), 1)
  assert (predictions.logits.shape, predictions.logits.dtype) == ((count, 4, 8), np.float32)
  scale = np.abs(one_by_one.logits).max()
  np.testing.assert_allclose(predictions.logits, one_by_one.logits, rtol=0, atol=1e-6 * scale)
  np.testing.assert_array_equal(predictions.ranked(5), one_by_one.ranked(5))
  np.testing.assert_allclose(predictions.probabilities.sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize(('devices', 'batch_size'), [(4, 8), (8, 16)])
def test_logits_are_bitwise_equal_for_equal_batches_per_device(source, devices, batch_size):
  """The last batch is padded to the full size."""
  some = Some(source, 11)
  one, many = predict(some, 2), predict(some, batch_size, devices)
  assert one.logits.tobytes() == many.logits.tobytes()
  assert one.probabilities.tobytes() == many.probabilities.tobytes()


def test_progress_counts_videos(source):
  done = []
  predict(Some(source, 11), 4, report=done.append)
  assert done == [4, 8, 11]


def test_unreadable_videos_are_listed_with_the_reason(source):
  predictions = predict(Some(source, 6, unreadable=(1, 5)), 4)
  assert predictions.readable.tolist() == [True, False, True, True, True, False]
  for i in (1, 5):
    assert source[i]['id'] in predictions.errors[i]
    assert not predictions.probabilities[i].any()
    assert not predictions.logits[i].any()
  others = predict(Some(source, 6), 4)
  np.testing.assert_array_equal(
    predictions.probabilities[predictions.readable], others.probabilities[predictions.readable]
  )


def test_only_unreadable_videos_is_an_error(source):
  predictions = predict(Some(source, 3, unreadable=(0, 1, 2)), 4)
  assert not predictions.readable.any()
  assert predictions.logits.shape == (3, 4, 8)
  assert not predictions.probabilities.any()


def of(logits, average='probabilities', errors=None):
  count = len(logits)
  errors = np.asarray([''] * count) if errors is None else errors
  return Predictions(np.arange(count), np.arange(count), np.asarray(logits, np.float32), errors, average)


def test_ties_go_to_the_lowest_class():
  predictions = of([[[1, 2, 1, 0]], [[3, 3, 3, 3]], [[0, 5, 0, 5]]])
  assert predictions.ranked(3).tolist() == [[1, 0, 2], [0, 1, 2], [1, 3, 0]]
  assert predictions.ranked(9).shape == (3, 4)


def test_ranking_is_a_stable_sort():
  predictions = of(np.random.default_rng(0).integers(0, 4, (300, 1, 9)))
  expected = np.argsort(-predictions.probabilities, axis=1, kind='stable')
  np.testing.assert_array_equal(predictions.ranked(9), expected)


def test_averages_of_views():
  """Averages of probabilities and of logits against their definitions; many videos, and large logits."""
  logits = 30 * np.random.default_rng(0).normal(size=(1500, 3, 5)).astype(np.float32)
  views = np.exp(np.float64(logits))
  views /= views.sum(-1, keepdims=True)
  np.testing.assert_allclose(of(logits).probabilities, views.mean(1), rtol=1e-9, atol=1e-300)
  geometric = np.exp(np.log(views).mean(1))
  expected = geometric / geometric.sum(-1, keepdims=True)
  np.testing.assert_allclose(of(logits, 'logits').probabilities, expected, rtol=1e-9, atol=1e-300)
  assert (of(logits).ranked(1) != of(logits, 'logits').ranked(1)).any()
  assert np.isfinite(of(1e4 * logits).probabilities).all()


def test_protocol_names():
  assert EvaluationConfig().name == 'validation-1x3'
  assert EvaluationConfig(split='test', clips=4, crops=1).name == 'test-4x1'
  assert EvaluationConfig(views='10x3', average='logits').name == 'validation-10x3-logits'


def test_config_is_parsed_from_a_protocol_name():
  assert EvaluationConfig(views='4x3') == EvaluationConfig(clips=4, crops=3)
  assert EvaluationConfig(clips=7, views='2x1') == EvaluationConfig(clips=2, crops=1)


def test_a_batch_size_that_is_not_divisible_by_the_devices_is_rounded_up():
  config, changes = resolve(Config(evaluation=EvaluationConfig(batch_size=64)), devices=8)
  assert (config.evaluation.batch_size, changes) == (64, [])
  config, changes = resolve(Config(evaluation=EvaluationConfig(batch_size=9)), devices=8)
  assert config.evaluation.batch_size == 16
  assert describe(changes) == 'config.evaluation.batch_size: 9 -> 16 (a multiple of 8 devices)'


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    ({'views': '4'}, r"evaluation\.views must be clips x crops, such as '4x3', not '4'"),
    ({'views': '0x3'}, r'evaluation\.clips must be in \[1, 1000\], not 0'),
    ({'average': 'votes'}, r"evaluation\.average must be one of \['probabilities', 'logits'\], not 'votes'"),
  ],
)
def test_invalid_protocols_are_refused(fields, match):
  with pytest.raises(UserError, match=match):
    EvaluationConfig(**fields)


@pytest.mark.parametrize(
  ('sizes', 'crops', 'text'),
  [
    ([(1920, 1080)] * 3, 1, '3 of 3 videos are cut: evaluation.crops=1 shows 56 % of their frames'),
    ([(1920, 1080)] * 3, 2, ''),
    ([(1920, 540)] * 2 + [(100, 100)], 2, '2 of 3 videos are cut: evaluation.crops=2 shows 56 % of their frames'),
    ([(240, 320)] * 3, 1, ''),
    ([(100, 100)] * 2 + [(1920, 540)], 1, ''),
  ],
)
def test_crops_that_cut_most_videos_are_mentioned(sizes, crops, text):
  found = describe_crops(np.array(sizes), (64, 64), crops)
  assert found.startswith(text) if text else found == ''


def test_the_crops_that_are_suggested_show_all_of_the_frame():
  tall = np.array([(1920, 540)])
  found = describe_crops(tall, (64, 64), 1)
  suggested = int(re.search(r'--config.evaluation.crops=(\d+)', found)[1])
  assert describe_crops(tall, (64, 64), suggested) == ''
  assert len(view_boxes(CLIP, 1920, 540, suggested)) == suggested == 4
