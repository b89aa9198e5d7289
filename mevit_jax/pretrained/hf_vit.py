"""ViT checkpoints of Hugging Face transformers: ViT, DeiT, MAE, MSN, BEiT-like, DINOv2 and DINOv3.

https://github.com/huggingface/transformers (models/vit, models/dinov2, ...); the names are those of the files.
"""

from dataclasses import replace

from mevit_jax.pretrained.formats import CheckpointFormat, rename_tensors, require, rule, without
from mevit_jax.pretrained.timm_vit import DISTILLATION_TOKEN, DISTILLED_POSITIONS
from mevit_jax.pretrained.transforms import (
  CONV_WITH_BIAS,
  HEADS_WITH_BIAS,
  LINEAR,
  POSITIONS,
  SCALED_LINEAR,
  SCALED_OUT_PROJECTION,
  TOKEN,
  TOKENS,
)
from mevit_jax.pretrained.vit import HALF, IMAGENET

_LAYER, _BLOCK = 'encoder.layer.{i}', 'blocks/{i}'
RULES = (
  rule('embeddings.cls_token', 'class_token', TOKEN),
  rule('embeddings.position_embeddings', 'class_position embedding/space', POSITIONS),
  rule('embeddings.patch_embeddings.projection.weight', 'embedding/(kernel|bias)', CONV_WITH_BIAS,
       extras='embeddings.patch_embeddings.projection.bias', feature='patch embedding bias'),
  rule(f'{_LAYER}.layernorm_before.weight', f'{_BLOCK}/space_attention/norm/scale'),
  rule(f'{_LAYER}.layernorm_before.bias', f'{_BLOCK}/space_attention/norm/bias'),
  *(
    rule(f'{_LAYER}.attention.attention.{name}.weight', f'{_BLOCK}/space_attention/{name}/(kernel|bias)',
         HEADS_WITH_BIAS, extras=f'{_LAYER}.attention.attention.{name}.bias', feature=f'{name} bias')
    for name in ('query', 'key', 'value')
  ),
  rule(f'{_LAYER}.attention.output.dense.weight {_LAYER}.attention.output.dense.bias',
       f'{_BLOCK}/space_attention/out/(kernel|bias)', SCALED_OUT_PROJECTION,
       extras=f'{_LAYER}.lambda_1', feature='LayerScale'),
  rule(f'{_LAYER}.layernorm_after.weight', f'{_BLOCK}/mlp/norm/scale'),
  rule(f'{_LAYER}.layernorm_after.bias', f'{_BLOCK}/mlp/norm/bias'),
  rule(f'{_LAYER}.intermediate.dense.weight', f'{_BLOCK}/mlp/up/kernel', LINEAR),
  rule(f'{_LAYER}.intermediate.dense.bias', f'{_BLOCK}/mlp/up/bias'),
  rule(f'{_LAYER}.output.dense.weight {_LAYER}.output.dense.bias', f'{_BLOCK}/mlp/down/(kernel|bias)', SCALED_LINEAR,
       extras=f'{_LAYER}.lambda_2', feature='LayerScale'),
  rule('layernorm.weight', 'norm/scale'),
  rule('layernorm.bias', 'norm/bias'),
  rule('classifier.weight', 'head/kernel', LINEAR, feature='head'),
  rule('classifier.bias', 'head/bias', feature='head'),
)  # fmt: skip

# Names of transformers 5 in memory (`model.state_dict()`).
_IN_MEMORY = {
  'attention.attention.query': 'attention.q_proj',
  'attention.attention.key': 'attention.k_proj',
  'attention.attention.value': 'attention.v_proj',
  'attention.output.dense': 'attention.o_proj',
}

HF_VIT = CheckpointFormat(
  'Hugging Face ViT',
  RULES,
  unused=(
    (r'pooler\.dense\.(weight|bias)', 'tanh layer on the class token, which MEViT does not have'),
    (r'decoder\..*', 'decoder of the pretraining (MAE), which an encoder does not have'),
    (r'embeddings\.mask_token', 'token of masked patches in pretraining'),
  ),
  prefix=r'(vit|deit|beit|data2vec_vision)\.',
  layer_norm_eps=1e-12,
  antialias=False,
  normalization=HALF,
)
HF_VIT_IN_MEMORY = replace(
  HF_VIT,
  rules=rename_tensors(
    RULES,
    {'encoder.layer.': 'layers.', **_IN_MEMORY, 'intermediate.dense': 'mlp.fc1', 'output.dense': 'mlp.fc2'},
  ),
)

