"""Randomly initialized ImageNet ViTs of real libraries, loaded into MEViT."""

import numpy as np
import pytest

from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.source import open_source
from tests.pretrained.conftest import (
  CLASSES,
  DEPTH,
  HEADS,
  MLP,
  PATCH,
  SIDE,
  WIDTH,
  assert_close,
  config_of,
  logits_of,
  model_of,
  randomize,
  repeated,
  to_torch,
  tokens_of,
)

HF = config_of(1, 2, layer_norm_eps=1e-12)
OTHERS = config_of(1, 2)


@pytest.fixture
def images(rng):
  return rng.normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)


def converted(path, config, **options):
  return load(path, model_of(config)[0], **{'head': 'keep', **options})


def rows_of(loaded, status):
  return {row.name: row.note for row in loaded.table if row.status == status}


def check_logits(path, config, images, theirs):
  """Checks that MEViT's logits of clips of one repeated frame equal the source's logits of that frame."""
  loaded = converted(path, config)
  assert_close(logits_of(config, loaded.params, repeated(images, config.frames)), theirs)
  return loaded


@pytest.mark.parametrize(('native', 'side', 'patch'), [(224, 224, 16), (224, 288, 16), (SIDE, 24, PATCH)])
def test_hugging_face_classifier(hf_vit, rng, tmp_path, torch, native, side, patch):
  """Tokens and logits at the source's grid and resized ones; motion attention is initialized to add nothing."""
  theirs = hf_vit(image_size=native, patch_size=patch)
  theirs.save_pretrained(tmp_path)
  config = config_of(1, 2, side=side, patch_size=patch, layer_norm_eps=1e-12)
  images = rng.normal(size=(2, side, side, 3)).astype(np.float32)
  with torch.no_grad():
    resized = {'interpolate_pos_encoding': side != native}
    logits = theirs(to_torch(images), **resized).logits
    tokens = theirs.vit(to_torch(images), **resized).last_hidden_state
    loaded = check_logits(tmp_path, config, images, logits)
    ours = tokens_of(config, loaded.params, repeated(images, config.frames))
    ours = theirs.vit.layernorm(torch.tensor(ours))  # the source's are normalized
  for frame in range(config.frames):
    assert_close(ours[:, frame], tokens)
  assert ('embedding/space' in rows_of(loaded, 'resized')) == (side != native)


def test_hugging_face_model_without_a_head(hf_vit, images, tmp_path, torch):
  theirs = hf_vit('ViTModel')
  theirs.save_pretrained(tmp_path)
  loaded = converted(tmp_path, HF, head='auto')
  assert rows_of(loaded, 'unused').keys() == {'pooler.dense.weight', 'pooler.dense.bias'}
  assert rows_of(loaded, 'fresh').keys() == {'head/kernel', 'head/bias', 'embedding/time'}
  with torch.no_grad():
    tokens = theirs(to_torch(images)).last_hidden_state
    ours = theirs.layernorm(torch.tensor(tokens_of(HF, loaded.params, repeated(images, 2))[:, 0]))
  assert_close(ours, tokens)


@pytest.mark.parametrize('stages', [(1, 1, 1), (1, 2, 1)])
def test_class_block_is_initialized_from_the_next_or_last_block(hf_vit, images, tmp_path, torch, stages):
  """Patch tokens equal those of the ViT without a class token; the class block is its next block, or its last."""
  theirs = hf_vit()
  theirs.save_pretrained(tmp_path)
  config = config_of(*stages, layer_norm_eps=1e-12)
  loaded = converted(tmp_path, config)
  before = stages[0] + stages[1]
  with torch.no_grad():
    tokens = theirs.vit.embeddings(to_torch(images))[:, 1:]
    for layer in theirs.vit.layers[:before]:
      tokens = layer(tokens)
  ours = tokens_of(config, loaded.params, repeated(images, config.frames))
  for frame in range(config.frames):
    assert_close(ours[:, frame, 1:], tokens)
  source = theirs.vit.layers[min(before, DEPTH - 1)]
  block = loaded.params['class']['blocks']
  np.testing.assert_array_equal(block['mlp']['up']['kernel'][0], source.mlp.fc1.weight.detach().numpy().T)
  np.testing.assert_array_equal(
    block['class_attention']['value']['bias'][0].ravel(), source.attention.v_proj.bias.detach().numpy()
  )
  copied = 'class/blocks/class_attention/query/kernel'
  assert copied in rows_of(loaded, 'loaded' if before < DEPTH else 'copied')


