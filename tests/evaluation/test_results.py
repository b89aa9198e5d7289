"""Files of an evaluation, and its film strips."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from mevit_jax.errors import UserError
from mevit_jax.evaluation import results as results_module
from mevit_jax.evaluation.metrics import wilson_interval
from mevit_jax.evaluation.protocol import Predictions
from mevit_jax.evaluation.results import read_results, read_summary, summarize, write_results
from mevit_jax.report.examples import Example, choose_examples, draw_examples

NAMES = ('a', 'b', 'ça, "c"', '$d$ \\frac', 'e', 'f')


@pytest.fixture
def predictions():
  """Predictions of six videos: label ranked first, third, sixth, unreadable, first, and without a label."""
  probabilities = [
    [0.5, 0.1, 0.1, 0.1, 0.1, 0.1],
    [0.4, 0.3, 0.2, 0.05, 0.03, 0.02],
    [0.4, 0.3, 0.2, 0.05, 0.03, 0.02],
    [0.0] * 6,
    [0.0, 0.0, 0.0, 0.9, 0.1, 0.0],
    [0.9, 0.1, 0.0, 0.0, 0.0, 0.0],
  ]
  return Predictions(
    ids=np.asarray([f'v{i}' for i in range(6)]),
    labels=np.asarray([0, 2, 5, 0, 3, -1]),
    logits=np.log(np.asarray(probabilities, np.float32) + 1e-9)[:, None],  # n v c
    errors=np.asarray(['', '', '', 'it is empty', '', '']),
  )


def without_labels(predictions):
  return dataclasses.replace(predictions, labels=np.full(6, -1))


def test_unreadable_videos_count_as_wrong_or_are_excluded_and_unlabeled_ones_are_excluded(predictions):
  found = summarize(predictions)
  assert {name: found[name] for name in found if not name.startswith(('mean', 'inter', 'calib', 'aver'))} == {
    'videos': 6,
    'unlabeled': 1,
    'unreadable': 1,
    'unreadable_videos': {'v3': 'it is empty'},
    'top1_correct': 2,
    'top1': 2 / 4,
    'top1_interval': wilson_interval(2, 4),
    'top1_unreadable_wrong': 2 / 5,
    'top5_correct': 3,
    'top5': 3 / 4,
    'top5_interval': wilson_interval(3, 4),
    'top5_unreadable_wrong': 3 / 5,
    'loss': pytest.approx(-np.log([0.5, 0.2, 0.02, 0.9]).mean(), rel=1e-6),
    'most_predicted': {'class_id': 0, 'fraction': 3 / 4, 'label_fraction': 1 / 4},
  }
  assert found['mean_class'] == (1 + 0 + 0 + 1) / 4  # classes 0, 2, 5 and 3
  assert found['mean_class_unreadable_wrong'] == (1 / 2 + 0 + 0 + 1) / 4
  low, high = found['mean_class_interval']
  assert 0 <= low < 0.5 < high <= 1
  assert found['averages'] == {average: {'top1': 0.5, 'top5': 0.75} for average in ('probabilities', 'logits')}
  assert found['calibration']['mean_confidence'] == pytest.approx((0.5 + 0.4 + 0.4 + 0.9) / 4)
  # Separate bins: 0.5 and 0.9 are right, 0.4 is wrong twice.
  assert found['calibration']['ece'] == pytest.approx((0.5 + 2 * 0.4 + 0.1) / 4)


def test_accuracy_is_undefined_without_labels(predictions):
  assert summarize(without_labels(predictions)) == {
    'videos': 6,
    'unlabeled': 6,
    'unreadable': 1,
    'unreadable_videos': {'v3': 'it is empty'},
  }


def test_submission_file_has_the_official_format(predictions, tmp_path):
  """The format of the dataset's baseline: number and five class ids, semicolons, no header."""
  ids = np.asarray([f'test/{100 + i}' for i in range(6)])
  unlabeled = dataclasses.replace(without_labels(predictions), ids=ids)
  write_results(tmp_path, unlabeled, NAMES, {})
  assert (tmp_path / 'submission.csv').read_text().splitlines() == [
    '100;0;1;2;3;4',
    '101;0;1;2;3;4',
    '102;0;1;2;3;4',
    '104;3;4;0;1;2',  # 103 is unreadable
    '105;0;1;2;3;4',
  ]
  with (tmp_path / 'predictions.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert {(row['label'], row['correct']) for row in rows} == {('', '')}


def test_accuracy_is_undefined_without_readable_videos(predictions):
  errors = np.asarray(['gone'] * 6)
  nothing = dataclasses.replace(predictions, logits=0 * predictions.logits, errors=errors)
  summary = summarize(nothing)
  assert (summary['top1'], summary['top5'], summary['unreadable'], summary['mean_class']) == (0.0, 0.0, 6, 0.0)
  assert summary['top1_interval'] == summary['mean_class_interval'] == (0.0, 1.0)
  json.dumps(summary, allow_nan=False)


def test_written_evaluation_is_read_back(predictions, tmp_path):
  several = dataclasses.replace(predictions, logits=np.repeat(predictions.logits, 3, axis=1), average='logits')
  results = write_results(tmp_path, several, NAMES, {'checkpoint': {'step': 3}})
  found, read, names = read_results(tmp_path)
  assert (found, names, read.average) == (json.loads(json.dumps(results)), NAMES, 'logits')
  for name in ('ids', 'labels', 'logits', 'errors'):
    np.testing.assert_array_equal(getattr(read, name), getattr(several, name))
  assert summarize(read) == summarize(several)


@pytest.mark.parametrize('name', ['results.json', 'logits.npz'])
def test_incomplete_evaluation_is_refused(predictions, tmp_path, name):
  write_results(tmp_path, predictions, NAMES, {})
  whole = (tmp_path / name).read_bytes()
  (tmp_path / name).write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match='is damaged, evaluate again'):
    read_results(tmp_path)
  (tmp_path / name).unlink()
  with pytest.raises(UserError, match=f'is incomplete: {name} is missing'):
    read_results(tmp_path)


