"""Training from the stored features of a frozen encoder equals training through the encoder."""

import json

import numpy as np
import pytest

from mevit_jax import train
from mevit_jax.errors import UserError

pytestmark = pytest.mark.usefixtures('compile_once')

PROBE = {
  'model.space_blocks': 1, 'model.motion_blocks': 0, 'model.class_blocks': 1, 'model.space_encoder': True,
  'model.frame_tokens': 1, 'model.dtype': 'float32', 'optimizer.freeze': '^(embedding|frame_tokens|space)',
  'training.log_every': 1, 'augment.flip': True, 'augment.mixup': 0.8, 'mesh.data': 4,
}  # fmt: skip


def metrics(workdir, name='train/loss'):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return np.array([line[name] for line in lines if name in line])


@pytest.fixture(scope='module')
def uncached(tiny, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uncached') / 'run'
  results = train.train(tiny(**PROBE), str(workdir))
  return metrics(workdir), results


def cached(tiny, workdir, **changes):
  return train.train(tiny(**{**PROBE, 'training.cache_features': 100, **changes}), str(workdir))


def test_training_from_features_equals_training_through_the_encoder(tiny, uncached, tmp_path):
  losses, expected = uncached
  results = cached(tiny, tmp_path / 'run')
  np.testing.assert_allclose(metrics(tmp_path / 'run'), losses, rtol=1e-4)
  assert len(losses) > 2
  assert results['top1'] == pytest.approx(expected['top1'])


@pytest.mark.slow
def test_only_missing_features_are_computed(tiny, uncached, tmp_path, monkeypatch):
  cached(tiny, tmp_path / 'run')
  files = sorted((tmp_path / 'run' / 'features').iterdir())
  files[-1].unlink()  # as after a kill
  kept = {file: file.stat().st_mtime_ns for file in files[:-2]}
  for name in ('checkpoints', 'metrics.jsonl', 'config.json'):
    path = tmp_path / 'run' / name
    path.rename(tmp_path / name)
  cached(tiny, tmp_path / 'run')
  assert {file: file.stat().st_mtime_ns for file in kept} == kept
  np.testing.assert_allclose(metrics(tmp_path / 'run'), uncached[0], rtol=1e-4)


def test_later_epochs_have_the_same_clips_in_another_order(tiny, tmp_path):
  epochs = 3.0
  cached(tiny, tmp_path / 'run', **{'training.cache_features': 1, 'training.epochs': epochs})
  stored = list((tmp_path / 'run' / 'features').glob('*.npy'))
  steps = len(metrics(tmp_path / 'run'))
  assert len(stored) < steps <= epochs * len(stored)
  losses = metrics(tmp_path / 'run')
  assert len(set(losses)) == steps


def test_dry_run_stores_no_features(tiny, tmp_path, capsys):
  train.dry_run(tiny(**PROBE, **{'training.cache_features': 1}), str(tmp_path / 'run'))
  assert 'ran a second training step' in capsys.readouterr().out
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model.space_encoder': False}, 'needs `model.space_encoder`'),
    ({'optimizer.freeze': '^space'}, 'embedding, frame_tokens are trained'),
    ({'optimizer.freeze': ''}, 'embedding, frame_tokens, space, space_norm are trained'),
  ],
)
def test_features_of_a_trained_encoder_are_not_stored(tiny, tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    cached(tiny, tmp_path / 'run', **changes)


def test_damaged_features_are_reported_by_name(tiny, tmp_path):
  cached(tiny, tmp_path / 'run')
  file = min((tmp_path / 'run' / 'features').glob('*.npy'))
  file.write_bytes(file.read_bytes()[:100])
  (tmp_path / 'run' / 'checkpoints').rename(tmp_path / 'checkpoints')
  with pytest.raises(UserError, match=f'{file.name} is damaged'):
    cached(tiny, tmp_path / 'run')
