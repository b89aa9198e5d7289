"""Small models with random params for tests of MEViT."""

import dataclasses
import functools

import jax

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.functional import build_model
from tests.helpers.naive import random_params, random_video

TINY = MEViTConfig(
  classes=5,
  frames=2,
  image_size=(3, 2),
  patch_size=1,
  width=8,
  heads=2,
  mlp_dim=16,
  space_blocks=1,
  motion_blocks=1,
  class_blocks=1,
  dtype='float32',
)


@functools.cache
def case(**fields):
  """Builds a model, random params and a video; equal abstract params give equal params."""
  model = build_model(dataclasses.replace(TINY, **fields))
  return model, random_params(model), random_video(model.config)


def edited(params, path, change):
  """Applies `change` to the params at a path, which can be a subtree."""
  name, _, rest = path.partition('/')
  new = edited(params[name], rest, change) if rest else jax.tree.map(change, params[name])
  return {**params, name: new}
