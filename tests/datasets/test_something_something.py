"""Something-Something-v2: the official lists with numbered video files."""

import json
import random
from pathlib import Path

import pytest

from mevit_jax.augment.clip import mirror_labels
from mevit_jax.datasets.builders import something_something
from mevit_jax.errors import UserError
from tests.helpers.trees import make_tree, shuffled_listing, write_lines

# All 174 class names, in the order of labels.json.
TEMPLATES = (Path(__file__).parent / 'something_something_v2.txt').read_text().splitlines()

TRAIN = [
  ('78687', 'Holding [something] next to [something]'),
  ('1000', 'Putting [number of] [something] onto [something]'),
  ('9', 'Pushing [something] from left to right'),
]
VALIDATION = [('220847', 'Twisting (wringing) [something] wet until water comes out'), ('74225', 'Opening [something]')]
TEST = ['1420', '3']


def entry(number, template):
  return {'id': number, 'label': 'holding a cup', 'template': template, 'placeholders': ['a cup']}


def annotate(folder: Path, prefix: str = '', order: int = 0) -> Path:
  """Writes the lists; `order` is the seed of the order of their entries."""
  rng = random.Random(order)
  labels = [(name, str(i)) for i, name in enumerate(TEMPLATES)]
  train, validation, test = ([entry(*row) for row in rows] for rows in (TRAIN, VALIDATION, [(n, '') for n in TEST]))
  content = {'labels': dict(rng.sample(labels, len(labels)))}
  content |= {'train': rng.sample(train, len(train)), 'validation': rng.sample(validation, len(validation))}
  content |= {'test': [{'id': each['id']} for each in test]}
  for name, value in content.items():
    write_lines(folder / f'{prefix}{name}.json', json.dumps(value))
  return folder


NUMBERS = [*(row[0] for row in TRAIN), *(row[0] for row in VALIDATION), *TEST]
LAYOUTS = {
  'flat': lambda number: f'{number}.webm',
  'as unpacked': lambda number: f'20bn-something-something-v2/{number}.webm',
  'parts': lambda number: f'part{int(number) % 3}/{number}.webm',
  'as mp4': lambda number: f'{number}.mp4',
}


@pytest.mark.parametrize('prefix', ['', 'something-something-v2-'])
@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_dataset(tmp_path, layout, prefix, monkeypatch):
  root = make_tree(tmp_path / 'videos', *map(layout, NUMBERS))
  with shuffled_listing(monkeypatch, seed=len(prefix)):
    listing = something_something.find(root, [annotate(tmp_path / 'lists', prefix, order=len(prefix))])
  assert listing.class_names == tuple(TEMPLATES)
  assert [(each.id, each.label, each.split) for each in listing.videos] == [
    ('3', '', 'test'),
    ('9', 'Pushing something from left to right', 'train'),
    ('1000', 'Putting number of something onto something', 'train'),
    ('1420', '', 'test'),
    ('74225', 'Opening something', 'validation'),
    ('78687', 'Holding something next to something', 'train'),
    ('220847', 'Twisting (wringing) something wet until water comes out', 'validation'),
  ]
  assert [each.path for each in listing.videos] == [str(root / layout(each.id)) for each in listing.videos]
  assert listing.notes == []


def test_label_ids_are_those_of_labels_json(tmp_path):
  annotate(tmp_path)
  write_lines(
    tmp_path / 'labels.json', json.dumps({'Opening something': 1, 'Holding something': 0, 'Folding something': 2})
  )
  write_lines(tmp_path / 'train.json', json.dumps([entry('1', 'Opening [something]')]))
  (tmp_path / 'validation.json').unlink()
  listing = something_something.find(make_tree(tmp_path / 'videos', '1.webm'), [tmp_path])
  assert listing.class_names == ('Holding something', 'Opening something', 'Folding something')
  assert listing.notes == []


def test_answer_file_labels_the_test_split(tmp_path):
  lists = annotate(tmp_path / 'lists')
  write_lines(lists / 'test-answers.csv', '1420;Opening something', '3;Holding something next to something', '')
  root = make_tree(tmp_path / 'videos', *map(LAYOUTS['flat'], NUMBERS))
  found = something_something.find(root, [lists]).videos
  assert {each.id: each.label for each in found if each.split == 'test'} == {
    '1420': 'Opening something',
    '3': 'Holding something next to something',
  }


