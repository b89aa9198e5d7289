import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest

from mevit_jax.config.data import ClipConfig
from mevit_jax.data import pipeline
from mevit_jax.data.pipeline import eval_batches, train_batches
from mevit_jax.data.sampling import Sampling
from mevit_jax.errors import UserError
from mevit_jax.video.decode import VideoError, decode
from tests.helpers.videos import make_video, picture

CLIP = ClipConfig(frames=3, size=(16, 16), stride=4, short_side=(20, 24))
VIDEO = make_video([picture(i) for i in range(20)])
LABELS = np.array([0, 0, 0, 1, 0, 0, 0])
REPEATED = {'repeats': 3, 'batch_size': 12, 'balance': 0.6, 'labels': LABELS}


@dataclass(frozen=True)
class Videos:
  """Source whose examples share one video; `unreadable` ones are empty files, and `broken` ones raise when read."""

  length: int = 7
  unreadable: tuple[int, ...] = ()
  broken: tuple[int, ...] = ()
  video: bytes = field(default=VIDEO, repr=False)

  def __len__(self):
    return self.length

  def __getitem__(self, index):
    if index in self.broken:
      raise OSError('the disk is on fire')
    data = b'' if index in self.unreadable else self.video
    return {
      'video': data,
      'label': index * 10,
      'id': f'clip{index}',
      'num_frames': 20,
      'duration': 20 / 30,
    }


def train(steps=4, source=None, **changes):
  options = {'batch_size': 4, 'seed': 5} | changes
  sampling = Sampling(**{name: options.pop(name) for name in Sampling._fields if name in options})
  batches = train_batches(Videos() if source is None else source, CLIP, sampling, **options)
  try:
    return list(itertools.islice(batches, steps))
  finally:
    batches.close()


def evaluate(source=None, **changes):
  options = {'batch_size': 4, 'crops': 3} | changes
  batches = eval_batches(Videos() if source is None else source, CLIP, **options)
  try:
    return list(batches)
  finally:
    batches.close()


def assert_equal(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def column(batches, name):
  return np.concatenate([batch[name] for batch in batches])


def test_every_epoch_has_every_video_in_a_new_order():
  batches = train(steps=14)
  for batch in batches:
    types = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert types == {
      'video': ((4, 3, 16, 16, 3), 'uint8'),
      'label': ((4,), 'int32'),
      'index': ((4,), 'int64'),
      'used': ((4,), 'int64'),
      'error': ((4,), 'str32'),  # length 1: all are empty
    }
  index = column(batches, 'index').reshape(8, 7)  # epochs examples
  np.testing.assert_array_equal(np.sort(index, axis=1), np.tile(np.arange(7), (8, 1)))
  assert len({tuple(epoch) for epoch in index.tolist()}) > 4  # every epoch has a different order
  np.testing.assert_array_equal(column(batches, 'used'), index.ravel())
  np.testing.assert_array_equal(column(batches, 'label'), index.ravel() * 10)
  clips = column(batches, 'video')
  assert len({clip.tobytes() for clip in clips}) == len(clips)  # a different crop each time


def test_batches_depend_on_the_seed():
  assert_equal(train(), train())
  assert not np.array_equal(column(train(), 'index'), column(train(seed=6), 'index'))


@pytest.mark.parametrize('options', [{}, REPEATED], ids=['plain', 'repeated'])
@pytest.mark.parametrize('processes', [1, 2, 4, 12])
def test_slices_of_all_processes_form_the_batch(processes, options):
  """Includes slices that begin within a block of repeats."""
  share = 12 // processes
  options = {'batch_size': 12, **options}
  parts = [train(rows=slice(h * share, (h + 1) * share), **options) for h in range(processes)]
  joined = [
    {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)
  ]
  assert_equal(joined, train(**options))


@pytest.mark.parametrize('options', [{}, REPEATED], ids=['plain', 'repeated'])
@pytest.mark.parametrize('step', [1, 2, 7])
def test_a_restart_continues_with_the_next_batch(step, options):
  assert_equal(train(steps=3, start_step=step, **options), train(steps=step + 3, **options)[step:])
  rows = slice(1, 3)
  assert_equal(train(3, start_step=step, rows=rows, **options), train(step + 3, rows=rows, **options)[step:])


def test_batches_do_not_depend_on_workers():
  source = Videos(unreadable=(2, 5))
  alone = train(6, source, **REPEATED)
  assert_equal(train(6, source, workers=1, **REPEATED), alone)
  assert_equal(train(4, source, workers=2, start_step=2, **REPEATED), alone[2:])
  assert_equal(evaluate(source, workers=2), evaluate(source))


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2, 4])
@pytest.mark.parametrize('options', [{}, REPEATED], ids=['plain', 'repeated'])
def test_any_number_of_workers(workers, options):
  source = Videos(unreadable=(2, 5))
  alone = train(20, source, **options)
  assert_equal(train(13, source, workers=workers, start_step=7, **options), alone[7:])
  rows = [train(9, source, workers=workers, rows=slice(start, start + 2), **options) for start in (0, 2)]
  for a, b, both in zip(*rows, alone, strict=False):
    for name in both:
      np.testing.assert_array_equal(np.concatenate([a[name], b[name]]), both[name][:4], err_msg=name)


