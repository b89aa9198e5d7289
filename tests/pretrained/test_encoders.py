"""Encoders of transformers and timm with random values in every tensor, frame by frame on a moving clip."""

import jax
import numpy as np
import pytest

from mevit_jax.errors import UserError
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.source import open_source
from tests.pretrained.conftest import (
  DEPTH,
  HEADS,
  MLP,
  PATCH,
  SIDE,
  WIDTH,
  assert_close,
  config_of,
  converted,
  hf_sizes,
  model_of,
  patches_of,
  randomize,
  repeated,
  timm_encoder,
  to_torch,
  write_folder,
)

FRAMES = 2


def moving_clip(side=SIDE):
  """Returns one clip `1 t h w 3` of different frames."""
  return np.random.default_rng(side).normal(size=(1, FRAMES, side, side, 3)).astype(np.float32)


def normalized(norm, x, eps):
  x = np.asarray(x, np.float64)
  mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + eps) * norm['scale'] + norm['bias']


def check(path, video, patches, pooled, *, normed=True, side=SIDE):
  """Compares the patches `t n d` and the class token `t d` of every frame, after the last norm or before it."""
  config, loaded = converted(path, side)
  ours, token = patches_of(config, loaded.params, video)
  norm, eps = loaded.params['norm'], config.layer_norm_eps
  assert_close(normalized(norm, ours[0], eps) if normed else ours[0], patches)
  assert_close(normalized(norm, token[0], eps), pooled)
  return loaded


# Hugging Face transformers.


