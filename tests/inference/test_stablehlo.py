"""The exported model equals the model for any batch size, and computes in float32 for any training dtype."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from jax import export

from mevit_jax.config.data import DataConfig, Normalization
from mevit_jax.config.experiment import Config
from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.inference import stablehlo
from mevit_jax.models.functional import build_model
from mevit_jax.training.steps import make_evaluation_step
from tests.helpers.naive import random_params

pytestmark = pytest.mark.usefixtures('compile_once')

# Two motion blocks, which are a loop in the exported model; unequal patch blocks and frames that are not square.
CONFIG = MEViTConfig(
  classes=5, frames=3, image_size=(24, 16), patch_size=(8, 8), width=16, heads=2, mlp_dim=32, space_blocks=1,
  motion_blocks=2, class_blocks=1, block_size=2, dtype='float32',
)  # fmt: skip
NORMALIZATION = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.fixture(scope='module')
def params():
  return random_params(build_model(CONFIG))


@pytest.fixture(scope='module')
def exported(params, compile_once):
  config = dataclasses.replace(CONFIG, dtype='bfloat16', remat='block')
  return export.deserialize(stablehlo.export_model(params, config, NORMALIZATION).serialize())


def test_exported_model_equals_the_model_for_any_batch_size(params, exported):
  colors = np.random.default_rng(1).integers(0, 256, (7, 3, 3, 2, 3), np.uint8)
  video = colors.repeat(8, axis=2).repeat(8, axis=3)  # one color per patch; noise has equal means
  step = jax.jit(make_evaluation_step(build_model(CONFIG), NORMALIZATION))
  expected = jax.nn.softmax(step(params, video[:, None])[:, 0])  # b classes
  apart = np.abs(expected[:, None] - expected).max(axis=-1)  # b b
  assert apart[~np.eye(7, dtype=bool)].min() > 1e-4  # otherwise swapped examples would go unnoticed
  for size in (1, 7):
    probabilities = np.asarray(exported.call(video[:size]))
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected[:size], atol=1e-6, rtol=0)


def test_program_is_float32_plain_xla_with_frames_as_input(exported):
  """No bfloat16, no product below the highest precision, no custom kernel; frames are the only input."""
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


def write(folder, params):
  data = DataConfig(mean=NORMALIZATION.mean, std=NORMALIZATION.std, short_side=(24, 24), stride=4)
  return stablehlo.write_model(folder, params, Config(model=CONFIG, data=data), {'class_names': list('abcde')})


def test_metadata_describes_the_input(params, tmp_path):
  path = write(tmp_path / 'new', params)
  assert {file.name for file in path.parent.iterdir()} == {'model.jax_export', 'model.json'}
  metadata = json.loads((path.parent / 'model.json').read_text())
  assert metadata['input']['shape'] == ['b', 3, 24, 16, 3]
  assert metadata['output'] == {'axes': 'b classes', 'shape': ['b', 5], 'dtype': 'float32'}
  assert metadata['preprocessing']['frames'] == {'sampling': 'dense', 'frames': 3, 'stride': 4, 'rate': 30}
  assert metadata['preprocessing']['views'] == {'clips': 1, 'crops': 3, 'average': 'probabilities'}
  assert metadata['model']['mean'] == [0.1, 0.2, 0.3]
  assert metadata['jax_export']['calling_convention_version'] >= export.minimum_supported_calling_convention_version
  assert metadata['class_names'] == list('abcde')
  assert min(stablehlo.time_startup(path)) > 0


def test_invalid_files_are_refused(params, tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='is not empty'):
    write(tmp_path, params)
  with pytest.raises(UserError, match='cannot be written'):
    write(tmp_path / 'file', params)
  monkeypatch.setattr(stablehlo, '_MAX_BYTES', 1000)
  with pytest.raises(UserError, match='a StableHLO export at most'):
    write(tmp_path / 'new', params)
  assert not list((tmp_path / 'new').iterdir())
