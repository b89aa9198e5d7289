"""config.json of workdirs, and folders that are not workdirs."""

import json

import pytest

from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.checkpoint.workdir import read_workdir, write_workdir
from mevit_jax.errors import UserError

ABOUT = {'config': {}, 'class_names': ['a', 'b'], 'fingerprint': 'f'}


def test_config_json_is_read_as_written(tmp_path):
  write_workdir(tmp_path / 'run', ABOUT)
  assert read_workdir(tmp_path / 'run') == {**ABOUT, 'format': 3}
  assert [path.name for path in (tmp_path / 'run').iterdir()] == ['config.json']


@pytest.mark.parametrize(
  'text', ['{"format": 1', json.dumps({**ABOUT, 'format': 99}), json.dumps(ABOUT), '[]', '{"format": 1}']
)
@pytest.mark.parametrize('opened', [read_workdir, load_checkpoint])
def test_config_json_of_another_format_version_is_refused(tmp_path, opened, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(
    UserError, match=r'config\.json (is damaged|has format (99|1); this version .* reads format 3|was not written by)'
  ):
    opened(tmp_path)


@pytest.mark.parametrize('opened', [read_workdir, load_checkpoint])
def test_folder_without_config_json_is_not_a_workdir(tmp_path, opened):
  with pytest.raises(UserError, match=r'is not a workdir: it has no config\.json'):
    opened(tmp_path / 'nowhere')
  assert not (tmp_path / 'nowhere').exists()
