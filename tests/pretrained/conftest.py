"""Tiny models of other libraries with random tensors; tests are skipped where a library is not installed."""

import functools
import importlib
import json
import warnings

import jax
import numpy as np
import pytest

from benchmarks.torch_baselines import stub_torchvision_operators
from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.functional import build_model
from mevit_jax.models.order import from_block_order
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.source import open_source

# Sizes of all models here.
WIDTH, HEADS, MLP, PATCH, SIDE, DEPTH, CLASSES = 32, 2, 64, 8, 32, 3, 5


@pytest.fixture(scope='module', autouse=True)
def always(exact_and_fast):
  """Applies `exact_and_fast` to every test."""


def _import(name):
  """Imports a library of requirements-parity.txt, ignoring its warnings, or skips the test."""
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
  for model in ('vit', 'timesformer', 'dinov2', 'clip', 'siglip'):  # imported lazily, with warnings
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
  """A function that makes Hugging Face ViTs: hf_vit('ViTModel', image_size=48)."""

  def make(kind='ViTForImageClassification', **changes):
    config = transformers.ViTConfig(**{**hf_sizes(), 'num_labels': CLASSES, **changes})
    return randomize(getattr(transformers, kind)(config))

  return make


@pytest.fixture
def hf_timesformer(transformers):
  def make(frames=8, **changes):
    config = transformers.TimesformerConfig(**{**hf_sizes(), 'num_labels': CLASSES, 'num_frames': frames, **changes})
    return randomize(transformers.TimesformerForVideoClassification(config))

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


def randomize(module, seed=0):
  """Overwrites every tensor: most biases and norms are initialized to constants, so that a swap would go unnoticed."""
  rng = np.random.default_rng(seed)
  torch = importlib.import_module('torch')
  with torch.no_grad():
    for parameter in module.state_dict().values():
      parameter.copy_(torch.tensor(rng.normal(0, 0.3, parameter.shape)))
  return module.eval()


def config_of(space=1, motion=2, classify=0, *, side=SIDE, **changes):
  """Returns the config of a MEViT of the size of the models here."""
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
  fields = {'block_size': 1, 'attention_order': 'time_space', 'class_token_in_motion': False}
  return config_of(0, DEPTH, 0, **{'frames': frames, **fields, **changes})


@functools.cache
def model_of(config):
  """Returns the model of a config with its `apply` and `tokens`, compiled once for all tests."""
  model = build_model(config)
  return model, jax.jit(model.apply), jax.jit(model.tokens)


def random_params(config, rng, *, still=False):
  """Returns random parameters; with `still`, all frames have the same time position."""
  abstract = model_of(config)[0].abstract
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), abstract)
  if still:
    params['embedding']['time'][:] = params['embedding']['time'][0]
  return params


def logits_of(config, params, video):
  return model_of(config)[1](params, video)


def tokens_of(config, params, video):
  """Returns the tokens of each frame in a ViT's order: `b t 1+n d`, class token first, patches in raster order."""
  patches, token = map(np.asarray, model_of(config)[2](params, video))
  b, t, _, d = patches.shape
  raster = np.asarray(from_block_order(patches, config)).reshape(b, t, -1, d)
  return np.concatenate([np.broadcast_to(token[:, None, None], (b, t, 1, d)), raster], axis=2)


def patches_of(config, params, video):
  """Returns the patches `b t n d` in raster order, and the class token."""
  patches, token = map(np.asarray, model_of(config)[2](params, video))
  return np.asarray(from_block_order(patches, config)).reshape(patches.shape), token


def repeated(image, frames):
  """Returns images `b h w 3` as clips `b t h w 3` of one repeated frame."""
  return np.repeat(image[:, None], frames, axis=1)


def to_torch(images):
  """Converts `... h w 3` to torch `... 3 h w`."""
  return importlib.import_module('torch').tensor(np.moveaxis(images, -1, -3).copy())


def assert_close(ours, theirs):
  """Asserts a difference of at most 1e-5 of the reference's largest absolute value."""
  theirs = theirs.detach().numpy() if hasattr(theirs, 'detach') else np.asarray(theirs)
  assert np.shape(ours) == theirs.shape
  worst = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
  assert worst <= 1e-5, f'{worst:.2e} of the largest'


def converted(path, side=SIDE, classify=0, frames=2, **changes):
  """Loads an encoder into a model with motion blocks, which keeps its class token and registers in every frame."""
  source = open_source(path, HEADS)
  fields = {'frame_tokens': source.info.tokens, **source.info.model_fields, **changes}
  config = config_of(1, DEPTH - 1, classify, side=side, frames=frames, **fields)
  return config, load(source, model_of(config)[0])


def write_folder(folder, tensors, config):
  folder.mkdir(exist_ok=True)
  tensors = {name: x.contiguous() for name, x in tensors.items()}
  importlib.import_module('safetensors.torch').save_file(tensors, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(config))


def timm_sizes(**changes):
  sizes = {'img_size': SIDE, 'patch_size': PATCH, 'embed_dim': WIDTH, 'depth': DEPTH, 'num_heads': HEADS}
  return {**sizes, 'mlp_ratio': MLP / WIDTH, 'num_classes': CLASSES, **changes}


def timm_encoder(timm, folder, name, side=SIDE, **changes):
  """Makes a random encoder and its folder, as timm writes it."""
  arguments = timm_sizes(**changes)
  theirs = randomize(timm.create_model(name, **arguments, **({} if side == SIDE else {'dynamic_img_size': True})))
  write_folder(folder, theirs.state_dict(), {'architecture': name, 'model_args': arguments})
  return theirs
