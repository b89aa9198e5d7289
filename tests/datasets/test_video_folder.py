"""Video folders: which videos are listed, how they are split, and unusable, damaged and duplicate ones."""

import dataclasses
import random
from collections import Counter
from pathlib import Path

import pytest

from mevit_jax.datasets.builders import files, video_folder
from mevit_jax.errors import UserError
from tests.helpers.trees import make_tree


def item(name: str, label: str, sha256: str) -> files.VideoFile:
  return files.VideoFile(files.ListedVideo(name, name, label, ''), 1, 1, {'sha256': sha256})


def many(count: int = 40, classes: int = 3) -> list[files.VideoFile]:
  return [item(f'v{i:03d}', f'class {i % classes}', f'bytes {i}') for i in range(count)]


def test_class_folders_are_listed(tmp_path):
  root = make_tree(tmp_path, 'b/2.MP4', 'b/deep/er/1.avi', 'a/x.webm', 'a/notes.txt', 'a/.hidden.mp4', 'stray.mov')
  listing = video_folder.find(root)
  found, notes = listing.videos, listing.notes
  assert [(video.id, video.label, video.split) for video in found] == [
    ('a/x.webm', 'a', ''),
    ('b/2.MP4', 'b', ''),
    ('b/deep/er/1.avi', 'b', ''),
  ]
  assert [Path(video.path) for video in found] == [root / video.id for video in found]
  assert notes == ['files that are not videos are left out: 1 .txt', 'videos outside a class folder are left out: 1']
  assert listing.class_names == ('a', 'b')


def test_split_folders_are_listed(tmp_path):
  root = make_tree(tmp_path, 'train/a/1.mp4', 'val/a/2.mp4', 'Test/b/3.mkv', 'annotations/list.txt')
  found = video_folder.find(root).videos
  assert {video.id: (video.split, video.label) for video in found} == {
    'train/a/1.mp4': ('train', 'a'),
    'val/a/2.mp4': ('validation', 'a'),
    'Test/b/3.mkv': ('test', 'b'),
  }


def test_validation_is_split_off_if_there_is_only_a_train_folder(tmp_path):
  listing = video_folder.find(make_tree(tmp_path, 'train/a/1.mp4', 'train/b/2.mp4'))
  found, notes = listing.videos, listing.notes
  assert {video.split for video in found} == {''}
  assert {video.label for video in found} == {'a', 'b'}
  assert 'validation split is taken from it' in notes[0]


def test_links_are_followed_except_in_cycles(tmp_path):
  make_tree(tmp_path / 'elsewhere', '1.mp4')
  root = make_tree(tmp_path / 'root', 'b/2.mp4')
  (root / 'a').symlink_to(tmp_path / 'elsewhere')
  (root / 'b' / 'loop').symlink_to(root)
  assert [video.id for video in video_folder.find(root).videos] == ['a/1.mp4', 'b/2.mp4']


def test_class_names_do_not_depend_on_unicode_normalization(tmp_path):
  decomposed = make_tree(tmp_path / 'mac', 'cafe\u0301  noir/1.mp4')  # decomposed, as on macOS
  composed = make_tree(tmp_path / 'linux', 'caf\u00e9 noir/1.mp4')
  labels = {video_folder.find(root).videos[0].label for root in (decomposed, composed)}
  assert labels == {'caf\u00e9 noir'}


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    ((), r'contains no videos \(it is empty\)'),
    (('a/1.txt', 'a/2.txt', 'b/3'), r'contains no videos \(2 \.txt, 1 no suffix\)'),
    (('1.mp4', '2.mp4'), r'its 2 videos are not in class folders; expected: ROOT/CLASS/VIDEO'),
    (('train/1.mp4',), r'are not in class folders; expected: ROOT/SPLIT/CLASS/VIDEO'),
    (('train/a/1.mp4', 'bus/1.mp4'), r'split folders \(train\) and others \(bus\)'),
  ],
)
def test_invalid_folders_are_refused(tmp_path, names, message):
  with pytest.raises(UserError, match=message):
    video_folder.find(make_tree(tmp_path, *names))


def test_missing_source_is_reported(tmp_path):
  with pytest.raises(UserError, match='does not exist; give a folder'):
    video_folder.find(tmp_path / 'no.csv')


