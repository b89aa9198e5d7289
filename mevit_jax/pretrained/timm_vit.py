"""ViT checkpoints of timm, with the names of the original DeiT, DINOv2, MAE and others."""

from dataclasses import replace

from mevit_jax.pretrained.formats import CheckpointFormat, Rule, rename_tensors, require, rule, without
from mevit_jax.pretrained.transforms import (
  CONV_WITH_BIAS,
  KEY_VALUE,
  LINEAR,
  OUT_PROJECTION,
  POOL_QUERY,
  POSITIONS,
  QKV,
  QKV_WITHOUT_KEY_BIAS,
  SCALED_LINEAR,
  SCALED_OUT_PROJECTION,
  TOKEN,
  TOKENS,
  Arrays,
  Sizes,
  Tensors,
  read_only,
)
from mevit_jax.pretrained.vit import IMAGENET, PRE_LOGITS

# https://github.com/huggingface/pytorch-image-models (vision_transformer.py): ViT, DeiT, DeiT III, DINOv2, CLIP, ...
_RULES = (
  rule('cls_token', 'class_token', TOKEN, feature='class token'),
  rule('reg_token', 'registers', TOKENS, feature='registers'),
  rule('pos_embed', 'class_position embedding/space', POSITIONS),
  rule('patch_embed.proj.weight', 'embedding/(kernel|bias)', CONV_WITH_BIAS,
       extras='patch_embed.proj.bias', feature='patch embedding bias'),
  rule('norm_pre.weight', 'pre_norm/scale', feature='pre-norm'),
  rule('norm_pre.bias', 'pre_norm/bias', feature='pre-norm'),
  rule('blocks.{i}.norm1.weight', 'blocks/{i}/space_attention/norm/scale'),
  rule('blocks.{i}.norm1.bias', 'blocks/{i}/space_attention/norm/bias'),
  rule('blocks.{i}.attn.qkv.weight',
       'blocks/{i}/space_attention/(query|key|value)/kernel blocks/{i}/space_attention/(query|key|value)/bias',
       QKV, extras='blocks.{i}.attn.qkv.bias', feature='query, key and value biases'),
  rule('blocks.{i}.attn.proj.weight blocks.{i}.attn.proj.bias', 'blocks/{i}/space_attention/out/(kernel|bias)',
       SCALED_OUT_PROJECTION, extras='blocks.{i}.ls1.gamma', feature='LayerScale'),
  rule('blocks.{i}.norm2.weight', 'blocks/{i}/mlp/norm/scale'),
  rule('blocks.{i}.norm2.bias', 'blocks/{i}/mlp/norm/bias'),
  rule('blocks.{i}.mlp.fc1.weight', 'blocks/{i}/mlp/up/kernel', LINEAR),
  rule('blocks.{i}.mlp.fc1.bias', 'blocks/{i}/mlp/up/bias'),
  rule('blocks.{i}.mlp.fc2.weight blocks.{i}.mlp.fc2.bias', 'blocks/{i}/mlp/down/(kernel|bias)',
       SCALED_LINEAR, extras='blocks.{i}.ls2.gamma', feature='LayerScale'),
  rule('norm.weight', 'norm/scale'),
  rule('norm.bias', 'norm/bias'),
  rule('head.weight', 'head/kernel', LINEAR, feature='head'),
  rule('head.bias', 'head/bias', feature='head'),
)  # fmt: skip

TIMM = CheckpointFormat(
  'timm or DeiT ViT',
  _RULES,
  unused=(
    (r'pre_logits\.fc\.(weight|bias)', PRE_LOGITS),
    ('mask_token', 'token of masked patches in pretraining'),
  ),
  prefix=r'(module\.)?(model\.)?',
)


def _replace(rules: tuple[Rule, ...], *new: Rule) -> tuple[Rule, ...]:
  """Returns the rules with others for the parameters of `new`."""
  return (*without(rules, *(name for r in new for name in r.params)), *new)


# The head reads the mean of the patches, normalized: https://github.com/facebookresearch/mae (fine-tuned), and others.
MEAN_POOL = replace(
  TIMM,
  name='timm ViT with mean pooling',
  rules=_replace(_RULES, rule('fc_norm.weight', 'norm/scale'), rule('fc_norm.bias', 'norm/bias')),
  head_reason='its head reads the mean of the patches',
)

# The authors' files of DINOv2 with registers: https://github.com/facebookresearch/dinov2
DINOV2_REGISTERS = replace(
  TIMM,
  name='DINOv2 with registers',
  rules=require(rename_tensors(_RULES, {'reg_token': 'register_tokens'}), 'registers'),
)


