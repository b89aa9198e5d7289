"""Checkpoints are restored bitwise on any devices, and only intact ones are used."""

import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mevit_jax.checkpoint import checksums
from mevit_jax.checkpoint.manager import CheckpointManager
from mevit_jax.checkpoint.reader import load_checkpoint, read_run, restore_item
from mevit_jax.checkpoint.workdir import write_workdir
from mevit_jax.config.experiment import from_dict, to_dict
from mevit_jax.config.mesh import MeshConfig
from mevit_jax.errors import UserError
from mevit_jax.files import read_checked_json
from mevit_jax.parallel.mesh import make_mesh
from mevit_jax.parallel.placement import abstract_with_shardings, param_shardings
from mevit_jax.training.state import TrainState

METADATA = {
  'config': json.loads(json.dumps(to_dict(from_dict({'model': {'image_size': [32, 32]}})))),
  'class_names': ['é', 'b'],
  'fingerprint': 'f',
}


def state_at(step, devices=8, ema=True):
  """Returns a state of random numbers, including a NaN and a subnormal."""
  rng = np.random.default_rng(step)
  params = {'mlp': {'kernel': rng.normal(size=(64, 5)), 'bias': [np.nan, 1e-42]}, 'head': rng.normal(size=3)}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params, is_leaf=lambda x: isinstance(x, list))
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.trace(0.9))
  _, opt_state = optimizer.update(params, optimizer.init(params), params)
  mean = jax.tree.map(lambda x: -x, params) if ema else None
  state = TrainState(jnp.asarray(step, jnp.int32), params, opt_state, mean, jnp.asarray(0, jnp.int32))
  return jax.device_put(state, param_shardings(state, make_mesh(MeshConfig(data=devices))))


def target(devices=8):
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_at(0, 1))
  return abstract_with_shardings(shapes, make_mesh(MeshConfig(data=devices)))


def assert_same_bits(state, other):
  assert jax.tree.structure(state) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(workdir, *steps, keep=10, ema=True):
  write_workdir(workdir, METADATA)
  checkpoints = CheckpointManager(workdir, keep)
  for step in steps:
    checkpoints.save(state_at(step, ema=ema), METADATA)
  checkpoints.close()


def restore(workdir, devices=8):
  """Restores like resumed training."""
  checkpoints = CheckpointManager(workdir, 10)
  try:
    return checkpoints.restore(target(devices))
  finally:
    checkpoints.close()


def names_in(workdir):
  return {path.name for path in (workdir / 'checkpoints').iterdir()}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('saved')
  save(workdir, 3, 5)
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'run')


@pytest.mark.parametrize('devices', [8, 2, 1])
def test_state_is_restored_bitwise_on_any_devices(saved, devices):
  state = restore(saved, devices)
  assert_same_bits(state, state_at(5))
  assert len(state.params['head'].sharding.device_set) == devices


def test_load_checkpoint_selects_step_and_weights(saved):
  found = load_checkpoint(saved)
  assert (found.step, found.metadata) == (5, {**METADATA, 'step': 5, 'format': 3})
  assert [load_checkpoint(saved, weights=weights).weights for weights in ('auto', 'ema', 'raw')] == [
    'ema',
    'ema',
    'raw',
  ]
  assert_same_bits(restore_item(found.folder, 'ema', target(2).ema), state_at(5).ema)
  assert load_checkpoint(saved, '3').step == 3


def test_state_without_ema_is_restored(tmp_path):
  save(tmp_path, 3, ema=False)
  assert [load_checkpoint(tmp_path, weights=weights).weights for weights in ('auto', 'raw')] == ['raw', 'raw']
  with pytest.raises(UserError, match=r'checkpoints/3 has no EMA parameters: .* training\.ema = 0'):
    load_checkpoint(tmp_path, weights='ema')


def test_arrays_can_be_overwritten_during_an_asynchronous_save(tmp_path):
  checkpoints = CheckpointManager(tmp_path, 2)
  state = jax.tree.map(jnp.copy, state_at(3))
  checkpoints.save(state, METADATA)
  jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
  checkpoints.close()
  assert_same_bits(restore(tmp_path), state_at(3))


def test_full_disk_is_a_one_line_error_and_keeps_saved_checkpoints(tmp_path, monkeypatch):
  checkpoints = CheckpointManager(tmp_path, 2)
  checkpoints.save(state_at(3), METADATA)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
  with pytest.raises(
    UserError, match=r'no space left on the disk: .* 0\.0 MiB are free .* resume from step 3'
  ) as raised:
    checkpoints.save(state_at(4), METADATA)
  assert '\n' not in str(raised.value)
  checkpoints.close()
  assert_same_bits(restore(tmp_path), state_at(3))


# Which checkpoints are kept.


