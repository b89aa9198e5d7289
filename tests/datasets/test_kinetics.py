"""Kinetics: the official CSV files with videos in the folder layouts in use."""

import random
from pathlib import Path

import pytest

from mevit_jax.datasets.builders import kinetics
from mevit_jax.errors import UserError
from tests.helpers.trees import make_tree, shuffled_listing, write_lines

HEAD = 'label,youtube_id,time_start,time_end,split,is_cc'
# label, id, seconds: ids with - and _ at their ends and between digits, labels with brackets, a quote and a comma
TRAIN = [
  ('abseiling', '-3B32lodo2M', 59, 69),
  ('passing American football (in game)', '_4rY_0000_1', 8, 18),
  ("massaging person's head", 'a_000010_00', 0, 10),
  ('zumba', 'zzzzzzzzzz-', 1234, 1244),
]
VALIDATION = [('abseiling', '0wR5jVB-WPk', 417, 427), ('zumba', '3caPS4FHFF8', 36, 46)]
TEST = [('zumba', '9kiOa5pNbQE', 5, 15)]


def row(label, name, start, end, split):
  return f'"{label}",{name},{start},{end},{split},0'


def annotate(folder: Path, names=('train.csv', 'validate.csv', 'test.csv')) -> Path:
  for rows, name, split in zip((TRAIN, VALIDATION, TEST), names, ('train', 'validate', 'test'), strict=True):
    write_lines(folder / name, HEAD, *(row(*clip, split) for clip in rows))
  return folder


def paths(layout) -> list[str]:
  """Returns the path of a video in a layout, a function of split, label, id, start and end."""
  rows = (('train', TRAIN), ('val', VALIDATION), ('test', TEST))
  return [layout(split, *clip) for split, clips in rows for clip in clips]


LAYOUTS = {
  'flat': lambda split, label, name, start, end: f'{name}_{start:06d}_{end:06d}.mp4',
  'CVDF': lambda split, label, name, start, end: f'{split}/{name}_{start:06d}_{end:06d}.mp4',
  'parts': lambda split, label, name, start, end: f'{split}/part_{start % 3}/{name}_{start:06d}_{end:06d}.mp4',
  'classes': lambda split, label, name, start, end: f'{split}/{label}/{name}_{start:06d}_{end:06d}.mp4',
  'underscores': lambda split, label, name, start, end: f'{label.replace(" ", "_")}/{name}_{start:06d}_{end:06d}.webm',
  'ids': lambda split, label, name, start, end: f'{label}/{name}.mkv',
  'starts': lambda split, label, name, start, end: f'{name}_{start}.AVI',
  'six digits': lambda split, label, name, start, end: f'{name}_{start:06d}.avi',
  'plain': lambda split, label, name, start, end: f'{name}_{start}_{end}.mp4',
  'twice a suffix': lambda split, label, name, start, end: f'{name}_{start:06d}_{end:06d}.mp4.mkv',
}


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_dataset(tmp_path, layout):
  root = make_tree(tmp_path / 'videos', *paths(layout))
  listing = kinetics.find(root, [annotate(tmp_path / 'lists')], 400)
  assert [(each.id, each.label, each.split) for each in listing.videos] == [
    ('test/9kiOa5pNbQE_000005_000015', 'zumba', 'test'),
    ('train/-3B32lodo2M_000059_000069', 'abseiling', 'train'),
    ('train/_4rY_0000_1_000008_000018', 'passing American football (in game)', 'train'),
    ('train/a_000010_00_000000_000010', "massaging person's head", 'train'),
    ('train/zzzzzzzzzz-_001234_001244', 'zumba', 'train'),
    ('validation/0wR5jVB-WPk_000417_000427', 'abseiling', 'validation'),
    ('validation/3caPS4FHFF8_000036_000046', 'zumba', 'validation'),
  ]
  assert sorted(each.path for each in listing.videos) == sorted(str(root / path) for path in paths(layout))
  assert listing.notes == ['the lists contain 4 of the 400 classes; label ids are those of all 400']


