"""Checkpoints: bit for bit what was saved, on any devices, and nothing that is not whole."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mevit_jax.errors import UserError
from mevit_jax.parallel.mesh import MeshConfig, make_mesh
from mevit_jax.parallel.placement import place, placed
from mevit_jax.training.checkpoint import Checkpoints, read_workdir, write_workdir
from mevit_jax.training.state import TrainState

ABOUT = {'recipe': {'model': {'image_size': [32, 32]}}, 'class_names': ['é', 'b'], 'fingerprint': 'f'}


def state_at(step, devices=8):
  """A state of random numbers, a NaN and a tiny one among them."""
  rng = np.random.default_rng(step)
  params = {'mlp': {'kernel': rng.normal(size=(64, 5)), 'bias': [np.nan, 1e-42]}, 'head': rng.normal(size=3)}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params, is_leaf=lambda x: isinstance(x, list))
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.trace(0.9))
  _, opt_state = optimizer.update(params, optimizer.init(params), params)
  state = TrainState(jnp.asarray(step, jnp.int32), params, opt_state)
  return jax.device_put(state, place(state, make_mesh(MeshConfig(data=devices))))


def target(devices=8):
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_at(0, 1))
  return placed(shapes, make_mesh(MeshConfig(data=devices)))


def assert_same_bits(state, other):
  assert jax.tree.structure(state) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(workdir, *steps, keep=10):
  checkpoints = Checkpoints(workdir, keep)
  for step in steps:
    checkpoints.save(state_at(step), ABOUT)
  checkpoints.close()


def restore(workdir, devices=8):
  checkpoints = Checkpoints(workdir)
  try:
    return checkpoints.restore(target(devices))
  finally:
    checkpoints.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('saved')
  save(workdir, 3, 5)
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'run')


@pytest.mark.parametrize('devices', [8, 2, 1])
def test_a_state_comes_back_bit_for_bit_on_any_devices(saved, devices):
  state = restore(saved, devices)
  assert_same_bits(state, state_at(5))
  assert len(state.params['head'].sharding.device_set) == devices


def test_params_alone(saved):
  checkpoints = Checkpoints(saved)
  step, params = checkpoints.restore_params(target(2).params)
  assert step == 5
  assert_same_bits(params, state_at(5).params)
  assert checkpoints.about() == {**ABOUT, 'step': 5, 'format': 1}
  checkpoints.close()


def test_saving_leaves_time_to_overwrite_what_is_saved(tmp_path):
  checkpoints = Checkpoints(tmp_path, 2)
  state = jax.tree.map(jnp.copy, state_at(3))
  checkpoints.save(state, ABOUT)
  jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
  checkpoints.close()
  assert_same_bits(restore(tmp_path), state_at(3))


def test_a_full_disk_is_one_line_and_costs_nothing_saved(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path, 2)
  checkpoints.save(state_at(3), ABOUT)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
  with pytest.raises(UserError, match=r'no space on the disk: .* 0\.0 MiB are free .* go on from step 3') as raised:
    checkpoints.save(state_at(4), ABOUT)
  assert '\n' not in str(raised.value)
  checkpoints.close()
  assert_same_bits(restore(tmp_path), state_at(3))


def test_the_newest_are_kept(tmp_path):
  save(tmp_path, 1, 2, 3, 4, keep=2)
  assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} == {'3', '4'}
  save(tmp_path, 4, keep=2)  # it is there already
  assert_same_bits(restore(tmp_path), state_at(4))


def test_a_checkpoint_that_was_being_written_is_not_taken(workdir):
  """As Orbax leaves it when it is killed: under its last name only once it is whole."""
  folder = workdir / 'checkpoints'
  half = shutil.copytree(folder / '5', folder / '7.orbax-checkpoint-tmp')
  shutil.rmtree(half / 'params')
  (half / 'commit_success.txt').unlink()
  assert_same_bits(restore(workdir), state_at(5))
  save(workdir, 7)
  assert_same_bits(restore(workdir), state_at(7))


def test_reading_leaves_what_another_process_is_writing(workdir):
  half = workdir / 'checkpoints/7.orbax-checkpoint-tmp'
  half.mkdir()
  restore(workdir)
  assert half.exists()


# Orbax leaves coroutines behind that failed, and Python says so when it collects them.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage', ['half of the arrays', 'no arrays', 'half of the names', 'another model'])
def test_a_damaged_checkpoint_is_one_line(workdir, damage):
  params = workdir / 'checkpoints/5/params'
  if damage == 'half of the arrays':
    for path in params.rglob('d/*'):
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif damage == 'no arrays':
    (params / 'manifest.ocdbt').unlink()
  elif damage == 'half of the names':
    (params / '_METADATA').write_text((params / '_METADATA').read_text()[:200])
  else:
    shutil.rmtree(params)
    shutil.copytree(workdir / 'checkpoints/5/opt_state', params)
  with pytest.raises(UserError, match=r'checkpoint .*/checkpoints/5 cannot be restored.* the one before') as raised:
    restore(workdir)
  assert '\n' not in str(raised.value)
  shutil.rmtree(workdir / 'checkpoints/5')  # as it says
  assert_same_bits(restore(workdir), state_at(3))


def test_a_damaged_description_is_one_line(workdir):
  (workdir / 'checkpoints/5/about/metadata').write_text('{"recipe": ')
  checkpoints = Checkpoints(workdir)
  with pytest.raises(UserError, match='checkpoints/5 cannot be restored'):
    checkpoints.about()
  checkpoints.close()


@pytest.mark.parametrize('empty', [True, False])
def test_no_checkpoint(tmp_path, empty):
  if empty:
    Checkpoints(tmp_path, 2).close()
    assert Checkpoints(tmp_path, 2).latest is None
  with pytest.raises(UserError, match='has no checkpoint'):
    restore(tmp_path if empty else tmp_path / 'nowhere')
  assert not (tmp_path / 'nowhere').exists()


def test_config_json(tmp_path):
  write_workdir(tmp_path / 'run', ABOUT)
  assert read_workdir(tmp_path / 'run') == {**ABOUT, 'format': 1}
  assert [path.name for path in (tmp_path / 'run').iterdir()] == ['config.json']


@pytest.mark.parametrize(
  'text', ['{"format": 1', json.dumps({**ABOUT, 'format': 99}), json.dumps(ABOUT), '[]', '{"format": 1}']
)
def test_config_json_of_another_format(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(
    UserError, match=r'config\.json (is damaged|has format (99|None), this version .* reads 1|is not of a workdir)'
  ):
    read_workdir(tmp_path)


def test_no_config_json(tmp_path):
  with pytest.raises(UserError, match='is no workdir'):
    read_workdir(tmp_path)
