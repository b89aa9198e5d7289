"""The artefact says what the model says, for any batch, and computes in float32 whatever the model was trained in."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from jax import export

from mevit_jax.config.data import ClipConfig
from mevit_jax.config.evaluation import EvaluationConfig
from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.inference import stablehlo as artefact
from mevit_jax.models.functional import build_model
from mevit_jax.training.steps import make_evaluation_step
from tests.helpers.naive import random_params

pytestmark = pytest.mark.usefixtures('compile_once')

# Two motion blocks, which are a loop in the artefact; blocks of unequal size, a frame that is no square.
CONFIG = MEViTConfig(
  classes=5, frames=3, image_size=(24, 16), patch_size=(8, 8), width=16, heads=2, mlp_dim=32, space_blocks=1,
  motion_blocks=2, class_blocks=1, block_size=2, dtype='float32',
)  # fmt: skip
PIXELS = {'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}


@pytest.fixture(scope='module')
def params():
  return random_params(build_model(CONFIG))


@pytest.fixture(scope='module')
def exported(params, compile_once):
  made = artefact.make_artefact(params, dataclasses.replace(CONFIG, dtype='bfloat16', remat='block'), **PIXELS)
  return export.deserialize(made.serialize())


def test_it_says_what_the_model_says_for_any_batch(params, exported):
  colors = np.random.default_rng(1).integers(0, 256, (7, 3, 3, 2, 3), np.uint8)
  video = colors.repeat(8, axis=2).repeat(8, axis=3)  # a color a patch: noise would be the same in all rows
  step = jax.jit(make_evaluation_step(build_model(CONFIG), **PIXELS))
  expected = jax.nn.softmax(step(params, video[:, None])[:, 0])  # b classes
  apart = np.abs(expected[:, None] - expected).max(axis=-1)  # b b
  assert apart[~np.eye(7, dtype=bool)].min() > 1e-4  # else it would not show that a row got another one's
  for size in (1, 7):
    found = np.asarray(exported.call(video[:size]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[:size], atol=1e-6, rtol=0)


def test_what_is_in_it(exported):
  """No bfloat16, no product below the highest precision, no kernel; the frames are all that it takes."""
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  module = exported.mlir_module()
  assert 'bf16' not in module
  assert 'custom_call' not in re.sub(r'custom_call @(shape_assertion|Sharding)', '', module)
  products = re.findall(r'stablehlo\.dot_general.*', module)
  assert products
  assert all('precision = [HIGHEST, HIGHEST]' in line for line in products)
  (video,), (probabilities,) = exported.in_avals, exported.out_avals
  assert (str(video), str(probabilities)) == ('uint8[b,3,24,16,3]', 'float32[b,5]')
  with pytest.raises(ValueError, match='uint8'):
    exported.call(np.zeros((1, 3, 24, 16, 3), np.float32))


def write(folder, params, **clip):
  return artefact.write_artefact(
    folder, params, CONFIG, ClipConfig(frames=3, size=(24, 16), short_side=(24, 24), **clip), EvaluationConfig(),
    about={'class_names': list('abcde')}, **PIXELS,
  )  # fmt: skip


def test_what_lies_beside_it(params, tmp_path):
  path = write(tmp_path / 'new', params, stride=4)
  assert {file.name for file in path.parent.iterdir()} == {'model.jax_export', 'model.json'}
  about = json.loads((path.parent / 'model.json').read_text())
  assert about['input']['shape'] == ['b', 3, 24, 16, 3]
  assert about['output'] == {'axes': 'b classes', 'shape': ['b', 5], 'dtype': 'float32'}
  assert about['before']['frames'] == {'sampling': 'dense', 'frames': 3, 'stride': 4, 'rate': 30}
  assert about['before']['views'] == {'clips': 1, 'crops': 3, 'average': 'probabilities'}
  assert about['inside']['mean'] == [0.1, 0.2, 0.3]
  assert about['jax_export']['calling_convention_version'] >= export.minimum_supported_calling_convention_version
  assert about['class_names'] == list('abcde')
  start = artefact.time_start(path)
  assert min(start) > 0


def test_what_is_refused(params, tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='is not empty'):
    write(tmp_path, params)
  with pytest.raises(UserError, match='cannot be written'):
    write(tmp_path / 'file', params)
  monkeypatch.setattr(artefact, '_LARGEST', 1000)
  with pytest.raises(UserError, match='an artefact holds'):
    write(tmp_path / 'new', params)
  assert not list((tmp_path / 'new').iterdir())
