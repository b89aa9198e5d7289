"""Preparing an existing dataset: kept, overwritten, or refused because arguments differ."""

import shutil

import pytest

from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError
from tests.helpers.commands import make_noise_video, small_shapes


def test_preparing_again_does_nothing_without_overwrite(folder, tmp_path, run):
  arguments = ('video_folder', folder, f'--data_dir={tmp_path}')
  run(*arguments)
  first = datasets.open_split(tmp_path, 'my_videos', 'train').fingerprint
  (folder / 'cats' / '0.mp4').write_bytes(make_noise_video(77))
  assert 'already complete: nothing to do' in run(*arguments)
  assert datasets.open_split(tmp_path, 'my_videos', 'train').fingerprint == first
  run(*arguments, '--overwrite')
  assert datasets.open_split(tmp_path, 'my_videos', 'train').fingerprint != first


def test_moving_shapes_of_different_arguments_are_refused(tmp_path, run):
  run(*small_shapes(tmp_path))
  assert 'nothing to do' in run(*small_shapes(tmp_path))
  message = r'train_videos 8 -> 16, seed 0 -> 3; give --data_dir or --overwrite'
  with pytest.raises(UserError, match=message):
    run(*small_shapes(tmp_path), '--train_videos=16', '--seed=3')
  run(*small_shapes(tmp_path), '--train_videos=16', '--seed=3', '--overwrite')
  assert len(datasets.open_split(tmp_path, 'moving_shapes', 'train')) == 16
  assert 'nothing to do' in run(*small_shapes(tmp_path), '--train_videos=16', '--seed=3')


def test_videos_of_a_different_source_are_refused(folder, tmp_path, run, monkeypatch):
  arguments = ('video_folder', folder, f'--data_dir={tmp_path}')
  run(*arguments)
  monkeypatch.chdir(folder.parent)
  assert 'nothing to do' in run('video_folder', folder.name, f'--data_dir={tmp_path}', '--max_unusable=0.5')
  with pytest.raises(UserError, match=r'seed 0 -> 1, validation_fraction 0\.2 -> 0\.4; give --name or'):
    run(*arguments, '--seed=1', '--validation_fraction=0.4')
  other = shutil.copytree(folder, tmp_path / 'b' / folder.name)
  with pytest.raises(UserError, match=f'source {folder} -> {other}; give --name or --overwrite'):
    run('video_folder', other, f'--data_dir={tmp_path}')
  run(*small_shapes(tmp_path))
  with pytest.raises(UserError, match='kind moving_shapes -> video_folder; give --name or'):
    run(*arguments, '--name=moving_shapes')


def test_differing_arguments_are_printed_as_flags(folder, tmp_path, run):
  arguments = ('video_folder', folder, f'--data_dir={tmp_path}/a folder')
  assert f"--config.data.data_dir='{tmp_path}/a folder'" in run(*arguments)
  message = 'encoding keep -> kind=h264 short_side=320 keyframes=6 quality=20; give --name'
  with pytest.raises(UserError, match=message):
    run(*arguments, '--encoding=h264', '--quality=20')


def test_seed_does_not_matter_if_the_split_is_given(folder, tmp_path, run):
  for split in ('train', 'test'):
    shutil.copytree(folder, tmp_path / 'given' / split)
  arguments = ('video_folder', tmp_path / 'given', f'--data_dir={tmp_path}')
  run(*arguments)
  assert 'nothing to do' in run(*arguments, '--seed=5')


def test_damaged_fingerprint_is_a_one_line_error(tmp_path, run):
  run(*small_shapes(tmp_path))
  for name in ('fingerprint.json', 'fingerprint.copy.json'):
    (tmp_path / 'moving_shapes' / '1.0.0' / name).write_text('{')
  with pytest.raises(UserError, match=r'is damaged.*; prepare it again, with --overwrite'):
    run(*small_shapes(tmp_path))


def test_a_lost_shard_is_written_again(folder, tmp_path, run):
  arguments = ('video_folder', folder, f'--data_dir={tmp_path}')
  run(*arguments)
  directory = tmp_path / 'my_videos' / '1.0.0'
  before = {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()}
  next(directory.glob('*validation.array_record*')).unlink()
  assert '1 shards are missing or truncated (my_videos-validation.array_record' in run(*arguments)
  assert {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()} == before


def test_a_lost_shard_of_changed_videos_removes_no_other_shards(folder, tmp_path, run):
  arguments = ('video_folder', folder, f'--data_dir={tmp_path}', '--max_unusable=0.2')
  run(*arguments)
  directory = tmp_path / 'my_videos' / '1.0.0'
  before = {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()}
  lost = next(directory.glob('*validation.array_record*'))
  lost.unlink()
  moved = (folder / 'cats' / '0.mp4').rename(tmp_path / '0.mp4')
  with pytest.raises(
    UserError, match=r'has lost shards, and its videos have changed since .* restore the videos, or give'
  ):
    run(*arguments)
  after = {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()}
  assert after == {path: data for path, data in before.items() if path != lost}
  moved.rename(folder / 'cats' / '0.mp4')
  assert '1 shards are missing or truncated' in run(*arguments)
  assert {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()} == before
