"""Models of the Hugging Face Hub by name, from a hub on 127.0.0.1: what is downloaded, and failures in one line."""

import json

import numpy as np
import pytest
from huggingface_hub import constants

from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.config.data import Normalization
from mevit_jax.errors import UserError
from mevit_jax.inference.export import export_checkpoint
from mevit_jax.pretrained.export import export
from mevit_jax.pretrained.hub import is_hub_name, locate, push, same_model
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.models import open_model
from mevit_jax.pretrained.source import open_source
from tests.helpers import hub as hubs
from tests.pretrained.conftest import config_of, model_of, random_params

CONFIG = config_of(3, 0, frames=1)
NAMES = ('a b', 'b', 'c', 'd', 'e')


@pytest.fixture
def hub(tmp_path, monkeypatch):
  with hubs.serve() as hub:
    hubs.use(hub, tmp_path / 'cache', monkeypatch)
    yield hub


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """The files of a ViT in Hugging Face's format."""
  folder = tmp_path_factory.mktemp('vit') / 'out'
  params = random_params(CONFIG, np.random.default_rng(0))
  export(folder, params, CONFIG, 'hf_vit', class_names=NAMES, normalization=Normalization())
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(name, action=locate):
  with pytest.raises(UserError) as error:
    action(name)
  message = str(error.value)
  assert '\n' not in message
  assert name.removeprefix('hf://') in message
  return message


def unreachable(monkeypatch):
  """Lets the hub's address be one where nothing listens."""
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
  monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/{revision}/{filename}')


def test_only_configs_and_safetensors_are_downloaded_once(hub, files):
  extra = {'pytorch_model.bin': b'pickle', 'README.md': b'card', 'tf_model.h5': b'tf', 'training_args.bin': b'x'}
  commit = hub.add('org/vit', {**files, **extra})
  located = locate('hf://org/vit')
  assert sorted(hub.downloads()) == sorted(files)
  assert {path.name: path.read_bytes() for path in located.path.iterdir()} == files
  assert located.name == f'hf://org/vit@{commit}'
  hub.requests.clear()
  assert locate('hf://org/vit') == located
  assert not hub.downloads()


def test_pickles_are_downloaded_if_there_is_nothing_else(hub):
  hub.add('org/old', {'config.json': b'{}', 'pytorch_model.bin': b'pickle', 'flax_model.msgpack': b'flax'})
  assert (locate('hf://org/old').path / 'pytorch_model.bin').read_bytes() == b'pickle'
  assert sorted(hub.downloads()) == ['config.json', 'pytorch_model.bin']


def test_shards_are_downloaded(hub):
  index = json.dumps({'weight_map': {'a': 'model-00001-of-00002.safetensors'}}).encode()
  shards = {'model-00001-of-00002.safetensors': b'1', 'model-00002-of-00002.safetensors': b'2'}
  hub.add('org/large', {'config.json': b'{}', 'model.safetensors.index.json': index, **shards})
  assert set(hub.downloads()) == set()
  folder = locate('hf://org/large').path
  assert {path.name for path in folder.iterdir()} == {'config.json', 'model.safetensors.index.json', *shards}


def test_revisions(hub, files):
  first = hub.add('org/vit', files)
  second = hub.add('org/vit', {**files, 'config.json': files['config.json'] + b' '}, branch='v2')
  assert locate('hf://org/vit').name == f'hf://org/vit@{first}'
  assert locate('hf://org/vit@v2').name == locate(f'hf://org/vit@{second}').name == f'hf://org/vit@{second}'
  assert f'hf://org/vit@v3: no such revision at {hub.url}' in refused('hf://org/vit@v3')


def test_names(hub, files, tmp_path, monkeypatch):
  hub.add('timm/vit_tiny.augreg', files)
  assert locate('timm/vit_tiny.augreg').name.startswith('hf://timm/vit_tiny.augreg@')
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'timm' / 'mine').mkdir(parents=True)
  assert not is_hub_name('timm/mine')  # a local folder
  assert locate('timm/mine').path.is_dir()
  for name in ('hf://vit', 'hf://a/b/c', 'hf://a/b@', 'hf://a b/c', 'hf://../x/y'):
    assert 'write hf://ORG/NAME' in refused(name)
  assert same_model('hf://a/b', 'hf://a/b@1234')
  assert same_model('timm/b', 'hf://timm/b@1234')
  assert not same_model('hf://a/b@v2', 'hf://a/b@1234')
  assert not same_model('', 'hf://a/b@1234')