def test_a_changed_digit_is_damage(predictions, tmp_path):
  write_results(tmp_path, predictions, NAMES, {'checkpoint': {'step': 3}})
  assert read_summary(tmp_path)['checkpoint'] == {'step': 3}
  text = (tmp_path / 'results.json').read_text()
  (tmp_path / 'results.json').write_text(text.replace('"step": 3', '"step": 2'))
  for read in (read_results, read_summary):
    with pytest.raises(UserError, match=r'is damaged, evaluate again: results\.json does not match its checksum'):
      read(tmp_path)
  (tmp_path / 'logits.npz').unlink()  # which takes most of the space
  assert read_summary(tmp_path)['checkpoint'] == {'step': 2}


def test_killed_evaluation_leaves_no_results_of_the_previous_one(predictions, tmp_path, monkeypatch):
  write_results(tmp_path, predictions, NAMES, {})
  monkeypatch.setattr(results_module, '_write_csv', lambda *arguments: 1 / 0)
  (tmp_path / 'report.html').write_text('of the one before')
  with pytest.raises(ZeroDivisionError):
    write_results(tmp_path, predictions, NAMES, {})
  assert not (tmp_path / 'results.json').exists()
  assert not (tmp_path / 'report.html').exists()


def test_files_of_an_evaluation(predictions, tmp_path):
  results = write_results(tmp_path / 'new/folder', predictions, NAMES, {'checkpoint': {'step': 3}, 'size': (2, 2)})
  folder = tmp_path / 'new/folder'
  assert {path.name for path in folder.iterdir()} == {
    'results.json', 'predictions.csv', 'logits.npz', 'submission.csv',  # of the video without a label
  }  # fmt: skip
  stored = json.loads((folder / 'results.json').read_text())
  assert stored == json.loads(json.dumps(results))
  assert stored == json.loads(json.dumps({**summarize(predictions), 'checkpoint': {'step': 3}, 'size': [2, 2]}))
  with (folder / 'predictions.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [row['id'] for row in rows] == [f'v{i}' for i in range(6)]
  assert [row['label'] for row in rows] == ['a', NAMES[2], 'f', 'a', NAMES[3], '']
  assert [row['prediction'] for row in rows] == ['a', 'a', 'a', '', NAMES[3], 'a']
  assert [row['correct'] for row in rows] == ['1', '0', '0', '', '1', '']
  assert (folder / 'submission.csv').read_text() == 'v5;0;1;2;3;4\n'
  assert [row['confidence'] for row in rows] == ['0.5000', '0.4000', '0.4000', '', '0.9000', '0.9000']
  assert rows[3]['error'] == 'it is empty'
  assert rows[1]['top5'] == '|'.join(NAMES[:5])
  with np.load(folder / 'logits.npz') as arrays:
    for name in ('ids', 'labels', 'logits', 'errors'):
      np.testing.assert_array_equal(arrays[name], getattr(predictions, name))
    assert tuple(arrays['class_names']) == NAMES


def test_film_strips_show_mistakes_and_correct_predictions(predictions):
  shown = choose_examples(predictions, 4)
  assert sorted(shown) == [0, 1, 2, 4]  # the mistakes, and one correct prediction per class
  assert 3 not in choose_examples(predictions, 8)
  assert len(set(choose_examples(predictions, 8))) == len(choose_examples(predictions, 8))


def test_film_strips_of_unlabeled_videos_show_one_per_predicted_class(predictions):
  assert choose_examples(without_labels(predictions), 2) == [0, 4]  # one of class 0, one of class 3
  assert choose_examples(predictions, 8)[-2:] == [1, 2]  # v5 has no label: it is not a mistake


def colors(path):
  with Image.open(path) as image:
    return set(map(tuple, np.asarray(image.convert('RGB')).reshape(-1, 3).tolist()))


def test_unlabeled_film_strip_is_marked_neither_right_nor_wrong(tmp_path):
  frames = np.zeros((2, 8, 8, 3), np.uint8)
  green, red = (0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E)
  for label, shown in (('', set()), ('b', {green, red})):
    draw_examples(tmp_path / 'a.png', [Example(frames, label, [('a', 0.6), ('b', 0.3)])], 'title')
    assert colors(tmp_path / 'a.png') & {green, red} == shown, label


@pytest.mark.parametrize(('frames', 'height', 'width'), [(2, 16, 16), (20, 12, 24)])
def test_film_strips_contain_the_frames(tmp_path, frames, height, width):
  rng = np.random.default_rng(0)
  strips = [
    Example(rng.integers(0, 256, (frames, height, width, 3), np.uint8), label, [(NAMES[3], 0.7), (NAMES[2], 0.2)])
    for label in (NAMES[3], NAMES[2], NAMES[0])
  ]
  draw_examples(tmp_path / 'videos.png', strips, 'a $title$ \\frac')
  with Image.open(tmp_path / 'videos.png') as image:
    pixels = np.asarray(image.convert('RGB')).astype(int)
  columns = min(frames, 8)
  assert image.format == 'PNG'
  # 1.1 inches per frame, 3.6 for the labels and a margin of 0.12, at 150 dots per inch.
  assert abs(image.width - 150 * (0.12 + 1.1 * columns + 3.6)) < 2
  assert abs(image.height - 150 * (3 * (1.1 * height / width + 0.08) + 0.5 + 0.12)) < 2
  # Frames are at their positions: the first frame of the last strip, and the last frame of the first.
  down, across = 150 * (1.1 * height / width + 0.08), 165
  for row, column in ((2, 0), (0, columns - 1)):
    frame = strips[row].frames[0 if column == 0 else -1]
    y, x = int(75 + down * row + 0.08 * 150 + 165 * height / width / 2), int(18 + across * column + 0.97 * 165 / 2)
    around = frame[height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1].reshape(-1, 3).astype(int)
    assert np.abs(around - pixels[y, x]).sum(1).min() == 0