def test_missing_unlisted_and_duplicate_files_are_reported(tmp_path):
  lists = annotate(tmp_path / 'lists')
  write_lines(lists / 'notes.json', '{}')
  root = make_tree(tmp_path / 'videos', *map(LAYOUTS['flat'], NUMBERS[1:]), 'b/1000.mp4', '5.webm')
  files = [lists / f'{name}.json' for name in ('test', 'notes', 'labels', 'validation', 'train')]
  listing = something_something.find(root, files)
  assert listing == something_something.find(root, [lists])
  assert [each.id for each in listing.videos if not each.path] == [NUMBERS[0]]
  assert listing.notes == [
    'files that are not lists are ignored: notes.json',
    '1 videos have several files; used: 1000.webm, not b/1000.mp4',
    '1 videos are not listed and are left out: 5.webm',
  ]


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    (
      'train.json',
      [entry('1', 'Opening [somthing]')],
      r"train\.json, entry 1: .*'Opening \[somthing\]' \(nearest: 'Open",
    ),
    ('train.json', [entry('1', '')], r'train\.json, entry 1: the template is missing'),
    ('train.json', [entry('1', 'Opening [something]'), {}], 'entry 2: the id is missing'),
    ('train.json', {'1': 'Opening [something]'}, 'must be a list of videos'),
    (
      'train.json',
      [entry('9', 'Opening [something]')] * 2,
      'entry 2: video 9 is listed twice, first in .*entry 1',
    ),
    ('test.json', [{'id': '74225'}], r'validation\.json, entry \d: video 74225 is listed twice.*test\.json'),
    ('labels.json', ['Opening something'], r'labels\.json must be an object that maps templates to ids'),
    ('labels.json', {'Opening something': 'first'}, r'labels\.json must be an object that maps templates to ids'),
    ('labels.json', {'Opening something': '1'}, 'the ids of 1 classes must be 0 to 0, each exactly once'),
    ('labels.json', {'Opening something': '0', 'Folding something': '0'}, 'the ids of 2 classes must be 0 to 1'),
    ('v2-train.json', [], r'train\.json and .*v2-train\.json are both train lists; name the one to use'),
    ('test-answers.csv', '1420;Flying something', r'test-answers\.csv, line 1: .*no class'),
    ('train.json', '[{"id": "1",\n]', r'train\.json, line 2: not valid JSON'),
  ],
)
def test_invalid_lists_are_refused(tmp_path, name, content, message):
  annotate(tmp_path / 'lists')
  write_lines(tmp_path / 'lists' / name, content if isinstance(content, str) else json.dumps(content))
  with pytest.raises(UserError, match=message) as caught:
    something_something.find(make_tree(tmp_path / 'videos', *map(LAYOUTS['flat'], NUMBERS)), [tmp_path / 'lists'])
  assert '\n' not in str(caught.value)


def test_missing_lists_are_reported(tmp_path):
  lists, root = annotate(tmp_path / 'lists'), make_tree(tmp_path / 'videos', '999.webm')
  with pytest.raises(UserError, match=r'contains none of the . listed videos.* files like 999'):
    something_something.find(root, [lists])
  (lists / 'labels.json').unlink()
  with pytest.raises(UserError, match=r'expected: .*labels\.json.*; got: test\.json, train\.json, validation\.json'):
    something_something.find(root, [lists])
  (lists / 'test.json').write_bytes(b'\xff\xfe')
  annotate(lists / 'more')
  with pytest.raises(UserError, match=r'are both \w+ lists'):
    something_something.find(root, [lists])


def test_a_directional_class_maps_to_its_mirror_image():
  """Words that only resemble a direction swap no class."""
  mirrored = dict(enumerate(mirror_labels(TEMPLATES)))
  pairs = (
    ('Pulling something from left to right', 'Pulling something from right to left'),
    ('Pushing something from left to right', 'Pushing something from right to left'),
    ('Turning the camera left while filming something', 'Turning the camera right while filming something'),
  )
  for one, other in pairs:
    assert mirrored.pop(TEMPLATES.index(one)) == TEMPLATES.index(other)
    assert mirrored.pop(TEMPLATES.index(other)) == TEMPLATES.index(one)
  out = TEMPLATES.index('Plugging something into something but pulling it right out as you remove your hand')
  assert mirrored.pop(out) in (out, -1)  # never flipping is safe too
  assert all(label == mirror for label, mirror in mirrored.items())
