"""Exporting weights: a space-only MEViT as a ViT of timm or Hugging Face, a TimeSformer as one of Hugging Face."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mevit_jax.config.data import Normalization
from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.files import new_folder, write_json
from mevit_jax.models.functional import Params
from mevit_jax.pretrained import hf_vit, timesformer, timm_vit
from mevit_jax.pretrained.files import write_safetensors
from mevit_jax.pretrained.formats import CheckpointFormat
from mevit_jax.pretrained.source import unstack_blocks

_WEIGHTS = 'model.safetensors'
Library = Literal['timm', 'hf_vit', 'hf_timesformer']
# Format of each library, and the prefix of all names but the head's.
_FORMATS = {
  'timm': (timm_vit.TIMM, ''),
  'hf_vit': (hf_vit.HF_VIT, 'vit.'),
  'hf_timesformer': (timesformer.HF, 'timesformer.'),
}


def export(
  folder: str | Path,
  params: Params,
  config: MEViTConfig,
  to: Library,
  *,
  class_names: Sequence[str],
  normalization: Normalization,
) -> Path:
  """Writes `model.safetensors` and the library's configs; the library computes the same logits from them.

  Args:
    folder: folder to write, new or empty.
    params: parameters of a model with this config.
    config: config of the model.
    to: library and model to export to.
    class_names: names of the classes.
    normalization: pixel normalization that the model was trained with.

  Returns:
    The path of the weights.

  Raises:
    UserError: the library's model cannot represent this one, or the folder is not empty or cannot be written.
  """
  folder = Path(folder).expanduser()
  _CHECKS[to](config)
  arrays, _ = unstack_blocks(params)
  if 'frame_tokens' in arrays:  # instead of the class token
    arrays['class_token'], arrays['class_position'] = arrays['frame_tokens'][0], 0 * arrays.pop('frame_tokens')[0]
  if to != 'hf_timesformer':
    arrays['embedding/space'] = arrays['embedding/space'] + _constant_position(arrays.pop('embedding/time'))
  checkpoint_format, prefix = _FORMATS[to]
  tensors = _to_tensors(checkpoint_format, prefix, arrays, config.depth)
  with new_folder(folder) as temporary:
    write_safetensors(temporary / _WEIGHTS, tensors, metadata={'format': 'pt'})
    for name, content in _configs(to, config, class_names, normalization).items():
      write_json(temporary / name, content)
  return folder / _WEIGHTS


def _to_tensors(
  checkpoint_format: CheckpointFormat, prefix: str, arrays: dict[str, np.ndarray], depth: int
) -> dict[str, np.ndarray]:
  """Returns tensor name in the format -> tensor; every array is used."""
  tensors, used = {}, set[str]()
  for tensor_names, param_names, transform in checkpoint_format.mappings(depth):
    if not all(name in arrays for name in param_names):  # an optional feature, such as registers
      continue
    results = transform.inverse(tuple(np.asarray(arrays[name], np.float32) for name in param_names))
    used.update(param_names)
    for name, tensor in zip(tensor_names, results, strict=True):
      if tensor is None:  # an extra that the parameters do not need, such as LayerScale
        continue
      tensors[name if name.startswith('classifier.') else prefix + name] = np.ascontiguousarray(tensor)
  assert set(arrays) <= used, f'{checkpoint_format.name} has no tensor for {sorted(set(arrays) - used)}'
  return tensors


def _constant_position(times: np.ndarray) -> np.ndarray:
  """Returns the time position that all frames share; a ViT has none, so it is added to the space positions."""
  if np.any(times != times[:1]):
    raise UserError('embedding/time differs between frames, which a ViT cannot represent: use --to=mevit or stablehlo')
  return times[0]


def _check_features(config: MEViTConfig, frame_tokens: tuple[int, ...]) -> None:
  allowed = {
    'activation': ('gelu',),
    'pre_norm': (False,),
    'rotary_theta': (0.0,),
    'frame_tokens': frame_tokens,
    'space_encoder': (False,),
  }
  for name, values in allowed.items():
    if getattr(config, name) not in values:
      raise UserError(
        f'model.{name} is {getattr(config, name)}, and the exported model has {" or ".join(map(str, values))}: '
        'use --to=mevit or stablehlo'
      )


def _check_vit(config: MEViTConfig) -> None:
  _check_features(config, frame_tokens=(0, 1))
  if config.motion_blocks or config.class_blocks:
    raise UserError(
      f'this model has {config.motion_blocks} motion and {config.class_blocks} class blocks, '
      'and a ViT has only space blocks: use --to=mevit or stablehlo'
    )


def _check_timm(config: MEViTConfig) -> None:
  _check_vit(config)
  if config.layer_norm_eps != 1e-6:
    raise UserError(f'model.layer_norm_eps is {config.layer_norm_eps:g} and timm has 1e-6: use --to=hf_vit')


def _check_timesformer(config: MEViTConfig) -> None:
  _check_features(config, frame_tokens=(0,))
  required = {
    'space_blocks': 0,
    'class_blocks': 0,
    'block_size': 1,
    'attention_order': 'time_space',
    'class_token_in_motion': False,
  }
  problems = [
    f'{name} is {getattr(config, name)} instead of {value}'
    for name, value in required.items()
    if getattr(config, name) != value
  ]
  for name in ('image_size', 'patch_size'):
    height, width = getattr(config, name)
    if height != width:
      problems.append(f'{name} {height}x{width} is not square')
  if problems:
    raise UserError(f'this model is not a TimeSformer: {"; ".join(problems)}')


_CHECKS = {'timm': _check_timm, 'hf_vit': _check_vit, 'hf_timesformer': _check_timesformer}


def _configs(
  to: Library, config: MEViTConfig, class_names: Sequence[str], normalization: Normalization
) -> dict[str, dict[str, Any]]:
  """Returns file name -> content of the configs beside the weights."""
  if to == 'timm':
    return {'config.json': _timm_config(config, class_names, normalization)}
  height, width = config.image_size
  preprocessor = {
    'image_processor_type': 'ViTImageProcessor' if to == 'hf_vit' else 'VideoMAEImageProcessor',
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': list(normalization.mean),
    'image_std': list(normalization.std),
    'do_resize': True,
    'resample': 2,
    'size': {'height': height, 'width': width} if to == 'hf_vit' else {'shortest_edge': min(height, width)},
  }
  if to == 'hf_timesformer':
    preprocessor |= {'do_center_crop': True, 'crop_size': {'height': height, 'width': width}}
  return {'config.json': _hf_config(to, config, class_names), 'preprocessor_config.json': preprocessor}


def _hf_config(to: Library, config: MEViTConfig, class_names: Sequence[str]) -> dict[str, Any]:
  model: dict[str, Any] = {
    'hf_vit': {'model_type': 'vit', 'architectures': ['ViTForImageClassification']},
    'hf_timesformer': {
      'model_type': 'timesformer',
      'architectures': ['TimesformerForVideoClassification'],
      'attention_type': 'divided_space_time',
      'num_frames': config.frames,
    },
  }
  return {
    **model[to],
    'image_size': _side(config.image_size),
    'patch_size': _side(config.patch_size),
    'num_channels': 3,
    'hidden_size': config.width,
    'num_hidden_layers': config.depth,
    'num_attention_heads': config.heads,
    'intermediate_size': config.mlp_dim,
    'hidden_act': 'gelu',
    'layer_norm_eps': config.layer_norm_eps,
    'qkv_bias': True,
    'hidden_dropout_prob': 0.0,
    'attention_probs_dropout_prob': 0.0,
    'id2label': {str(i): name for i, name in enumerate(class_names)},
    'label2id': {name: i for i, name in enumerate(class_names)},
  }


def _timm_config(config: MEViTConfig, class_names: Sequence[str], normalization: Normalization) -> dict[str, Any]:
  return {
    'architecture': 'vit_base_patch16_224',
    'num_classes': config.classes,
    'num_features': config.width,
    'model_args': {
      'img_size': _side(config.image_size),
      'patch_size': _side(config.patch_size),
      'embed_dim': config.width,
      'depth': config.depth,
      'num_heads': config.heads,
      'mlp_ratio': config.mlp_dim / config.width,
    },
    'pretrained_cfg': {
      'input_size': [3, *config.image_size],
      'num_classes': config.classes,
      'mean': list(normalization.mean),
      'std': list(normalization.std),
      'label_names': list(class_names),
    },
  }


def _side(sides: tuple[int, ...]) -> int | list[int]:
  return sides[0] if sides[0] == sides[1] else list(sides)
