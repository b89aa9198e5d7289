"""Settings of a source's config that change its function: honored, or refused by name."""

import dataclasses
import re
from typing import Any

from mevit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a model that its config states and its tensors do not show; None if the config does not state them.

  Attributes:
    heads: number of attention heads.
    layer_norm_eps: epsilon of its LayerNorms.
    activation: activation of its MLPs, as in `MEViTConfig.activation`.
    rotary_theta: base of its rotary positions; 0 if it has none.
    head_reason: reason why its head is initialized instead of kept, or ''.
  """

  heads: int | None = None
  layer_norm_eps: float | None = None
  activation: str | None = None
  rotary_theta: float = 0.0
  head_reason: str = ''


# Names of the activations in configs -> `MEViTConfig.activation`.
_ACTIVATIONS = {
  'gelu': 'gelu',
  'gelu_python': 'gelu',
  'gelu_erf': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_tanh': 'gelu_tanh',
  'quick_gelu': 'quick_gelu',
  'quickgelu': 'quick_gelu',
}


def read_settings(config: dict[str, Any]) -> Settings:
  """Reads the settings of a config of Hugging Face, timm or OpenCLIP; an empty one states nothing.

  Raises:
    UserError: a setting that MEViT does not support, by its name.
  """
  if isinstance(config.get('architecture'), str):
    return _read_timm(config)
  if isinstance(config.get('model_cfg'), dict):
    return _read_open_clip(config['model_cfg'])
  return _read_hugging_face(config) if config else Settings()


def vision_config(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the image encoder's part of a Hugging Face config of images and text (CLIP, SigLIP), else the config."""
  part = config.get('vision_config')
  if not isinstance(part, dict):
    return config
  return {**part, 'model_type': part.get('model_type') or f'{config.get("model_type")}_vision_model'}


# Hugging Face: defaults of each model type, which its config.json may leave out.
_VIT = {'hidden_act': 'gelu', 'layer_norm_eps': 1e-12, 'num_attention_heads': 12}
_DINOV2 = {**_VIT, 'layer_norm_eps': 1e-6, 'use_swiglu_ffn': False}
_CLIP = {'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5, 'num_attention_heads': 12}
_SIGLIP = {'hidden_act': 'gelu_pytorch_tanh', 'layer_norm_eps': 1e-6, 'num_attention_heads': 12}
_BEIT = {**_VIT, 'use_absolute_position_embeddings': False, 'use_relative_position_bias': False,
         'use_shared_relative_position_bias': False}  # fmt: skip
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
  'vit': _VIT,
  'deit': _VIT,
  'vit_mae': _VIT,
  'vit_msn': {**_VIT, 'layer_norm_eps': 1e-6},
  'beit': _BEIT,
  'data2vec-vision': _BEIT,
  'dinov2': _DINOV2,
  'dinov2_with_registers': _DINOV2,
  'dinov3_vit': {**_VIT, 'layer_norm_eps': 1e-5, 'num_attention_heads': 6, 'rope_theta': 100.0, 'use_gated_mlp': False},
  'clip_vision_model': _CLIP,
  'metaclip_2_vision_model': _CLIP,
  'siglip_vision_model': _SIGLIP,
  'timesformer': {**_VIT, 'layer_norm_eps': 1e-6, 'attention_type': 'divided_space_time'},
}
# Fields that must have these values where a config has them, and the feature that other values stand for.
_HF_REQUIRED: dict[str, tuple[tuple[Any, ...], str]] = {
  'attention_type': (('divided_space_time',), 'joint attention or space only'),
  'use_swiglu_ffn': ((False,), 'SwiGLU'),
  'use_gated_mlp': ((False,), 'SwiGLU'),
  'use_absolute_position_embeddings': ((True,), 'no learned positions'),
  'use_relative_position_bias': ((False,), 'relative positions'),
  'use_shared_relative_position_bias': ((False,), 'relative positions'),
  'position_embedding_type': (('absolute', 'learned'), 'positions of another kind'),
  'pos_embed_type': (('absolute', 'learned'), 'positions of another kind'),
  'num_channels': ((3,), 'images that are not RGB'),
  'add_cross_attention': ((False,), 'cross-attention'),
}