# DeiT with a distillation token.
HF_DISTILLED = replace(
  HF_VIT,
  name='Hugging Face DeiT',
  rules=(
    *without(RULES, 'embedding/space'),
    rule('embeddings.position_embeddings', 'class_position embedding/space', DISTILLED_POSITIONS),
    rule('embeddings.distillation_token embeddings.position_embeddings', 'registers', DISTILLATION_TOKEN),
  ),
  unused=(
    *HF_VIT.unused,
    (r'(cls|distillation)_classifier\.(weight|bias)', 'one of two heads whose logits are averaged, of two tokens'),
  ),
  normalization=IMAGENET,
)

# BEiT and data2vec with learned instead of relative positions; the norm behind the mean of the patches.
HF_BEIT = replace(
  HF_VIT,
  name='Hugging Face BEiT or data2vec',
  rules=require(rename_tensors(RULES, {'layernorm.': 'pooler.layernorm.'}), 'LayerScale'),
  prefix=r'(beit|data2vec_vision)\.',
  head_reason='its head reads the mean of the patches',
)
# The encoder alone, without a norm and a head.
HF_BEIT_ENCODER = replace(HF_BEIT, rules=without(HF_BEIT.rules, 'norm/scale', 'norm/bias', 'head/kernel', 'head/bias'))

_DINOV2 = {
  'layernorm_before': 'norm1',
  'layernorm_after': 'norm2',
  'lambda_1': 'layer_scale1.lambda1',
  'lambda_2': 'layer_scale2.lambda1',
  'attention.output.dense': 'attention.output_dense',  # so that the next but one leaves it as it is
  'intermediate.dense': 'mlp.fc1',
  '.output.dense': '.mlp.fc2',
  'attention.output_dense': 'attention.output.dense',
}
_REGISTERS = rule('embeddings.register_tokens', 'registers', TOKENS)
_CLASS_AND_MEAN = 'its head reads the class token and the mean of the patches'
HF_DINOV2 = replace(
  HF_VIT,
  name='Hugging Face DINOv2',
  rules=require(rename_tensors(RULES, _DINOV2), 'LayerScale'),
  prefix=r'(dinov2|dinov2_with_registers)\.',
  layer_norm_eps=1e-6,
  normalization=IMAGENET,
  head_reason=_CLASS_AND_MEAN,
)
HF_DINOV2_REGISTERS = replace(
  HF_DINOV2, name='Hugging Face DINOv2 with registers', rules=(*HF_DINOV2.rules, _REGISTERS), antialias=True
)
HF_DINOV2_IN_MEMORY, HF_DINOV2_REGISTERS_IN_MEMORY = (
  replace(x, rules=rename_tensors(x.rules, _IN_MEMORY)) for x in (HF_DINOV2, HF_DINOV2_REGISTERS)
)

HF_DINOV3 = replace(
  HF_DINOV2,
  name='Hugging Face DINOv3',
  rules=(
    *rename_tensors(
      without(HF_DINOV2.rules, 'embedding/space'),
      {
        'encoder.layer.': 'layer.',
        **_IN_MEMORY,
        'mlp.fc1': 'mlp.up_proj',
        'mlp.fc2': 'mlp.down_proj',
        'patch_embeddings.projection': 'patch_embeddings',
        'layernorm.': 'norm.',
      },
    ),
    _REGISTERS,
  ),
  prefix=r'(dinov3_vit\.)?(model\.)?',
  layer_norm_eps=1e-5,
)

FORMATS = (
  HF_VIT, HF_VIT_IN_MEMORY, HF_DISTILLED, HF_BEIT, HF_BEIT_ENCODER, HF_DINOV2, HF_DINOV2_REGISTERS,
  HF_DINOV2_IN_MEMORY, HF_DINOV2_REGISTERS_IN_MEMORY, HF_DINOV3,
)  # fmt: skip