@pytest.mark.parametrize(('start', 'status'), [('zero', 'copied'), ('copy', 'copied'), ('random', 'fresh')])
def test_motion_init_of_converted_weights(hf_vit, tmp_path, start, status):
  hf_vit().save_pretrained(tmp_path)
  loaded = converted(tmp_path, config_of(1, 2, layer_norm_eps=1e-12, motion_init=start))
  blocks = loaded.params['motion']['blocks']
  space, motion = blocks['space_attention'], blocks['motion_attention']
  assert np.array_equal(space['query']['kernel'], motion['query']['kernel']) == (start != 'random')
  assert np.array_equal(space['out']['kernel'], motion['out']['kernel']) == (start == 'copy')
  assert np.any(motion['out']['kernel']) == (start != 'zero')
  assert 'motion/blocks/motion_attention/out/kernel' in rows_of(loaded, status)


def test_hugging_face_shards_and_pickles(hf_vit, tmp_path, torch):
  theirs = hf_vit()
  theirs.save_pretrained(tmp_path / 'one')
  theirs.save_pretrained(tmp_path / 'many', max_shard_size='20KB')
  assert len(list((tmp_path / 'many').glob('*.safetensors'))) > 2
  torch.save(theirs.state_dict(), tmp_path / 'memory.bin')  # transformers 5 uses other names in memory
  whole = converted(tmp_path / 'one', HF).params
  for path in (tmp_path / 'many', tmp_path / 'memory.bin', tmp_path / 'one' / 'model.safetensors'):
    assert_same(converted(path, HF).params, whole)


def assert_same(ours, theirs):
  import jax

  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def timm_sizes(**changes):
  sizes = {'img_size': SIDE, 'patch_size': PATCH, 'embed_dim': WIDTH, 'depth': DEPTH, 'num_heads': HEADS}
  return {**sizes, 'mlp_ratio': MLP / WIDTH, 'num_classes': CLASSES, **changes}


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'deit_tiny_patch16_224'])
@pytest.mark.parametrize('kind', ['safetensors', 'pth', 'old pth'])
def test_timm_models(timm, images, tmp_path, torch, name, kind):
  import safetensors.torch

  theirs = randomize(timm.create_model(name, **timm_sizes()))
  path = tmp_path / 'weights'  # the type is recognized by its content
  if kind == 'safetensors':
    safetensors.torch.save_file(theirs.state_dict(), path)
  else:
    content = {'model': theirs.state_dict(), 'epoch': 3}
    torch.save(content, path, _use_new_zipfile_serialization=kind == 'pth')
  assert open_source(path).info.layer_norm_eps == theirs.blocks[0].norm1.eps
  with torch.no_grad():
    check_logits(path, OTHERS, images, theirs(to_torch(images)))


def test_position_resize_equals_that_of_timm(timm, rng, tmp_path, torch):
  """timm's resampling of positions, which is antialiased, in a model of another grid."""
  theirs = randomize(timm.create_model('vit_tiny_patch16_224', **timm_sizes(dynamic_img_size=True)))
  torch.save(theirs.state_dict(), tmp_path / 'weights.pth')
  for side in (24, 56):
    images = rng.normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
      check_logits(tmp_path / 'weights.pth', config_of(1, 2, side=side), images, theirs(to_torch(images)))


def test_distilled_deit_without_its_distillation_token(timm, tmp_path, torch):
  """The distillation token is listed as unused."""
  theirs = randomize(timm.create_model('deit_tiny_distilled_patch16_224', **timm_sizes()))
  torch.save({'model': theirs.state_dict()}, tmp_path / 'weights.pth')
  loaded = converted(tmp_path / 'weights.pth', OTHERS)
  assert loaded.info.kind == 'distilled DeiT'
  assert loaded.info.normalization.mean == theirs.pretrained_cfg['mean']
  assert rows_of(loaded, 'unused').keys() == {'dist_token', 'head_dist.weight', 'head_dist.bias'}
  positions = theirs.pos_embed.detach().numpy()[0]
  np.testing.assert_array_equal(loaded.params['class_position'], positions[0])
  np.testing.assert_array_equal(loaded.params['embedding']['space'].reshape(-1, WIDTH), positions[2:])


