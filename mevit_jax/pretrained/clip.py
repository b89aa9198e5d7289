"""Image encoders that were trained with text: CLIP, MetaCLIP and SigLIP of Hugging Face, and OpenCLIP."""

from dataclasses import replace

from mevit_jax.config.data import Normalization
from mevit_jax.pretrained.formats import CheckpointFormat, prefix_tensors, rename_tensors, rule, without
from mevit_jax.pretrained.hf_vit import RULES
from mevit_jax.pretrained.transforms import (
  CONV_WITH_BIAS,
  FUSED_KEY_VALUE,
  FUSED_POOL_QUERY,
  LINEAR,
  OUT_PROJECTION,
  POSITIONS,
  QKV,
)
from mevit_jax.pretrained.vit import HALF

_CLIP_NORMALIZATION = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_TEXT = 'text encoder, or the projection to its space'
_TEXT_UNUSED = (
  (r'text_model\..*|(visual|text)_projection\.weight|logit_(scale|bias)', _TEXT),
  (r'embeddings\.position_ids', 'numbers of the positions'),
)
_MEAN = 'its head reads the mean of the patches'

# https://github.com/huggingface/transformers (models/clip); `pre_layrnorm` is its spelling.
_CLIP = (
  *rename_tensors(
    without(RULES, 'class_token', 'embedding/space', 'embedding/kernel'),
    {
      'encoder.layer.': 'encoder.layers.',
      'layernorm_before': 'layer_norm1',
      'layernorm_after': 'layer_norm2',
      'attention.attention.query': 'self_attn.q_proj',
      'attention.attention.key': 'self_attn.k_proj',
      'attention.attention.value': 'self_attn.v_proj',
      'attention.output.dense': 'self_attn.out_proj',
      'intermediate.dense': 'mlp.fc1',
      'output.dense': 'mlp.fc2',
      'layernorm.': 'post_layernorm.',
    },
  ),
  rule('embeddings.position_embedding.weight', 'class_position embedding/space', POSITIONS),
  rule(
    'embeddings.patch_embedding.weight', 'embedding/(kernel|bias)', CONV_WITH_BIAS,
    extras='embeddings.patch_embedding.bias', feature='patch embedding bias',
  ),
)  # fmt: skip

HF_CLIP = CheckpointFormat(
  'Hugging Face CLIP',
  (
    *_CLIP,
    rule('embeddings.class_embedding', 'class_token'),
    rule('pre_layrnorm.weight', 'pre_norm/scale'),
    rule('pre_layrnorm.bias', 'pre_norm/bias'),
  ),
  _TEXT_UNUSED,
  prefix=r'(clip\.)?vision_model\.',
  layer_norm_eps=1e-5,
  normalization=_CLIP_NORMALIZATION,
  antialias=False,
  activation=None,
  head_reason=_MEAN,
)

# https://github.com/huggingface/transformers (models/siglip). Its head, an attention pool, is a class block, exactly.
_POOL = 'class_blocks/0'
_SIGLIP_POOL = (
  rule('head.probe head.attention.in_proj_weight head.attention.in_proj_bias post_layernorm.bias',
       f'class_token {_POOL}/class_attention/query/(kernel|bias)', FUSED_POOL_QUERY),
  rule('head.attention.in_proj_weight head.attention.in_proj_bias',
       f'{_POOL}/class_attention/(key|value)/kernel {_POOL}/class_attention/(key|value)/bias', FUSED_KEY_VALUE),
  rule('head.attention.out_proj.weight', f'{_POOL}/class_attention/out/kernel', OUT_PROJECTION),
  rule('head.attention.out_proj.bias', f'{_POOL}/class_attention/out/bias'),
  rule('post_layernorm.weight', f'{_POOL}/class_attention/norm/scale'),
  rule('post_layernorm.bias', f'{_POOL}/class_attention/norm/bias'),
  rule('head.layernorm.weight', f'{_POOL}/mlp/norm/scale'),
  rule('head.layernorm.bias', f'{_POOL}/mlp/norm/bias'),
  rule('head.mlp.fc1.weight', f'{_POOL}/mlp/up/kernel', LINEAR),
  rule('head.mlp.fc1.bias', f'{_POOL}/mlp/up/bias'),
  rule('head.mlp.fc2.weight', f'{_POOL}/mlp/down/kernel', LINEAR),
  rule('head.mlp.fc2.bias', f'{_POOL}/mlp/down/bias'),
)  # fmt: skip
HF_SIGLIP = CheckpointFormat(
  'Hugging Face SigLIP',
  (*without(_CLIP, 'norm/scale', 'norm/bias'), *_SIGLIP_POOL),
  _TEXT_UNUSED,
  prefix=r'(siglip\.)?vision_model\.',
  normalization=HALF,
  antialias=False,
  activation='gelu_tanh',
  head_reason=_MEAN,
)
HF_SIGLIP_WITHOUT_POOL = replace(HF_SIGLIP, rules=_CLIP)

