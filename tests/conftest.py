"""Settings and fixtures of all tests; the environment is set before jax is imported."""

import importlib.metadata
import os
import shutil
import signal

import pytest

# Eight devices on one CPU, so that sharding is tested. Set before jax is imported.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

# A shell's background job ignores it, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Halves compilation time. XLA of jax 0.11 and later computes wrong values without its optimizations, for example in
# dm_pix.adjust_contrast followed by adjust_hue at xla_backend_optimization_level=0.
FAST_COMPILATION = [*map(int, importlib.metadata.version('jax').split('.')[:2])] < [0, 11]

TINY = {
  'model.image_size': (16, 16),
  'model.patch_size': (8, 8),
  'model.frames': 2,
  'model.width': 16,
  'model.heads': 2,
  'model.mlp_dim': 32,
  'model.space_blocks': 1,
  'model.motion_blocks': 1,
  'model.class_blocks': 0,
  'model.dtype': 'float32',
  'data.dataset': 'moving_shapes',
  'data.stride': 2,
  'data.short_side': (16, 18),
  'data.mean': (0.5, 0.5, 0.5),
  'data.std': (0.5, 0.5, 0.5),
  'optimizer.learning_rate': 0.1,
  'training.batch_size': 8,
  'training.epochs': 2.0,  # 6 steps
  'training.log_every': 1,
  'training.save_every': 2,
  'training.keep': 10,
  'evaluation.crops': 1,
  'evaluation.batch_size': 8,
  'evaluation.attention_maps': 0,  # compiles the model once more
}


def pytest_addoption(parser):
  parser.addoption('--slow', action='store_true', help='also run the slow tests (minutes)')


def pytest_configure(config):
  config.addinivalue_line('markers', 'slow: takes minutes; runs with --slow')


def pytest_collection_modifyitems(config, items):
  if not config.getoption('--slow'):
    for item in items:
      if 'slow' in item.keywords:
        item.add_marker(pytest.mark.skip(reason='slow: runs with --slow'))


@pytest.fixture(scope='session')
def shapes_dir(tmp_path_factory):
  """data_dir with a tiny moving_shapes: 24 and 11 videos of 8 frames of 24x24 pixels."""
  from mevit_jax.datasets import shards
  from mevit_jax.datasets.builders import moving_shapes

  data_dir = tmp_path_factory.mktemp('data')
  shards.write(moving_shapes.build(data_dir, {'train': 24, 'validation': 11}, frames=8, size=24))
  return data_dir


@pytest.fixture(scope='session')
def tiny(shapes_dir):
  """Function from config fields by path to the config of a model that trains in seconds."""
  from mevit_jax.config import experiment

  def config(**changes):
    values = experiment.to_dict(experiment.Config())
    for path, value in {**TINY, 'data.data_dir': str(shapes_dir), **changes}.items():
      section, field = path.split('.')
      assert field in values[section], path
      values[section][field] = value
    return experiment.from_dict(values)

  return config


@pytest.fixture(scope='session')
def compiled(tmp_path_factory):
  """Folder of the compilation cache."""
  return tmp_path_factory.mktemp('compiled')


@pytest.fixture(scope='module')
def compile_once(compiled):
  """Enables the compilation cache in this process and its children, and halves compilation time."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  settings = {  # and their values without the cache
    'jax_compilation_cache_dir': (str(compiled), None),
    'jax_persistent_cache_min_compile_time_secs': (0, 1),
    'jax_persistent_cache_min_entry_size_bytes': (0, 0),
    'jax_disable_most_optimizations': (FAST_COMPILATION, False),
  }
  for name, (value, _) in settings.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
  compilation_cache.reset_cache()  # jax checks only once whether a cache is set
  yield
  for name, (_, value) in settings.items():
    jax.config.update(name, value)
    del os.environ[name.upper()]
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def exact_and_fast():
  """Sets full float32 precision, which is not the default on accelerators, and halves compilation time."""
  import jax

  jax.config.update('jax_disable_most_optimizations', FAST_COMPILATION)
  with jax.default_matmul_precision('highest'):
    yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def start(tmp_path):
  """Function that starts the processes of one run; see `hosts.starting`."""
  from tests.helpers.hosts import starting

  yield from starting(tmp_path)


@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory, compile_once):
  """Workdir of an uninterrupted run of six steps, and its batches."""
  from tests.helpers.workdirs import recorded

  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  return workdir, recorded(tiny(**{'training.evaluate_every': 4}), workdir)


@pytest.fixture
def browser():
  """Headless Chromium with a log of its console."""
  webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
  chromium, driver = shutil.which('chromium'), shutil.which('chromedriver')
  if not chromium or not driver:
    pytest.skip('there is no Chromium: apt-get install chromium chromium-driver')
  options = webdriver.ChromeOptions()
  options.binary_location = chromium
  for argument in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'):
    options.add_argument(argument)
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
  yield opened
  opened.quit()
