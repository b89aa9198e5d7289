"""Comparison of two evaluations, and the compare command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mevit_jax.checkpoint.workdir import write_workdir
from mevit_jax.cli import compare
from mevit_jax.config import experiment
from mevit_jax.errors import UserError
from mevit_jax.evaluation import comparison
from mevit_jax.evaluation.protocol import Predictions
from mevit_jax.evaluation.results import summarize, write_results
from mevit_jax.report.comparison import format_comparison
from tests.helpers.predictions import ABOUT, predictions

NAMES = tuple(f'class {i}' for i in range(12))
ROOT = Path(__file__).parents[2]


def shuffled(given):
  order = np.random.default_rng(3).permutation(len(given.ids))
  columns = {name: getattr(given, name)[order] for name in ('ids', 'labels', 'logits', 'errors')}
  return dataclasses.replace(given, **columns)


def test_accuracies_equal_those_of_each_evaluation():
  one, other = predictions(seed=1), predictions(seed=2, skill=3.0)
  found = comparison.compare(one, shuffled(other), NAMES)
  for name in ('top1', 'top5', 'mean_class'):
    assert (found[name]['a'], found[name]['b']) == (summarize(one)[name], summarize(other)[name])
    assert found[name]['difference'] == found[name]['b'] - found[name]['a'] > 0
    low, high = found[name]['interval']
    assert low < found[name]['difference'] < high
  assert (found['videos'], found['excluded']) == (300, 0)


def test_confidence_interval_is_paired():
  """Its width is that of the mean difference, which is narrower than for two independent sets of videos."""
  one = predictions(videos=1000, seed=1)
  logits = one.logits + 0.4 * np.random.default_rng(5).normal(size=one.logits.shape).astype(np.float32)
  found = comparison.compare(one, dataclasses.replace(one, logits=logits), NAMES)['top1']
  hits = [
    (one.labels == one.ranked(1)[:, 0]).astype(int),
    (one.labels == dataclasses.replace(one, logits=logits).ranked(1)[:, 0]).astype(int),
  ]
  error = (hits[1] - hits[0]).std() / np.sqrt(1000)
  low, high = found['interval']
  assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
  assert high - low < 0.6 * 2 * 1.96 * np.hypot(hits[0].std(), hits[1].std()) / np.sqrt(1000)


def test_a_model_does_not_differ_from_itself():
  found = comparison.compare(predictions(), predictions(), NAMES)
  assert found['top1']['interval'] == (0.0, 0.0)
  assert found['mcnemar_top1'] == {'correct_to_wrong': 0, 'wrong_to_correct': 0, 'p': 1.0}
  assert (found['correct_to_wrong'], found['wrong_to_correct'], found['same_prediction']) == ([], [], 1.0)
  assert found['ensemble'] == {name: found[name]['a'] for name in ('top1', 'top5', 'mean_class')}


def test_videos_with_changed_predictions_are_listed():
  one, other = predictions(seed=1), predictions(seed=2)
  found = comparison.compare(one, other, NAMES)
  right = [of.ranked(1)[:, 0] == of.labels for of in (one, other)]
  lost = set(one.ids[right[0] & ~right[1]].tolist())
  won = set(one.ids[right[1] & ~right[0]].tolist())
  assert {video['id'] for video in found['correct_to_wrong']} == lost
  assert {video['id'] for video in found['wrong_to_correct']} == won
  p = stats.binomtest(len(won), len(lost) + len(won)).pvalue
  assert found['mcnemar_top1'] == {'correct_to_wrong': len(lost), 'wrong_to_correct': len(won), 'p': pytest.approx(p)}
  surest = [video['b']['confidence'] for video in found['correct_to_wrong']]
  assert surest == sorted(surest, reverse=True)
  first = found['correct_to_wrong'][0]
  i = one.ids.tolist().index(first['id'])
  assert first['label'] == first['a']['prediction'] == NAMES[one.labels[i]] != first['b']['prediction']


def test_an_ensemble_is_the_mean_of_probabilities():
  one, other = predictions(seed=1), predictions(seed=2)
  together = (one.probabilities + other.probabilities).argmax(1) == one.labels
  found = comparison.compare(one, other, NAMES)
  assert found['ensemble']['top1'] == together.mean() > max(found['top1']['a'], found['top1']['b'])


def test_unreadable_and_unlabeled_videos_are_excluded():
  one, other = (
    predictions(seed=1, unreadable=(3, 4), unlabeled=(9,)),
    predictions(seed=2, unreadable=(4, 5), unlabeled=(9,)),
  )
  found = comparison.compare(one, other, NAMES)
  assert (found['videos'], found['excluded']) == (296, 4)


@pytest.mark.parametrize(
  ('other', 'match'),
  [
    (predictions(videos=299), 'different videos or classes'),
    (predictions(classes=14), 'different videos or classes'),
    (dataclasses.replace(predictions(), labels=np.zeros(300, int)), 'different labels for the same videos'),
    (predictions(unreadable=range(300)), 'nothing to compare'),
  ],
)
def test_evaluations_of_different_videos_are_refused(other, match):
  with pytest.raises(UserError, match=match):
    comparison.compare(predictions(), other, NAMES)


@pytest.fixture
def workdirs(tmp_path):
  """Two runs of different seeds and block sizes with the same protocol, the second with another protocol too."""
  for seed, name in enumerate(('a', 'b')):
    config = experiment.to_dict(experiment.Config())
    config['training']['seed'] = seed
    write_workdir(tmp_path / name, {'config': config, 'class_names': NAMES, 'fingerprint': 'f'})
    write_results(tmp_path / name / 'evaluation/validation-2x1', predictions(seed=seed), NAMES, ABOUT)
  return tmp_path


def folders(workdirs):
  return [workdirs / name / 'evaluation/validation-2x1' for name in ('a', 'b')]


def test_compare_prints_writes_and_plots(workdirs):
  command = [sys.executable, '-m', 'mevit_jax', 'compare', workdirs / 'a', workdirs / 'b', '--videos=2']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stderr) == (0, '')
  found = comparison.compare_evaluations(*folders(workdirs))
  assert done.stdout == format_comparison(found, 2) + '\n'


def test_text_output(workdirs):
  found = comparison.compare_evaluations(*folders(workdirs))
  lines = format_comparison(found, 2).splitlines()
  assert '300 videos of made_up/validation, fingerprint ffffffffffff; 0 excluded' in lines[2]
  numbers = [float(x) for x in next(line for line in lines if line.startswith('top-1')).replace('%', ' ').split()[1:4]]
  expected = [100 * found['top1'][of] for of in ('a', 'b', 'difference')]
  np.testing.assert_allclose(numbers, expected, atol=0.0051)
  assert sum(line.startswith('  split/') for line in lines) == 4
  assert lines[-1] == '  config.training.seed: 0 -> 1'
  assert not any('Correct only in' in line for line in format_comparison(found, 0).splitlines() if line.endswith(':'))


def test_result_is_json_serializable(workdirs):
  found = comparison.compare_evaluations(*folders(workdirs))
  stored = json.loads(json.dumps(found, allow_nan=False))
  assert len(stored['correct_to_wrong']) == stored['mcnemar_top1']['correct_to_wrong'] > 2
  assert stored['differences'] == ['config.training.seed: 0 -> 1']


def test_another_average_needs_no_second_evaluation(workdirs):
  found = comparison.compare_evaluations(*folders(workdirs), average='logits')
  assert (
    found['top1']['a'] == json.loads((folders(workdirs)[0] / 'results.json').read_text())['averages']['logits']['top1']
  )


def test_evaluation_is_selected_by_protocol(workdirs):
  assert comparison.find_evaluation(workdirs / 'a', None).name == 'validation-2x1'
  write_results(workdirs / 'a/evaluation/test-1x1', predictions(), NAMES, ABOUT)
  with pytest.raises(UserError, match='several evaluations, choose one with --name: test-1x1, validation-2x1'):
    comparison.find_evaluation(workdirs / 'a', None)
  assert comparison.find_evaluation(workdirs / 'a', 'test-1x1').name == 'test-1x1'
  with pytest.raises(UserError, match='has no evaluation test-9x9; it has test-1x1, validation-2x1'):
    comparison.find_evaluation(workdirs / 'a', 'test-9x9')


def test_different_datasets_are_refused(workdirs):
  other = {**ABOUT, 'dataset': {**ABOUT['dataset'], 'fingerprint': 'e' * 64}}
  write_results(folders(workdirs)[0], predictions(), NAMES, other)
  with pytest.raises(UserError, match='different datasets or splits: fingerprint: eee'):
    comparison.compare_evaluations(*folders(workdirs))


def test_invalid_arguments_are_one_line_errors(workdirs):
  with pytest.raises(UserError, match='two workdirs or evaluation folders, not 1'):
    compare.main(['compare', str(workdirs / 'a')])
  with pytest.raises(UserError, match=r'nothing has no evaluation; run: mevit evaluate'):
    comparison.find_evaluation(workdirs / 'nothing', None)


def changed(lost, won, videos):
  """Two evaluations: the first is right in `lost` videos in which the second is wrong, and the other way around."""
  labels = np.zeros(videos, int)
  right = np.ones((2, videos), bool)
  right[1, :lost] = False
  right[0, lost : lost + won] = False
  logits = np.where(right[..., None], np.float32([3, 0]), np.float32([0, 3]))[:, :, None]  # 2 n 1 c
  ids, errors = np.asarray([f'v{i}' for i in range(videos)]), np.full(videos, '')
  return [Predictions(ids, labels, x, errors) for x in logits]


@pytest.mark.parametrize(
  ('lost', 'won', 'videos', 'text'),
  [
    (0, 5, 36, 'excludes 0, but p = 0.062: only 5 of 36 videos changed'),
    (0, 12, 36, ''),
    (4, 5, 36, ''),
  ],
)
def test_an_interval_and_a_p_value_that_disagree_are_explained(lost, won, videos, text):
  found = comparison.compare(*changed(lost, won, videos), ('a', 'b'))
  about = {'a': 'A', 'b': 'B', 'dataset': {'name': 'd', 'split': 's', 'fingerprint': 'f'}, 'differences': []}
  shown = format_comparison({**about, **found}, 0)
  assert (text or 'The exact test decides') in shown if text else 'The exact test decides' not in shown
