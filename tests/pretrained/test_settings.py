"""Settings of encoders that their tensors do not show: honored, or refused by name."""

import json

import numpy as np
import pytest

from mevit_jax.errors import UserError
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.settings import read_settings
from mevit_jax.pretrained.source import open_source
from tests.pretrained.conftest import HEADS, WIDTH, config_of, converted, model_of, timm_encoder

# timm.


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_heads': 4}, 'heads 4 -> 2'),
    ({'act_layer': 'relu'}, r"model_args.act_layer = 'relu'"),
    ({'act_layer': 'quick_gelu'}, 'a different activation'),
    ({'qk_norm': True}, 'query and key norms'),
    ({'norm_layer': 'rmsnorm'}, 'norms of another kind'),
    ({'block_fn': 'ResPostBlock'}, 'model_args.block_fn'),
    ({'global_pool': 'avg'}, 'global_pool=avg'),
  ],
)
def test_timm_settings_are_honored_or_refused(timm, tmp_path, changes, message):
  timm_encoder(timm, tmp_path, 'vit_base_patch16_224')
  content = json.loads((tmp_path / 'config.json').read_text())
  content['model_args'] |= changes
  (tmp_path / 'config.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match=message):
    load(tmp_path, model_of(config_of(1, 2))[0], head='keep')


def test_timm_top_level_pooling(timm, tmp_path):
  """timm writes `global_pool` beside the architecture."""
  timm_encoder(timm, tmp_path, 'vit_base_patch16_224')
  content = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps({**content, 'global_pool': 'avg'}))
  with pytest.raises(UserError, match='global_pool=avg'):
    load(tmp_path, model_of(config_of(1, 2))[0], head='keep')


@pytest.mark.parametrize('architecture', ['vit_base_patch16_rope_ape_224', 'vit_base_patch16_rpn_224'])
def test_architectures_that_the_tensors_do_not_show(architecture):
  with pytest.raises(UserError, match='which has') as error:
    read_settings({'architecture': architecture})
  assert architecture in str(error.value)


@pytest.mark.slow
def test_settings_of_every_vit_of_timm(timm, torch):
  """An architecture's name implies heads, activation, epsilon and pooling as timm builds it."""
  count = 0
  for name in timm.list_models():
    try:
      settings = read_settings({'architecture': name} if name.startswith(('vit_', 'deit', 'eva', 'beit')) else {})
      with torch.device('meta'):
        theirs = timm.create_model(name, depth=1) if settings.heads else None
    except (UserError, TypeError, ValueError, RuntimeError, AssertionError):  # refused, or without `depth`
      continue
    blocks = getattr(theirs, 'blocks', ())
    if not len(blocks) or not hasattr(getattr(blocks[0], 'attn', None), 'num_heads'):
      continue
    act = blocks[0].mlp.act
    names = {'GELU': 'gelu', 'GELUTanh': 'gelu_tanh', 'QuickGELU': 'quick_gelu', 'SiLU': settings.activation}  # SwiGLU
    found = settings.heads, settings.activation, settings.layer_norm_eps, not settings.head_reason
    eps, is_token = blocks[0].norm1.eps, theirs.global_pool == 'token'
    assert found == (blocks[0].attn.num_heads, names[type(act).__name__], eps, is_token), name
    count += 1
  assert count > 150


# Settings of Hugging Face configs.


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ({'model_type': 'swin'}, "model_type = 'swin'"),
    ({'model_type': 'siglip2_vision_model'}, "model_type = 'siglip2_vision_model'"),
    ({'model_type': 'dinov2', 'use_swiglu_ffn': True}, 'SwiGLU'),
    ({'model_type': 'dinov3_vit', 'use_gated_mlp': True}, 'SwiGLU'),
    ({'model_type': 'beit'}, 'no learned positions'),
    ({'model_type': 'beit', 'use_absolute_position_embeddings': True, 'use_relative_position_bias': True}, 'relative'),
    ({'model_type': 'vit', 'hidden_act': 'relu'}, "hidden_act = 'relu'"),
    ({'model_type': 'vit', 'position_embedding_type': 'rope'}, 'position_embedding_type'),
    ({'model_type': 'timesformer', 'attention_type': 'space_only'}, "attention_type = 'space_only'"),
    ({'model_type': 'vit', 'num_channels': 1}, 'num_channels = 1'),
    ({'model_type': 'clip', 'vision_config': {'hidden_act': 'silu'}}, "hidden_act = 'silu'"),
    ({'model_type': 'vit', 'num_attention_heads': '12'}, 'num_attention_heads'),
    ({'model_cfg': {'vision_cfg': {'timm_model_name': 'vit_base'}}}, 'timm_model_name'),
    ({'model_cfg': {'vision_cfg': {'pool_type': 'avg'}}}, "pool_type = 'avg'"),
  ],
)
def test_settings_that_are_refused(config, message):
  with pytest.raises(UserError, match=message) as error:
    read_settings(config)
  assert '\n' not in str(error.value)


