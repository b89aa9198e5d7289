"""Random damage to the files of a run and a dataset: all that is used afterwards is right, or the damage is named.

`python -m benchmarks.fault_injection --kills=0 --faults=1000` runs it. Each fault changes one file of a copy: a flipped
bit, a changed digit, a block of zeros, a file that is cut, empty, missing, or another file's content. Then the copy is
used as commands use it. The outcome is

  named      one line, an error or a warning, names the file, or its checkpoint, evaluation or example
  harmless   the result is that of the undamaged files
  silent     the result is another one, and nothing was said
  crashed    an exception that is not a UserError, or that has several lines

A target of its own kind, such as weights of another library, is one more `Target` in `make_targets`.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mevit_jax import train
from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.reader import load_checkpoint, read_best, read_run
from mevit_jax.config import experiment
from mevit_jax.config.data import ClipConfig
from mevit_jax.data import pipeline
from mevit_jax.datasets import reader as datasets
from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import moving_shapes
from mevit_jax.errors import UserError
from mevit_jax.evaluation.comparison import find_evaluation
from mevit_jax.evaluation.results import read_results
from mevit_jax.inference.shared import read_results as read_card_results
from mevit_jax.training.metrics import MetricWriter

OUTCOMES = ('named', 'harmless', 'silent', 'crashed')
DATASET = 'moving_shapes'


@dataclasses.dataclass(frozen=True)
class Target:
  """Files to damage.

  Attributes:
    name: name in the table.
    folder: folder that is copied for every fault.
    pattern: glob pattern of the files that are damaged, below the folder.
    use: function of a copy that uses it as commands do, and returns what it read, to be compared with `==`.
    words: regular expression of words that also name a damaged file, besides its name and that of its folder.
  """

  name: str
  folder: Path
  pattern: str
  use: Callable[[Path], Any]
  words: str = r'(?!)'


def make_targets(folder: Path) -> list[Target]:
  """Trains a small run in a folder and returns what is damaged."""
  shards.write(moving_shapes.build(folder / 'data', {'train': 16, 'validation': 11}, frames=4, size=16))
  model = {'image_size': 16, 'patch_size': 8, 'frames': 2, 'width': 16, 'heads': 2, 'mlp_dim': 32}
  config = experiment.from_dict({
    'model': {**model, 'space_blocks': 0, 'motion_blocks': 1, 'class_blocks': 0, 'dtype': 'float32'},
    'data': {'dataset': DATASET, 'data_dir': str(folder / 'data'), 'short_side': (16,), 'stride': 1},
    'training': {
      'batch_size': 8, 'epochs': 3.0, 'save_every': 2, 'evaluate_every': 2, 'log_every': 1, 'ema': 0.9, 'keep': 2,
    },
    'evaluation': {'crops': 1, 'attention_maps': 0},
    'mesh': {'data': 1},
  })  # fmt: skip
  workdir = folder / 'run'
  train.train(config, str(workdir))
  return [
    Target('config.json', workdir, 'config.json', read_run),
    Target('best.json', workdir, 'best.json', _use_state),
    Target('metrics.jsonl', workdir, 'metrics.jsonl', _use_state),
    Target('evaluation', workdir, 'evaluation/*/[rl][eo][sg]*', _use_evaluation, words='has no evaluation'),
    Target('checkpoint', workdir, 'checkpoints/*/**/*', _use_checkpoint, words=r'checkpoints/\d+ is damaged'),
    Target('dataset, metadata', folder / 'data', '*/*/*.*[!0-9]', _use_dataset),
    Target(
      'dataset, shards',
      folder / 'data',
      '*/*/*.array_record-*',
      _use_dataset,
      words=r'dataset index \d+|the first video in the shards',
    ),
  ]


def _use_state(workdir: Path) -> Any:
  """Resumes: returns what is best, the latest step and the checkpoints that are kept."""
  best = read_best(workdir)
  with contextlib.closing(CheckpointManager(workdir, keep=1)) as checkpoints:
    latest = checkpoints.latest
  with contextlib.closing(MetricWriter(workdir, latest or 0)):
    pass
  return best, latest, sorted(path.name for path in (workdir / 'checkpoints').iterdir())


def _use_evaluation(workdir: Path) -> Any:
  """Compares and exports: returns the results, the predictions and the rows of the model card."""
  results, predictions, names = read_results(find_evaluation(workdir, None))
  card = list(read_card_results(workdir, results['checkpoint']))
  arrays = predictions.ids, predictions.labels, predictions.logits, predictions.errors
  return results, card, names, predictions.average, _digest(arrays)


def _use_checkpoint(workdir: Path) -> Any:
  """Loads the latest checkpoint, raw and EMA, and its optimizer state's file names."""
  found = []
  for weights in ('raw', 'ema'):
    checkpoint = load_checkpoint(workdir, weights=weights)
    metadata = json.dumps(checkpoint.metadata, sort_keys=True)
    found.append((checkpoint.step, metadata, checkpoint.class_names, _digest(jax.tree.leaves(checkpoint.params))))
  return found


