"""Shards: written and read back, resumed after an interruption, refused when incomplete."""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from mevit_jax.datasets import builders, shards, tasks
from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError

NAMES = ('cat', 'dog')


class Toys(builders.VideoBuilder):
  """Builder with random bytes as videos, which these tests do not decode."""

  made: ClassVar[list[int]] = []
  breaks_at: int | None = None

  @staticmethod
  def make(item):
    if item == Toys.breaks_at:
      raise UserError(f'toy {item} broke')
    Toys.made.append(item)
    return {
      'video': bytes([item % 256]) * 3 + b'\0\0',
      'label': NAMES[item % 2],
      'id': f'toy/é/{item}',
      'num_frames': item,
      'fps': 29.97,
      'duration': 0.5,
      'height': 4,
      'width': 6,
    }


@pytest.fixture(autouse=True)
def _fresh():
  Toys.made, Toys.breaks_at = [], None


def toys(data_dir, train=10, validation=3, name='toys', class_names=NAMES):
  rows = {'train': range(train), 'validation': range(100, 100 + validation)}
  return Toys(
    data_dir, name, class_names, {split: shards.group_items(ids, lambda _: 1, 4) for split, ids in rows.items()}
  )


def test_written_examples_are_read_back(tmp_path):
  progress = []
  mark = shards.write(toys(tmp_path), progress=lambda *at: progress.append(at))
  split = datasets.open_split(tmp_path, 'toys', 'train')
  assert (len(split), split.class_names, split.fingerprint) == (10, NAMES, mark)
  assert (split.name, split.dataset) == ('train', 'toys')
  for i in range(10):
    example, made = split.source[i], Toys.make(i)
    assert example.pop('fps') == pytest.approx(made.pop('fps'))
    assert example == {**made, 'label': i % 2}
    assert {type(value) for value in example.values()} <= {bytes, int, str, float}
  assert progress == [(0, 13), (4, 13), (8, 13), (10, 13), (13, 13)]
  assert len(datasets.open_split(tmp_path, 'toys', 'validation')) == 3


def test_a_source_can_be_pickled(tmp_path):
  shards.write(toys(tmp_path))
  source = datasets.open_split(tmp_path, 'toys', 'train').source
  source[0]  # open files are not pickled
  assert pickle.loads(pickle.dumps(source))[7] == source[7]


def test_writing_resumes_at_the_first_missing_shard(tmp_path):
  Toys.breaks_at = 9
  with pytest.raises(UserError, match='toy 9 broke'):
    shards.write(toys(tmp_path))
  with pytest.raises(UserError, match=r'not complete.*run the same prepare command again'):
    datasets.open_split(tmp_path, 'toys', 'train')
  Toys.breaks_at, Toys.made = None, []
  mark = shards.write(toys(tmp_path))
  assert sorted(Toys.made) == [8, 9, 100, 101, 102]  # 0-3 and 4-7 were complete
  assert mark == shards.write(toys(tmp_path / 'other'))
  again, fresh = (
    sorted(path.name for path in (d / 'toys' / '1.0.0').iterdir()) for d in (tmp_path, tmp_path / 'other')
  )
  assert again == fresh


def test_truncated_shards_and_those_of_another_plan_are_written_again(tmp_path):
  Toys.breaks_at = 102
  with pytest.raises(UserError):
    shards.write(toys(tmp_path))
  directory = tmp_path / 'toys' / '1.0.0'
  truncated = directory / 'toys-train.array_record-00001-of-00003'
  truncated.write_bytes(truncated.read_bytes()[:100])
  Toys.breaks_at, Toys.made = None, []
  shards.write(toys(tmp_path))
  assert sorted(Toys.made) == [4, 5, 6, 7, 100, 101, 102]

  Toys.made = []
  shards.write(toys(tmp_path, train=5))
  assert sorted(Toys.made) == [0, 1, 2, 3, 4]
  assert len(list(directory.glob('*train.array_record*'))) == 2
  assert [e['num_frames'] for e in datasets.open_split(tmp_path, 'toys', 'train').source] == [0, 1, 2, 3, 4]


def test_labels_of_a_partial_dataset_are_replaced_when_classes_change(tmp_path):
  Toys.breaks_at = 102
  with pytest.raises(UserError):
    shards.write(toys(tmp_path))
  Toys.breaks_at = None
  shards.write(toys(tmp_path, class_names=('bird', *NAMES)))
  split = datasets.open_split(tmp_path, 'toys', 'train')
  assert [split.class_names[e['label']] for e in split.source] == [NAMES[i % 2] for i in range(10)]


def test_shards_do_not_depend_on_the_number_of_processes(tmp_path):
  """Uses a builder of the package: spawned processes cannot import test modules."""
  from mevit_jax.datasets.builders import moving_shapes

  written = []
  for workers in (0, 2):
    builder = moving_shapes.build(tmp_path / str(workers), {'train': 9, 'validation': 8}, frames=2, size=16)
    shards.write(builder, functools.partial(tasks.run_local, workers=workers))
    written.append({path.name: path.read_bytes() for path in Path(builder.data_path).rglob('*') if path.is_file()})
  assert written[0] == written[1]