@pytest.mark.parametrize(
  'names',
  [
    ('train.csv', 'val.csv', 'test.csv'),
    ('kinetics-400_train.csv', 'kinetics-400_val.csv', 'kinetics-400_test.csv'),
    ('kinetics400_train.csv', 'kinetics400_validate.csv', 'kinetics400_test.csv'),
    ('kinetics_600_train.csv', 'kinetics_600_validation.csv', 'kinetics_600_test.csv'),
    ('train/list.csv', 'val/list.csv', 'test/list.csv'),
  ],
)
def test_split_is_taken_from_the_name_of_the_list(tmp_path, names):
  """Without a split column, the name of the file or of its folder states the split."""
  for rows, name in zip((TRAIN, VALIDATION, TEST), names, strict=True):
    table = [f'"{label}",{video},{start},{end}' for label, video, start, end in rows]
    write_lines(tmp_path / 'lists' / name, 'label,youtube_id,time_start,time_end', *table)
  root = make_tree(tmp_path / 'videos', *paths(LAYOUTS['flat']))
  files = [tmp_path / 'lists' / name for name in names]
  listing = kinetics.find(root, [tmp_path / 'lists'], 400)
  assert listing == kinetics.find(root, files[::-1], 400)
  assert [each.split for each in listing.videos] == ['test'] + 4 * ['train'] + 2 * ['validation']


@pytest.mark.parametrize('classes', kinetics.CLASSES)
def test_label_ids_are_the_official_ones(tmp_path, classes, monkeypatch):
  """For any classes, rows and files, in any order."""
  names = kinetics.class_names(classes)
  assert len(set(names)) == classes
  assert list(names) == sorted(names)
  rng = random.Random(0)
  rows = [row(name, f'{i:011d}', i, i + 10, 'train') for i, name in enumerate(names)]
  write_lines(tmp_path / 'a' / 'train.csv', HEAD, *rows)
  write_lines(tmp_path / 'b' / 'train.csv', HEAD, *rng.sample(rows, 20))
  root = make_tree(tmp_path / 'videos', *(f'{i:011d}.mp4' for i in range(classes)))
  whole, part = (kinetics.find(root, [tmp_path / each], classes) for each in 'ab')
  assert whole.class_names == part.class_names == names
  assert [each.label for each in whole.videos] == list(names)
  assert set(part.videos) < set(whole.videos)
  write_lines(tmp_path / 'a' / 'train.csv', HEAD, *rng.sample(rows, classes))
  with shuffled_listing(monkeypatch, seed=1):
    assert kinetics.find(root, [tmp_path / 'a'], classes) == whole


def test_class_lists_of_three_versions_differ_as_published():
  """Kinetics-600 keeps 368 classes of 400 (arXiv 1808.01340), Kinetics-700 keeps 597 of 600 (arXiv 1907.06987)."""
  k400, k600, k700 = ({name.lower() for name in kinetics.class_names(classes)} for classes in kinetics.CLASSES)
  assert len(set(kinetics.class_names(400)) & set(kinetics.class_names(600))) == 368
  assert len(k600 & k700) == 597
  assert k600 - k700 == {'bull fighting', 'chopping vegetables', 'picking fruit'}
  assert 'vault' in k400 - k600


def test_all_spellings_of_a_label_are_recognized(tmp_path):
  """Kinetics-600 and -700 spell one class differently; folders and copies of the lists use underscores."""
  rows = [
    row('passing American football (not in game)', 'a' * 11, 0, 10, 'train'),
    row('Passing_american_football_(not_in_game)', 'b' * 11, 0, 10, 'val'),
  ]
  write_lines(tmp_path / 'lists' / 'all.csv', HEAD, *rows)
  root = make_tree(tmp_path / 'videos', f'{"a" * 11}.mp4', f'{"b" * 11}.mp4')
  for classes, name in ((600, 'passing american football (not in game)'), (700, rows[0].split('"')[1])):
    assert {each.label for each in kinetics.find(root, [tmp_path / 'lists'], classes).videos} == {name}