def _read_hugging_face(config: dict[str, Any]) -> Settings:
  config = vision_config(config)
  kind = config.get('model_type')
  if kind is not None and kind not in _HF_DEFAULTS:
    _refuse('model_type', kind, tuple(_HF_DEFAULTS))
  stated = {name: value for name, value in config.items() if value is not None}
  values = {**_HF_DEFAULTS.get(str(kind), {}), **stated}
  for name, (allowed, feature) in _HF_REQUIRED.items():
    if name in values and values[name] not in allowed:
      _refuse(name, values[name], allowed, feature)
  if values.get('rope_theta') is None and isinstance(values.get('rope_parameters'), dict):
    values['rope_theta'] = values['rope_parameters'].get('rope_theta')
  eps = values.get('layer_norm_eps')
  return Settings(
    heads=_integer('num_attention_heads', values.get('num_attention_heads')) if kind else None,
    layer_norm_eps=_epsilon('layer_norm_eps', eps),
    activation=_activation('hidden_act', values.get('hidden_act')),
    rotary_theta=float(values.get('rope_theta') or 0),
    head_reason='its head reads the mean of the patches'
    if values.get('use_mean_pooling') and 'beit' in str(kind)
    else '',
  )


# timm: an architecture's name implies settings that its config.json leaves out. First match, by field.
_TIMM_REFUSED = (
  (r'_rope_|^vit_pe_|lingbot|^eva02', 'rotary positions of another kind'),
  (r'_rpn_', 'norms behind attention and MLP'),
  (r'_relpos_|_srelpos_', 'relative positions'),
  (r'_mci_|_r\d+_|_resnet\d+', 'a patch embedding that is not linear'),
)
_TIMM_HEADS = (
  (r'_(base|huge)_patch\d+_gap_', 16),
  (r'_base_patch\d+_plus_', 14),
  (r'_giant_patch14_(dinov2|reg\d_)|_giant_patch16_radio', 24),
  (r'_huge_plus_', 20),
  (r'_d?wee_|_xsmall_', 4),
  (r'_d?little_', 5),
  (r'_tiny_', 3),
  (r'_small_', 6),
  (r'_mediumd?_', 8),
  (r'_betwixt_', 10),
  (r'_so150m2_', 13),
  (r'_so150m_', 14),
  (r'_base_', 12),
  (r'_(large|huge|so400m|giant|gigantic|giantopt|intern300m)_', 16),
)
_TIMM_ACTIVATIONS = (
  (r'quickgelu', 'quick_gelu'),
  (r'_(base_patch32|giantopt_patch16|so400m_patch16)_siglip|_large_patch16_siglip(_gap)?_512', 'gelu_tanh'),
)
_TIMM_POOLS = ((r'_gap(_|$)|_dinov3|^beit|^eva_(?!.*_clip_)', 'avg'), (r'_siglip|_map_', 'map'))
# Arguments that tensors and their shapes show, or that have no effect in evaluation.
_TIMM_SHOWN = re.compile(
  r'(img|patch)_size|embed_dim|depth|mlp_ratio|num_classes|(qkv|proj|q|k|v)_bias(_separate|_fused)?|qkv_fused|init_values|'
  r'class_token|no_embed_class|(num_)?reg_tokens|pre_norm|(use_)?fc_norm|dynamic_img_size|.*drop.*|weight_init|fix_init|'
  r'num_heads|act_layer|global_pool|rope_temperature|norm_eps|use_abs_pos_emb|strict_img_size|pretrained.*'
)
_TIMM_REQUIRED: dict[str, tuple[tuple[Any, ...], str]] = {
  'in_chans': ((3,), 'images that are not RGB'),
  'qk_norm': ((False, None), 'query and key norms'),
  'scale_attn_norm': ((False, None), 'norms inside attention or MLP'),
  'scale_mlp_norm': ((False, None), 'norms inside attention or MLP'),
  'swiglu_mlp': ((False, None), 'SwiGLU'),
  'use_post_norm': ((False, None), 'norms behind attention and MLP'),
  'pos_embed': (('learn', None), 'positions of another kind'),
  'rope_type': (('dinov3',), 'rotary positions of another kind'),
  'rope_rotate_half': ((True,), 'rotary positions of another kind'),
  'use_rot_pos_emb': ((True,), 'no rotary positions'),
  'norm_layer': ((None, 'layernorm', 'LayerNorm'), 'norms of another kind'),
  'final_norm': ((True,), 'no last norm'),
  'pool_include_prefix': ((False, None), 'pooling over all tokens'),
  'dynamic_img_pad': ((False, None), 'padded images'),
}


