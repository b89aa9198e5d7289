"""Other libraries' models, tiny, with every tensor overwritten at random; without the libraries tests are skipped."""

import functools
import importlib
import warnings

import jax
import numpy as np
import pytest

from benchmarks.torch_baselines import stub_torchvision_operators
from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.functional import build_model
from mevit_jax.models.order import from_block_order

# Of all models here.
WIDTH, HEADS, MLP, PATCH, SIDE, DEPTH, CLASSES = 32, 2, 64, 8, 32, 3, 5


@pytest.fixture(scope='module', autouse=True)
def always(exact_and_fast):
  """Exact and fast."""


def _import(name):
  """A library of requirements-parity.txt; what it warns of at its import is its own affair."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    try:
      return importlib.import_module(name)
    except ImportError:
      return pytest.skip(f'needs {name} (requirements-parity.txt)')


@pytest.fixture(scope='session')
def torch():
  torch = _import('torch')
  stub_torchvision_operators(torch)
  return torch


@pytest.fixture(scope='session')
def transformers(torch):
  for model in ('vit', 'timesformer'):  # they come at their first use, with the warnings of their imports
    _import(f'transformers.models.{model}.modeling_{model}')
  return _import('transformers')


@pytest.fixture(scope='session')
def torchvision(torch):
  return _import('torchvision')


@pytest.fixture(scope='session')
def timm(torchvision):
  return _import('timm')


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def hf_vit(transformers):
  """Makes HF ViTs: hf_vit('ViTModel', image_size=48)."""

  def make(kind='ViTForImageClassification', **changes):
    config = transformers.ViTConfig(**{**hf_sizes(), 'num_labels': CLASSES, **changes})
    return randomise(getattr(transformers, kind)(config))

  return make


@pytest.fixture
def hf_timesformer(transformers):
  def make(frames=8, **changes):
    config = transformers.TimesformerConfig(**{**hf_sizes(), 'num_labels': CLASSES, 'num_frames': frames, **changes})
    return randomise(transformers.TimesformerForVideoClassification(config))

  return make


def hf_sizes():
  return {
    'hidden_size': WIDTH,
    'num_hidden_layers': DEPTH,
    'num_attention_heads': HEADS,
    'intermediate_size': MLP,
    'image_size': SIDE,
    'patch_size': PATCH,
  }


def randomise(module, seed=0):
  """Overwrites every tensor: most biases and norms are constants at initialisation, and a swap would pass."""
  rng = np.random.default_rng(seed)
  torch = importlib.import_module('torch')
  with torch.no_grad():
    for parameter in module.state_dict().values():
      parameter.copy_(torch.tensor(rng.normal(0, 0.3, parameter.shape)))
  return module.eval()


def config_of(space=1, motion=2, classify=0, *, side=SIDE, **changes):
  """A MEViT of the size of the models here."""
  fields = {
    'classes': CLASSES,
    'frames': 2,
    'image_size': side,
    'patch_size': PATCH,
    'width': WIDTH,
    'heads': HEADS,
    'mlp_dim': MLP,
    'space_blocks': space,
    'motion_blocks': motion,
    'class_blocks': classify,
    'dtype': 'float32',
  }
  return MEViTConfig(**{**fields, **changes})


def timesformer_config(frames=8, **changes):
  fields = {'block_size': 1, 'order': 'time_space', 'class_token_in_motion': False}
  return config_of(0, DEPTH, 0, **{'frames': frames, **fields, **changes})


@functools.cache
def model_of(config):
  """The model of a config, compiled once for all tests: itself, `apply` and `tokens`."""
  model = build_model(config)
  return model, jax.jit(model.apply), jax.jit(model.tokens)


def random_params(config, rng, *, still=False):
  """Params, all random; the same position in time for all frames if `still`."""
  abstract = model_of(config)[0].abstract
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), abstract)
  if still:
    params['embedding']['time'][:] = params['embedding']['time'][0]
  return params


def logits_of(config, params, video):
  return model_of(config)[1](params, video)


def tokens_of(config, params, video):
  """All tokens of each frame as a ViT has them: `b t 1+n d`, the class token first, patches in raster order."""
  patches, token = map(np.asarray, model_of(config)[2](params, video))
  b, t, _, d = patches.shape
  raster = np.asarray(from_block_order(patches, config)).reshape(b, t, -1, d)
  return np.concatenate([np.broadcast_to(token[:, None, None], (b, t, 1, d)), raster], axis=2)


def repeated(image, frames):
  """Images `b h w 3` as clips `b t h w 3` of one repeated frame."""
  return np.repeat(image[:, None], frames, axis=1)


def to_torch(images):
  """`... h w 3` -> torch `... 3 h w`."""
  return importlib.import_module('torch').tensor(np.moveaxis(images, -1, -3).copy())


def assert_close(ours, theirs):
  """At most 1e-5 of the reference's largest absolute value apart."""
  theirs = theirs.detach().numpy() if hasattr(theirs, 'detach') else np.asarray(theirs)
  assert np.shape(ours) == theirs.shape
  worst = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
  assert worst <= 1e-5, f'{worst:.2e} of the largest'
