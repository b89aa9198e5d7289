"""Video files: present and missing files, examples, unusable videos, and the steps from a listing to a dataset."""

import dataclasses
import functools
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from mevit_jax.datasets import preparation, tasks
from mevit_jax.datasets import reader as datasets
from mevit_jax.datasets.builders import files, moving_shapes
from mevit_jax.datasets.builders.files import ListedVideo, Listing
from mevit_jax.errors import UserError
from mevit_jax.video.decode import decode
from mevit_jax.video.transcode import Encoding
from tests.helpers import trouble

NAMES = ('cats', 'dogs')


def video(seed: int, frames: int = 6) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), np.uint8)
  return moving_shapes.encode(pixels)


@pytest.fixture
def root(tmp_path):
  """Folder with six training and four validation videos."""
  for i in range(10):
    (tmp_path / f'{i}.mp4').write_bytes(video(i))
  return tmp_path


def listing(root: Path, count: int = 10, names: tuple[str, ...] = NAMES) -> Listing:
  found = [
    ListedVideo(f'v{i}', str(root / f'{i}.mp4'), NAMES[i % 2], 'train' if i < 6 else 'validation') for i in range(count)
  ]
  return Listing(found, names)


def prepare(root: Path, what: Listing, data_dir: Path | None = None, **changes):
  options = preparation.Options(functools.partial(tasks.run_local, workers=0), lambda what: lambda done, total: None)
  directory = (data_dir or root / 'data') / 'pets' / '1.0.0'
  return preparation.prepare(directory, what, {'kind': 'test'}, dataclasses.replace(options, **changes))


def item(path: Path, **changes) -> files.VideoFile:
  [one], missing = files.find_files(Listing([ListedVideo('v', str(path), 'cats', 'train')], NAMES))
  assert not missing
  return dataclasses.replace(one, **changes)


made = functools.partial(files.make_example, encoding=Encoding('keep'))


def test_listing_counts_present_and_missing_files(root):
  gone = [ListedVideo('gone', str(root / 'gone.mp4'), 'cats', 'train'), ListedVideo('never', '', 'dogs', 'test')]
  what = Listing([*listing(root).videos, *gone, ListedVideo('in', str(root / '0.mp4' / 'x.mp4'), '', 'test')], NAMES)
  items, missing = files.find_files(what)
  assert [each.video.id for each in items] == [f'v{i}' for i in range(10)]
  assert [each.num_bytes for each in items] == [(root / f'{i}.mp4').stat().st_size for i in range(10)]
  assert [each.id for each in missing] == ['gone', 'never', 'in']


@pytest.mark.parametrize(
  ('found', 'message'),
  [
    (
      [ListedVideo('a', '/x', 'cats', ''), ListedVideo('a', '/y', 'cats', '')],
      "two videos have the id 'a': /x and /y",
    ),
    ([ListedVideo('a', '/x', 'newts', '')], "a has the class 'newts', which is not in the list of classes"),
    (
      [ListedVideo('a', '', 'cats', ''), ListedVideo('b', '/x', 'cats', '')],
      r'all 2 listed videos are missing .*example /x\)',
    ),
  ],
)
def test_invalid_listings_are_refused(found, message):
  with pytest.raises(UserError, match=message):
    files.find_files(Listing(found, NAMES))


