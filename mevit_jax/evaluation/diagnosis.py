"""Signs that a model is not learning, overfits or waits for data, with their usual remedies."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_RECENT = 3  # log lines that are averaged

# All remedies start with the flag or command that applies them.
_NOT_LEARNING = (
  ('--config.init_from=WEIGHTS', 'start from pretrained weights'),
  ('--config=small', 'from scratch: few large patches and a small model leave the plateau sooner'),
  ('--config.optimizer.learning_rate', 'a third, or three times as much'),
  ('--config.optimizer.clip_norm=1 --config.optimizer.warmup_epochs=5', 'if the loss jumps'),
)
_OVERFITTING = (
  ('--config.init_from=WEIGHTS', 'pretrained weights need fewer videos'),
  ('--config.augment.flip, .color_jitter, .erase, .mixup', 'augmentation (docs/augmentation.md)'),
  ('--config.training.patience=10', 'stop when validation no longer improves, and keep the best checkpoint'),
  ('--config.optimizer.weight_decay, --config.model.drop_path', 'more regularization'),
  ('--config=small', 'a smaller model'),
)
_UNDERFITTING = (
  ('--config.training.epochs', 'train longer'),
  ('--config.model.width, .motion_blocks', 'a larger model'),
  ('--config.augment', 'weaker augmentation'),
)
_WAITING = (
  (
    'mevit prepare ... --encoding=h264 --short_side=64',
    'store small videos that are cheap to decode; about image_size',
  ),
  ('--config.data.workers', 'more decoding processes, up to the number of cores'),
  ('--config.data.repeated_augmentation=2', 'several clips per decoded video'),
)
_BASELINE = (
  ('docs/small_datasets.md', 'Small datasets: which config to use for how many videos'),
  ('--config.init_from=WEIGHTS', 'start from pretrained weights'),
)


class Finding(NamedTuple):
  """One symptom.

  Attributes:
    symptom: general name: 'Overfitting'.
    found: what this run shows, in one line; '' if it does not have the symptom.
    remedies: (flag or command, explanation) pairs.
  """

  symptom: str
  found: str
  remedies: Sequence[tuple[str, str]]

  @property
  def is_absent(self) -> bool:
    """True if the run does not have the symptom."""
    return not self.found


def describe_baselines(results: Mapping[str, Any]) -> str:
  """Returns 'top-1 49.0 %; linear baseline 73.5 %: see Small datasets' if the model is not better, else ''."""
  baselines = results.get('baselines')
  if not baselines or 'top1' not in results:
    return ''
  names = {'linear': 'linear baseline', 'majority': 'majority class'}
  best = max(names, key=lambda name: baselines[name]['top1'])
  if results['top1'] > baselines[best]['top1']:
    return ''
  return (
    f'top-1 {100 * results["top1"]:.1f} %; {names[best]} {100 * baselines[best]["top1"]:.1f} %: see Small datasets, '
    'docs/small_datasets.md'
  )


def describe_collapse(results: Mapping[str, Any], class_names: Sequence[str]) -> str:
  """Returns 'one class is predicted for 94 % of the videos: NAME' if most of these have another label, else ''."""
  most = results.get('most_predicted')
  if not most or most['fraction'] < 0.5 or most['fraction'] < 2 * most['label_fraction']:
    return ''
  return f'one class is predicted for {100 * most["fraction"]:.0f} % of the videos: {class_names[most["class_id"]]}'


def diagnose(
  results: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], class_names: Sequence[str]
) -> list[Finding]:
  """Returns all symptoms, those that the run shows and those that it does not.

  Args:
    results: contents of results.json.
    lines: contents of metrics.jsonl, up to the evaluated step.
    class_names: class i is the i-th name.
  """
  loss, accuracy, wait = (_recent(lines, f'train/{name}') for name in ('loss', 'accuracy', 'data_wait'))
  classes = len(class_names)
  top1, guessing = results.get('top1', math.nan), math.log(classes)
  plateau = ''
  if classes > 1 and loss > 0.97 * guessing and len([line for line in lines if 'train/loss' in line]) >= _RECENT:
    plateau = f'the training loss is {loss:.3f}; guessing has ln {classes} = {guessing:.3f}'
  trains = f'{100 * accuracy:.0f} % in training, {100 * top1:.0f} % in {results["protocol"]["split"]}'
  learns = not plateau and accuracy > 2 / classes
  return [
    Finding('Loss stays at ln C', plateau, _NOT_LEARNING),
    Finding('One class is predicted for most videos', describe_collapse(results, class_names), _NOT_LEARNING),
    Finding('Not better than a baseline', describe_baselines(results), _BASELINE),
    Finding('Overfitting', trains if accuracy - top1 > 0.2 else '', _OVERFITTING),
    Finding('Underfitting', trains if learns and accuracy < 0.7 and accuracy - top1 < 0.1 else '', _UNDERFITTING),
    Finding('Waiting for data', f'{100 * wait:.0f} % of the time' if wait > 0.3 else '', _WAITING),
  ]


def _recent(lines: Sequence[Mapping[str, Any]], name: str) -> float:
  """Returns the mean of the last values of a metric; NaN if there is none."""
  values = [line[name] for line in lines if line.get(name) is not None][-_RECENT:]
  return float(np.mean(values)) if values else math.nan
