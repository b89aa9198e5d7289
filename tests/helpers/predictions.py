"""Random predictions of an evaluation."""

import numpy as np

from mevit_jax.evaluation.protocol import Predictions


def predictions(videos=300, classes=12, views=2, seed=0, skill=2.0, unreadable=(), unlabeled=()):
  """Builds random predictions with the same labels for every seed; classes come in pairs that are often confused."""
  labels = np.random.default_rng(7).integers(0, classes, videos)
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(videos, views, classes))
  logits[np.arange(videos), :, labels] += skill
  logits[np.arange(videos), :, labels ^ 1] += 0.8 * skill
  errors = np.full(videos, '', dtype='U20')
  errors[list(unreadable)] = 'it is <empty> & gone'
  logits[list(unreadable)] = 0
  labels[list(unlabeled)] = -1
  ids = np.asarray([f'split/{i:04d}' for i in range(videos)])
  return Predictions(ids, labels, logits.astype(np.float32), errors)


ABOUT = {
  'protocol': {'name': 'validation-2x1', 'split': 'validation', 'clips': 2, 'crops': 1, 'average': 'probabilities'},
  'clip': {'frames': 8, 'sampling': 'dense'},
  'preprocessing': {'size': (16, 16)},
  'dataset': {'name': 'made_up', 'split': 'validation', 'fingerprint': 'f' * 64},
  'checkpoint': {'step': 60, 'weights': 'ema'},
  'versions': {'jax': '0'},
}
