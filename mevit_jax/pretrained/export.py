"""Weights out again: a space-only MEViT as a ViT of timm or Hugging Face, a TimeSformer as Hugging Face's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from mevit_jax.config.data import Normalization
from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.files import new_folder
from mevit_jax.models.functional import Params
from mevit_jax.pretrained import timesformer, vit
from mevit_jax.pretrained.source import unstack_blocks
from mevit_jax.pretrained.transforms import CheckpointFormat

_WEIGHTS = 'model.safetensors'
Library = Literal['timm', 'hf_vit', 'hf_timesformer']
# Each library's page, and what Hugging Face writes before all names but the head's.
_PAGES = {
  'timm': (vit.TIMM, ''),
  'hf_vit': (vit.HF, 'vit.'),
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
  """Writes `model.safetensors` and the configs beside it; the other library computes the same logits from them.

  Args:
    folder: where to; made if it is not there.
    params: of a model with this config.
    config: of the model.
    to: the library, and in Hugging Face's the model.
    class_names: of the head.
    normalization: pixel mean and standard deviation of training.

  Returns:
    The path of the weights.

  Raises:
    UserError: the library's model is not this one (the line says in what), or the folder is not empty, or cannot be
      written.
  """
  folder = Path(folder).expanduser()
  _CHECKS[to](config)
  arrays, _ = unstack_blocks(params)
  if to != 'hf_timesformer':
    arrays['embedding/space'] = arrays['embedding/space'] + _still(arrays.pop('embedding/time'))
  page, prefix = _PAGES[to]
  tensors = _theirs(page, prefix, arrays, config.depth)
  with new_folder(folder) as aside:
    save_file(tensors, aside / _WEIGHTS, metadata={'format': 'pt'})
    for name, content in _configs(to, config, class_names, normalization).items():
      (aside / name).write_text(json.dumps(content, indent=2) + '\n')
  return folder / _WEIGHTS


def _theirs(page: CheckpointFormat, prefix: str, arrays: dict[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
  """The arrays under their names; every array of ours has one."""
  tensors, written = {}, set[str]()
  for theirs, ours, change in page.pairs(depth):
    out = change.out(tuple(np.asarray(arrays[name], np.float32) for name in ours))
    written.update(ours)
    for name, array in zip(theirs, out, strict=True):
      full = name if name.startswith('classifier.') else f'{prefix}{name}'
      tensors[full] = np.ascontiguousarray(array)
  left = set(arrays) - written
  assert not left, f'{page.name} has no place for {sorted(left)}'
  return tensors


def _still(times: np.ndarray) -> np.ndarray:
  """The one position in time of all frames: a ViT knows no time, but adds this to its other positions."""
  if np.any(times != times[:1]):
    raise UserError('this model has learned where in time a frame is (embedding/time): a ViT cannot hold that')
  return times[0]


def _check_vit(config: MEViTConfig) -> None:
  if config.motion_blocks or config.class_blocks:
    raise UserError(
      'a ViT has space blocks only; this model has '
      f'{config.motion_blocks} motion and {config.class_blocks} class blocks'
    )


def _check_timm(config: MEViTConfig) -> None:
  _check_vit(config)
  if config.layer_norm_eps != 1e-6:
    raise UserError(f"timm's LayerNorms have an eps of 1e-6, this model's {config.layer_norm_eps:g}: --to=hf_vit")


def _check_timesformer(config: MEViTConfig) -> None:
  wanted = {
    'space_blocks': 0, 'class_blocks': 0, 'block_size': 1, 'order': 'time_space', 'class_token_in_motion': False,
  }  # fmt: skip
  wrong = [f'{name} {getattr(config, name)}, not {value}' for name, value in wanted.items()
           if getattr(config, name) != value]  # fmt: skip
  for name in ('image_size', 'patch_size'):
    height, width = getattr(config, name)
    if height != width:
      wrong.append(f'{name} {height}x{width}, which is no square')
  if wrong:
    raise UserError(f'this model is no TimeSformer: it has {"; ".join(wrong)}')


_CHECKS = {'timm': _check_timm, 'hf_vit': _check_vit, 'hf_timesformer': _check_timesformer}


def _configs(
  to: Library, config: MEViTConfig, class_names: Sequence[str], normalization: Normalization
) -> dict[str, dict[str, Any]]:
  """The files beside the weights."""
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
  kind: dict[str, Any] = {
    'hf_vit': {'model_type': 'vit', 'architectures': ['ViTForImageClassification']},
    'hf_timesformer': {
      'model_type': 'timesformer',
      'architectures': ['TimesformerForVideoClassification'],
      'attention_type': 'divided_space_time',
      'num_frames': config.frames,
    },
  }
  return {
    **kind[to],
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
