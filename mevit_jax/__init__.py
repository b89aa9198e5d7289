"""MEViT-JAX: train, evaluate and use Motion Enhanced Video Transformers."""

import importlib
from typing import Any

__version__ = '0.1.0'

_EXPORTS = {
  'MEViTConfig': 'mevit_jax.config.model',
  'Prediction': 'mevit_jax.inference.predictor',
  'Predictor': 'mevit_jax.inference.predictor',
  'UserError': 'mevit_jax.errors',
  'build_model': 'mevit_jax.models.functional',
}
__all__ = ['MEViTConfig', 'Prediction', 'Predictor', 'UserError', 'build_model']


def __getattr__(name: str) -> Any:
  # Lazy: importing one submodule (in a data worker, say) imports no other.
  if name in _EXPORTS:
    return getattr(importlib.import_module(_EXPORTS[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
