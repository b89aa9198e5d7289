"""TimeSformer checkpoints (divided space-time attention) of Hugging Face and of its authors.

TimeSformer has a linear layer, `temporal_fc`, after the output projection of its time attention. Loading folds both
into one projection; exporting writes an identity as the second.
"""

import numpy as np

from mevit_jax.config.data import Normalization
from mevit_jax.pretrained.formats import CheckpointFormat, rename_tensors, rule
from mevit_jax.pretrained.transforms import (
  CONV,
  LINEAR,
  OUT_PROJECTION,
  POSITIONS,
  QKV,
  TIME_POSITIONS,
  TOKEN,
  Arrays,
  Sizes,
  Transform,
)


def _fold(tensors: Arrays, sizes: Sizes) -> Arrays:
  projection, projection_bias, linear, bias = tensors  # weights are `out in`
  (kernel,) = OUT_PROJECTION.forward((linear @ projection,), sizes)  # h k d
  return kernel, linear @ projection_bias + bias


def _unfold(params: Arrays) -> Arrays:
  kernel, bias = params
  (weight,) = OUT_PROJECTION.inverse((kernel,))
  assert weight is not None
  return weight, bias, np.eye(bias.size, dtype=bias.dtype), np.zeros_like(bias)


FOLD = Transform(_fold, _unfold)

# https://github.com/huggingface/transformers (models/timesformer)
_HF = (
  rule('embeddings.cls_token', 'class_token', TOKEN),
  rule('embeddings.position_embeddings', 'class_position embedding/space', POSITIONS),
  rule('embeddings.time_embeddings', 'embedding/time', TIME_POSITIONS),
  rule('embeddings.patch_embeddings.projection.weight', 'embedding/kernel', CONV),
  rule('embeddings.patch_embeddings.projection.bias', 'embedding/bias'),
  rule('encoder.layer.{i}.temporal_layernorm.weight', 'blocks/{i}/motion_attention/norm/scale'),
  rule('encoder.layer.{i}.temporal_layernorm.bias', 'blocks/{i}/motion_attention/norm/bias'),
  rule('encoder.layer.{i}.temporal_attention.attention.qkv.weight',
       'blocks/{i}/motion_attention/(query|key|value)/kernel blocks/{i}/motion_attention/(query|key|value)/bias', QKV,
       extras='encoder.layer.{i}.temporal_attention.attention.qkv.bias', feature='query, key and value biases'),
  rule('encoder.layer.{i}.temporal_attention.output.dense.weight '
       'encoder.layer.{i}.temporal_attention.output.dense.bias '
       'encoder.layer.{i}.temporal_dense.weight encoder.layer.{i}.temporal_dense.bias',
       'blocks/{i}/motion_attention/out/(kernel|bias)', FOLD),
  rule('encoder.layer.{i}.layernorm_before.weight', 'blocks/{i}/space_attention/norm/scale'),
  rule('encoder.layer.{i}.layernorm_before.bias', 'blocks/{i}/space_attention/norm/bias'),
  rule('encoder.layer.{i}.attention.attention.qkv.weight',
       'blocks/{i}/space_attention/(query|key|value)/kernel blocks/{i}/space_attention/(query|key|value)/bias', QKV,
       extras='encoder.layer.{i}.attention.attention.qkv.bias', feature='query, key and value biases'),
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
  rule('classifier.weight', 'head/kernel', LINEAR, feature='head'),
  rule('classifier.bias', 'head/bias', feature='head'),
)  # fmt: skip

# Its authors did not train with the mean of 0.5 of the ViT that they started from.
_NORMALIZATION = Normalization((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))

HF = CheckpointFormat(
  'Hugging Face TimeSformer', _HF, prefix=r'timesformer\.', antialias=False, normalization=_NORMALIZATION
)

# The original, https://github.com/facebookresearch/TimeSformer (timesformer/models/vit.py), extends timm's ViT.
ORIGINAL = CheckpointFormat(
  'TimeSformer',
  rename_tensors(
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
  normalization=_NORMALIZATION,
)

FORMATS = (HF, ORIGINAL)