def _split_distilled(tensors: Tensors, sizes: Sizes) -> Arrays:
  """Splits positions of class token, distillation token and patches, without the second: `1 2+n d`."""
  (positions,) = tensors
  if positions is None or positions.ndim != 3 or len(positions) != 1:
    raise ValueError('positions must be 1 2+n d')
  return positions[0, 0], positions[0, 2:]


def _add_position(tensors: Tensors, sizes: Sizes) -> Arrays:
  """Adds its position to the distillation token, a register of which a frame has one: `1 d`."""
  token, positions = tensors
  if token is None or positions is None or token.ndim != 3 or positions.ndim != 3:
    raise ValueError('the distillation token must be 1 1 d, and positions 1 2+n d')
  return ((token + positions[:, 1:2])[0],)


DISTILLED_POSITIONS, DISTILLATION_TOKEN = read_only(_split_distilled), read_only(_add_position)
DISTILLED = replace(
  TIMM,
  name='distilled DeiT',
  rules=(
    *without(_RULES, 'registers', 'embedding/space'),
    rule('pos_embed', 'class_position embedding/space', DISTILLED_POSITIONS),
    rule('dist_token pos_embed', 'registers', DISTILLATION_TOKEN),
  ),
  unused=((r'head_dist\.(weight|bias)', 'head of the distillation token'),),
  normalization=IMAGENET,
)

# An attention pool instead of a class token (SigLIP): class block 0 is the pool, exactly.
_POOL = 'class_blocks/0'
ATTENTION_POOL = replace(
  TIMM,
  name='timm ViT with attention pooling',
  rules=(
    *without(_RULES, 'class_token', 'registers', 'norm/scale', 'norm/bias'),  # the pool would read registers
    rule('attn_pool.latent attn_pool.q.weight attn_pool.q.bias norm.bias',
         f'class_token {_POOL}/class_attention/query/(kernel|bias)', POOL_QUERY),
    rule('attn_pool.kv.weight attn_pool.kv.bias',
         f'{_POOL}/class_attention/(key|value)/kernel {_POOL}/class_attention/(key|value)/bias', KEY_VALUE),
    rule('attn_pool.proj.weight', f'{_POOL}/class_attention/out/kernel', OUT_PROJECTION),
    rule('attn_pool.proj.bias', f'{_POOL}/class_attention/out/bias'),
    rule('norm.weight', f'{_POOL}/class_attention/norm/scale'),
    rule('norm.bias', f'{_POOL}/class_attention/norm/bias'),
    rule('attn_pool.norm.weight', f'{_POOL}/mlp/norm/scale'),
    rule('attn_pool.norm.bias', f'{_POOL}/mlp/norm/bias'),
    rule('attn_pool.mlp.fc1.weight', f'{_POOL}/mlp/up/kernel', LINEAR),
    rule('attn_pool.mlp.fc1.bias', f'{_POOL}/mlp/up/bias'),
    rule('attn_pool.mlp.fc2.weight', f'{_POOL}/mlp/down/kernel', LINEAR),
    rule('attn_pool.mlp.fc2.bias', f'{_POOL}/mlp/down/bias'),
  ),
  activation=None,
  head_reason='its head follows the attention pool without a norm',
)  # fmt: skip

# timm's Eva with the names of BEiT's LayerScale: DINOv3 (https://github.com/facebookresearch/dinov3). Positions are
# rotary and have no tensors, so the config must state them.
DINOV3 = replace(
  TIMM,
  name='timm DINOv3',
  rules=(
    *require(
      rename_tensors(
        without(
          _RULES, 'embedding/space', 'pre_norm/scale', 'pre_norm/bias', 'blocks/{i}/space_attention/query/kernel'
        ),
        {'ls1.gamma': 'gamma_1', 'ls2.gamma': 'gamma_2'},
      ),
      'LayerScale',
    ),
    rule('blocks.{i}.attn.qkv.weight',
         'blocks/{i}/space_attention/(query|key|value)/kernel blocks/{i}/space_attention/(query|key|value)/bias',
         QKV_WITHOUT_KEY_BIAS, extras='blocks.{i}.attn.q_bias blocks.{i}.attn.v_bias',
         feature='query and value biases'),
  ),
  layer_norm_eps=1e-5,
)  # fmt: skip

FORMATS = (TIMM, MEAN_POOL, DINOV2_REGISTERS, DISTILLED, ATTENTION_POOL, DINOV3)
