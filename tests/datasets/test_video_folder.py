"""Video folders: which videos are listed, how they are split, and unusable, damaged and duplicate ones."""

import dataclasses
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from mevit_jax.datasets.builders import files, lists, video_folder
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


def make_folder(root: Path, *names: bytes) -> Path:
  """Creates files whose names are bytes."""
  for name in names:
    path = os.path.join(os.fsencode(root), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
      file.write(name)
  return root


def test_names_that_are_not_utf8_stay_different(tmp_path):
  classes = [name.encode('gbk') for name in ('跳舞', '唱歌', 'walk')]
  root = make_folder(tmp_path, *(name + b'/' + video for name in classes for video in (b'\xd1.mp4', b'\xd2.mp4')))
  listing = video_folder.find(root)
  assert listing.class_names == (r'\xb3\xaa\xb8\xe8', r'\xcc\xf8\xce\xe8', 'walk')
  items, missing = files.find_files(listing)
  assert len({each.video.id for each in items}) == 6
  assert not missing
  spelled = {os.fsencode(each.video.path): each.video.id for each in items}
  for path, name in spelled.items():  # the spelling can be reversed
    assert name.encode().decode('unicode_escape').encode('latin-1') == os.path.relpath(path, os.fsencode(root))


def test_control_characters_of_names_are_escaped(tmp_path):
  root = make_folder(tmp_path, b'a\x1b[31m/1\n2.mp4', b'b/\xe2\x80\xae4pm.mp4')
  listing = video_folder.find(root)
  assert listing.class_names == (r'a\x1b[31m', 'b')
  assert [each.id for each in listing.videos] == [r'a\x1b[31m/1\n2.mp4', r'b/\u202e4pm.mp4']
  assert len(files.find_files(listing)[0]) == 2


def test_different_names_are_not_spelled_alike(tmp_path):
  root = make_folder(tmp_path, b'\xb4/1.mp4', rb'\xb4/2.mp4')
  with pytest.raises(UserError, match=r"class names b'.*xb4' and b'.xb4' are both spelled .xb4; rename"):
    video_folder.find(root)


def test_class_names_that_look_alike_are_named(tmp_path):
  root = make_folder(tmp_path, 'caf\u00e9/1.mp4'.encode(), 'cafe\u0301/2.mp4'.encode(), b'Walk/1.mp4', b'walk/1.mp4')
  listing = video_folder.find(root)
  assert listing.class_names == ('Walk', 'caf\u00e9', 'walk')
  assert listing.notes == [r"spellings that are taken as one class: 'cafe\u0301', 'caf\xe9'"]
  [warning] = lists.similar((*listing.class_names, '\uff57alk', 'run'))
  assert warning.startswith('WARNING: class names that differ only in case or Unicode form')
  assert warning.endswith(r'Walk = walk = \uff57alk')
  assert lists.similar(('a', 'b')) == []


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
    ('path,label\n./v/a.mp4,a\nv/a.mp4,b\n', r'line 3: v/a\.mp4 is listed twice, first in line 2'),
    ('path,label\nv//a.mp4,a\nw/../v/a.mp4,b\n', r'line 3: v/a\.mp4 is listed twice, first in line 2'),
    ('path,label\na.mp4,x\nb\0c.mp4,y\n', r'line 3: a field contains a NUL byte; the file is damaged'),
    ('path,label\na.mp4,x\nb.mp4,\0\n', r'line 3: a field contains a NUL byte; the file is damaged'),
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
