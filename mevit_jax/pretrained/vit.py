"""ImageNet ViT checkpoints of Google (npz) and torchvision."""

import numpy as np

from mevit_jax.config.data import Normalization
from mevit_jax.pretrained.formats import CheckpointFormat, rename_tensors, rule
from mevit_jax.pretrained.transforms import CONV, LINEAR, OUT_PROJECTION, POSITIONS, QKV, TOKEN, Transform

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PRE_LOGITS = 'tanh layer before the head, which MEViT does not have; the head after it is not kept'

# torchvision: https://github.com/pytorch/vision (models/vision_transformer.py)
_TORCHVISION = (
  rule('class_token', 'class_token', TOKEN),
  rule('encoder.pos_embedding', 'class_position embedding/space', POSITIONS),
  rule('conv_proj.weight', 'embedding/kernel', CONV),
  rule('conv_proj.bias', 'embedding/bias'),
  rule('encoder.layers.encoder_layer_{i}.ln_1.weight', 'blocks/{i}/space_attention/norm/scale'),
  rule('encoder.layers.encoder_layer_{i}.ln_1.bias', 'blocks/{i}/space_attention/norm/bias'),
  rule('encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight',
       'blocks/{i}/space_attention/(query|key|value)/kernel blocks/{i}/space_attention/(query|key|value)/bias',
       QKV, extras='encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias',
       feature='query, key and value biases'),
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
  rule('heads.head.weight', 'head/kernel', LINEAR, feature='head'),
  rule('heads.head.bias', 'head/bias', feature='head'),
)  # fmt: skip

TORCHVISION = CheckpointFormat(
  'torchvision ViT',
  _TORCHVISION,
  ((r'heads\.pre_logits\.(weight|bias)', PRE_LOGITS),),
  r'(module\.)?',
  normalization=IMAGENET,
)

# The published files use the names of an older torchvision MLP.
TORCHVISION_OLD = CheckpointFormat(
  TORCHVISION.name,
  rename_tensors(_TORCHVISION, {'mlp.0': 'mlp.linear_1', 'mlp.3': 'mlp.linear_2'}),
  TORCHVISION.unused, TORCHVISION.prefix, normalization=IMAGENET,
)  # fmt: skip

# Google: https://github.com/google-research/vision_transformer, the original paper's and AugReg's files.
_ATTENTION = 'Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1'
_GOOGLE = (
  rule('cls', 'class_token', TOKEN),
  rule('Transformer/posembed_input/pos_embedding', 'class_position embedding/space', POSITIONS),
  rule('embedding/kernel', 'embedding/kernel'),
  rule('embedding/bias', 'embedding/bias'),
  rule('Transformer/encoderblock_{i}/LayerNorm_0/scale', 'blocks/{i}/space_attention/norm/scale'),
  rule('Transformer/encoderblock_{i}/LayerNorm_0/bias', 'blocks/{i}/space_attention/norm/bias'),
  *(
    rule(f'{_ATTENTION}/{name}/{part}', f'blocks/{{i}}/space_attention/{name}/{part}')
    for name in ('query', 'key', 'value', 'out')
    for part in ('kernel', 'bias')
  ),
  rule('Transformer/encoderblock_{i}/LayerNorm_2/scale', 'blocks/{i}/mlp/norm/scale'),
  rule('Transformer/encoderblock_{i}/LayerNorm_2/bias', 'blocks/{i}/mlp/norm/bias'),
  rule('Transformer/encoderblock_{i}/MlpBlock_3/Dense_0/kernel', 'blocks/{i}/mlp/up/kernel'),
  rule('Transformer/encoderblock_{i}/MlpBlock_3/Dense_0/bias', 'blocks/{i}/mlp/up/bias'),
  rule('Transformer/encoderblock_{i}/MlpBlock_3/Dense_1/kernel', 'blocks/{i}/mlp/down/kernel'),
  rule('Transformer/encoderblock_{i}/MlpBlock_3/Dense_1/bias', 'blocks/{i}/mlp/down/bias'),
  rule('Transformer/encoder_norm/scale', 'norm/scale'),
  rule('Transformer/encoder_norm/bias', 'norm/bias'),
  rule('head/kernel', 'head/kernel', feature='head'),
  rule('head/bias', 'head/bias', feature='head'),
)  # fmt: skip
_GOOGLE_UNUSED = (
  (r'pre_logits/(kernel|bias)', PRE_LOGITS),
  (r'opt/.*', 'optimizer state'),
)

GOOGLE = CheckpointFormat("Google's ViT", _GOOGLE, _GOOGLE_UNUSED, r'opt/target/|params/', normalization=HALF)

# https://github.com/google-research/big_vision: positions are added before the class token, which has no position.
_PATCH_POSITIONS = Transform(
  lambda tensors, sizes: (np.zeros_like(tensors[0][0, 0]), tensors[0][0]), lambda params: (params[1][None],)
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
  _GOOGLE_UNUSED, GOOGLE.prefix, normalization=HALF,
)  # fmt: skip

FORMATS = (GOOGLE, BIG_VISION, TORCHVISION, TORCHVISION_OLD)