def test_a_missing_file_is_listed_without_a_path(tmp_path):
  root = make_tree(tmp_path / 'videos', *paths(LAYOUTS['flat'])[1:], 'unlisted.mp4', 'notes.txt')
  listing = kinetics.find(root, [annotate(tmp_path / 'lists')], 400)
  assert [each.id for each in listing.videos if not each.path] == ['train/-3B32lodo2M_000059_000069']
  assert '1 videos are not listed and are left out: unlisted.mp4' in listing.notes


def test_a_test_list_can_lack_labels(tmp_path):
  write_lines(tmp_path / 'lists' / 'train.csv', HEAD, row(*TRAIN[0], 'train'))
  write_lines(tmp_path / 'lists' / 'test.csv', 'youtube_id,time_start,time_end,split', '9kiOa5pNbQE,5,15,test')
  root = make_tree(tmp_path / 'videos', '-3B32lodo2M.mp4', '9kiOa5pNbQE.mp4')
  found = kinetics.find(root, [tmp_path / 'lists'], 400).videos
  assert [(each.split, each.label, bool(each.path)) for each in found] == [
    ('test', '', True),
    ('train', 'abseiling', True),
  ]
  # A list with labels takes precedence, whichever is read first.
  for name in ('answers_test.csv', 'zz_test.csv'):
    answers = write_lines(tmp_path / name, HEAD, row('zumba', '9kiOa5pNbQE', 5, 15, 'test'))
    found = kinetics.find(root, [tmp_path / 'lists', answers], 400).videos
    assert [each.label for each in found] == ['zumba', 'abseiling']


@pytest.mark.parametrize(
  ('files', 'best'),
  [
    (('a/-3B32lodo2M_000059_000069.mp4', '-3B32lodo2M.mp4'), 0),
    (('val/-3B32lodo2M.mp4', 'train/-3B32lodo2M.mp4'), 1),
    (('val/-3B32lodo2M.mp4', 'other/-3B32lodo2M.mp4'), 1),
    (('train/zumba/-3B32lodo2M.mp4', 'train/Abseiling/-3B32lodo2M.mp4'), 1),
    (('train/-3B32lodo2M_000059_000069.mp4', 'replacement/replacement_for_corrupted_k400/-3B32lodo2M.mp4'), 1),
    (('b/-3B32lodo2M.mp4', 'a/-3B32lodo2M.mp4'), 1),
    (('a/-3B32lodo2M.webm', 'a/-3B32lodo2M.mp4'), 1),
  ],
)
def test_one_of_several_files_of_a_clip_is_used_and_reported(tmp_path, monkeypatch, files, best):
  root = make_tree(tmp_path / 'videos', *files)
  table = write_lines(tmp_path / 'train.csv', HEAD, row(*TRAIN[0], 'train'))
  for seed in range(3):
    with shuffled_listing(monkeypatch, seed):
      listing = kinetics.find(root, [table], 400)
    assert [each.path for each in listing.videos] == [str(root / files[best])]
    assert f'1 videos have several files; used: {files[best]}, not {files[1 - best]}' in listing.notes


def test_a_file_name_that_matches_two_clips_belongs_to_neither(tmp_path):
  table = write_lines(
    tmp_path / 'train.csv', HEAD, *(row('zumba', 'abcdefghijk', at, at + 10, 'train') for at in (0, 30))
  )
  root = make_tree(tmp_path / 'videos', 'abcdefghijk.mp4', 'abcdefghijk_30.mp4')
  found = kinetics.find(root, [table], 400).videos
  assert [Path(each.path).name for each in found] == ['', 'abcdefghijk_30.mp4']


def test_csv_variants_of_other_programs_are_read(tmp_path):
  """Byte order mark, CRLF, trailing commas, capitals, spaces, empty lines, seconds with decimals."""
  text = '\ufeffLabel, YouTube_ID,time_start,time_end,split,\r\nzumba , abcdefghijk,3.0,13.0,Validate,\r\n\r\n'
  (tmp_path / 'k.csv').write_bytes(text.encode())
  root = make_tree(tmp_path / 'videos', 'abcdefghijk.mp4')
  (each,) = kinetics.find(root, [tmp_path / 'k.csv'], 400).videos
  assert (each.id, each.label) == ('validation/abcdefghijk_000003_000013', 'zumba')