# Repeated augmentation and class balance.


def test_repeats_are_adjacent_and_decoded_once(monkeypatch):
  decoded = []

  def count(data, times, num_frames):
    decoded.append(times)
    return decode(data, times, num_frames)

  monkeypatch.setattr(pipeline, 'decode', count)
  monkeypatch.setattr(pipeline.os, 'sched_getaffinity', lambda _: [0])  # a single prefetch thread
  once = column(train(7, batch_size=4), 'index')  # the draws
  decoded.clear()
  batches = train(7, repeats=3, batch_size=12)
  assert 28 <= len(decoded) <= 28 + 2 * 4 + 1
  index = column(batches, 'index').reshape(-1, 3, 2)  # blocks repeats pair
  np.testing.assert_array_equal(index, np.repeat(once.reshape(-1, 1, 2), 3, axis=1))
  np.testing.assert_array_equal(column(batches, 'label'), index.ravel() * 10)
  clips = column(batches, 'video')
  assert len({clip.tobytes() for clip in clips}) == len(clips)  # a different crop each time


def test_all_repeats_are_crops_of_the_same_frames():
  uncropped = ClipConfig(frames=3, size=(48, 64), stride=4, short_side=(48, 48))  # the crop is the entire frame
  batches = [pipeline.train_batches(Videos(), uncropped, Sampling(5, r), batch_size=b) for b, r in ((4, 1), (12, 3))]
  plain, repeated = (next(iterator)['video'] for iterator in batches)
  for iterator in batches:
    iterator.close()
  blocks = repeated.reshape(2, 3, 2, *repeated.shape[1:])  # blocks repeats pair t h w 3
  for k in range(3):
    np.testing.assert_array_equal(blocks[:, k].reshape(plain.shape), plain)


def test_balanced_classes_are_drawn_equally_often():
  index = column(train(14, balance=1.0, labels=LABELS), 'index').reshape(8, 7)  # epochs draws
  for epoch in index:
    assert np.bincount(LABELS[epoch]).tolist() == [4, 3]  # the only video of class 1 is drawn three times
  assert set(index.ravel()) == set(range(7))


def test_a_dataset_can_be_smaller_than_a_batch():
  batches = train(6, Videos(length=2), batch_size=5)
  assert np.bincount(column(batches, 'index')).tolist() == [15, 15]
  assert train(1, Videos(length=1))[0]['index'].tolist() == [0] * 4