def test_newest_checkpoints_are_kept(tmp_path):
  save(tmp_path, 1, 2, 3, 4, keep=2)
  assert names_in(tmp_path) == {'3', '4'}
  save(tmp_path, 4, keep=2)  # it exists already
  assert_same_bits(restore(tmp_path), state_at(4))


def test_leftovers_of_a_killed_run_are_deleted(workdir):
  """Complete and partial checkpoints."""
  old = shutil.copytree(workdir / 'checkpoints/3', workdir / 'checkpoints/1')
  shutil.rmtree(old / 'params')
  save(workdir, keep=2)
  assert names_in(workdir) == {'3', '5'}
  assert_same_bits(restore(workdir), state_at(5))


@pytest.mark.parametrize('keeps', [True, False])
def test_best_checkpoint_is_kept(tmp_path, keeps):
  write_workdir(tmp_path, METADATA)
  for steps in ((1, 2, 3), (4, 5)):  # also by a resumed run
    checkpoints = CheckpointManager(tmp_path, 1, keeps)
    for step in steps:
      checkpoints.save(state_at(step), METADATA)
      checkpoints.record_evaluation(step, {2: 0.5, 5: 0.5}.get(step, 0.1), 'validation-1x1')
    checkpoints.close()
  assert names_in(tmp_path) == ({'2', '5'} if keeps else {'5'})  # the earlier of two equally good ones
  if keeps:
    assert read_checked_json(tmp_path / 'best.json') == {'step': 2, 'top1': 0.5, 'evaluation': 'validation-1x1'}
    assert load_checkpoint(tmp_path, 'best').step == 2
  assert load_checkpoint(tmp_path).step == 5


def test_best_checkpoint_depends_on_the_protocol(tmp_path):
  write_workdir(tmp_path, METADATA)
  checkpoints = CheckpointManager(tmp_path, 1)
  for step, top1, evaluation in ((1, 0.9, 'validation-1x1'), (2, 0.5, 'validation-1x3')):
    checkpoints.save(state_at(step), METADATA)
    checkpoints.record_evaluation(step, top1, evaluation)
  checkpoints.close()
  assert load_checkpoint(tmp_path, 'best').step == 2


@pytest.mark.parametrize(
  ('which', 'match'), [('best', 'no best checkpoint: no evaluation ran'), ('4', 'no checkpoint 4')]
)
def test_missing_checkpoint_is_a_one_line_error(saved, which, match):
  with pytest.raises(UserError, match=f'has {match}.*; its checkpoints: 3, 5$'):
    load_checkpoint(saved, which)


# Damage.


def test_damaged_best_json_deletes_no_checkpoint(tmp_path, caplog):
  """The best checkpoint is then the one that metrics.jsonl records."""
  write_workdir(tmp_path, METADATA)
  save_steps = ((1, 0.1), (2, 0.9), (3, 0.5))
  checkpoints = CheckpointManager(tmp_path, 1)
  for step, top1 in save_steps:
    checkpoints.save(state_at(step), METADATA)
    checkpoints.record_evaluation(step, top1, 'validation-1x1')
  checkpoints.close()
  lines = [json.dumps({'step': step, 'validation-1x1/top1': top1}) for step, top1 in save_steps]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
  text = (tmp_path / 'best.json').read_text()
  (tmp_path / 'best.json').write_text(text.replace('"step": 2', '"step": 6'))
  save(tmp_path, 4, keep=1)
  assert names_in(tmp_path) == {'2', '4'}
  assert 'best.json is damaged' in caplog.text
  assert load_checkpoint(tmp_path, 'best').step == 2


def test_damaged_config_json_is_restored_from_checkpoint_metadata(workdir, caplog):
  path = workdir / 'config.json'
  for damage in (lambda: path.write_text(path.read_text().replace('"b"', '"c"')), path.unlink):
    damage()
    assert read_run(workdir) == {**METADATA, 'step': 5, 'format': 3}
    assert load_checkpoint(workdir).class_names == ('é', 'b')
    assert 'using the metadata of checkpoint 5' in caplog.text
    caplog.clear()