def test_duplicate_rows_are_merged_or_refused(tmp_path):
  rows = [row(*TRAIN[0], 'train'), row(*TRAIN[0], 'train'), row(*TRAIN[0], 'val')]
  table = write_lines(tmp_path / 'k.csv', HEAD, *rows)
  listing = kinetics.find(make_tree(tmp_path / 'videos', '-3B32lodo2M.mp4'), [table], 400)
  assert [each.split for each in listing.videos] == ['train', 'validation']
  name = '-3B32lodo2M_000059_000069'
  assert listing.notes[:2] == [
    f'1 rows repeat another row of their split and are left out: {name} ({table}, line 3)',
    f'WARNING: 1 clips are listed in two splits: {name} ({table}, line 2 and {table}, line 4)',
  ]


GOOD = row(*TRAIN[0], 'train')


@pytest.mark.parametrize(
  ('lines', 'message'),
  [
    ((), r'k\.csv must have the columns youtube_id,time_start,time_end\[,label\]\[,split\]; it has: none'),
    (('path,label', 'a.mp4,zumba'), r'k\.csv must have the columns .*; it has: label, path'),
    ((HEAD,), r'k\.csv: the CSV files list no videos'),
    ((HEAD, GOOD, row('zumbaa', 'b' * 11, 0, 10, 'train')), r"line 3: .* no class 'zumbaa' \(nearest: 'zumba'\)"),
    ((HEAD, row('alligator wrestling', 'b' * 11, 0, 10, 'train')), r'line 2: .* is this kinetics600\?'),
    ((HEAD, row('xqxqxq', 'b' * 11, 0, 10, 'train')), r"line 2: Kinetics-400 has no class 'xqxqxq'$"),
    ((HEAD, row('', 'b' * 11, 0, 10, 'val')), 'line 2: the label is empty; only a test list may lack labels'),
    ((HEAD, row('zumba', 'b' * 11, '0:05', 10, 'val')), "line 2: time_start and time_end must be seconds, not '0:05'"),
    ((HEAD, row('zumba', '', 0, 10, 'val')), 'line 2: the youtube_id is empty'),
    ((HEAD, row('zumba', 'b' * 11, 0, 10, 'holdout')), 'line 2: unknown split.* one of train, validation'),
    ((HEAD, row('zumba', 'b' * 11, 0, 10, '')), 'line 2: unknown split'),
    ((HEAD, GOOD, 'zumba,b'), 'line 3: 2 fields for 6 columns'),
    ((HEAD, GOOD, f'{GOOD},0'), 'line 3: 7 fields for 6 columns'),
    (
      (HEAD, GOOD, GOOD.replace('abseiling', 'zumba')),
      r"line 3: \S+ has the class 'zumba', but 'abseiling' in .*line 2",
    ),
  ],
)
def test_invalid_lists_are_refused(tmp_path, lines, message):
  (tmp_path / 'k.csv').write_text('\n'.join(lines))
  with pytest.raises(UserError, match=message) as caught:
    kinetics.find(make_tree(tmp_path / 'videos', '-3B32lodo2M.mp4'), [tmp_path / 'k.csv'], 400)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ((), 'videos is not a folder: it does not exist'),
    (('part_0.tar.gz', 'part_1.tar.gz'), r'contains no videos \(2 \.gz\); archives must be extracted first'),
    (('x/some.mp4',), r'none of the 7 listed videos.* files like x/some\.mp4, .* like test/9kiOa5pNbQE_000005'),
  ],
)
def test_invalid_folders_are_refused(tmp_path, files, message):
  make_tree(tmp_path / 'videos', *files)
  with pytest.raises(UserError, match=message):
    kinetics.find(tmp_path / 'videos', [annotate(tmp_path / 'lists')], 400)


def test_missing_lists_are_reported(tmp_path):
  root = make_tree(tmp_path / 'videos', 'a.mp4')
  with pytest.raises(UserError, match='no does not exist; expected: the CSV files of Kinetics'):
    kinetics.find(root, [tmp_path / 'no'], 400)
  with pytest.raises(UserError, match=r'no \.csv file in .*videos; expected: the CSV files of Kinetics'):
    kinetics.find(root, [root], 400)
