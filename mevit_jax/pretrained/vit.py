"""ImageNet ViT checkpoints of Google (npz), timm, DeiT, Hugging Face and torchvision."""

import numpy as np

from mevit_jax.config.data import Normalization
from mevit_jax.pretrained.transforms import (
  CONV,
  FLATTEN,
  HEADS,
  HEADS_BIAS,
  LINEAR,
  OUT_PROJECTION,
  POSITIONS,
  QKV,
  QKV_BIAS,
  CheckpointFormat,
  Transform,
  rename_tensors,
  rule,
)

_IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_PRE_LOGITS = 'tanh layer before the head, which MEViT does not have; the head after it is not kept'

# timm, and the original DeiT: https://github.com/huggingface/pytorch-image-models (vision_transformer.py)
_TIMM = (
  rule('cls_token', 'class_token', FLATTEN),
  rule('pos_embed', 'class_position embedding/space', POSITIONS),
  rule('patch_embed.proj.weight', 'embedding/kernel', CONV),
  rule('patch_embed.proj.bias', 'embedding/bias'),
  rule('blocks.{i}.norm1.weight', 'blocks/{i}/space_attention/norm/scale'),
  rule('blocks.{i}.norm1.bias', 'blocks/{i}/space_attention/norm/bias'),
  rule('blocks.{i}.attn.qkv.weight', 'blocks/{i}/space_attention/(query|key|value)/kernel', QKV),
  rule('blocks.{i}.attn.qkv.bias', 'blocks/{i}/space_attention/(query|key|value)/bias', QKV_BIAS),
  rule('blocks.{i}.attn.proj.weight', 'blocks/{i}/space_attention/out/kernel', OUT_PROJECTION),
  rule('blocks.{i}.attn.proj.bias', 'blocks/{i}/space_attention/out/bias'),
  rule('blocks.{i}.norm2.weight', 'blocks/{i}/mlp/norm/scale'),
  rule('blocks.{i}.norm2.bias', 'blocks/{i}/mlp/norm/bias'),
  rule('blocks.{i}.mlp.fc1.weight', 'blocks/{i}/mlp/up/kernel', LINEAR),
  rule('blocks.{i}.mlp.fc1.bias', 'blocks/{i}/mlp/up/bias'),
  rule('blocks.{i}.mlp.fc2.weight', 'blocks/{i}/mlp/down/kernel', LINEAR),
  rule('blocks.{i}.mlp.fc2.bias', 'blocks/{i}/mlp/down/bias'),
  rule('norm.weight', 'norm/scale'),
  rule('norm.bias', 'norm/bias'),
  rule('head.weight', 'head/kernel', LINEAR, optional=True),
  rule('head.bias', 'head/bias', optional=True),
)  # fmt: skip

TIMM = CheckpointFormat(
  'timm or DeiT ViT',
  _TIMM,
  unused=((r'pre_logits\.fc\.(weight|bias)', _PRE_LOGITS),),
  prefix=r'(module\.)?(model\.)?',
)

# Positions of the class token, the distillation token and the patches; the second is not used.
_DISTILLED_POSITIONS = Transform(lambda tensors, h: (tensors[0][0, 0], tensors[0][0, 2:]), POSITIONS.inverse)

DISTILLED = CheckpointFormat(
  'distilled DeiT',
  (
    *(r for r in _TIMM if r.tensors != ('pos_embed',)),
    rule('pos_embed', 'class_position embedding/space', _DISTILLED_POSITIONS),
  ),
  unused=(
    (
      'dist_token',
      'distillation token with its position (row 1 of pos_embed), which MEViT does not have; patches attend to it',
    ),
    (r'head_dist\.(weight|bias)', 'head of the distillation token'),
  ),
  prefix=TIMM.prefix,
  normalization=_IMAGENET,
)