def test_settings_that_a_config_leaves_out():
  """Published configs of SigLIP state the model type alone; the rest are transformers' defaults."""
  found = read_settings({'model_type': 'siglip', 'vision_config': {'model_type': 'siglip_vision_model'}})
  assert (found.heads, found.activation, found.layer_norm_eps) == (12, 'gelu_tanh', 1e-6)
  found = read_settings({'model_type': 'clip', 'vision_config': {}})
  assert (found.heads, found.activation, found.layer_norm_eps) == (12, 'quick_gelu', 1e-5)


def test_defaults_are_those_of_transformers(transformers):
  names = (
    'ViT',
    'DeiT',
    'ViTMAE',
    'ViTMSN',
    'Dinov2',
    'Dinov2WithRegisters',
    'DINOv3ViT',
    'CLIPVision',
    'SiglipVision',
  )
  for name in names:
    theirs = getattr(transformers, f'{name}Config')()
    found = read_settings({'model_type': theirs.model_type})
    assert (found.heads, found.layer_norm_eps) == (theirs.num_attention_heads, theirs.layer_norm_eps), name
    assert found == read_settings({'model_type': theirs.model_type, 'hidden_act': theirs.hidden_act}), name


# What tensors alone show.


def test_dinov2_of_its_authors(timm, torch, tmp_path):
  """Other names than timm's, and a position of the class token; without a config."""
  theirs = timm_encoder(timm, tmp_path, 'vit_small_patch14_reg4_dinov2')
  state = {name.replace('reg_token', 'register_tokens'): x for name, x in theirs.state_dict().items()}
  position = torch.randn(1, 1, WIDTH)
  state |= {'mask_token': torch.zeros(1, WIDTH), 'pos_embed': torch.cat([position, theirs.pos_embed], dim=1)}
  torch.save({f'module.{name}': x for name, x in state.items()}, tmp_path / 'weights.pth')
  (tmp_path / 'config.json').unlink()
  _, loaded = converted(tmp_path / 'weights.pth')
  with torch.no_grad():
    tokens = torch.cat([theirs.cls_token + position, theirs.reg_token], dim=1)[0]
  np.testing.assert_array_equal(loaded.params['frame_tokens'], tokens)
  assert 'module.mask_token' in {row.name for row in loaded.table if row.status == 'unused'}


def test_features_that_tensors_do_not_show(timm, tmp_path):
  """Without its config, DINOv3 has no positions and CLIP no activation."""
  for name, message in (
    ('vit_small_patch16_dinov3', 'rotary positions'),
    ('vit_base_patch16_clip_quickgelu_224', 'activation'),
  ):
    timm_encoder(timm, tmp_path, name)
    (tmp_path / 'config.json').unlink()
    with pytest.raises(UserError, match=message) as error:
      open_source(tmp_path, HEADS)
    assert 'config.json' in str(error.value)


def test_swiglu_in_the_usual_names(timm, tmp_path):
  """timm's giant DINOv2 has an `fc1` of two halves."""
  timm_encoder(timm, tmp_path, 'vit_giant_patch14_dinov2')
  with pytest.raises(UserError, match='SwiGLU'):
    open_source(tmp_path, HEADS)


def test_number_of_frame_tokens(timm, tmp_path):
  timm_encoder(timm, tmp_path, 'vit_small_patch14_reg4_dinov2')
  with pytest.raises(UserError, match=r'5 tokens per frame .* -> 2 .*use 5'):
    converted(tmp_path, frame_tokens=2)
  _, loaded = converted(tmp_path, frame_tokens=0)
  note = next(row.note for row in loaded.table if row.name == 'reg_token')
  assert 'model.frame_tokens=5' in note
