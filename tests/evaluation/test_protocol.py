"""Evaluation: every video once, whatever the batch and the devices, and the unreadable ones by name."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from mevit_jax.data import datasets, pipeline
from mevit_jax.data.clips import ClipConfig
from mevit_jax.evaluation.protocol import EvaluationConfig, Predictions, predict_all
from mevit_jax.parallel.hosts import host_rows
from mevit_jax.parallel.mesh import MeshConfig, make_mesh
from mevit_jax.parallel.placement import by_rows

CLIP = ClipConfig(frames=2, size=(8, 8), stride=3, short_side=(8, 8))
WEIGHTS = np.random.default_rng(0).normal(size=(2 * 8 * 8 * 3, 8)).astype(np.float32)


def step(params, video):
  """A model that any change of a pixel changes."""
  pixels = video.reshape(*video.shape[:2], -1) / 255 - 0.5  # b v thwc
  return jax.nn.softmax(pixels @ params).mean(1)


@dataclasses.dataclass(frozen=True)
class Some:
  """The first videos of another source; the `dead` ones are unreadable."""

  source: object
  count: int
  dead: tuple[int, ...] = ()

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    example = self.source[index]
    return {**example, 'video': b'no video'} if index in self.dead else example


@pytest.fixture(scope='module')
def source(shapes_dir):
  return datasets.open_split(shapes_dir, 'moving_shapes', 'validation').source


def predict(source, batch_size, devices=1, report=lambda done: None):
  rows = by_rows(make_mesh(MeshConfig(data=devices)))
  batches = pipeline.eval_batches(
    source, CLIP, crops=2, clips=2, batch_size=batch_size, rows=host_rows(rows, batch_size)
  )
  try:
    return predict_all(jax.jit(step, out_shardings=rows), WEIGHTS, batches, rows, report)
  finally:
    batches.close()


@pytest.mark.parametrize(
  ('count', 'batch_size', 'devices'), [(11, 4, 1), (11, 8, 8), (11, 16, 8), (8, 8, 8), (1, 8, 4)]
)
def test_every_video_once(source, count, batch_size, devices):
  predictions = predict(Some(source, count), batch_size, devices)
  assert collections.Counter(predictions.ids.tolist()) == {source[i]['id']: 1 for i in range(count)}
  assert predictions.labels.tolist() == [source[i]['label'] for i in range(count)]
  assert predictions.readable.all()
  one_by_one = predict(Some(source, count), 1)
  np.testing.assert_allclose(predictions.probabilities, one_by_one.probabilities, rtol=1e-6, atol=1e-7)
  np.testing.assert_array_equal(predictions.ranked(1), one_by_one.ranked(1))
  np.testing.assert_allclose(predictions.probabilities.sum(1), 1, rtol=1e-6)


def test_it_says_how_far_it_is(source):
  done = []
  predict(Some(source, 11), 4, report=done.append)
  assert done == [4, 8, 11]


def test_an_unreadable_video_is_named_with_the_reason(source):
  predictions = predict(Some(source, 6, dead=(1, 5)), 4)
  assert predictions.readable.tolist() == [True, False, True, True, True, False]
  for i in (1, 5):
    assert source[i]['id'] in predictions.errors[i]
    assert not predictions.probabilities[i].any()
  others = predict(Some(source, 6), 4)
  np.testing.assert_array_equal(
    predictions.probabilities[predictions.readable], others.probabilities[predictions.readable]
  )


def test_nothing_that_can_be_read(source):
  predictions = predict(Some(source, 3, dead=(0, 1, 2)), 4)
  assert not predictions.readable.any()
  assert predictions.probabilities.shape == (3, 8)


def test_ties_go_to_the_lowest_class():
  probabilities = np.asarray([[0.3, 0.4, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.5, 0.0, 0.5]], np.float32)
  nothing = np.zeros(3, int)
  predictions = Predictions(nothing, nothing, probabilities, np.asarray(['', '', '']))
  assert predictions.ranked(3).tolist() == [[1, 0, 2], [0, 1, 2], [1, 3, 0]]
  assert predictions.ranked(9).shape == (3, 4)


def test_name():
  assert EvaluationConfig().name == 'validation-1x3'
  assert EvaluationConfig(split='test', clips=4, crops=1).name == 'test-4x1'
