"""Names of packaged configs as values of --config, from any folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from mevit_jax.config import flags
from mevit_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def test_every_config_file_has_a_name():
  files = {path.relative_to(ROOT / 'configs') for path in (ROOT / 'configs').rglob('*.py')}
  assert {Path(f'{name}.py') for name in flags.config_names()} == files - {Path('common.py')}


@pytest.mark.parametrize('name', flags.config_names())
def test_a_name_selects_its_file(name):
  assert Path(flags.find_config(name)).samefile(ROOT / 'configs' / f'{name}.py')


def test_a_name_keeps_its_argument():
  assert flags.find_config('k400:L/16') == f'{flags.find_config("k400")}:L/16'


def test_files_take_precedence_over_names(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'k400').touch()
  for value in ('k400', 'configs/k400.py', '/nowhere/own.py:argument'):
    assert flags.find_config(value) == value


def test_a_folder_of_that_name_is_not_the_config(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'demo').mkdir()
  assert Path(flags.find_config('demo')).samefile(ROOT / 'configs/demo.py')


@pytest.mark.parametrize(
  ('name', 'hint'), [('k4000', r'did you mean k400\?'), ('zebra', r'use a \.py file or one of .*, k400, k600, ')]
)
def test_unknown_name_is_a_one_line_error(name, hint):
  with pytest.raises(UserError, match=rf"^unknown config '{name}'; {hint}"):
    flags.find_config(name)


def test_names_and_field_flags_work_in_any_folder(tmp_path):
  """The config, its argument and a field are read before the missing dataset ends the command."""
  fields = ['--config.data.data_dir=nowhere', '--config.training.batch_size=8']
  command = [sys.executable, '-m', 'mevit_jax', 'dry-run', '--config=k400:S/16', '--workdir=run', *fields]
  environment = {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'PATH': '/usr/bin:/bin', 'HOME': str(tmp_path)}
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
  assert done.returncode == 1
  assert "nowhere has no dataset 'kinetics400'" in done.stderr
  command[4] = '--config=k401'
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
  assert done.returncode == 1
  assert done.stderr.count('\n') == 1
  assert "unknown config 'k401'; did you mean k400?" in done.stderr


def test_help_exits_quietly_on_a_closed_pipe():
  process = subprocess.Popen(
    [sys.executable, '-m', 'mevit_jax', '--help'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  process.stdout.close()  # before Python has started
  assert (process.wait(timeout=60), process.stderr.read()) == (1, b'')
  process.stderr.close()