def test_failures_are_one_line(hub, files):
  assert f'no model org/nothing at {hub.url}: check the name' in refused('hf://org/nothing')
  hub.add('org/gated', files)
  hub.gated.add('org/gated')
  assert f'accept its terms at {hub.url}/org/gated' in refused('hf://org/gated')
  hub.add('org/onnx', {'config.json': b'{}', 'model.onnx': b'x'})
  assert 'no weights that can be read' in refused('hf://org/onnx')


def test_a_broken_connection_is_resumed(hub, files, monkeypatch):
  monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 1000)
  hub.add('org/vit', files)
  hub.cut = 2
  assert (locate('hf://org/vit').path / 'model.safetensors').read_bytes() == files['model.safetensors']
  starts = [start for method, path, start in hub.requests if method == 'GET' and path.endswith('.safetensors')]
  assert len(starts) == 3
  assert 0 == starts[0] < starts[1] < starts[2]


def test_a_connection_that_stays_broken_is_one_line(hub, files):
  hub.add('org/vit', files)
  hub.cut = 100
  assert 'the download failed: peer closed connection' in refused('hf://org/vit')
  hub.cut = 0
  assert (locate('hf://org/vit').path / 'model.safetensors').read_bytes() == files['model.safetensors']


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
def test_a_wrong_checksum_is_found_and_not_kept(hub, files, name):
  hub.add('org/vit', files)
  hub.corrupt.add(name)
  assert f"{name} does not match the hub's checksum" in refused('hf://org/vit')
  hub.corrupt.clear()
  assert (locate('hf://org/vit').path / name).read_bytes() == files[name]


def test_a_wrong_size_is_found(hub, files):
  hub.add('org/vit', files)
  hub.short.add('model.safetensors')
  assert 'file should be of size' in refused('hf://org/vit')


def test_a_file_that_is_damaged_in_the_cache_is_found(hub, files):
  hub.add('org/vit', files)
  weights = (locate('hf://org/vit').path / 'model.safetensors').resolve()
  weights.write_bytes(weights.read_bytes()[:-1] + b'\0')
  assert "does not match the hub's checksum" in refused('hf://org/vit')


def test_without_a_network_the_cache_is_used(hub, files, monkeypatch):
  hub.add('org/vit', files)
  located = locate('hf://org/vit')
  unreachable(monkeypatch)
  assert locate('hf://org/vit') == locate(located.name) == located
  assert 'not in the cache, and http://127.0.0.1:9 cannot be reached' in refused('hf://org/other')
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  assert locate('hf://org/vit') == located
  assert 'HF_HUB_OFFLINE forbids to download' in refused('hf://org/other')


def test_weights_by_name_are_those_of_the_folder(hub, files, tmp_path):
  commit = hub.add('org/vit', files)
  model, _, _ = model_of(CONFIG)
  source = open_source('hf://org/vit')
  assert source.name == f'hf://org/vit@{commit}'
  (tmp_path / 'local').mkdir()
  for name, content in files.items():
    (tmp_path / 'local' / name).write_bytes(content)
  ours, theirs = (load(name, model, class_names=NAMES).params for name in ('hf://org/vit', tmp_path / 'local'))
  np.testing.assert_array_equal(ours['head']['kernel'], theirs['head']['kernel'])


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
def test_a_shared_model_is_pushed_and_opened_by_name(hub, files, tmp_path, monkeypatch):
  """The commit of the source is in the config and the card; the pushed model has the same parameters."""
  commit = hub.add('org/vit', files)
  export_checkpoint('hf://org/vit', 'mevit', tmp_path / 'shared')
  card = (tmp_path / 'shared' / 'README.md').read_text()
  assert f'hf://org/vit@{commit}' in card
  assert 'base_model: org/vit' in card
  (tmp_path / 'shared' / 'secret.txt').write_text('not a file of the model')
  assert 'does not let you write there' in refused('hf://me/mine', lambda name: push(tmp_path / 'shared', name))
  assert 'leave out @v2' in refused('hf://me/mine@v2', lambda name: push(tmp_path / 'shared', name))
  monkeypatch.setenv('HF_TOKEN', hub.token)
  pushed = push(tmp_path / 'shared', 'hf://me/mine')
  written = hub.commits['me/mine'][pushed.partition('@')[2]]
  assert set(written) == {'README.md', 'checksums.json', 'config.json', 'model.safetensors'}
  opened, local = open_model('hf://me/mine'), load_checkpoint(tmp_path / 'shared')
  assert opened.config.init_from == f'hf://org/vit@{commit}'
  np.testing.assert_array_equal(opened.params['head']['kernel'], local.params['head']['kernel'])