def hf_encoder(transformers, name, **changes):
  config = getattr(transformers, f'{name}Config')(**{**hf_sizes(), 'mlp_ratio': MLP // WIDTH, **changes})
  return getattr(transformers, f'{name}Model')(config)


HF_ENCODERS = {
  'DINOv2': ('Dinov2', {}, 1),
  'DINOv2 without query, key and value biases': ('Dinov2', {'qkv_bias': False}, 1),
  'DINOv2 with registers': ('Dinov2WithRegisters', {'num_register_tokens': 3}, 4),
  'DINOv3': ('DINOv3ViT', {'num_register_tokens': 4, 'rope_theta': 50.0}, 5),
  'DeiT with a distillation token': ('DeiT', {}, 2),
  'MSN': ('ViTMSN', {}, 1),
  'MSN with tanh GELU': ('ViTMSN', {'hidden_act': 'gelu_new'}, 1),
}


@pytest.mark.parametrize('side', [SIDE, 48])
@pytest.mark.parametrize('name', HF_ENCODERS)
def test_hf_encoder(transformers, torch, tmp_path, name, side):
  kind, changes, tokens = HF_ENCODERS[name]
  theirs = randomize(hf_encoder(transformers, kind, **changes))
  theirs.save_pretrained(tmp_path)
  video = moving_clip(side)
  resized = {} if kind.startswith(('Dinov2', 'DINOv3')) else {'interpolate_pos_encoding': True}
  with torch.no_grad():
    output = theirs(to_torch(video[0]), **resized).last_hidden_state
  loaded = check(tmp_path, video, output[:, tokens:], output[:, 0], side=side)
  assert loaded.info.tokens == tokens


def test_hf_encoder_in_memory(transformers, torch, tmp_path):
  """Names of transformers 5 in memory, which are not those of its files."""
  theirs = randomize(hf_encoder(transformers, 'Dinov2'))
  theirs.save_pretrained(tmp_path / 'folder')
  torch.save(theirs.state_dict(), tmp_path / 'weights.bin')
  expected, loaded = (converted(tmp_path / name)[1].params for name in ('folder', 'weights.bin'))
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)


@pytest.mark.parametrize('side', [SIDE, 48])
def test_mae(transformers, torch, tmp_path, side):
  """The decoder is listed as unused; the encoder without masks is compared."""
  decoder = {'decoder_num_hidden_layers': 1, 'decoder_hidden_size': 16, 'decoder_num_attention_heads': 2}
  config = transformers.ViTMAEConfig(**hf_sizes(), **decoder, decoder_intermediate_size=16, mask_ratio=0.0)
  theirs = randomize(transformers.ViTMAEForPreTraining(config))
  theirs.save_pretrained(tmp_path)
  video = moving_clip(side)
  order = torch.arange((side // PATCH) ** 2).expand(FRAMES, -1).float()
  with torch.no_grad():
    output = theirs.vit(to_torch(video[0]), noise=order, interpolate_pos_encoding=True).last_hidden_state
  loaded = check(tmp_path, video, output[:, 1:], output[:, 0], side=side)
  unused = [row for row in loaded.table if row.status == 'unused']
  assert sum(row.name.startswith('decoder.') for row in unused) > 15
  assert all('decoder' in row.note for row in unused if row.name.startswith('decoder.'))


def test_deit_with_its_head(transformers, torch, tmp_path):
  """Of the heads of two tokens, whose logits are averaged, none is kept."""
  theirs = randomize(transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**hf_sizes())))
  theirs.save_pretrained(tmp_path)
  video = moving_clip()
  with torch.no_grad():
    output = theirs.deit(to_torch(video[0])).last_hidden_state
  loaded = check(tmp_path, video, output[:, 2:], output[:, 0])
  assert 'averaged' in next(row.note for row in loaded.table if row.name == 'cls_classifier.weight')


def test_data2vec(transformers, torch, tmp_path):
  """LayerScale under BEiT's names, no key bias, and a norm behind the mean of the patches."""
  learned = {'use_absolute_position_embeddings': True}
  theirs = randomize(transformers.Data2VecVisionModel(transformers.Data2VecVisionConfig(**hf_sizes(), **learned)))
  theirs.save_pretrained(tmp_path)
  video = moving_clip()
  with torch.no_grad():
    output = theirs(to_torch(video[0])).last_hidden_state
  config, loaded = converted(tmp_path)
  patches, token = patches_of(config, loaded.params, video)
  assert_close(patches[0], output[:, 1:])
  assert_close(token[0], output[:, 0])


@pytest.mark.parametrize('side', [SIDE, 48])
@pytest.mark.parametrize('whole', [False, True])
def test_clip(transformers, torch, tmp_path, whole, side):
  """The image encoder alone, and within CLIP with its text encoder; MetaCLIP has the same names."""
  vision = transformers.CLIPVisionConfig(**hf_sizes())
  if whole:
    text = {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 16}
    theirs = randomize(
      transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision.to_dict()))
    )
    encoder = theirs.vision_model
  else:
    theirs = encoder = randomize(transformers.CLIPVisionModel(vision))
  theirs.save_pretrained(tmp_path)
  video = moving_clip(side)
  with torch.no_grad():
    output = encoder(to_torch(video[0]), interpolate_pos_encoding=True)
  loaded = check(tmp_path, video, output.last_hidden_state[:, 1:], output.pooler_output, normed=False, side=side)
  assert (loaded.info.activation, loaded.info.pre_norm) == ('quick_gelu', True)


