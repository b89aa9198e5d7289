"""StableHLO export: a model in one file that runs without this package, with its parameters and normalization."""

import dataclasses
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
from mevit_jax.files import new_folder, write_json
from mevit_jax.models.functional import Params, build_model
from mevit_jax.video.clips import RATE

MODEL_FILE, METADATA_FILE = 'model.jax_export', 'model.json'
PLATFORMS = ('cpu', 'cuda', 'tpu')
# Execution fields of every exported model: full float32 precision on all platforms. The blocks are a loop, which is as
# fast on CPUs as unrolled blocks, and needs two thirds of the time and memory to compile.
_EXECUTION: dict[str, Any] = {'dtype': 'float32', 'attention': 'plain', 'unroll': 1, 'remat': 'none'}
_PRECISION = 'highest'
_MAX_BYTES = 2**31 - 2**24  # flatbuffers are limited to 2 GiB, of which the program needs a part


class StartupTimes(NamedTuple):
  """Seconds that an exported model needs to be read, for its first call (with compilation), and for its second call."""

  read: float
  first_call: float
  second_call: float


def export_model(params: Params, config: MEViTConfig, normalization: Normalization) -> export.Exported:
  """Exports frames uint8 `b t h w 3` of the model's size -> probabilities float32 `b classes`, for any `b`.

  Args:
    params: parameters of a model with this config.
    config: config of the model; the export computes in float32, whatever its dtype.
    normalization: pixel normalization that the model was trained with.

  Raises:
    UserError: the parameters are too large for a StableHLO export.
  """
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  if size > _MAX_BYTES:
    raise UserError(f'the parameters have {size / 1e9:.1f} GB, and a StableHLO export at most 2.1 GB: use --to=mevit')
  config = dataclasses.replace(config, **_EXECUTION)
  model = build_model(config)

  def predict(video: jax.Array) -> jax.Array:
    return jax.nn.softmax(model.apply(params, normalize(video, normalization, config.dtype)))  # b classes

  (b,) = export.symbolic_shape('b')
  video = jax.ShapeDtypeStruct((b, config.frames, *config.image_size, 3), np.uint8)
  with jax.default_matmul_precision(_PRECISION):
    return export.export(jax.jit(predict), platforms=PLATFORMS)(video)


def write_model(folder: Path, params: Params, config: Config, metadata: dict[str, Any]) -> Path:
  """Writes an exported model and a JSON file that describes its input and output; returns the model's path.

  Args:
    folder: folder to write, new or empty.
    params: parameters of the model.
    config: config of the experiment.
    metadata: further content of the JSON file: class names, origin of the parameters.

  Raises:
    UserError: the parameters are too large, or the folder is not empty or cannot be written.
  """
  with new_folder(folder) as temporary:
    exported = export_model(params, config.model, config.data.normalization)
    (temporary / MODEL_FILE).write_bytes(exported.serialize())
    write_json(temporary / METADATA_FILE, {**_describe(exported, config), **metadata})
  return folder / MODEL_FILE


def time_startup(path: Path) -> StartupTimes:
  """Measures the startup of an exported model on the default device, with one clip per call."""
  times = [time.perf_counter()]
  exported = export.deserialize(bytearray(path.read_bytes()))
  times.append(time.perf_counter())
  for _ in range(2):
    np.asarray(exported.call(np.zeros((1, *exported.in_avals[0].shape[1:]), np.uint8)))
    times.append(time.perf_counter())
  return StartupTimes(*np.diff(times).tolist())


def _describe(exported: export.Exported, config: Config) -> dict[str, Any]:
  """Returns the description of an exported model: input, output, and the preprocessing that it requires."""
  clip, evaluation, (mean, std) = config.clip, config.evaluation, config.data.normalization
  video, probabilities = exported.in_avals[0], exported.out_avals[0]
  dense = {'stride': clip.stride, 'rate': RATE} if clip.sampling == 'dense' else {}
  return {
    'input': {'axes': 'b t h w 3', 'shape': _shape(video), 'dtype': str(video.dtype), 'pixels': 'RGB, 0 to 255'},
    'output': {'axes': 'b classes', 'shape': _shape(probabilities), 'dtype': str(probabilities.dtype)},
    'preprocessing': {  # explained in docs/export.md
      'frames': {'sampling': clip.sampling, 'frames': clip.frames, **dense},
      'crop': {
        'size': clip.size,
        'resize': 'smallest scale at which the frame covers the crop',
        'filter': 'bilinear, antialiased',
      },
      'views': {'clips': evaluation.clips, 'crops': evaluation.crops, 'average': evaluation.average},
    },
    'model': {'mean': mean, 'std': std, 'dtype': _EXECUTION['dtype'], 'matmul_precision': _PRECISION},
    'platforms': exported.platforms,
    'jax_export': {
      'calling_convention_version': exported.calling_convention_version,
      'compatibility': 'JAX from 3 weeks older to 6 months newer than versions.jax, as jax.export guarantees',
    },
  }


def _shape(aval: jax.core.ShapedArray) -> list[int | str]:
  return [side if isinstance(side, int) else str(side) for side in aval.shape]