def _read_timm(config: dict[str, Any]) -> Settings:
  architecture = config['architecture']
  arguments = config.get('model_args')
  arguments = {k: v for k, v in arguments.items() if v is not None} if isinstance(arguments, dict) else {}
  if feature := _first(_TIMM_REFUSED, architecture):
    raise UserError(
      f'config.json of the weights has architecture = {architecture!r}, which has {feature}: use other weights'
    )
  for name, value in arguments.items():
    allowed, feature = _TIMM_REQUIRED.get(name, ((), ''))
    if value not in allowed and not _TIMM_SHOWN.fullmatch(name):
      _refuse(f'model_args.{name}', value, allowed, feature)
  rotary = '_dinov3' in architecture
  pool = arguments.get('global_pool', config.get('global_pool', _first(_TIMM_POOLS, architecture) or 'token'))
  large_eps = re.search(r'^vit_.*_clip_|_dinov3|^beit3', architecture)
  return Settings(
    heads=_integer('model_args.num_heads', arguments.get('num_heads')) or _first(_TIMM_HEADS, architecture),
    layer_norm_eps=float(arguments.get('norm_eps') or (1e-5 if large_eps else 1e-6)),
    activation=_activation(
      'model_args.act_layer', arguments.get('act_layer') or _first(_TIMM_ACTIVATIONS, architecture) or 'gelu'
    ),
    rotary_theta=float(arguments.get('rope_temperature') or 100) if rotary else 0.0,
    head_reason='' if pool == 'token' else f'its head reads another mean of the tokens (global_pool={pool})',
  )


_OPEN_CLIP_REFUSED = {
  'timm_model_name': 'an encoder of timm: save it with the names of timm',
  'attentional_pool': 'attention pooling',
  'input_patchnorm': 'a norm before the patch embedding',
  'no_ln_pre': 'no norm after the embedding',
  'qk_norm': 'query and key norms',
  'global_average_pool': 'mean pooling',
}


def _read_open_clip(config: dict[str, Any]) -> Settings:
  """Reads `model_cfg` of open_clip_config.json."""
  vision = config.get('vision_cfg')
  vision = vision if isinstance(vision, dict) else {}
  for name, feature in _OPEN_CLIP_REFUSED.items():
    if vision.get(name):
      _refuse(f'vision_cfg.{name}', vision[name], (), feature)
  if vision.get('pool_type', 'tok') != 'tok':
    _refuse('vision_cfg.pool_type', vision['pool_type'], ('tok',))
  if vision.get('pos_embed_type', 'learnable') != 'learnable':
    _refuse('vision_cfg.pos_embed_type', vision['pos_embed_type'], ('learnable',), 'positions of another kind')
  width, head_width = vision.get('width', 768), vision.get('head_width', 64)
  norm, act = ({} if not isinstance(vision.get(name), dict) else vision[name] for name in ('norm_kwargs', 'act_kwargs'))
  tanh = act.get('approximate') == 'tanh'
  return Settings(
    heads=width // head_width,
    layer_norm_eps=float(norm.get('eps', 1e-5)),
    activation='quick_gelu' if config.get('quick_gelu') else 'gelu_tanh' if tanh else 'gelu',
  )


def _first(table: tuple[tuple[str, Any], ...], name: str) -> Any:
  return next((value for pattern, value in table if re.search(pattern, name)), None)


def _activation(field: str, name: Any) -> str | None:
  if name is None:
    return None
  if name not in _ACTIVATIONS:
    _refuse(field, name, tuple(_ACTIVATIONS))
  return _ACTIVATIONS[name]


def _epsilon(field: str, value: Any) -> float | None:
  if value is not None and not (type(value) in (int, float) and 0 <= value < 1):
    raise UserError(f'config.json of the weights has {field} = {value!r}, which is not in [0, 1)')
  return None if value is None else float(value)


def _integer(field: str, value: Any) -> int | None:
  if value is not None and not (type(value) is int and value > 0):
    raise UserError(f'config.json of the weights has {field} = {value!r}, which is not a positive integer')
  return value


def _refuse(field: str, value: Any, allowed: tuple[Any, ...], feature: str = '') -> None:
  supported = f'; only {" or ".join(map(repr, allowed))} is supported' if allowed else ', which is not supported'
  raise UserError(f'config.json of the weights has {field} = {value!r}{f" ({feature})" if feature else ""}{supported}')