# Hugging Face transformers: https://github.com/huggingface/transformers (models/vit), names of its files.
_HF = (
  rule('embeddings.cls_token', 'class_token', FLATTEN),
  rule('embeddings.position_embeddings', 'class_position embedding/space', POSITIONS),
  rule('embeddings.patch_embeddings.projection.weight', 'embedding/kernel', CONV),
  rule('embeddings.patch_embeddings.projection.bias', 'embedding/bias'),
  rule('encoder.layer.{i}.layernorm_before.weight', 'blocks/{i}/space_attention/norm/scale'),
  rule('encoder.layer.{i}.layernorm_before.bias', 'blocks/{i}/space_attention/norm/bias'),
  rule('encoder.layer.{i}.attention.attention.query.weight', 'blocks/{i}/space_attention/query/kernel', HEADS),
  rule('encoder.layer.{i}.attention.attention.query.bias', 'blocks/{i}/space_attention/query/bias', HEADS_BIAS),
  rule('encoder.layer.{i}.attention.attention.key.weight', 'blocks/{i}/space_attention/key/kernel', HEADS),
  rule('encoder.layer.{i}.attention.attention.key.bias', 'blocks/{i}/space_attention/key/bias', HEADS_BIAS),
  rule('encoder.layer.{i}.attention.attention.value.weight', 'blocks/{i}/space_attention/value/kernel', HEADS),
  rule('encoder.layer.{i}.attention.attention.value.bias', 'blocks/{i}/space_attention/value/bias', HEADS_BIAS),
  rule('encoder.layer.{i}.attention.output.dense.weight', 'blocks/{i}/space_attention/out/kernel', OUT_PROJECTION),
  rule('encoder.layer.{i}.attention.output.dense.bias', 'blocks/{i}/space_attention/out/bias'),
  rule('encoder.layer.{i}.layernorm_after.weight', 'blocks/{i}/mlp/norm/scale'),
  rule('encoder.layer.{i}.layernorm_after.bias', 'blocks/{i}/mlp/norm/bias'),
  rule('encoder.layer.{i}.intermediate.dense.weight', 'blocks/{i}/mlp/up/kernel', LINEAR),
  rule('encoder.layer.{i}.intermediate.dense.bias', 'blocks/{i}/mlp/up/bias'),
  rule('encoder.layer.{i}.output.dense.weight', 'blocks/{i}/mlp/down/kernel', LINEAR),
  rule('encoder.layer.{i}.output.dense.bias', 'blocks/{i}/mlp/down/bias'),
  rule('layernorm.weight', 'norm/scale'),
  rule('layernorm.bias', 'norm/bias'),
  rule('classifier.weight', 'head/kernel', LINEAR, optional=True),
  rule('classifier.bias', 'head/bias', optional=True),
)  # fmt: skip

HF = CheckpointFormat(
  'Hugging Face ViT',
  _HF,
  unused=((r'pooler\.dense\.(weight|bias)', 'tanh layer on the class token, which MEViT does not have'),),
  prefix=r'vit\.',
  layer_norm_eps=1e-12,
  antialias=False,
  normalization=_HALF,
)

# Names of transformers 5 in memory (`model.state_dict()`).
HF_5 = CheckpointFormat(
  HF.name,
  rename_tensors(
    _HF,
    {
      'encoder.layer.': 'layers.',
      'attention.attention.query': 'attention.q_proj',
      'attention.attention.key': 'attention.k_proj',
      'attention.attention.value': 'attention.v_proj',
      'attention.output.dense': 'attention.o_proj',
      'intermediate.dense': 'mlp.fc1',
      'output.dense': 'mlp.fc2',
    },
  ),
  HF.unused, HF.prefix, HF.layer_norm_eps, HF.normalization, HF.antialias,
)  # fmt: skip

# torchvision: https://github.com/pytorch/vision (models/vision_transformer.py)
_TORCHVISION = (
  rule('class_token', 'class_token', FLATTEN),
  rule('encoder.pos_embedding', 'class_position embedding/space', POSITIONS),
  rule('conv_proj.weight', 'embedding/kernel', CONV),
  rule('conv_proj.bias', 'embedding/bias'),
  rule('encoder.layers.encoder_layer_{i}.ln_1.weight', 'blocks/{i}/space_attention/norm/scale'),
  rule('encoder.layers.encoder_layer_{i}.ln_1.bias', 'blocks/{i}/space_attention/norm/bias'),
  rule('encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight',
       'blocks/{i}/space_attention/(query|key|value)/kernel', QKV),
  rule('encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias',
       'blocks/{i}/space_attention/(query|key|value)/bias', QKV_BIAS),
  rule('encoder.layers.encoder_layer_{i}.self_attention.out_proj.weight',
       'blocks/{i}/space_attention/out/kernel', OUT_PROJECTION),
  rule('encoder.layers.encoder_layer_{i}.self_attention.out_proj.bias', 'blocks/{i}/space_attention/out/bias'),
  rule('encoder.layers.encoder_layer_{i}.ln_2.weight', 'blocks/{i}/mlp/norm/scale'),
  rule('encoder.layers.encoder_layer_{i}.ln_2.bias', 'blocks/{i}/mlp/norm/bias'),
  rule('encoder.layers.encoder_layer_{i}.mlp.0.weight', 'blocks/{i}/mlp/up/kernel', LINEAR),
  rule('encoder.layers.encoder_layer_{i}.mlp.0.bias', 'blocks/{i}/mlp/up/bias'),
  rule('encoder.layers.encoder_layer_{i}.mlp.3.weight', 'blocks/{i}/mlp/down/kernel', LINEAR),
  rule('encoder.layers.encoder_layer_{i}.mlp.3.bias', 'blocks/{i}/mlp/down/bias'),
  rule('encoder.ln.weight', 'norm/scale'),
  rule('encoder.ln.bias', 'norm/bias'),
  rule('heads.head.weight', 'head/kernel', LINEAR, optional=True),
  rule('heads.head.bias', 'head/bias', optional=True),
)  # fmt: skip