def test_checksums_are_written_before_the_checkpoint_is_renamed(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(
    'mevit_jax.checkpoint.manager.write_checksums',
    lambda folder: (seen.append(folder), checksums.write_checksums(folder)),
  )
  save(tmp_path, 3)
  assert [folder.name for folder in seen] == ['3.orbax-checkpoint-tmp']
  assert not checksums.verify_checksums(tmp_path / 'checkpoints/3')


def test_partially_written_checkpoint_is_not_used(workdir):
  """Orbax renames a checkpoint to its final name only when it is complete."""
  folder = workdir / 'checkpoints'
  half = shutil.copytree(folder / '5', folder / '7.orbax-checkpoint-tmp')
  shutil.rmtree(half / 'params')
  (half / 'commit_success.txt').unlink()
  assert load_checkpoint(workdir).step == 5
  assert half.exists()  # another process may still write it
  assert_same_bits(restore(workdir), state_at(5))
  save(workdir, 7)
  assert_same_bits(restore(workdir), state_at(7))


def test_partially_copied_checkpoint_is_not_used(workdir, caplog):
  (workdir / 'checkpoints/7/params').mkdir(parents=True)
  assert load_checkpoint(workdir).step == 5
  assert 'checkpoints/7 is damaged, using step 5 instead: checksums.json is missing' in caplog.text


def flip(path, count=4):
  data = bytearray(path.read_bytes())
  for i in np.random.default_rng(0).integers(len(data), size=count):
    data[i] ^= 0xFF
  path.write_bytes(data)


DAMAGES = {
  'flipped': (flip, 'has a different checksum'),
  'truncated': (
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    'has .* bytes instead of',
  ),
  'empty': (lambda path: path.write_bytes(b''), 'has 0 bytes instead of'),
  'missing': (lambda path: path.unlink(), 'is missing'),
}


def checked_files(folder):
  """Returns all files of a checkpoint except Orbax's own two, which are not needed."""
  return [path for path in sorted(folder.rglob('*')) if path.is_file() and path.relative_to(folder).parent.name]


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_to_any_file_is_reported_by_name(workdir, damage):
  folder = workdir / 'checkpoints/5'
  hurt, what = DAMAGES[damage]
  assert len(checked_files(folder)) > 20
  for path in checked_files(folder):
    kept = path.read_bytes()
    hurt(path)
    if path.stat().st_size != len(kept) if path.exists() else True:
      assert re.fullmatch(
        rf'{re.escape(str(path.relative_to(folder)))} {what}.*', checksums.verify_checksums(folder)
      ), path
    else:
      assert checksums.verify_checksums(folder).startswith(f'{path.relative_to(folder)} {what}'), path
    path.write_bytes(kept)
  assert not checksums.verify_checksums(folder)


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_checksums_are_reported(workdir, damage):
  path = workdir / 'checkpoints/5' / checksums.CHECKSUMS
  DAMAGES[damage][0](path)
  assert checksums.verify_checksums(path.parent)


def test_previous_checkpoint_is_used_if_the_newest_is_damaged(workdir, caplog):
  """Resuming renames the damaged checkpoint and saves its step again."""
  largest = max(checked_files(workdir / 'checkpoints/5'), key=lambda path: path.stat().st_size)
  flip(largest)
  where = largest.relative_to(workdir / 'checkpoints/5')
  said = f'checkpoints/5 is damaged, using step 3 instead: {where} has a different checksum'
  assert load_checkpoint(workdir).step == 3
  assert said in caplog.text
  caplog.clear()
  assert names_in(workdir) == {'3', '5'}
  with pytest.raises(UserError, match=rf'checkpoints/5 is damaged; .*{where}'):
    load_checkpoint(workdir, '5')
  assert_same_bits(restore(workdir), state_at(3))
  assert said in caplog.text
  caplog.clear()
  assert names_in(workdir) == {'3', '5.damaged'}
  save(workdir, 4, 5)
  assert not caplog.text
  assert_same_bits(restore(workdir), state_at(5))


def test_only_damaged_checkpoints_is_a_one_line_error_and_changes_no_file(workdir):
  for step in ('3', '5'):
    (workdir / 'checkpoints' / step / 'params/manifest.ocdbt').unlink()
  for opened in (load_checkpoint, restore):
    with pytest.raises(
      UserError, match=r'all checkpoints .* are damaged; none was changed.* 5: params/manifest.* 3: params/man'
    ) as raised:
      opened(workdir)
    assert '\n' not in str(raised.value)
  assert names_in(workdir) == {'3', '5'}


@pytest.mark.parametrize('name', ['_CHECKPOINT_METADATA', 'commit_success.txt'])
def test_files_that_orbax_adds_are_optional(workdir, name):
  (workdir / 'checkpoints/5' / name).unlink()
  assert_same_bits(restore(workdir), state_at(5))
  save(workdir, 6)
  assert_same_bits(restore(workdir), state_at(6))


def test_checkpoint_of_another_model_is_a_one_line_error(saved):
  with pytest.raises(UserError, match=r'checkpoint .*/checkpoints/5 cannot be restored: params: ') as raised:
    restore_item(load_checkpoint(saved).folder, 'params', target().opt_state)
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize('empty', [True, False])
def test_workdir_without_checkpoints(tmp_path, empty):
  write_workdir(tmp_path, METADATA)
  if empty:
    CheckpointManager(tmp_path, 2).close()
    assert CheckpointManager(tmp_path, 2).latest is None
  with pytest.raises(UserError, match='has no checkpoint: train into it first'):
    load_checkpoint(tmp_path)
  assert (tmp_path / 'checkpoints').exists() == empty