def test_every_file_becomes_an_example_or_is_reported_unusable(tmp_path):
  good = video(0)
  contents = {'good.mp4': good, 'truncated.mp4': good[: len(good) // 2], 'text.mp4': b'hello', 'empty.mp4': b''}
  for name, data in contents.items():
    (tmp_path / name).write_bytes(data)
  first, *others = (made(item(tmp_path / name)) for name in contents)
  assert (first['num_frames'], first['height'], first['width'], first['video']) == (6, 16, 16, good)
  assert first['fps'] == pytest.approx(30)
  assert not first['damage']
  assert all(each['unusable'] and '\n' not in each['unusable'] for each in others)


def test_a_video_that_exceeds_the_time_limit_is_unusable(root):
  unusable = made(item(root / '0.mp4'), limits=files.Limits(time_limit=1e-9))['unusable']
  assert unusable == 'takes longer than 1e-09 s to decode'


def test_a_file_that_is_too_large_is_not_read(tmp_path):
  with (tmp_path / 'long.mp4').open('wb') as file:
    file.truncate(files.MAX_BYTES + 1)
  assert 'cut it into clips' in made(item(tmp_path / 'long.mp4'))['unusable']


def test_limits_are_named(root):
  unusable = made(item(root / '0.mp4'), limits=files.Limits(max_bytes=1000))['unusable']
  assert unusable.endswith('more than the limit of 1,000 bytes: cut it into clips')
  unusable = made(item(root / '0.mp4'), limits=files.Limits(max_pixels=255))['unusable']
  assert unusable == 'frames of 16x16 pixels, more than the limit of 255 pixels; scale it down first'
  assert 'unusable' not in made(item(root / '0.mp4'), limits=files.Limits(max_pixels=256))


def test_only_regular_files_are_read(tmp_path):
  """A pipe would block, and a device never ends, with a size of 0."""
  os.mkfifo(tmp_path / 'pipe.mp4')
  (tmp_path / 'zero.mp4').symlink_to('/dev/zero')
  (tmp_path / 'folder.mp4').mkdir()
  for name, reason in (
    ('pipe', 'a named pipe, not a video file'),
    ('zero', 'a device, not a video file'),
    ('folder', 'Is a directory'),
  ):
    assert made(item(tmp_path / f'{name}.mp4'))['unusable'] == reason


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_file_without_read_permission_is_unusable(root):
  (root / '1.mp4').chmod(0)
  assert made(item(root / '1.mp4'))['unusable'] == 'Permission denied'


def test_a_file_that_changed_is_not_written(root):
  before = item(root / '0.mp4')
  examined = dataclasses.replace(before, examined=made(before))
  assert made(examined)['video'] == video(0)
  (root / '0.mp4').write_bytes(video(1))
  for old in (before, item(root / '0.mp4', examined=examined.examined)):
    with pytest.raises(UserError, match=r'0\.mp4 changed during preparation; run the command again'):
      made(old)


def test_an_examined_video_is_not_decoded_again(root, monkeypatch):
  first = made(item(root / '0.mp4'))
  monkeypatch.setattr(files, 'reencode', lambda *_: pytest.fail('decoded'))
  assert made(item(root / '0.mp4', examined=first)) == first


def test_given_splits_are_written_in_the_order_of_the_list(root):
  what = listing(root)
  summary = prepare(root, dataclasses.replace(what, videos=what.videos[::-1], notes=['a note']))
  assert summary['total'] == {'listed': 10, 'usable': 10, 'damaged': 0, 'short': 10, 'unusable': 0, 'missing': 0}
  train = datasets.open_split(root / 'data', 'pets', 'train')
  assert [example['id'] for example in train.source] == ['v5', 'v4', 'v3', 'v2', 'v1', 'v0']
  assert [example['video'] for example in train.source] == [video(i) for i in range(5, -1, -1)]
  assert train.labels.tolist() == [1, 0, 1, 0, 1, 0]
  assert train.videos == {'train': 6, 'validation': 4}
  assert 'a note' in (root / 'data' / 'pets' / '1.0.0' / 'report.txt').read_text()


def test_each_video_is_decoded_once(root, monkeypatch):
  reencode, seen = files.reencode, []
  monkeypatch.setattr(files, 'reencode', lambda data, *rest: seen.append(data) or reencode(data, *rest))
  prepare(root, listing(root))
  assert sorted(seen) == sorted(video(i) for i in range(10))


def test_reencoded_videos(root, caplog):
  """The frames and times stay the same; the fingerprint depends on the source files and the encoding settings."""
  caplog.set_level(logging.INFO)
  prepare(root, listing(root))
  kept = datasets.open_split(root / 'data', 'pets', 'train')
  found = [dataclasses.replace(each, split='') for each in listing(root).videos]
  for what, directory in ((listing(root), 'again'), (Listing(found, NAMES), 'unsplit')):
    data_dir = root / directory
    summary = prepare(root, what, encoding=Encoding('h264', quality=1), data_dir=data_dir)
    assert summary['total']['usable'] == 10
    assert any('when re-encoded' in message for message in caplog.messages)
    caplog.clear()
    stored = datasets.open_split(data_dir, 'pets', 'train')
    for example in stored.source:
      original = video(int(example['id'][1:]))
      assert example['video'] != original
      assert example['num_frames'] == 6
      for frame, before in zip(
        *(decode(data, np.arange(6) / 30) for data in (example['video'], original)), strict=True
      ):
        assert np.abs(frame.astype(int) - before).mean() < 3
    assert stored.fingerprint != kept.fingerprint
  rows = [
    list(datasets.read_videos(each.directory, 'train'))
    for each in (kept, datasets.open_split(root / 'again', 'pets', 'train'))
  ]
  assert [row['sha256'] for row in rows[0]] == [row['sha256'] for row in rows[1]]
  assert [row['bytes'] for row in rows[0]] != [row['bytes'] for row in rows[1]]
  other = prepare(root, listing(root), encoding=Encoding('h264', quality=9), data_dir=root / 'again')
  assert other['total']['usable'] == 10
  assert datasets.open_split(root / 'again', 'pets', 'train').fingerprint not in (kept.fingerprint, stored.fingerprint)


def test_a_split_without_labels(root):
  found = [dataclasses.replace(each, split='test', label='') for each in listing(root).videos[6:]]
  summary = prepare(root, Listing([*listing(root).videos[:6], *found], NAMES))
  test = datasets.open_split(root / 'data', 'pets', 'test')
  assert test.labels.tolist() == [-1] * 4
  assert [example['label'] for example in test.source] == [-1] * 4
  assert summary['counts']['test'] == {
    '': {'listed': 4, 'usable': 4, 'damaged': 0, 'short': 4, 'unusable': 0, 'missing': 0}
  }
  assert summary['notes'] == []


def test_too_many_missing_files_stop_preparation_before_decoding(root, monkeypatch):
  for i in (0, 2, 4):
    (root / f'{i}.mp4').unlink()
  monkeypatch.setattr(files, 'make_example', lambda *_, **__: pytest.fail('decoded'))
  with pytest.raises(UserError, match=r'3 of 10 videos are missing, more than --max_missing=0\.2 allows'):
    prepare(root, listing(root))
  assert not (root / 'data').exists()
  monkeypatch.undo()
  summary = prepare(root, listing(root), max_missing=0.3, all_classes=False)
  assert summary['missing'] == ['v0', 'v2', 'v4']
  assert summary['total']['missing'] == 3
  assert 'train has no usable video of: cats' in summary['notes']


def test_too_many_unusable_videos_stop_preparation_and_keep_examined_ones(root, monkeypatch):
  for i in (1, 3):
    (root / f'{i}.mp4').write_bytes(b'no video')
  monkeypatch.setattr(files, 'SHARD_BYTES', (1, 1))  # one video per shard
  seen, make = [], files.make_example
  monkeypatch.setattr(files, 'make_example', lambda item, **rest: seen.append(item.video.id) or make(item, **rest))
  with pytest.raises(UserError, match=r'2 of 10 videos are unusable already, more than --max_unusable=0\.1 allows'):
    prepare(root, listing(root))
  assert seen == ['v0', 'v1', 'v2', 'v3']
  with pytest.raises(UserError, match='not complete'):
    datasets.open_split(root / 'data', 'pets', 'train')
  summary = prepare(root, listing(root), max_unusable=0.2)
  assert seen == [f'v{i}' for i in range(10)]  # the remaining videos
  assert list(summary['unusable']) == ['v1', 'v3']
  train = datasets.open_split(root / 'data', 'pets', 'train')
  assert [train.source[i]['id'] for i in range(4)] == ['v0', 'v2', 'v4', 'v5']  # with empty shards between
  (root / '3.mp4').write_bytes(video(3))  # repaired
  assert list(prepare(root, listing(root))['unusable']) == ['v1']
  assert seen[10:] == ['v3']


def test_a_class_or_split_without_videos_is_refused(root):
  with pytest.raises(UserError, match='all videos are unusable or missing in: newts'):
    prepare(root, listing(root, names=(*NAMES, 'newts')))
  summary = prepare(root, listing(root, names=(*NAMES, 'newts')), all_classes=False)
  assert summary['notes'] == ['1 classes have no usable video: newts']
  for i in range(6, 10):
    (root / f'{i}.mp4').write_bytes(b'')
  with pytest.raises(UserError, match='all videos are unusable or missing in: validation'):
    prepare(root, listing(root), max_unusable=0.5)
  for i in range(6, 10):
    (root / f'{i}.mp4').unlink()
  with pytest.raises(UserError, match='all 4 videos of the validation split are missing; add them, or remove'):
    prepare(root, listing(root), max_missing=0.5)


def test_a_test_split_without_files_is_left_out(root, caplog):
  caplog.set_level(logging.INFO)
  absent = [ListedVideo(f't{i}', '', '', 'test') for i in range(20)]
  summary = prepare(root, Listing([*listing(root).videos, *absent], NAMES))  # otherwise too many are missing
  assert summary['notes'] == ['the test split is left out: all of its 20 videos are missing']
  assert (set(summary['counts']), summary['missing']) == ({'train', 'validation'}, [])
  assert '10 videos of 2 classes, 0 of them missing' in caplog.messages


def test_a_crash_or_hang_of_the_decoder_loses_one_video(root):
  """Real worker processes crash: the list of unusable videos names the video, and the others are complete."""
  for name in ('crash', 'hang'):
    (root / f'{name}.mp4').write_bytes(video(0))
  found = [ListedVideo(name, str(root / f'{name}.mp4'), 'cats', '') for name in ('0', 'crash', '1', 'hang', '2')]
  items, _ = files.find_files(Listing(found, NAMES))
  task = tasks.Task('task', items, trouble.make_example, files.unusable_example, time_limit=1)
  tasks.run(root / 'notes', [task], functools.partial(tasks.run_local, workers=2))
  rows = tasks.require_manifest(root / 'notes', task)['rows']
  assert [row['id'] for row in rows] == ['0', 'crash', '1', 'hang', '2']
  unusable = {row['id']: row['unusable'] for row in rows if 'unusable' in row}
  assert unusable == {'crash': 'the decoder crashed, or ran out of memory', 'hang': 'the decoder hangs'}


def test_examined_videos_are_recorded(root, monkeypatch):
  what = Listing([dataclasses.replace(each, split='') for each in listing(root).videos], NAMES)
  seen, make = [], files.make_example
  monkeypatch.setattr(files, 'make_example', lambda item, **rest: seen.append(item.video.id) or make(item, **rest))
  monkeypatch.setattr(files, 'EXAMINED_PER_TASK', 2)

  def examine():
    return files.examine(files.find_files(what)[0], root / 'notes', tasks.run_local)

  rows = examine()
  assert sorted(rows) == sorted(seen) == sorted(f'v{i}' for i in range(10))
  assert json.loads(json.dumps(rows)) == rows == examine()
  (root / '4.mp4').write_bytes(b'')  # of the class's second pair
  assert examine()['v4']['unusable']
  assert seen[10:] == ['v4', 'v6']
