"""A model in one file that runs without this package: StableHLO by jax.export, params and preprocessing inside."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export

from mevit_jax.augment.clip import normalize
from mevit_jax.config.data import Normalization
from mevit_jax.config.experiment import Config
from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.files import new_folder
from mevit_jax.models.functional import Params, build_model
from mevit_jax.video.clips import RATE

ARTEFACT, ABOUT = 'model.jax_export', 'model.json'
PLATFORMS = ('cpu', 'cuda', 'tpu')
# How it computes, whatever the model was trained with: as exactly as float32 can on every platform. The blocks are a
# loop: on a CPU it is as fast as all of them in a row, and compiled in two thirds of the time and memory.
_COMPUTES: dict[str, Any] = {'dtype': 'float32', 'attention': 'plain', 'unroll': 1, 'remat': 'none'}
_PRECISION = 'highest'
_LARGEST = 2**31 - 2**24  # bytes: flatbuffers end at 2 GiB, and the code wants room


class Start(NamedTuple):
  """Seconds of a new process's first steps with an artefact: reading it, its first answer (compiling), its second."""

  read: float
  first: float
  second: float


def make_artefact(params: Params, config: MEViTConfig, normalization: Normalization) -> export.Exported:
  """What an artefact holds: frames uint8 `b t h w 3` of the model's size -> probabilities float32 `b classes`, any `b`.

  Args:
    params: of a model with this config.
    config: of the model; it computes in float32, whatever its dtype.
    normalization: pixel mean and standard deviation of training.

  Raises:
    UserError: the params are larger than an artefact can be.
  """
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  if size > _LARGEST:
    raise UserError(f'the parameters are {size / 1e9:.1f} GB, and an artefact holds 2.1 at most: take --to=mevit')
  config = dataclasses.replace(config, **_COMPUTES)
  model = build_model(config)

  def predict(video: jax.Array) -> jax.Array:
    return jax.nn.softmax(model.apply(params, normalize(video, normalization, config.dtype)))  # b classes

  (b,) = export.symbolic_shape('b')
  video = jax.ShapeDtypeStruct((b, config.frames, *config.image_size, 3), np.uint8)
  with jax.default_matmul_precision(_PRECISION):
    return export.export(jax.jit(predict), platforms=PLATFORMS)(video)


def write_artefact(
  folder: Path,
  params: Params,
  config: Config,
  about: dict[str, Any],
) -> Path:
  """Writes an artefact, and beside it a JSON that says what it takes and gives; returns the artefact's path.

  Args:
    folder: new, or empty.
    params: of the model.
    config: config of the experiment.
    normalization: pixel mean and standard deviation of training.
    about: what else the JSON holds: class names, where the params are from.

  Raises:
    UserError: the params are too large, or the folder is not empty, or cannot be written.
  """
  with new_folder(folder) as aside:
    exported = make_artefact(params, config.model, config.data.normalization)
    (aside / ARTEFACT).write_bytes(exported.serialize())
    described = {**_describe(exported, config), **about}
    (aside / ABOUT).write_text(json.dumps(described, indent=2) + '\n')
  return folder / ARTEFACT


def time_start(path: Path) -> Start:
  """How fast an artefact is ready on this machine's default device, with one clip at a time."""
  times = [time.perf_counter()]
  exported = export.deserialize(bytearray(path.read_bytes()))
  times.append(time.perf_counter())
  for _ in range(2):
    np.asarray(exported.call(np.zeros((1, *exported.in_avals[0].shape[1:]), np.uint8)))
    times.append(time.perf_counter())
  return Start(*np.diff(times).tolist())


def _describe(exported: export.Exported, config: Config) -> dict[str, Any]:
  """What an artefact takes, does and gives, and what must be done before."""
  clip, evaluation, (mean, std) = config.clip, config.evaluation, config.data.normalization
  video, probabilities = exported.in_avals[0], exported.out_avals[0]
  dense = {'stride': clip.stride, 'rate': RATE} if clip.sampling == 'dense' else {}
  return {
    'input': {'axes': 'b t h w 3', 'shape': _shape(video), 'dtype': str(video.dtype), 'pixels': 'RGB, 0 to 255'},
    'output': {'axes': 'b classes', 'shape': _shape(probabilities), 'dtype': str(probabilities.dtype)},
    'before': {  # docs/export.md says it in words
      'frames': {'sampling': clip.sampling, 'frames': clip.frames, **dense},
      'crop': {'size': clip.size, 'resize': 'the frame just covers it', 'filter': 'bilinear, antialiased'},
      'views': {'clips': evaluation.clips, 'crops': evaluation.crops, 'average': evaluation.average},
    },
    'inside': {'mean': mean, 'std': std, 'dtype': _COMPUTES['dtype'], 'matmul_precision': _PRECISION},
    'platforms': exported.platforms,
    'jax_export': {
      'calling_convention_version': exported.calling_convention_version,
      'runs_with': 'JAX from 3 weeks older to 6 months newer than versions.jax, as jax.export promises',
    },
  }


def _shape(aval: jax.core.ShapedArray) -> list[int | str]:
  return [side if isinstance(side, int) else str(side) for side in aval.shape]