def _use_dataset(data_dir: Path) -> Any:
  """Opens the splits and reads every video as evaluation does."""
  found = []
  for name in ('train', 'validation'):
    split = datasets.open_split(data_dir, DATASET, name)
    split.verify()
    labels = split.labels.tolist()
    clip = ClipConfig(frames=2, size=(16, 16), stride=1, short_side=(16, 16))
    batches = pipeline.eval_batches(split.source, clip, crops=1, batch_size=8)
    try:
      read = [{key: _digest([batch[key]]) for key in ('video', 'label', 'id', 'error')} for batch in batches]
    finally:
      batches.close()
    found.append((split.class_names, split.fingerprint, dict(split.videos), labels, read))
  return found


def _digest(arrays: Any) -> str:
  """Returns a hash of the dtypes, shapes and bytes of arrays."""
  digest = hashlib.sha256()
  for array in map(np.asarray, arrays):
    digest.update(repr((array.dtype, array.shape)).encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def damage(path: Path, random_: random.Random) -> str:
  """Changes a file; returns how."""
  data = bytearray(path.read_bytes())
  kind = random_.choice(('bit', 'high bit', 'digit', 'zeros', 'cut', 'cut line', 'empty', 'missing', 'other file'))
  at = random_.randrange(len(data)) if data else 0
  if kind in ('bit', 'high bit') and data:
    data[at] ^= 0x80 if kind == 'high bit' else 1 << random_.randrange(7)
  elif kind == 'digit' and (digits := [match.start() for match in re.finditer(rb'\d', data)]):
    at = random_.choice(digits)
    data[at] = random_.choice([digit for digit in b'0123456789' if digit != data[at]])
  elif kind == 'zeros':
    data[at : at + 16] = bytes(len(data[at : at + 16]))
  elif kind == 'cut':
    del data[at:]
  elif kind == 'cut line':  # such as a list of class names
    del data[data.find(b'\n', at) + 1 :]
  elif kind == 'empty':
    data.clear()
  elif kind == 'other file':
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    data = bytearray(random_.choice(others).read_bytes()) if others else data
  path.unlink() if kind == 'missing' else path.write_bytes(data)
  return f'{kind} at {at}'


class _Warnings(logging.Handler):
  """Collects the messages of warnings."""

  def __init__(self) -> None:
    super().__init__(logging.WARNING)
    self.messages: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.messages.append(record.getMessage())


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
  """Yields the list of the package's warnings, which are not printed meanwhile."""
  logger, handler = logging.getLogger('mevit_jax'), _Warnings()
  handlers, logger.handlers = logger.handlers, [handler]
  try:
    yield handler.messages
  finally:
    logger.handlers = handlers


def classify(target: Target, expected: Any, folder: Path, path: Path) -> tuple[str, str]:
  """Uses a damaged copy; returns the outcome and what was said or differs."""
  error, found = None, None
  with _warnings() as messages:
    try:
      found = target.use(folder)
    except Exception as raised:
      error = raised
  if error is None and found == expected:
    return 'harmless', ''
  if error is not None:
    if not isinstance(error, UserError) or '\n' in str(error):
      return 'crashed', repr(error)
    messages.append(str(error))
  names = re.compile(f'{re.escape(path.name)}|{re.escape(str(path.parent))}|{target.words}')
  said = [message for message in messages if names.search(message)]
  return ('named', said[0]) if said else ('silent', '; '.join(messages) or 'the result differs')


def run(folder: Path, faults: int, seed: int) -> tuple[str, list[str]]:
  """Damages files of every target; writes into an empty folder.

  Returns:
    The table of outcomes, and a line for each fault that was silent or crashed.
  """
  counts: dict[str, collections.Counter] = {}
  failures, random_ = [], random.Random(seed)
  targets = make_targets(folder)
  for target in targets:
    expected = target.use(shutil.copytree(target.folder, folder / 'intact'))
    shutil.rmtree(folder / 'intact')
    counts[target.name] = collections.Counter()
    for _ in range(faults // len(targets)):
      copy = shutil.copytree(target.folder, folder / 'damaged')
      path = random_.choice(sorted(path for path in copy.glob(target.pattern) if path.is_file()))
      kind = damage(path, random_)
      outcome, message = classify(target, expected, copy, path)
      counts[target.name][outcome] += 1
      if outcome in ('silent', 'crashed'):
        failures.append(f'{outcome}: {path.relative_to(copy)}: {kind}: {message}')
      shutil.rmtree(copy)
  return format_table(counts), failures


def format_table(counts: dict[str, collections.Counter]) -> str:
  """Formats the number of each outcome by target, and their sums."""
  total = sum(counts.values(), collections.Counter())
  rows = [('', *OUTCOMES), *((name, *(str(row[outcome]) for outcome in OUTCOMES)) for name, row in counts.items())]
  rows.append((f'{total.total()} faults', *(str(total[outcome]) for outcome in OUTCOMES)))
  return '\n'.join(f'{row[0]:20}' + ''.join(f'{cell:>10}' for cell in row[1:]) for row in rows)