@pytest.mark.parametrize('quick', [False, True])
def test_open_clip(transformers, torch, tmp_path, quick):
  """OpenCLIP's names, of the whole model and of the image encoder alone, against transformers' CLIP."""
  activation = 'quick_gelu' if quick else 'gelu'
  theirs = randomize(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**hf_sizes(), hidden_act=activation)))
  visual = open_clip_names(theirs.state_dict(), torch)
  text = {'positional_embedding': torch.zeros(4, 8), 'transformer.resblocks.0.ln_1.weight': torch.zeros(8)}
  model = {**{f'visual.{name}': x for name, x in visual.items()}, **text, 'logit_scale': torch.zeros(())}
  settings = {'embed_dim': 8, 'vision_cfg': {'width': WIDTH, 'head_width': WIDTH // HEADS}, 'quick_gelu': quick}
  video = moving_clip()
  with torch.no_grad():
    output = theirs(to_torch(video[0]))
  for name, tensors in (('whole', model), ('visual', visual)):
    write_folder(tmp_path / name, tensors, {'model_cfg': settings})
    check(tmp_path / name, video, output.last_hidden_state[:, 1:], output.pooler_output, normed=False)
  (tmp_path / 'visual' / 'config.json').unlink()
  with pytest.raises(UserError, match='do not show its activation'):
    open_source(tmp_path / 'visual', HEADS)


def open_clip_names(state, torch):
  """Renames the tensors of transformers' CLIP to those of OpenCLIP."""
  state = {name.removeprefix('vision_model.'): x for name, x in state.items()}
  tensors = {
    'class_embedding': state['embeddings.class_embedding'],
    'positional_embedding': state['embeddings.position_embedding.weight'],
    'conv1.weight': state['embeddings.patch_embedding.weight'],
    'proj': torch.zeros(WIDTH, 8),
  }
  for part in ('weight', 'bias'):
    tensors[f'ln_pre.{part}'] = state[f'pre_layrnorm.{part}']
    tensors[f'ln_post.{part}'] = state[f'post_layernorm.{part}']
    for i in range(DEPTH):
      old, new = f'encoder.layers.{i}', f'transformer.resblocks.{i}'
      tensors[f'{new}.attn.in_proj_{part}'] = torch.cat([state[f'{old}.self_attn.{x}_proj.{part}'] for x in 'qkv'])
      names = {'self_attn.out_proj': 'attn.out_proj', 'layer_norm1': 'ln_1', 'layer_norm2': 'ln_2'}
      for a, b in {**names, 'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj'}.items():
        tensors[f'{new}.{b}.{part}'] = state[f'{old}.{a}.{part}']
  return tensors


def check_pool(path, video, patches, pooled, side=SIDE):
  """Compares patches on a moving clip, and the class block's token with an attention pool's output on still clips."""
  config, loaded = converted(path, side, classify=1)
  ours, _ = patches_of(config, loaded.params, video)
  norm = jax.tree.map(lambda x: x[0], loaded.params['class']['blocks']['class_attention']['norm'])
  assert_close(normalized(norm, ours[0], config.layer_norm_eps), patches)
  for image, expected in zip(video[0], pooled, strict=True):
    _, token = patches_of(config, loaded.params, repeated(image[None], FRAMES))
    assert_close(token[0], expected)
  with pytest.raises(UserError, match='class_blocks=1'):
    converted(path, side)
  return loaded


@pytest.mark.parametrize('side', [SIDE, 48])
@pytest.mark.parametrize('whole', [False, True])
def test_siglip(transformers, torch, tmp_path, whole, side):
  """No class token; its attention pool is the class block. SigLIP 2 of fixed resolution has the same names."""
  vision = transformers.SiglipVisionConfig(**hf_sizes())
  if whole:
    text = {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 16}
    theirs = randomize(
      transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision.to_dict()))
    )
    encoder = theirs.vision_model
  else:
    theirs = encoder = randomize(transformers.SiglipVisionModel(vision))
  theirs.save_pretrained(tmp_path)
  video = moving_clip(side)
  with torch.no_grad():
    output = encoder(to_torch(video[0]), interpolate_pos_encoding=True)
  loaded = check_pool(tmp_path, video, output.last_hidden_state, output.pooler_output, side)
  assert (loaded.info.activation, loaded.info.tokens) == ('gelu_tanh', 0)


# timm.


TIMM_ENCODERS = {
  'vit_small_patch14_dinov2': {},
  'vit_small_patch14_reg4_dinov2': {},
  'deit3_small_patch16_224': {},
  'deit_small_distilled_patch16_224': {},
  'vit_base_patch16_clip_224': {},
  'vit_base_patch16_clip_quickgelu_224': {},
  'vit_base_patch16_224_miil': {'qkv_bias': False},
  'vit_base_patch16_224': {'act_layer': 'gelu_tanh'},
  'vit_small_patch16_dinov3': {},
  'vit_small_patch16_dinov3_qkvb': {},
}