@pytest.mark.parametrize('published', [False, True])
def test_torchvision_models(torchvision, images, tmp_path, torch, published):
  """Includes the names of the published files, which are older than the code."""
  theirs = torchvision.models.VisionTransformer(SIDE, PATCH, DEPTH, HEADS, WIDTH, MLP, num_classes=CLASSES)
  state = randomize(theirs).state_dict()
  if published:
    state = {name.replace('mlp.0', 'mlp.linear_1').replace('mlp.3', 'mlp.linear_2'): x for name, x in state.items()}
  torch.save(state, tmp_path / 'weights.pth')
  with torch.no_grad():
    loaded = check_logits(tmp_path / 'weights.pth', OTHERS, images, theirs(to_torch(images)))
  assert loaded.info.kind == 'torchvision ViT'
  assert loaded.info.normalization.std == (0.229, 0.224, 0.225)


def test_bgr_weights(timm, images, tmp_path, torch):
  """Weights that were trained on BGR images take RGB after loading."""
  theirs = randomize(timm.create_model('vit_tiny_patch16_224', **timm_sizes()))
  torch.save(theirs.state_dict(), tmp_path / 'weights.pth')
  params = converted(open_source(tmp_path / 'weights.pth', HEADS, 'bgr'), OTHERS).params
  with torch.no_grad():
    assert_close(logits_of(OTHERS, params, repeated(images[..., ::-1], 2)), theirs(to_torch(images)))


def test_normalization_is_read_from_the_folder(hf_vit, transformers, timm, tmp_path):
  import json

  hf_vit(id2label=dict(enumerate('edcba'))).save_pretrained(tmp_path / 'hf')
  assert open_source(tmp_path / 'hf').info.normalization.mean == (0.5, 0.5, 0.5)
  preprocessor = {'image_mean': [0.1, 0.2, 0.3], 'image_std': [0.4, 0.5, 0.6]}
  (tmp_path / 'hf' / 'preprocessor_config.json').write_text(json.dumps(preprocessor))
  info = open_source(tmp_path / 'hf').info
  assert info.normalization == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
  assert (info.layer_norm_eps, info.heads, info.classes, info.class_names) == (1e-12, HEADS, 5, tuple('edcba'))
  theirs = timm.create_model('deit_tiny_patch16_224', **timm_sizes())
  import safetensors.torch

  (tmp_path / 'timm').mkdir()
  safetensors.torch.save_file(theirs.state_dict(), tmp_path / 'timm' / 'model.safetensors')
  assert open_source(tmp_path / 'timm').info.normalization is None
  config = {'architecture': 'deit_tiny_patch16_224', 'pretrained_cfg': {'mean': [0.4] * 3, 'std': [0.2] * 3}}
  (tmp_path / 'timm' / 'config.json').write_text(json.dumps(config))
  assert open_source(tmp_path / 'timm').info.normalization.std == (0.2, 0.2, 0.2)


def test_head_is_reordered_by_class_names(hf_vit, images, tmp_path, torch):
  theirs = hf_vit(id2label=dict(enumerate('edcba')))
  theirs.save_pretrained(tmp_path)
  with torch.no_grad():
    logits = theirs(to_torch(images)).logits
  loaded = converted(tmp_path, HF, head='auto', class_names=tuple('abcde'))
  assert_close(logits_of(HF, loaded.params, repeated(images, 2)), logits.flip(-1))
  for names, head in ((tuple('abcdf'), 'auto'), (None, 'auto'), (tuple('edcba'), 'fresh')):
    loaded = converted(tmp_path, HF, head=head, class_names=names)
    assert not np.any(loaded.params['head']['kernel'])
    assert 'head/kernel' in rows_of(loaded, 'fresh')
    assert 'classifier.weight' in rows_of(loaded, 'unused')
