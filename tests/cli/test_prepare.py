"""`mevit prepare`: complete runs, output, and one-line errors."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections import namedtuple

import pytest
from absl import flags

from mevit_jax import progress
from mevit_jax.datasets import reader as datasets
from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import moving_shapes
from mevit_jax.errors import UserError
from tests.helpers.commands import make_noise_video, small_shapes


def test_prepare_end_to_end(folder, tmp_path):
  """Runs in a subprocess, like a user's."""
  command = [
    sys.executable,
    '-m',
    'mevit_jax',
    'prepare',
    'video_folder',
    folder,
    f'--data_dir={tmp_path}',
    '--workers=2',
  ]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert not done.stderr
  assert 'mevit train --config=video_folder' in done.stdout
  assert f'--config.data.dataset=my_videos --config.data.data_dir={tmp_path}' in done.stdout
  assert re.search(r'videos written: 9 of 9, \d+\.\d/s\n', done.stdout)
  train, validation = (datasets.open_split(tmp_path, 'my_videos', name) for name in ('train', 'validation'))
  # One of each class, or two copies: the order is that of the files' hashes, which depend on the encoder's version.
  assert (len(train), len(validation)) in {(7, 2), (6, 3)}
  assert train.class_names == ('cats', 'dogs')
  for example in (*train.source, *validation.source):
    assert example['video'] == (folder / example['id']).read_bytes()
    assert train.class_names[example['label']] == example['id'].split('/')[0]
    assert (example['num_frames'], example['height'], example['width']) == (4, 16, 16)
    assert example['fps'] == pytest.approx(30)
  directory = tmp_path / 'my_videos' / '1.0.0'
  report = json.loads((directory / 'report.json').read_text())
  assert report['total'] == {'listed': 10, 'usable': 9, 'damaged': 0, 'short': 9, 'unusable': 1, 'missing': 0}
  assert list(report['unusable']) == ['dogs/9.mp4']
  copies = report['duplicates_across_splits'] + report['duplicates_within_split']
  assert [name.split(': ')[1] for name in copies[0]] == ['cats/0.mp4', 'cats/8.mp4']
  assert 'dogs/9.mp4' in (directory / 'report.txt').read_text()
  assert not (tmp_path / 'my_videos' / '.examined').exists()


def test_too_many_unusable_videos_stop_preparation_with_a_summary_before_writing(folder, tmp_path, run, caplog):
  (folder / 'cats' / '0.mp4').write_bytes(b'')
  with pytest.raises(UserError, match=r'2 of 10 videos are unusable already, more than --max_unusable=0\.1'):
    run('video_folder', folder, f'--data_dir={tmp_path}')
  assert 'cats/0.mp4: ' in caplog.text
  assert 'dogs/9.mp4: ' in caplog.text
  assert not (tmp_path / 'my_videos' / '1.0.0').exists()
  run('video_folder', folder, f'--data_dir={tmp_path}', '--max_unusable=0.5')
  assert len(datasets.open_split(tmp_path, 'my_videos', 'train')) == 6


def test_missing_file_of_a_csv_is_reported(folder, tmp_path, run):
  rows = [f'My Videos/{c}/{i}.mp4,{c},{("train", "test")[i > 4]}' for i in range(9) for c in [('cats', 'dogs')[i % 2]]]
  (tmp_path / 'list.csv').write_text('\n'.join(['path,label,split', *rows, 'gone.mp4,dogs,train']))
  printed = run('video_folder', tmp_path / 'list.csv', f'--data_dir={tmp_path}', '--name=Pets', '--max_unusable=0.2')
  assert '10 videos of 2 classes, 1 of them missing' in printed
  assert 'missing: listed, but without a file (1):\n  gone.mp4' in printed
  assert 'same bytes in two splits' in printed
  counts = {name: len(datasets.open_split(tmp_path, 'Pets', name)) for name in ('train', 'test')}
  assert counts == {'train': 5, 'test': 4}


@pytest.mark.parametrize(
  'flag', ['--size=1000000', '--frames=1000000000', '--train_videos=1000000000', '--workers=1000000']
)
def test_numbers_out_of_bounds_are_refused_before_anything_is_written(tmp_path, run, flag):
  with pytest.raises(flags.IllegalFlagValueError, match=flag.partition('=')[0]):
    run(*small_shapes(tmp_path), flag)
  assert not list(tmp_path.iterdir())


def test_moving_shapes_have_the_name_that_was_given(tmp_path, run):
  printed = run(*small_shapes(tmp_path), '--name=shapes')
  assert '--config.data.dataset=shapes' in printed
  assert len(datasets.open_split(tmp_path, 'shapes', 'train')) == 8
  assert [path.name for path in tmp_path.iterdir()] == ['shapes']