def test_csv_is_read(tmp_path):
  table = tmp_path / 'v.csv'
  table.write_text('\ufeffpath,label,split\nd/1.mp4, "two, words" ,val\n2.mp4,b,TRAIN\n', 'utf-8')
  table.write_text('\ufefflabel,path,split\n"two,  words",d/1.mp4,val\nb,2.mp4,TRAIN\n', 'utf-8')
  found = video_folder.find(table).videos
  assert found == [
    files.ListedVideo('2.mp4', str(tmp_path / '2.mp4'), 'b', 'train'),
    files.ListedVideo('d/1.mp4', str(tmp_path / 'd/1.mp4'), 'two, words', 'validation'),
  ]


def test_numeric_labels_are_sorted_by_value(tmp_path):
  (tmp_path / 'v.csv').write_text('path,label\n1.mp4,10\n2.mp4,2\n3.mp4,0\n')
  assert video_folder.find(tmp_path / 'v.csv').class_names == ('0', '2', '10')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', r'must have the columns path,label\[,split\]; it has: none'),
    ('file,label\n1.mp4,a\n', r'it has: file, label'),
    ('path label\n1.mp4 a\n', r'it has: path label'),
    ('path,label\n', 'lists no videos'),
    ('path,label\n1.mp4,a,b\n', 'line 2: 3 fields for 2 columns'),
    ('path,label\n1.mp4\n', 'line 2: 1 fields for 2 columns'),
    ('path,label\n1.mp4,a\n2.mp4, \n', 'line 3: the path or the label is empty'),
    ('path,label\n1.mp4,a\n1.mp4,b\n', r'line 3: 1\.mp4 is listed twice'),
    ('path,label,split\n1.mp4,a,dev\n', "line 2: unknown split 'dev'; known: train, val"),
    ('path,label,split\n1.mp4,a,train\n2.mp4,a,\n', 'give every row a split, or none'),
  ],
)
def test_invalid_csv_is_refused(tmp_path, text, message):
  (tmp_path / 'v.csv').write_text(text)
  with pytest.raises(UserError, match=message):
    video_folder.find(tmp_path / 'v.csv')


def test_binary_file_is_not_a_csv(tmp_path):
  (tmp_path / 'v.csv').write_bytes(b'\xff\xfe\x00\x80')
  with pytest.raises(UserError, match='not a CSV file in UTF-8'):
    video_folder.find(tmp_path / 'v.csv')


def test_a_split_is_stratified_and_contains_every_video_once():
  items = many(41)
  splits = video_folder.split(items, 0.2, seed=0)
  assert list(splits) == ['train', 'validation']
  assert sorted(i.video.id for rows in splits.values() for i in rows) == [i.video.id for i in items]
  assert Counter(i.video.label for i in splits['validation']) == {f'class {c}': 3 for c in range(3)}
  tiny = video_folder.split(many(6), 0.01, seed=0)
  assert Counter(i.video.label for i in tiny['validation']) == {f'class {c}': 1 for c in range(3)}
  full = video_folder.split(many(6), 1.0, seed=0)
  assert Counter(i.video.label for i in full['train']) == {f'class {c}': 1 for c in range(3)}


def test_split_depends_only_on_seed_and_bytes():
  items = many()
  shuffled = random.Random(0).sample(items, len(items))
  renamed = [dataclasses.replace(i, video=dataclasses.replace(i.video, id='z' + i.video.id)) for i in shuffled]
  splits = video_folder.split(items, 0.3, seed=0)
  assert video_folder.split(shuffled, 0.3, seed=0) == splits
  again = video_folder.split(renamed, 0.3, seed=0)
  assert [i.video.id[1:] for i in again['validation']] == [i.video.id for i in splits['validation']]
  assert video_folder.split(items, 0.3, seed=1) != splits


def test_copies_of_a_video_are_in_the_same_split():
  for seed in range(20):
    items = [item(f'v{i}', 'a', f'bytes {i // 4}') for i in range(20)]
    splits = video_folder.split(items, 0.3, seed)
    sides = [{i.examined['sha256'] for i in rows} for rows in splits.values()]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_a_class_that_cannot_be_split_is_reported():
  with pytest.raises(UserError, match=r'too few usable videos to split.* in: lonely;'):
    video_folder.split([*many(), item('z', 'lonely', 'q')], 0.2, 0)