TORCHVISION = CheckpointFormat(
  'torchvision ViT',
  _TORCHVISION,
  ((r'heads\.pre_logits\.(weight|bias)', _PRE_LOGITS),),
  r'(module\.)?',
  normalization=_IMAGENET,
)

# The published files use the names of an older torchvision MLP.
TORCHVISION_OLD = CheckpointFormat(
  TORCHVISION.name,
  rename_tensors(_TORCHVISION, {'mlp.0': 'mlp.linear_1', 'mlp.3': 'mlp.linear_2'}),
  TORCHVISION.unused, TORCHVISION.prefix, normalization=_IMAGENET,
)  # fmt: skip

# Google: https://github.com/google-research/vision_transformer, the original paper's and AugReg's files.
_ATTENTION = 'Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1'
_GOOGLE = (
  rule('cls', 'class_token', FLATTEN),
  rule('Transformer/posembed_input/pos_embedding', 'class_position embedding/space', POSITIONS),
  rule('embedding/kernel', 'embedding/kernel'),
  rule('embedding/bias', 'embedding/bias'),
  rule('Transformer/encoderblock_{i}/LayerNorm_0/scale', 'blocks/{i}/space_attention/norm/scale'),
  rule('Transformer/encoderblock_{i}/LayerNorm_0/bias', 'blocks/{i}/space_attention/norm/bias'),
  *(
    rule(f'{_ATTENTION}/{name}/{kind}', f'blocks/{{i}}/space_attention/{name}/{kind}')
    for name in ('query', 'key', 'value', 'out')
    for kind in ('kernel', 'bias')
  ),
  rule('Transformer/encoderblock_{i}/LayerNorm_2/scale', 'blocks/{i}/mlp/norm/scale'),
  rule('Transformer/encoderblock_{i}/LayerNorm_2/bias', 'blocks/{i}/mlp/norm/bias'),
  rule('Transformer/encoderblock_{i}/MlpBlock_3/Dense_0/kernel', 'blocks/{i}/mlp/up/kernel'),
  rule('Transformer/encoderblock_{i}/MlpBlock_3/Dense_0/bias', 'blocks/{i}/mlp/up/bias'),
  rule('Transformer/encoderblock_{i}/MlpBlock_3/Dense_1/kernel', 'blocks/{i}/mlp/down/kernel'),
  rule('Transformer/encoderblock_{i}/MlpBlock_3/Dense_1/bias', 'blocks/{i}/mlp/down/bias'),
  rule('Transformer/encoder_norm/scale', 'norm/scale'),
  rule('Transformer/encoder_norm/bias', 'norm/bias'),
  rule('head/kernel', 'head/kernel', optional=True),
  rule('head/bias', 'head/bias', optional=True),
)  # fmt: skip
_GOOGLE_UNUSED = (
  (r'pre_logits/(kernel|bias)', _PRE_LOGITS),
  (r'opt/.*', 'optimizer state'),
)

GOOGLE = CheckpointFormat("Google's ViT", _GOOGLE, _GOOGLE_UNUSED, r'opt/target/|params/', normalization=_HALF)

# https://github.com/google-research/big_vision: positions are added before the class token, which has no position.
_PATCH_POSITIONS = Transform(
  lambda tensors, h: (np.zeros_like(tensors[0][0, 0]), tensors[0][0]), lambda params: (params[1][None],)
)
BIG_VISION = CheckpointFormat(
  'big_vision ViT',
  rename_tensors(
    (
      *(r for r in _GOOGLE if r.params[0] != 'class_position'),
      rule('pos_embedding', 'class_position embedding/space', _PATCH_POSITIONS),
    ),
    {'DotProductAttention_1': 'DotProductAttention_0', 'LayerNorm_2': 'LayerNorm_1', 'MlpBlock_3': 'MlpBlock_0'},
  ),
  _GOOGLE_UNUSED, GOOGLE.prefix, normalization=_HALF,
)  # fmt: skip

FORMATS = (GOOGLE, BIG_VISION, TIMM, DISTILLED, HF, HF_5, TORCHVISION, TORCHVISION_OLD)