# https://github.com/mlfoundations/open_clip (transformer.py), with the names of OpenAI's CLIP.
_RESBLOCK, _BLOCK = 'transformer.resblocks.{i}', 'blocks/{i}'
OPEN_CLIP = CheckpointFormat(
  'OpenCLIP',
  (
    rule('class_embedding', 'class_token'),
    rule('positional_embedding', 'class_position embedding/space', POSITIONS),
    rule('conv1.weight', 'embedding/(kernel|bias)', CONV_WITH_BIAS, extras='conv1.bias',
         feature='patch embedding bias'),
    rule('ln_pre.weight', 'pre_norm/scale'),
    rule('ln_pre.bias', 'pre_norm/bias'),
    rule(f'{_RESBLOCK}.ln_1.weight', f'{_BLOCK}/space_attention/norm/scale'),
    rule(f'{_RESBLOCK}.ln_1.bias', f'{_BLOCK}/space_attention/norm/bias'),
    rule(f'{_RESBLOCK}.attn.in_proj_weight',
         f'{_BLOCK}/space_attention/(query|key|value)/kernel {_BLOCK}/space_attention/(query|key|value)/bias', QKV,
         extras=f'{_RESBLOCK}.attn.in_proj_bias', feature='query, key and value biases'),
    rule(f'{_RESBLOCK}.attn.out_proj.weight', f'{_BLOCK}/space_attention/out/kernel', OUT_PROJECTION),
    rule(f'{_RESBLOCK}.attn.out_proj.bias', f'{_BLOCK}/space_attention/out/bias'),
    rule(f'{_RESBLOCK}.ln_2.weight', f'{_BLOCK}/mlp/norm/scale'),
    rule(f'{_RESBLOCK}.ln_2.bias', f'{_BLOCK}/mlp/norm/bias'),
    rule(f'{_RESBLOCK}.mlp.c_fc.weight', f'{_BLOCK}/mlp/up/kernel', LINEAR),
    rule(f'{_RESBLOCK}.mlp.c_fc.bias', f'{_BLOCK}/mlp/up/bias'),
    rule(f'{_RESBLOCK}.mlp.c_proj.weight', f'{_BLOCK}/mlp/down/kernel', LINEAR),
    rule(f'{_RESBLOCK}.mlp.c_proj.bias', f'{_BLOCK}/mlp/down/bias'),
    rule('ln_post.weight', 'norm/scale'),
    rule('ln_post.bias', 'norm/bias'),
  ),
  (('proj', _TEXT),),
  layer_norm_eps=1e-5,
  normalization=_CLIP_NORMALIZATION,
  activation=None,
)  # fmt: skip

# The image encoder within the whole model, where the text encoder's blocks have its names without `visual`.
OPEN_CLIP_MODEL = replace(
  OPEN_CLIP,
  rules=prefix_tensors(OPEN_CLIP.rules, 'visual.'),
  unused=(
    (r'visual\.proj|logit_(scale|bias)|text\..*', _TEXT),
    (r'(transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection', _TEXT),
  ),
)

FORMATS = (HF_CLIP, HF_SIGLIP, HF_SIGLIP_WITHOUT_POOL, OPEN_CLIP, OPEN_CLIP_MODEL)
