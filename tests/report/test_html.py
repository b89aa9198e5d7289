"""Contents of the HTML report."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from mevit_jax.evaluation.metrics import confusion_matrix
from mevit_jax.evaluation.results import write_results
from mevit_jax.report import html
from mevit_jax.report.examples import Example, choose_worst
from tests.helpers.predictions import ABOUT, predictions

EVIL = '</script><script>document.title = "taken over"</script> & $x$ "quoted"'


class Page(HTMLParser):
  """Parser of a page: table rows by the table's id, text, pictures, and requested URLs."""

  def __init__(self, path):
    super().__init__()
    self.rows, self.words, self.pictures, self.scripts, self.addresses = {}, [], [], 0, []
    self._table, self._inside = None, None
    self.feed(path.read_text())

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self._inside = tag
    self.scripts += tag == 'script'
    self.addresses += [attributes[name] for name in ('src', 'href') if name in attributes]
    if tag == 'table':
      self._table = attributes.get('id')
    if tag == 'tr':
      self.rows.setdefault(self._table, []).append([])
    if tag in ('td', 'th'):
      self.rows[self._table][-1].append('')
    if tag == 'img':
      self.pictures.append((attributes['alt'], attributes['src']))

  def handle_endtag(self, tag):
    self._inside = None

  def handle_data(self, data):
    if self._inside not in ('script', 'style'):
      self.words.append(data)
      if self.rows.get(self._table) and self.rows[self._table][-1]:
        self.rows[self._table][-1][-1] += data.strip()

  @property
  def text(self):
    return ' '.join(' '.join(self.words).split())


def class_names(classes):
  return (EVIL, *(f'class {i}' for i in range(1, classes)))


def write(folder, classes=12, sections=(), metrics='', **changes):
  """Writes a report of random predictions; returns the predictions and the parsed page."""
  found = predictions(classes=classes, **changes)
  names = class_names(classes)
  results = write_results(folder, found, names, ABOUT)
  frames = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), np.uint8)
  examples = [
    (
      str(found.ids[i]),
      Example(frames, names[found.labels[i]] if found.labels[i] >= 0 else '', [(names[0], 0.7), (names[1], 0.2)]),
    )
    for i in choose_worst(found)
  ]
  (folder / 'metrics.jsonl').write_text(metrics)
  html.write_report(
    folder / 'report.html',
    results,
    found,
    names,
    examples=examples,
    metrics_file=folder / 'metrics.jsonl',
    sections=sections,
  )
  return found, results, folder / 'report.html'


METRICS = ''.join(
  json.dumps({'step': step, 'train/loss': 3 / step, 'train/accuracy': step / 100, 'validation-2x1/top1': None}) + '\n'
  for step in range(10, 60, 10)
)


def image(address):
  kind, data = re.fullmatch(r'data:image/([a-z+]+);base64,(.*)', address).groups()
  return kind, base64.b64decode(data)


def test_tables_have_the_numbers_of_the_results(tmp_path):
  found, results, path = write(tmp_path, unreadable=(4, 5), metrics=METRICS)
  shown = Page(path)
  for name in ('top1', 'top5', 'mean_class', 'mean_class_unreadable_wrong'):
    assert f'{100 * results[name]:.2f} %' in shown.text, name
  assert '300 videos of made_up/validation, 2 clips \xd7 1 crop per video, 8 frames per clip (dense' in shown.text
  assert 'average of probabilities' in shown.text
  assert '2 videos are unreadable' in shown.text
  assert 'split/0004 it is <empty> & gone' in shown.text
  rows = shown.rows['classes-table'][1:]
  assert [row[0] for row in rows] == list(class_names(12))
  counted = found.readable
  matrix = confusion_matrix(found.labels[counted], found.ranked(1)[counted, 0], 12)
  assert [int(row[1]) for row in rows] == matrix.sum(1).tolist()
  assert [row[2] for row in rows] == [f'{100 * matrix[i, i] / matrix[i].sum():.1f}\u2009%' for i in range(12)]
  assert [row[4] for row in rows] == [f'{100 * matrix[i, i] / matrix[:, i].sum():.1f}\u2009%' for i in range(12)]
  wrong = matrix - np.diag(np.diag(matrix))
  pairs = [int(row[2]) for row in shown.rows['pairs'][1:]]
  assert pairs == sorted(wrong.ravel().tolist(), reverse=True)[: len(pairs)]
  assert ['dataset.fingerprint', 'f' * 64] in shown.rows['settings-table']


def test_page_is_self_contained_and_escapes_names(tmp_path):
  picture = np.zeros((5, 6, 3), np.uint8)
  sections = [html.Section('Attention maps', 'Of a patch.', [(picture, EVIL)])]
  _, _, path = write(tmp_path, metrics=METRICS, sections=sections)
  shown = Page(path)
  assert all(address.startswith(('data:', '#')) for address in shown.addresses)
  assert 'url(' not in path.read_text()
  assert shown.scripts == 1
  assert 'Attention maps Of a patch.' in shown.text
  for alt, address in shown.pictures:
    kind, data = image(address)
    if kind == 'svg+xml':
      assert data.startswith(b'<?xml')
    else:
      Image.open(io.BytesIO(data)).verify()
    assert alt
  kinds = [image(address)[0] for _, address in shown.pictures]
  assert kinds == ['svg+xml'] * 4 + ['jpeg'] * 12 + ['png']  # curves, confusion, reliability; strips; attention