def test_full_disk_is_a_one_line_error(tmp_path, monkeypatch):
  class Full(tasks.ArrayRecordWriter):
    def close(self):
      super().close()
      raise RuntimeError('write() failed: No space left on device; writing somewhere; at byte 4')

  monkeypatch.setattr(tasks, 'ArrayRecordWriter', Full)
  with pytest.raises(UserError, match=r'00000-of-00003 cannot be written: .*No space left on device$'):
    shards.write(toys(tmp_path))
  assert not list((tmp_path / 'toys' / '1.0.0').glob('*.tmp'))


def test_a_crash_while_drawing_is_an_error(tmp_path, monkeypatch):
  """If a process crashes while it draws a video, the next process of the shard raises an error."""
  died = iter([True])

  def run_in_processes(function, calls, workers):
    while calls:
      call = calls.popleft()
      if next(died, None):
        (call[0] / shards.IN_PROGRESS / f'{call[1].name}.current').write_text('1 0.0')
        yield call, tasks.CRASHED
      else:
        yield call, function(*call)

  monkeypatch.setattr(tasks, 'run_in_processes', run_in_processes)
  with pytest.raises(UserError, match=r'a process that made 1 ended: the decoder crashed.*again to continue'):
    shards.write(toys(tmp_path))


def test_a_crash_outside_of_an_example_is_a_one_line_error(tmp_path, monkeypatch):
  def run_in_processes(function, calls, workers):
    yield calls.popleft(), tasks.CRASHED

  monkeypatch.setattr(tasks, 'run_in_processes', run_in_processes)
  with pytest.raises(UserError, match='died, possibly because memory ran out; run the command again'):
    shards.write(toys(tmp_path))


def test_only_the_lost_shard_is_written_again(tmp_path):
  mark = shards.write(toys(tmp_path))
  directory = tmp_path / 'toys' / '1.0.0'
  before = {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()}
  assert shards.find_damaged(directory) == []
  gone, truncated = (
    directory / f'toys-{part}'
    for part in ('train.array_record-00002-of-00003', 'validation.array_record-00000-of-00001')
  )
  gone.unlink()
  truncated.write_bytes(truncated.read_bytes()[:1000])
  assert shards.find_damaged(directory) == [gone.name, truncated.name]
  Toys.made = []
  assert shards.write(toys(tmp_path)) == mark
  assert sorted(Toys.made) == [8, 9, 100, 101, 102]
  assert {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()} == before
  Toys.made = []
  with shards.open_for_writing(directory, overwrite=True) as new:
    assert shards.write(toys(new.parents[1])) == mark
  assert len(Toys.made) == 13
  assert {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()} == before


def test_labels_are_read_without_reading_records(tmp_path):
  shards.write(toys(tmp_path))
  directory = tmp_path / 'toys' / '1.0.0'
  split = datasets.open_split(tmp_path, 'toys', 'train')
  for path in directory.glob('*.array_record-*'):
    path.unlink()
  assert split.labels.dtype == np.int32
  assert split.labels.tolist() == [i % 2 for i in range(10)]
  assert datasets.read_labels(directory, 'validation').tolist() == [0, 1, 0]
  rows = list(datasets.read_videos(directory, 'train'))
  assert [(row['id'], row['num_frames'], row['bytes']) for row in rows[:2]] == [
    ('toy/é/0', '0', '5'),
    ('toy/é/1', '1', '5'),
  ]
  table = directory / 'videos.csv'
  table.write_text(''.join(table.read_text('utf-8').splitlines(keepends=True)[:5]), 'utf-8')
  other = dataclasses.replace(split)
  with pytest.raises(UserError, match=r'videos\.csv is damaged: it has 4 train videos, but the shards'):
    _ = other.labels


@pytest.mark.parametrize('text', ['{"fingerprint": "x", "videos": {}}', '{"format": 99}', '{'])
def test_dataset_of_another_format_version_is_refused(tmp_path, text):
  shards.write(toys(tmp_path))
  (tmp_path / 'toys' / '1.0.0' / 'fingerprint.json').write_text(text)
  with pytest.raises(
    UserError, match=r'1\.0\.0 (has format (1|99), but this program reads format 3|is damaged .*); prepare it again'
  ):
    datasets.open_split(tmp_path, 'toys', 'train')


