"""The command export: a checkpoint's weights for another library, and what is no such model."""

import pytest
from safetensors.numpy import load_file

from mevit_jax import train
from mevit_jax.errors import UserError
from mevit_jax.export import export


@pytest.mark.usefixtures('compile_once')
def test_a_space_only_checkpoint_becomes_a_vit(tiny, tmp_path):
  recipe = tiny(**{'model.space_blocks': 2, 'model.motion_blocks': 0, 'model.frames': 1, 'training.epochs': 0.4})
  train.train(recipe, tmp_path / 'run')
  path = export(tmp_path / 'run', 'hf_vit', tmp_path / 'out')
  tensors = load_file(path)
  assert tensors['classifier.weight'].shape == (8, 16)
  assert {path.name for path in (tmp_path / 'out').iterdir()} >= {'config.json', 'model.safetensors'}
  with pytest.raises(UserError, match='TimeSformer'):
    export(tmp_path / 'run', 'hf_timesformer', tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


def test_a_folder_that_is_no_workdir(tmp_path):
  with pytest.raises(UserError, match='has no checkpoint'):
    export(tmp_path / 'nothing', 'timm', tmp_path / 'out')