def test_names_of_any_bytes_are_prepared_and_printed_safely(tmp_path, run):
  """Two class folders from a zip made on a Chinese Windows, and names with terminal escapes."""
  classes = ['跳舞'.encode('gbk'), '唱歌'.encode('gbk'), b'walk\x1b[31m', b'Walk\x1b[31m']
  for k, name in enumerate(classes):
    folder = os.path.join(os.fsencode(tmp_path), b'v\xff', name)
    os.makedirs(folder)
    for i in range(3):
      with open(os.path.join(folder, b'\xd1\x07\n%d.mp4' % i), 'wb') as file:
        file.write(b'' if (k, i) == (0, 0) else make_noise_video(3 * k + i))
  arguments = 'video_folder', os.fsdecode(os.path.join(os.fsencode(tmp_path), b'v\xff')), f'--data_dir={tmp_path}'
  printed = run(*arguments, '--name=names')
  assert all(character.isprintable() or character == '\n' for character in printed)
  assert r'\xcc\xf8\xce\xe8/\xd1\x07\n0.mp4: ' in printed  # unusable
  assert r'differ only in case or Unicode form are different classes: Walk\x1b[31m = walk\x1b[31m' in printed
  split = datasets.open_split(tmp_path, 'names', 'train')
  assert split.class_names == (r'Walk\x1b[31m', r'\xb3\xaa\xb8\xe8', r'\xcc\xf8\xce\xe8', r'walk\x1b[31m')
  assert split.videos == {'train': 7, 'validation': 4}
  assert 'nothing to do' in run(*arguments, '--name=names')
  with pytest.raises(UserError, match=r'd.xff is not UTF-8, which array_record cannot write to; choose another folder'):
    run(*arguments[:2], f'--data_dir={tmp_path}/d\udcff')


def test_a_negative_seed_is_refused_before_anything_is_written(tmp_path, run):
  with pytest.raises(flags.IllegalFlagValueError, match='--seed=-1'):
    run(*small_shapes(tmp_path), '--seed=-1')
  assert not list(tmp_path.iterdir())


def test_a_class_without_usable_videos_is_reported_before_writing(folder, tmp_path, run, caplog):
  for name in ('1', '2'):
    path = folder / 'newts' / f'{name}.mp4'
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'')
  with pytest.raises(UserError, match=r'all videos are unusable or missing in: newts; '):
    run('video_folder', folder, f'--data_dir={tmp_path}', '--max_unusable=0.5')
  assert 'newts/1.mp4: ' in caplog.text
  assert not (tmp_path / 'my_videos' / '1.0.0').exists()


@pytest.mark.skipif(importlib.util.find_spec('apache_beam') is None, reason='Apache Beam is not installed')
@pytest.mark.filterwarnings('default')  # raised by Beam
def test_beam_writes_the_same_bytes(folder, tmp_path):
  """Runs on Beam's worker processes."""
  options = '--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2'
  command = [sys.executable, '-m', 'mevit_jax', 'prepare', 'video_folder', folder]
  for arguments in ([f'--data_dir={tmp_path}/a', '--workers=2'], [f'--data_dir={tmp_path}/b', f'--beam={options}']):
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert 'videos written: 9 of 9' in done.stdout
  a, b = (
    {p.relative_to(d): p.read_bytes() for p in d.rglob('*') if p.is_file()} for d in (tmp_path / 'a', tmp_path / 'b')
  )
  assert a == b


