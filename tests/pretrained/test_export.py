"""Exported weights: loaded by the other library, and loaded again here."""

import jax
import numpy as np
import pytest
from safetensors import SafetensorError

from mevit_jax.config.data import Normalization
from mevit_jax.errors import UserError
from mevit_jax.pretrained import files
from mevit_jax.pretrained.export import export
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.source import open_source
from tests.pretrained.conftest import (
  DEPTH,
  SIDE,
  assert_close,
  config_of,
  logits_of,
  model_of,
  random_params,
  repeated,
  timesformer_config,
  to_torch,
)

NAMES = tuple('abcde')
NORMALIZATION = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
METADATA = {'class_names': NAMES, 'normalization': NORMALIZATION}
SPACE = config_of(DEPTH, 0)


def images(rng):
  return rng.normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)


@pytest.mark.parametrize('eps', [1e-6, 1e-12])
def test_export_to_hugging_face(transformers, torch, rng, tmp_path, eps):
  config = config_of(DEPTH, 0, layer_norm_eps=eps)
  params, frames = random_params(config, rng, still=True), images(rng)
  export(tmp_path, params, config, 'hf_vit', **METADATA)
  theirs, account = transformers.ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(account.values())
  assert theirs.config.id2label == dict(enumerate(NAMES))
  with torch.no_grad():
    assert_close(logits_of(config, params, repeated(frames, 2)), theirs.eval()(to_torch(frames)).logits)
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
  assert tuple(processor.image_mean) == NORMALIZATION.mean


def test_export_to_timm(timm, torch, rng, tmp_path):
  params, frames = random_params(SPACE, rng, still=True), images(rng)
  export(tmp_path, params, SPACE, 'timm', **METADATA)
  theirs = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
  assert tuple(theirs.pretrained_cfg['std']) == NORMALIZATION.std
  with torch.no_grad():
    assert_close(logits_of(SPACE, params, repeated(frames, 2)), theirs(to_torch(frames)))


def test_frame_token_to_timm(timm, torch, rng, tmp_path):
  """A model with one frame token is a ViT, frame by frame, whose logits are averaged: on a moving clip, too."""
  config = config_of(DEPTH, 0, frame_tokens=1)
  params, clip = random_params(config, rng, still=True), images(rng)[None]
  export(tmp_path, params, config, 'timm', **METADATA)
  theirs = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
  with torch.no_grad():
    assert_close(logits_of(config, params, clip)[0], theirs(to_torch(clip[0])).mean(0))


@pytest.mark.parametrize('frames', [8, 16])
def test_export_to_timesformer(transformers, torch, rng, tmp_path, frames):
  """The second of the folded projections is written as an identity."""
  config = timesformer_config(frames)
  params = random_params(config, rng, still=False)
  export(tmp_path, params, config, 'hf_timesformer', **METADATA)
  theirs, account = transformers.TimesformerForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(account.values())
  video = rng.normal(size=(1, frames, SIDE, SIDE, 3)).astype(np.float32)
  with torch.no_grad():
    assert_close(logits_of(config, params, video), theirs.eval()(to_torch(video)).logits)


@pytest.mark.parametrize(
  ('to', 'config'),
  [
    ('timm', SPACE),
    ('hf_vit', SPACE),
    ('hf_timesformer', timesformer_config()),
    ('timm', config_of(DEPTH, 0, side=(32, 64))),
    ('hf_vit', config_of(DEPTH, 0, side=(64, 32))),
  ],
)
def test_exported_weights_load_bitwise(rng, tmp_path, to, config):
  """With the head by class name; the positions of a ViT include those of time."""
  params = random_params(config, rng, still=True)
  export(tmp_path, params, config, to, **METADATA)
  loaded = load(tmp_path, model_of(config)[0], class_names=NAMES)
  if to != 'hf_timesformer':
    params['embedding']['space'] = params['embedding']['space'] + params['embedding']['time'][0]
    params['embedding']['time'] = np.zeros_like(params['embedding']['time'])
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  info = open_source(tmp_path).info
  assert (info.normalization, info.class_names) == (NORMALIZATION, NAMES)