def test_unreadable_videos_are_replaced_and_reported():
  batches = train(14, Videos(unreadable=(2, 5)))
  index, used = column(batches, 'index'), column(batches, 'used')
  unreadable = np.isin(index, (2, 5))
  assert unreadable.sum() == 16  # sampled once per epoch, like all others
  assert not np.isin(used, (2, 5)).any()
  np.testing.assert_array_equal(used[~unreadable], index[~unreadable])
  assert len(set(used[unreadable].tolist())) > 2
  errors = column(batches, 'error')
  assert set(errors[~unreadable]) == {''}
  for sampled, error in zip(index[unreadable], errors[unreadable], strict=True):
    first, *more = error.splitlines()
    assert first == f"video 'clip{sampled}': the file is empty"
    assert set(more) <= {f"video 'clip{other}': the file is empty" for other in (2, 5)}
  np.testing.assert_array_equal(column(batches, 'label'), used * 10)


@pytest.mark.parametrize('workers', [0, 1])
def test_errors_name_the_video(workers):
  with pytest.raises(VideoError, match=r"20 consecutive videos.*'clip1': the file is empty"):
    train(source=Videos(length=2, unreadable=(0, 1)), workers=workers)
  with pytest.raises(UserError, match='dataset index 0 cannot be read: OSError: the disk is on fire'):
    train(source=Videos(length=1, broken=(0,)), workers=workers)


@pytest.mark.parametrize(
  ('failure', 'raised', 'message'),
  [
    (MemoryError('no room'), UserError, "video 'clip0': not enough memory to decode it; use fewer data.workers"),
    (TypeError('two\nlines'), RuntimeError, "video 'clip0': TypeError: two lines"),
  ],
)
def test_other_exceptions_are_raised(monkeypatch, failure, raised, message):
  def fail(*_):
    raise failure

  monkeypatch.setattr(pipeline, 'decode', fail)
  with pytest.raises(raised, match=message):
    evaluate()


def test_every_example_is_evaluated_once():
  batches = evaluate(Videos(length=7, unreadable=(3,)))
  assert [batch['video'].shape for batch in batches] == [(4, 3, 3, 16, 16, 3)] * 2
  assert column(batches, 'index').tolist() == [0, 1, 2, 3, 4, 5, 6, -1]
  assert column(batches, 'label').tolist() == [0, 10, 20, 30, 40, 50, 60, -1]
  assert column(batches, 'mask').tolist() == [True] * 7 + [False]
  assert column(batches, 'id').tolist() == [f'clip{i}' for i in range(7)] + ['']
  errors = column(batches, 'error').tolist()
  assert errors.pop(3) == "video 'clip3': the file is empty"
  assert errors == [''] * 7
  video = column(batches, 'video')
  assert not video[[3, 7]].any()
  assert video[[0, 1, 2, 4, 5, 6]].any(axis=(1, 2, 3, 4, 5)).all()
  types = [batches[0][name].dtype.name for name in ('label', 'index', 'mask')]
  assert types == ['int32', 'int64', 'bool']


def test_evaluation_does_not_depend_on_slices_and_batch_sizes():
  complete = evaluate()
  parts = [evaluate(rows=slice(start, start + 2)) for start in (0, 2)]
  for name in complete[0]:
    halves = [np.concatenate([a[name], b[name]]) for a, b in zip(*parts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(halves), column(complete, name))
    other = column(evaluate(batch_size=3), name)
    np.testing.assert_array_equal(other[:7], column(complete, name)[:7])


def test_views_are_ordered_by_clip_and_crop():
  def first_views(clips, crops):
    return evaluate(Videos(length=1), batch_size=1, clips=clips, crops=crops)[0]['video'][0]

  views = first_views(2, 3)
  assert views.shape == (6, 3, 16, 16, 3)
  assert len({view.tobytes() for view in views}) == 6
  np.testing.assert_array_equal(views[[1, 4]], first_views(2, 1))  # the center crop of both clips
  np.testing.assert_array_equal(first_views(3, 3)[3:6], first_views(1, 3))  # the center clip


def test_invalid_arguments_are_rejected():
  with pytest.raises(UserError, match='no examples'):
    train(source=Videos(length=0))
  with pytest.raises(UserError, match='batch_size'):
    train(batch_size=0)
  with pytest.raises(
    UserError, match=r'batch_size 8 is not divisible by 6 \(2 videos x data\.repeated_augmentation 3\)'
  ):
    train(batch_size=8, repeats=3)
