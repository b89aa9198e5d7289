"""Interrupted and concurrent preparation: it resumes, and a complete dataset stays readable."""

import fcntl
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mevit_jax.datasets import reader as datasets
from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import moving_shapes
from mevit_jax.errors import UserError
from tests.helpers.commands import small_shapes


@pytest.fixture
def broken(monkeypatch):
  """Returns a function of the number of videos after which drawing the next one interrupts the command."""
  encode = moving_shapes.encode

  def after(count):
    left = iter(range(count))

    def one(pixels):
      if next(left, None) is None:
        raise KeyboardInterrupt
      return encode(pixels)

    monkeypatch.setattr(moving_shapes, 'encode', one)

  return after


def test_interrupted_preparation_resumes(tmp_path, run, broken):
  broken(12)
  with pytest.raises(KeyboardInterrupt):
    run(*small_shapes(tmp_path))
  assert not datasets.is_complete(tmp_path / 'moving_shapes' / '1.0.0')
  broken(8)
  assert '8 of 16' in run(*small_shapes(tmp_path))
  broken(16)
  run(*small_shapes(tmp_path / 'whole'))
  marks = {datasets.open_split(d, 'moving_shapes', 'train').fingerprint for d in (tmp_path, tmp_path / 'whole')}
  assert len(marks) == 1


def test_killed_command_resumes_at_the_first_missing_shard(tmp_path):
  """Complete shards are kept, and the result is the same as without the kill."""
  command = [
    sys.executable,
    '-m',
    'mevit_jax',
    'prepare',
    *small_shapes(tmp_path / 'a'),
    '--train_videos=900',
    '--workers=1',
  ]
  directory, before = tmp_path / 'a' / 'moving_shapes' / '1.0.0', {}
  for ending, whole in ((signal.SIGINT, 1), (signal.SIGKILL, 2)):
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as killed:
      while len(manifests := list(directory.glob('manifests/*.json'))) < whole:
        assert killed.poll() is None
        time.sleep(0.01)
      killed.send_signal(ending)
      _, errors = killed.communicate(timeout=30)
      assert errors == ('' if ending == signal.SIGKILL else 'interrupted\n')
    assert not datasets.is_complete(directory)
    for path in (*manifests, *(directory / each.stem for each in manifests)):
      assert before.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
  done = subprocess.run([*command, '--workers=2'], capture_output=True, text=True, check=True)
  assert not done.stderr
  assert re.match(r'videos written: (512|768|900) of 908', done.stdout)
  assert {path: path.stat().st_mtime_ns for path in before} == before
  builder = moving_shapes.build(tmp_path / 'b', {'train': 900, 'validation': 8}, frames=2, size=16)
  shards.write(builder)
  a, b = ({p.name: p.read_bytes() for p in d.iterdir() if p.is_file()} for d in (directory, Path(builder.data_path)))
  del a['fingerprint.json'], b['fingerprint.json']  # it contains the arguments
  assert a == b


def test_two_commands_do_not_write_the_same_dataset(tmp_path, run):
  (tmp_path / 'moving_shapes').mkdir()
  with (tmp_path / 'moving_shapes' / '.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r'another command is preparing .*moving_shapes; wait'):
      run(*small_shapes(tmp_path))
  run(*small_shapes(tmp_path))


def content(directory):
  return {path.relative_to(directory): path.read_bytes() for path in directory.rglob('*') if path.is_file()}


def test_old_dataset_is_kept_until_the_new_one_is_complete(tmp_path, run, broken, capsys):
  directory, again = tmp_path / 'moving_shapes' / '1.0.0', (*small_shapes(tmp_path), '--seed=3', '--overwrite')
  run(*small_shapes(tmp_path))
  old = content(directory)
  for count in (4, 12):
    broken(count)
    with pytest.raises(KeyboardInterrupt):
      run(*again)
    assert content(directory) == old
    assert len(list(datasets.open_split(tmp_path, 'moving_shapes', 'train').source)) == 8
    capsys.readouterr()
  broken(0)
  assert 'nothing to do (--overwrite continues to prepare it again)' in run(*small_shapes(tmp_path))
  broken(8)
  assert 'videos written: 8 of 16' in run(*again)  # the first shard was complete
  broken(16)
  run(*small_shapes(tmp_path / 'other'), '--seed=3')
  assert content(directory.parent) == content(tmp_path / 'other' / 'moving_shapes')
  assert [path.name for path in directory.parent.iterdir() if path.is_dir()] == ['1.0.0']


@pytest.mark.parametrize(('moment', 'read'), [(0, 'old'), (1, 'old'), (2, 'new'), (3, 'new')])
def test_kill_during_replacement_leaves_one_complete_dataset(tmp_path, run, monkeypatch, moment, read):
  """Killed before each change to the disk: one dataset is complete and readable; the same command resumes."""
  directory, again = (
    tmp_path / 'a' / 'moving_shapes' / '1.0.0',
    (*small_shapes(tmp_path / 'a'), '--seed=3', '--overwrite'),
  )
  run(*small_shapes(tmp_path / 'a'))
  run(*small_shapes(tmp_path / 'b'), '--seed=3')
  new = tmp_path / 'b' / 'moving_shapes' / '1.0.0'
  marks = {'old': datasets.read_fingerprint(directory)[0], 'new': datasets.read_fingerprint(new)[0]}
  left = iter(range(moment))

  def dying(change):
    def dies(path, *arguments, **options):
      if Path(path).name in ('1.0.0', '0.0.0', '.staging') and next(left, None) is None:
        raise KeyboardInterrupt
      return change(path, *arguments, **options)

    return dies

  with monkeypatch.context() as patch:
    for where, name in ((Path, 'rename'), (shutil, 'rmtree')):
      patch.setattr(where, name, dying(getattr(where, name)))
    with pytest.raises(KeyboardInterrupt):
      run(*again)
  split = datasets.open_split(tmp_path / 'a', 'moving_shapes', 'train')
  assert (len(list(split.source)), split.fingerprint) == (8, marks[read])
  if read == 'old':
    with pytest.raises(UserError, match='seed 0 -> 3'):
      run(*again[:-1])
  else:
    assert 'nothing to do' in run(*again[:-1])
  assert directory.is_dir()
  assert not directory.with_name('0.0.0').exists()
  run(*again)
  assert content(tmp_path / 'a') == content(tmp_path / 'b')
  assert [path.name for path in directory.parent.iterdir() if path.is_dir()] == ['1.0.0']


def test_old_dataset_can_be_removed_to_free_disk_space(tmp_path, run, broken):
  directory, again = tmp_path / 'moving_shapes' / '1.0.0', (*small_shapes(tmp_path), '--seed=3', '--overwrite')
  run(*small_shapes(tmp_path))
  broken(12)
  with pytest.raises(KeyboardInterrupt):
    run(*again)
  shutil.rmtree(directory)
  broken(8)
  assert 'videos written: 8 of 16' in run(*again)
  assert datasets.is_complete(directory)
  assert not shards.staging_directory(directory).exists()