def test_loaded_weights_are_exported_bitwise(hf_vit, hf_timesformer, transformers, tmp_path):
  """Every tensor is the same except for TimeSformer's folded pair."""
  pairs = [
    (hf_vit(), transformers.ViTForImageClassification, config_of(DEPTH, 0, layer_norm_eps=1e-12), 'hf_vit'),
    (hf_timesformer(8), transformers.TimesformerForVideoClassification, timesformer_config(), 'hf_timesformer'),
  ]
  for theirs, kind, config, to in pairs:
    theirs.save_pretrained(tmp_path / 'in' / to)
    loaded = load(tmp_path / 'in' / to, model_of(config)[0], head='keep')
    export(tmp_path / 'out' / to, loaded.params, config, to, **METADATA)
    again = kind.from_pretrained(tmp_path / 'out' / to).state_dict()
    for name, tensor in theirs.state_dict().items():
      if 'temporal_attention.output' not in name and 'temporal_dense' not in name:
        np.testing.assert_array_equal(again[name].numpy(), tensor.numpy(), err_msg=name)


@pytest.mark.parametrize(
  ('to', 'config', 'message'),
  [
    ('timm', config_of(1, 2), '2 motion'),
    ('timm', config_of(3, 0, layer_norm_eps=1e-12), 'hf_vit'),
    ('hf_vit', SPACE, 'embedding/time'),
    ('timm', config_of(DEPTH, 0, pre_norm=True), 'model.pre_norm is True'),
    ('hf_vit', config_of(DEPTH, 0, space_encoder=True, frame_tokens=1), 'model.space_encoder is True'),
    ('hf_vit', config_of(DEPTH, 0, activation='quick_gelu'), 'model.activation is quick_gelu'),
    ('timm', config_of(DEPTH, 0, frame_tokens=5), 'model.frame_tokens is 5'),
    (
      'hf_timesformer',
      timesformer_config(attention_order='space_time', block_size=2),
      'block_size is 2 .*attention_order is space_time',
    ),
  ],
)
def test_models_that_the_library_cannot_represent_are_refused(rng, tmp_path, to, config, message):
  with pytest.raises(UserError, match=message):
    export(tmp_path, random_params(config, rng, still=False), config, to, **METADATA)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('content', ['config.json', 'checkpoints'])
def test_existing_files_are_not_overwritten(rng, tmp_path, content):
  """A workdir, for example; the hidden files of a cloned repository do not count."""
  (tmp_path / '.git').mkdir()
  export(tmp_path, random_params(SPACE, rng, still=True), SPACE, 'timm', **METADATA)
  (tmp_path / 'other' / content).mkdir(parents=True)
  for folder in (tmp_path, tmp_path / 'other'):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    with pytest.raises(UserError, match='is not empty: choose another folder'):
      export(folder, random_params(SPACE, rng, still=True), SPACE, 'timm', **METADATA)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == before


def test_full_disk_leaves_no_files(rng, tmp_path, monkeypatch):
  def full(tensors, path, metadata):
    path.write_bytes(b'half')
    raise SafetensorError('I/O error: No space left on device (os error 28)')

  monkeypatch.setattr(files, 'save_file', full)
  with pytest.raises(UserError, match=r'cannot be written: .*No space left'):
    export(tmp_path, random_params(SPACE, rng, still=True), SPACE, 'hf_vit', **METADATA)
  assert not list(tmp_path.iterdir())


def test_files_have_the_permissions_of_the_folder(rng, tmp_path):
  (tmp_path / 'new').mkdir(mode=0o750)
  export(tmp_path / 'new', random_params(SPACE, rng, still=True), SPACE, 'timm', **METADATA)
  assert {path.stat().st_mode & 0o777 for path in (tmp_path / 'new').iterdir()} == {0o640}


def test_output_path_that_is_a_file_is_refused(rng, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot be written'):
    export(tmp_path / 'file', random_params(SPACE, rng, still=True), SPACE, 'timm', **METADATA)
