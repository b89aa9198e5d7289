"""Symptoms of runs that do not learn."""

import math

import pytest

from mevit_jax.evaluation.diagnosis import describe_baselines, describe_collapse, diagnose

NAMES = tuple('abcdefgh')


def results(top1=0.9, most=0.15, linear=0.5, majority=0.125):
  return {
    'top1': top1,
    'protocol': {'split': 'validation'},
    'most_predicted': {'class_id': 2, 'fraction': most, 'label_fraction': 0.125},
    'baselines': {'linear': {'top1': linear}, 'majority': {'top1': majority}},
  }


def lines(loss=0.3, accuracy=0.95, wait=0.02):
  return [{'step': i, 'train/loss': loss, 'train/accuracy': accuracy, 'train/data_wait': wait} for i in range(5)]


def symptoms(found, logged):
  return {finding.symptom: finding.found for finding in diagnose(found, logged, NAMES) if finding.found}


def test_a_good_run_has_no_symptom():
  assert symptoms(results(), lines()) == {}
  assert symptoms(results(), []) == {}


@pytest.mark.parametrize(
  ('found', 'logged', 'symptom', 'text'),
  [
    (results(0.13), lines(2.08, 0.12), 'Loss stays at ln C', 'training loss is 2.080; guessing has ln 8 = 2.079'),
    (results(0.2, most=0.94), lines(), 'One class is predicted for most videos', 'for 94 % of the videos: c'),
    (
      results(0.49, linear=0.735),
      lines(),
      'Not better than a baseline',
      'top-1 49.0 %; linear baseline 73.5 %: see Small',
    ),
    (results(0.4), lines(accuracy=1.0), 'Overfitting', '100 % in training, 40 % in validation'),
    (results(0.52), lines(1.2, 0.55), 'Underfitting', '55 % in training, 52 % in validation'),
    (results(), lines(wait=0.65), 'Waiting for data', '65 % of the time'),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
def test_a_symptom_is_found_with_its_numbers(found, logged, symptom, text):
  assert text in symptoms(found, logged)[symptom]


def test_a_loss_at_ln_c_is_not_underfitting():
  assert 'Underfitting' not in symptoms(results(0.13), lines(math.log(8), 0.13))


def test_the_first_steps_are_no_plateau():
  assert 'Loss stays at ln C' not in symptoms(results(), lines(2.08)[:1])


def test_the_better_baseline_is_named_unless_the_model_beats_both():
  assert describe_baselines(results(0.51)) == ''
  assert describe_baselines(results(0.5)).startswith('top-1 50.0 %; linear baseline 50.0 %: see Small datasets')
  assert 'majority class 60.0 %' in describe_baselines(results(0.55, linear=0.5, majority=0.6))
  assert describe_baselines({'top1': 0.1}) == ''


def test_a_frequent_class_that_is_predicted_often_is_no_collapse():
  found = {'most_predicted': {'class_id': 0, 'fraction': 0.8, 'label_fraction': 0.75}}
  assert describe_collapse(found, NAMES) == ''
  assert describe_collapse({}, NAMES) == ''


def test_every_symptom_has_a_remedy_that_is_a_flag_a_command_or_a_page():
  for finding in diagnose(results(), [], NAMES):
    assert finding.remedies
    assert all(flag.startswith(('--config', 'mevit', 'docs/')) for flag, _ in finding.remedies)