def test_the_first_difference_of_fingerprints_is_shown():
  before = {'class_names': list('abcdefg'), 'fingerprint': 'f' * 64, 'videos': {'train': 5, 'test': 2}}
  assert datasets.differences(before, before) == []
  now = {'class_names': list('abxyzw'), 'fingerprint': 'e' * 64, 'videos': {'train': 5, 'validation': 1}}
  assert datasets.differences(before, now) == [
    'number of classes: 7 -> 6',
    "class 2: 'c' -> 'x'",
    "class 3: 'd' -> 'y'",
    "class 4: 'e' -> 'z'",
    '2 more classes differ',
    'test videos: 2 -> 0',
    'validation videos: 0 -> 1',
    'dataset fingerprint: ffffffffffff -> eeeeeeeeeeee',
  ]
  del before['videos']  # as in older checkpoints
  assert len(datasets.differences(before, now)) == 6


def test_fingerprint_covers_names_ids_labels_bytes_and_encoding():
  rows = {'train': [('a', 0, 'x'), ('b', 1, 'y')], 'test': [('c', 0, 'z')]}
  mark = shards.fingerprint(NAMES, rows)
  assert mark == shards.fingerprint(list(NAMES), {'test': iter(rows['test']), 'train': iter(rows['train'])}, {})
  assert mark == hashlib.sha256(json.dumps([NAMES, rows], sort_keys=True).encode()).hexdigest()
  others = [
    (('cat', 'cow'), rows),
    (NAMES, {**rows, 'train': [('a', 0, 'x'), ('b', 0, 'y')]}),
    (NAMES, {**rows, 'train': [('a', 0, 'x'), ('b', 1, 'w')]}),
    (NAMES, {**rows, 'train': [('A', 0, 'x'), ('b', 1, 'y')]}),
    (NAMES, {'train': [*rows['train'], *rows['test']]}),
  ]
  encoded = [shards.fingerprint(NAMES, rows, {'kind': 'h264', 'quality': quality}) for quality in (20, 30)]
  assert len({mark, *encoded, *(shards.fingerprint(*other) for other in others)}) == 8


def test_fingerprint_is_read_without_the_data(tmp_path):
  mark = shards.write(toys(tmp_path), arguments={'seed': 3})
  directory = tmp_path / 'toys' / '1.0.0'
  assert datasets.read_arguments(directory) == {'seed': 3}
  for path in directory.glob('*.array_record-*'):
    os.truncate(path, path.stat().st_size - 1)
  with pytest.raises(UserError, match=r'is damaged: train has \d+ bytes, not \d+; run its prepare command again'):
    datasets.open_split(tmp_path, 'toys', 'train')
  for path in directory.glob('*.array_record-*'):
    path.unlink()
  assert datasets.read_fingerprint(directory) == (mark, {'train': 10, 'validation': 3})
  with pytest.raises(UserError, match=r'is damaged: toys-train.* does not exist; run its prepare command'):
    datasets.open_split(tmp_path, 'toys', 'train')


def test_missing_datasets_and_splits_are_errors_that_list_the_existing_ones(tmp_path):
  with pytest.raises(UserError, match=r"has no dataset 'toys'; it has: none"):
    datasets.open_split(tmp_path, 'toys', 'train')
  shards.write(toys(tmp_path))
  with pytest.raises(
    UserError, match=r"no dataset 'ducks'; it has: toys; .*prepare video_folder ROOT --name=ducks --data_dir="
  ):
    datasets.open_split(tmp_path, 'ducks', 'train')
  with pytest.raises(UserError, match='mevit prepare moving_shapes --data_dir='):
    datasets.open_split(tmp_path, 'moving_shapes', 'train')
  with pytest.raises(UserError, match=r"no split 'test'; it has: train, validation"):
    datasets.open_split(tmp_path, 'toys', 'test')
  (tmp_path / 'toys' / '1.0.0' / 'dataset_info.json').write_text('{')
  with pytest.raises(UserError, match=r'1\.0\.0 is damaged: .*; prepare it again'):
    datasets.open_split(tmp_path, 'toys', 'train')


def test_the_newest_complete_version_is_read(tmp_path):
  shards.write(toys(tmp_path, train=5))
  old = tmp_path / 'toys' / '1.0.0'
  new = tmp_path / 'toys' / '1.10.0'
  new.mkdir()
  for path in old.iterdir():
    if path.is_file():
      (new / path.name).write_bytes(path.read_bytes().replace(b'"1.0.0"', b'"1.10.0"'))
  (tmp_path / 'toys' / '1.9.0').mkdir()  # incomplete
  assert '1.10.0' in str(datasets._newest_version(tmp_path, 'toys'))
  assert len(datasets.open_split(tmp_path, 'toys', 'train')) == 5


def test_reading_and_writing_import_neither_tensorflow_nor_jax(tmp_path):
  program = f"""
import sys
from mevit_jax.datasets import reader as datasets
from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import moving_shapes
shards.write(moving_shapes.build({str(tmp_path)!r}, {{'train': 8}}, frames=2, size=16))
datasets.open_split({str(tmp_path)!r}, 'moving_shapes', 'train').source[3]
print([name for name in ('tensorflow', 'jax', 'flax') if name in sys.modules])
"""
  run = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
  assert json.loads(run.stdout) == []