@pytest.mark.parametrize('side', [SIDE, 48])
@pytest.mark.parametrize('name', TIMM_ENCODERS)
def test_timm_encoder(timm, torch, tmp_path, name, side):
  changes = {'mlp_ratio': MLP / WIDTH}
  if 'dinov3' in name:  # the default is the mean of the patches
    changes['global_pool'] = 'token'
  theirs = timm_encoder(timm, tmp_path, name, side, **changes, **TIMM_ENCODERS[name])
  video = moving_clip(side)
  with torch.no_grad():
    output = theirs.forward_features(to_torch(video[0]))
  tokens = theirs.num_prefix_tokens
  loaded = check(tmp_path, video, output[:, tokens:], output[:, 0], side=side)
  assert loaded.info.tokens == tokens


@pytest.mark.parametrize('name', ['vit_base_patch16_siglip_224', 'vit_so400m_patch16_siglip_256'])
def test_timm_attention_pool(timm, torch, tmp_path, name):
  theirs = timm_encoder(timm, tmp_path, name)
  video = moving_clip()
  with torch.no_grad():
    output = theirs.forward_features(to_torch(video[0]))
    pooled = theirs.forward_head(output, pre_logits=True)
  loaded = check_pool(tmp_path, video, output, pooled)
  assert 'attention pool' in loaded.info.head_reason or 'global_pool' in loaded.info.head_reason


def test_logits_of_frames_are_averaged(timm, torch, tmp_path):
  """An image classifier's logits are those of its frames, averaged, whatever moves."""
  theirs = timm_encoder(timm, tmp_path, 'vit_small_patch14_dinov2')
  video = moving_clip()
  source = open_source(tmp_path, HEADS)
  config = config_of(DEPTH, 0, frames=FRAMES, frame_tokens=1, **source.info.model_fields)
  params = load(source, model_of(config)[0], head='keep').params
  with torch.no_grad():
    assert_close(model_of(config)[1](params, video)[0], theirs(to_torch(video[0])).mean(0))


def test_patches_are_the_encoders_whatever_the_stages(timm, torch, tmp_path):
  """With frame tokens, patches of a moving clip are those of the ViT in a model with all three stages, too."""
  theirs = timm_encoder(timm, tmp_path, 'vit_small_patch14_reg4_dinov2', depth=2)
  video = moving_clip()
  source = open_source(tmp_path, HEADS)
  config = config_of(1, 1, 1, frames=FRAMES, frame_tokens=5, **source.info.model_fields)
  loaded = load(source, model_of(config)[0])
  ours, _ = patches_of(config, loaded.params, video)
  with torch.no_grad():
    output = theirs.forward_features(to_torch(video[0]))
  assert_close(normalized(loaded.params['norm'], ours[0], config.layer_norm_eps), output[:, 5:])


@pytest.mark.slow
def test_every_vit_of_timm_is_exact_or_refused(timm, torch, tmp_path):
  """No architecture is loaded and computed differently; refusals never call a file damaged."""
  names = [name for name in timm.list_models() if name.startswith(('vit_', 'deit', 'eva', 'beit'))]
  accepted, refused = [], {}
  video = moving_clip()
  for name in names:
    try:
      theirs = timm_encoder(timm, tmp_path, name)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError):  # takes other sizes
      continue
    try:
      source = open_source(tmp_path, HEADS)
      classify = 0 if source.info.has_class_token else 1
      config, loaded = converted(tmp_path, classify=classify)
    except UserError as error:
      refused[name] = str(error)
      continue
    ours, _ = patches_of(config, loaded.params, video)
    with torch.no_grad():
      expected = theirs.forward_features(to_torch(video[0]))[:, theirs.num_prefix_tokens :]
    has_norm = not isinstance(theirs.norm, torch.nn.Identity)
    norm = jax.tree.map(np.asarray, loaded.params['norm'])
    if 'attn_pool.latent' in theirs.state_dict():
      norm = jax.tree.map(lambda x: x[0], loaded.params['class']['blocks']['class_attention']['norm'])
    assert_close(normalized(norm, ours[0], config.layer_norm_eps) if has_norm else ours[0], expected)
    accepted.append(name)
  assert len(accepted) > 100, refused
  assert not [error for error in refused.values() if 'damaged' in error]
