"""Randomly initialized TimeSformers of Hugging Face, loaded into MEViT."""

import numpy as np
import pytest

from mevit_jax.errors import UserError
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.positions import resize_time
from mevit_jax.pretrained.source import open_source
from tests.pretrained.conftest import (
  DEPTH,
  SIDE,
  assert_close,
  config_of,
  logits_of,
  model_of,
  timesformer_config,
  to_torch,
)

# Hugging Face name -> name in the original, the inverse of Hugging Face's own conversion.
ORIGINAL = {
  'timesformer.embeddings.cls_token': 'model.cls_token',
  'timesformer.embeddings.position_embeddings': 'model.pos_embed',
  'timesformer.embeddings.time_embeddings': 'model.time_embed',
  'timesformer.embeddings.patch_embeddings.projection': 'model.patch_embed.proj',
  'timesformer.encoder.layer.': 'model.blocks.',
  'temporal_layernorm': 'temporal_norm1',
  'temporal_attention.attention.qkv': 'temporal_attn.qkv',
  'temporal_attention.output.dense': 'temporal_attn.proj',
  'temporal_dense': 'temporal_fc',
  'layernorm_before': 'norm1',
  'attention.attention.qkv': 'attn.qkv',
  'attention.output.dense': 'attn.proj',
  'layernorm_after': 'norm2',
  'intermediate.dense': 'mlp.fc1',
  'output.dense': 'mlp.fc2',
  'timesformer.layernorm': 'model.norm',
  'classifier': 'model.head',
}


def converted(path, config, **options):
  return load(path, model_of(config)[0], **{'head': 'keep', **options})


def statuses(loaded):
  return {row.name: row.status for row in loaded.table}


@pytest.mark.parametrize('frames', [8, 16])
def test_logits_equal_those_of_hugging_face(hf_timesformer, rng, tmp_path, torch, frames):
  theirs = hf_timesformer(frames)
  theirs.save_pretrained(tmp_path)
  config = timesformer_config(frames)
  loaded = converted(tmp_path, config)
  assert set(statuses(loaded).values()) == {'loaded'}
  assert loaded.info.normalization.mean == (0.45, 0.45, 0.45)
  video = rng.normal(size=(2, frames, SIDE, SIDE, 3)).astype(np.float32)
  with torch.no_grad():
    assert_close(logits_of(config, loaded.params, video), theirs(to_torch(video)).logits)


def test_original_checkpoints_load_like_those_of_hugging_face(hf_timesformer, tmp_path, torch):
  """Original checkpoints have different names, and also contain the optimizer state."""
  import jax

  theirs = hf_timesformer(8)
  theirs.save_pretrained(tmp_path)
  state = {}
  for name, array in theirs.state_dict().items():
    for hf, original in ORIGINAL.items():
      name = name.replace(hf, original)
    state[name] = array
  content = {
    'epoch': 15,
    'model_state': state,
    'optimizer_state': {'state': {0: {'momentum_buffer': state['model.norm.bias']}}},
  }
  torch.save(content, tmp_path / 'checkpoint.pyth')
  config = timesformer_config()
  original = converted(tmp_path / 'checkpoint.pyth', config)
  assert original.info.kind == 'TimeSformer'
  jax.tree.map(np.testing.assert_array_equal, original.params, converted(tmp_path, config).params)


def test_timesformer_initializes_mevit(hf_timesformer, tmp_path):
  """With space and class blocks, M > 1 and other frames: motion blocks load their time attention."""
  theirs = hf_timesformer(8)
  theirs.save_pretrained(tmp_path)
  loaded = converted(tmp_path, config_of(1, 1, 1, frames=12, block_size=2), head='fresh')
  status = statuses(loaded)
  assert status['motion/blocks/motion_attention/query/kernel'] == 'loaded'
  assert status['embedding/time'] == 'resized'
  assert status['timesformer.encoder.layer.0.temporal_dense.weight'] == 'unused'
  assert status['timesformer.encoder.layer.2.temporal_dense.weight'] == 'unused'
  assert 'timesformer.encoder.layer.1.temporal_dense.weight' not in status
  times = theirs.timesformer.embeddings.time_embeddings.detach().numpy()[0]
  np.testing.assert_array_equal(loaded.params['embedding']['time'], resize_time(times, 12))
  assert open_source(tmp_path).info.frames == 8


def test_joint_space_time_timesformer_is_refused(hf_timesformer, tmp_path):
  hf_timesformer(8, attention_type='joint_space_time').save_pretrained(tmp_path)
  with pytest.raises(UserError, match="attention_type = 'joint_space_time'"):
    converted(tmp_path, timesformer_config())


def test_a_source_with_too_few_blocks_is_refused(hf_timesformer, tmp_path):
  hf_timesformer(8).save_pretrained(tmp_path)
  with pytest.raises(UserError, match=rf'{DEPTH} blocks -> 4 \(config\.model\.space_blocks'):
    converted(tmp_path, config_of(2, 2))