def test_confusion_matrix_of_many_classes_has_one_pixel_per_cell_and_tooltips(tmp_path):
  found, _, path = write(tmp_path, classes=30, videos=600)
  (address,) = [address for alt, address in Page(path).pictures if alt == 'Confusion matrix of 30 classes']
  with Image.open(io.BytesIO(image(address)[1])) as opened:
    pixels = np.asarray(opened.convert('RGB')).astype(int)
  cells = json.loads(re.search(r'id="cells">(.*?)</script>', path.read_text(), re.DOTALL)[1])
  order = [class_names(30).index(name) for name in cells['names']]
  assert sorted(order) == list(range(30))
  expected = confusion_matrix(found.labels, found.ranked(1)[:, 0], 30)[np.ix_(order, order)]
  counts = np.zeros((30, 30), int)
  for row, column, count in cells['counts']:
    counts[row, column] = count
  np.testing.assert_array_equal(counts, expected)
  assert cells['totals'] == expected.sum(1).tolist()
  assert pixels.shape == (30, 30, 3)
  dark = -pixels.sum(-1)  # the more videos of a row, the darker the cell
  for row in range(30):
    assert dark[row, counts[row].argmax()] == dark[row].max()


def test_most_confident_mistakes_are_shown_first():
  found = predictions(unreadable=(2,), unlabeled=(3, 4))
  confidence, right = found.probabilities.max(1), found.ranked(1)[:, 0] == found.labels
  worst = choose_worst(found, 10)
  assert len(worst) == 10
  assert not right[worst].any()
  assert not {2, 3, 4} & set(worst)
  wrong = np.flatnonzero(~right & found.readable & (found.labels >= 0))
  assert confidence[worst].tolist() == sorted(confidence[wrong].tolist(), reverse=True)[:10]


def test_without_mistakes_the_least_confident_predictions_are_shown():
  found = predictions(skill=60.0)
  worst = choose_worst(found, 5)
  assert found.probabilities.max(1)[worst].tolist() == sorted(found.probabilities.max(1).tolist())[:5]


def test_without_labels_there_is_no_accuracy(tmp_path):
  _, _, path = write(tmp_path, unlabeled=range(300))
  text = Page(path).text
  assert 'No video has a label' in text
  assert 'accuracy' not in text.lower()
  assert text.count('no label, predicted') == 12


def test_report_of_only_unreadable_videos(tmp_path):
  found, results, _ = write(tmp_path, unreadable=range(300))
  html.write_report(tmp_path / 'report.html', results, found, class_names(12))
  assert '300 videos are unreadable' in Page(tmp_path / 'report.html').text


def test_symptoms_of_the_run_come_first_with_their_remedies(tmp_path):
  line = {'train/loss': 0.1, 'train/accuracy': 1.0, 'train/data_wait': 0.65}
  _, results, path = write(tmp_path, metrics=''.join(json.dumps({'step': i, **line}) + '\n' for i in (20, 40, 60)))
  assert results['top1'] < 0.8
  rows = Page(path).rows['diagnosis-table'][1:]
  assert [row[0] for row in rows[:2]] == ['Overfitting', 'Waiting for data']
  assert rows[0][1] == f'100 % in training, {100 * results["top1"]:.0f} % in validation'
  assert rows[1][1] == '65 % of the time'
  assert '--encoding=h264 --short_side=64' in rows[1][2]
  assert {row[1] for row in rows[2:]} == {'no'}


def test_learning_curves_end_at_the_evaluated_checkpoint_and_show_the_validation_loss(tmp_path):
  lines = [
    {'step': 30, 'train/loss': 0.5, 'train/accuracy': 0.9, 'validation-2x1/loss': 1.5, 'validation-2x1/top1': 0.4},
    {'step': 60, 'train/loss': 0.2, 'train/accuracy': 0.9},
    {'step': 90, 'train/loss': 9e9, 'train/accuracy': 0.9},
  ]
  _, _, path = write(tmp_path, metrics=''.join(json.dumps(line) + '\n' for line in lines))
  curves = {alt: image(source)[1].decode() for alt, source in Page(path).pictures if alt.endswith('by training step')}
  loss, accuracy = curves['loss by training step'], curves['top-1 accuracy by training step']
  for text in ('training clips', 'validation-2x1', 'guessing (ln 12)'):
    assert f'<!-- {text} -->' in loss
  assert '<!-- guessing -->' in accuracy
  assert '1e' not in ''.join(re.findall('<!-- (.*?) -->', loss))  # the later loss would set the scale
