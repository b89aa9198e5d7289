"""TimeSformer with divided space-time attention, as Hugging Face and its authors keep it.

After its time attention TimeSformer has one more linear map, `temporal_fc`, right behind the output projection: they
are folded into one. Out again, the second is the identity.
"""

import numpy as np

from mevit_jax.config.data import Normalization
from mevit_jax.pretrained.transforms import (
  CONV,
  FLAT,
  JOIN,
  LINEAR,
  POSITIONS,
  QKV,
  QKV_BIAS,
  TIMES,
  Arrays,
  Change,
  CheckpointFormat,
  renamed,
  rule,
)


def _fold(theirs: Arrays, heads: int) -> Arrays:
  projection, projection_bias, linear, bias = theirs  # weights are `out in`
  (kernel,) = JOIN.into((linear @ projection,), heads)  # h k d
  return kernel, linear @ projection_bias + bias


def _unfold(ours: Arrays) -> Arrays:
  kernel, bias = ours
  return *JOIN.out((kernel,)), bias, np.eye(bias.size, dtype=bias.dtype), np.zeros_like(bias)


FOLD = Change(_fold, _unfold)

# https://github.com/huggingface/transformers (models/timesformer)
_HF = (
  rule('embeddings.cls_token', 'class_token', FLAT),
  rule('embeddings.position_embeddings', 'class_position embedding/space', POSITIONS),
  rule('embeddings.time_embeddings', 'embedding/time', TIMES),
  rule('embeddings.patch_embeddings.projection.weight', 'embedding/kernel', CONV),
  rule('embeddings.patch_embeddings.projection.bias', 'embedding/bias'),
  rule('encoder.layer.{i}.temporal_layernorm.weight', 'blocks/{i}/motion_attention/norm/scale'),
  rule('encoder.layer.{i}.temporal_layernorm.bias', 'blocks/{i}/motion_attention/norm/bias'),
  rule('encoder.layer.{i}.temporal_attention.attention.qkv.weight',
       'blocks/{i}/motion_attention/(query|key|value)/kernel', QKV),
  rule('encoder.layer.{i}.temporal_attention.attention.qkv.bias',
       'blocks/{i}/motion_attention/(query|key|value)/bias', QKV_BIAS),
  rule('encoder.layer.{i}.temporal_attention.output.dense.weight '
       'encoder.layer.{i}.temporal_attention.output.dense.bias '
       'encoder.layer.{i}.temporal_dense.weight encoder.layer.{i}.temporal_dense.bias',
       'blocks/{i}/motion_attention/out/(kernel|bias)', FOLD),
  rule('encoder.layer.{i}.layernorm_before.weight', 'blocks/{i}/space_attention/norm/scale'),
  rule('encoder.layer.{i}.layernorm_before.bias', 'blocks/{i}/space_attention/norm/bias'),
  rule('encoder.layer.{i}.attention.attention.qkv.weight', 'blocks/{i}/space_attention/(query|key|value)/kernel', QKV),
  rule('encoder.layer.{i}.attention.attention.qkv.bias', 'blocks/{i}/space_attention/(query|key|value)/bias', QKV_BIAS),
  rule('encoder.layer.{i}.attention.output.dense.weight', 'blocks/{i}/space_attention/out/kernel', JOIN),
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

# What its authors trained with: not the 0.5 of the ViT that they started from.
_PIXELS = Normalization((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))

HF = CheckpointFormat('Hugging Face TimeSformer', _HF, prefix=r'timesformer\.', antialias=False, pixels=_PIXELS)

# The original, https://github.com/facebookresearch/TimeSformer (timesformer/models/vit.py), is timm's ViT with more.
ORIGINAL = CheckpointFormat(
  'TimeSformer',
  renamed(
    _HF,
    {
      'embeddings.cls_token': 'cls_token',
      'embeddings.position_embeddings': 'pos_embed',
      'embeddings.time_embeddings': 'time_embed',
      'embeddings.patch_embeddings.projection': 'patch_embed.proj',
      'encoder.layer.': 'blocks.',
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
      'layernorm': 'norm',
      'classifier': 'head',
    },
  ),
  prefix=r'(module\.)?(model\.)?',
  pixels=_PIXELS,
)

PAGES = (HF, ORIGINAL)
