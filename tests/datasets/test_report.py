"""Report: complete counts, duplicates and absent classes by name, short text for large datasets."""

from mevit_jax.datasets.builders import report
from mevit_jax.datasets.builders.files import ListedVideo


def row(name, label, sha256, **more):
  return {
    'id': name,
    'label': label,
    'sha256': f'{sha256:064x}',
    'damage': '',
    'duration': 2.0,
    'num_frames': 60,
    **more,
  }


def unusable(name, label, why):
  return {'id': name, 'label': label, 'unusable': why}


ROWS = [
  ('train', row('a1', 'a', 1)),
  ('train', row('a2', 'a', 2, damage='the end is missing')),
  ('train', unusable('b1', 'b', 'no frame decodes')),
  ('validation', row('a3', 'a', 1)),
  ('validation', row('b2', 'b', 3)),
  ('validation', row('b3', 'b', 3, duration=0.5, num_frames=15)),
]


def test_a_report_counts_everything_and_names_duplicates_and_absent_classes():
  made = report.make(lambda: iter(ROWS), [ListedVideo('b9', '', 'b', 'train')], ['a note'])
  assert made['total'] == {'listed': 7, 'usable': 5, 'damaged': 1, 'short': 1, 'unusable': 1, 'missing': 1}
  assert made['counts']['train']['b'] == {
    'listed': 2,
    'usable': 0,
    'damaged': 0,
    'short': 0,
    'unusable': 1,
    'missing': 1,
  }
  assert made['unusable'] == {'b1': 'no frame decodes'}
  assert made['damaged'] == {'a2': 'the end is missing'}
  assert made['short'] == {'b3': '0.50 s, 15 frames'}
  assert made['missing'] == ['b9']
  assert made['duplicates_across_splits'] == [['train: a1', 'validation: a3']]
  assert made['duplicates_within_split'] == [['validation: b2', 'validation: b3']]
  assert made['duplicates_across_classes'] == []
  assert made['notes'] == ['a note', 'train has no usable video of: b']
  assert report.without_usable(made, ('a', 'b', 'c')) == ['c']
  text = report.text(made)
  for part in ('b1: no frame decodes', 'train: a1 = validation: a3', 'WARNING', 'a note', 'b9'):
    assert part in text
  assert 'and 1 more' in report.text({**made, 'unusable': {'p': 'q', 'r': 's'}}, max_entries=1)


def test_a_video_in_two_classes_is_a_warning():
  rows = [('train', row('a/1', 'a', 1)), ('train', row('b/1', 'b', 1)), ('test', row('1', '', 1))]
  made = report.make(lambda: iter(rows))
  assert made['duplicates_across_classes'] == [['train: a/1', 'train: b/1', 'test: 1']]
  assert 'WARNING: same bytes in two classes (1):\n  train: a/1 = train: b/1 = test: 1' in report.text(made)


def test_a_name_cannot_add_lines_or_escapes_to_the_report():
  rows = [('train', unusable('a\n\x1b[2J', 'a', 'why\rnot')), ('train', row('ok', 'a', 1))]
  text = report.text(report.make(lambda: iter(rows)))
  assert '  a\\n\\x1b[2J: why\\rnot\n' in text
  assert '\x1b' not in text


def test_digests_that_agree_in_part_are_not_duplicates():
  rows = [('train', row('a', 'a', 1)), ('test', row('b', 'a', 1 + 2**64))]  # the first eight bytes are the same
  made = report.make(lambda: iter(rows))
  assert made['duplicates_across_splits'] == []


def test_report_of_400_classes_is_short_on_a_terminal_and_complete_in_the_file():
  rows = [('train', row(f'v{i}', f'class {i % 400:03d}', i)) for i in range(4000)]
  rows += [('train', unusable(f'd{i}', f'class {i % 7:03d}', f'{i} of 300 packets do not decode')) for i in range(70)]
  made = report.make(lambda: iter(rows))
  short, whole = report.text(made, max_entries=20), report.text(made)
  assert len(short.splitlines()) < 50
  assert '70 x 0 to 69 of 300 packets do not decode' in short
  lines = [line.split() for line in short.splitlines() if line.startswith('  class')]
  assert [line[1] for line in lines] == [f'{i:03d}' for i in range(7)]
  assert [line[3] for line in lines] == ['10'] * 7  # usable of 20
  assert sum(line.startswith('  class') for line in whole.splitlines()) == 400
  assert sum('packets do not' in line and ': ' in line for line in whole.splitlines()) == 70


def test_similar_reasons_are_counted_with_the_range_of_their_numbers():
  same = {f'v{i}': '0.53 s, 16 frames' for i in range(30)}
  differ = {f'v{i}': f'{0.3 + i / 100:.2f} s, {9 + i} frames' for i in range(30)}
  unusable = {f'd{i}': 'no frame decodes' for i in range(40)}
  assert '  30 x 0.53 s, 16 frames' in report.section('short', same)
  assert '  30 x 0.30 to 0.59 s, 9 to 38 frames' in report.section('short', differ)
  assert report.section('both', {**differ, **unusable})[2:4] == [
    '  40 x no frame decodes', '  30 x 0.30 to 0.59 s, 9 to 38 frames',
  ]  # fmt: skip