def test_missing_beam_error_names_the_requirements_file(tmp_path, run, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  with pytest.raises(UserError, match=r'Apache Beam is not installed .*: pip install apache-beam'):
    run(*small_shapes(tmp_path), '--beam=--runner=DirectRunner')


def test_kinetics_and_something_something(tmp_path, run):
  """From the official lists, with some of the classes, a missing video and a split without labels."""
  videos, lists = tmp_path / 'videos', tmp_path / 'lists'
  for path in (videos, lists):
    path.mkdir()
  rows = [('abseiling', 'aaaaaaaaaaa', 'train'), ('zumba', 'bbbbbbbbbbb', 'train'), ('zumba', 'ccccccccccc', 'val')]
  for i, (_, name, _) in enumerate(rows):
    (videos / f'{name}_000001_000011.mp4').write_bytes(make_noise_video(i))
  for split in ('train', 'val'):
    lines = [f'{label},{name},1,11,{split}' for label, name, each in rows if each == split]
    (lists / f'{split}.csv').write_text('\n'.join(['label,youtube_id,time_start,time_end,split', *lines]))
  (lists / 'test.csv').write_text('youtube_id,time_start,time_end,split\nddddddddddd,1,11,test\n')
  printed = run('kinetics400', videos, f'--annotations={lists}', f'--data_dir={tmp_path}')
  assert '398 classes have no usable video' in printed
  assert '--config=k400' in printed
  assert datasets.open_split(tmp_path, 'kinetics400', 'train').labels.tolist() == [0, 399]
  assert datasets.open_split(tmp_path, 'kinetics400', 'validation').videos == {'train': 2, 'validation': 1}

  (lists / 'labels.json').write_text(json.dumps({'Pushing something': '1', 'Pulling something': '0'}))
  for split, numbers in {'train': (1, 2), 'validation': (3, 4, 5)}.items():
    templates = [{'id': str(i), 'template': ('Pulling [something]', 'Pushing [something]')[i % 2]} for i in numbers]
    (lists / f'{split}.json').write_text(json.dumps(templates))
  (lists / 'test.json').write_text(json.dumps([{'id': '6'}]))
  for i in (1, 2, 3, 4, 6):
    (videos / f'{i}.webm').write_bytes(make_noise_video(i))
  arguments = ('something_something_v2', videos, f'--annotations={lists}', f'--data_dir={tmp_path}')
  printed = run(*arguments)
  assert 'missing: listed, but without a file (1):\n  5\n' in printed
  assert datasets.open_split(tmp_path, 'something_something_v2', 'validation').labels.tolist() == [1, 0]
  assert datasets.open_split(tmp_path, 'something_something_v2', 'test').labels.tolist() == [-1]
  assert 'already complete' in run(*arguments)
  with pytest.raises(UserError, match=r'saved -> requested\): annotations .*lists -> .*labels\.json'):
    run(*arguments[:2], f'--annotations={lists}/labels.json', f'--data_dir={tmp_path}')


def test_free_disk_space_is_checked_before_writing(folder, tmp_path, run, monkeypatch):
  usage = namedtuple('usage', 'free')
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(100))
  with pytest.raises(UserError, match=r'0\.0 MB free, but 0\.0 MB are needed; nothing was written'):
    run('video_folder', folder, f'--data_dir={tmp_path}')
  assert not (tmp_path / 'my_videos' / '1.0.0').exists()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((), 'name a dataset to prepare: moving_shapes, video_folder'),
    (
      ('video_foldr',),
      "unknown dataset 'video_foldr'.*known: moving_shapes, video_folder, .*; did you mean video_folder",
    ),
    (('moving_shapes', 'x'), 'takes no further arguments'),
    (('moving_shapes', '--size=33'), '--size=33 is odd'),
    (
      ('moving_shapes', '--size=1024', '--frames=1000'),
      '--frames=1000 of --size=1024 are 1,048,576,000 pixels per video',
    ),
    (('moving_shapes', '--annotations=lists'), '--annotations has no effect on moving_shapes; leave it out'),
    (('moving_shapes', '--quality=20'), '--quality has no effect on moving_shapes'),
    (('video_folder', '.', '--frames=8'), '--frames has no effect on video_folder'),
    (('video_folder', '.', '--quality=20'), '--quality has no effect on videos that keep their encoding; give --enc'),
    (('video_folder', '.', '--fold=2'), '--fold has no effect without --lists'),
    (('video_folder', '.', '--max_unusable=nan'), '--max_unusable must be a number, not nan'),
    (('kinetics400', 'videos', '--annotations=lists', '--seed=1'), '--seed has no effect on kinetics400'),
    (('video_folder',), 'takes one folder or one CSV file'),
    (('video_folder', '.', '--name=my-videos'), '--name=my-videos must consist of letters'),
    (('video_folder', 'nowhere'), 'nowhere does not exist'),
    (('kinetics400', 'videos'), 'kinetics400 takes one folder of videos, and --annotations='),
  ],
)
def test_invalid_arguments_are_one_line_errors(tmp_path, run, arguments, message):
  with pytest.raises(UserError, match=message):
    run(*arguments, f'--data_dir={tmp_path}')
  assert not list(tmp_path.iterdir())


def test_a_single_class_is_refused(folder, tmp_path, run):
  shutil.rmtree(folder / 'dogs')
  with pytest.raises(UserError, match=r'one class only \(cats\)'):
    run('video_folder', folder, f'--data_dir={tmp_path}')


def test_errors_are_one_line_with_a_nonzero_exit_status(tmp_path):
  command = [sys.executable, '-m', 'mevit_jax', 'prepare', 'video_folder', tmp_path, f'--data_dir={tmp_path}']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert done.stderr.startswith('error: ')
  assert done.stderr.count('\n') == 1


def test_remaining_time_is_estimated_from_this_run_only(capsys, monkeypatch):
  now = iter([0.0, 0.0, 10.0, 20.0])
  monkeypatch.setattr(progress, 'time', types.SimpleNamespace(monotonic=lambda: next(now)))
  report = progress.Progress('videos')
  for done in (100, 110, 120):
    report(done, 200)
  assert capsys.readouterr().out.splitlines() == [
    'videos: 100 of 200',
    'videos: 110 of 200, 1.0/s, 01:30 left',
    'videos: 120 of 200, 1.0/s, 01:20 left',
  ]


def test_prepared_dataset_opens_in_its_data_dir(tmp_path, run):
  run(*small_shapes(tmp_path))
  assert not (tmp_path / 'moving_shapes' / '1.0.0' / shards.IN_PROGRESS).exists()
  split = datasets.open_split(str(tmp_path), 'moving_shapes', 'validation')
  assert split.class_names == moving_shapes.CLASS_NAMES
  assert [example['label'] for example in split.source] == list(range(8))
