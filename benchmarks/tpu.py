"""Estimated cost of the gradients of a training step on a TPU: compiler cycles, compared with the matmul lower bound.

  python -m benchmarks.tpu                                         # B/16, 8 frames, space 4, motion 8, M = 2, one v5e
  python -m benchmarks.tpu --chip=v5e,v5p,v6e --attention=auto,plain
  python -m benchmarks.tpu --block_size=1,2,7,14 --blocks=4+8,12+0
  python -m benchmarks.tpu --attention=auto --remat=none,block --json=tpu.json

Needs libtpu (pip install libtpu), on any Linux machine, no TPU; a row takes minutes. Cross-entropy
loss, bfloat16 clips, float32 parameters, all blocks unrolled; gradients only, no optimizer, one chip.

Columns: 'mcycles' is the sum of the compiler's estimates of all instructions plus our Pallas kernels, for which the
compiler has no estimate: they count as the larger of tile-padded arithmetic at peak rate and memory traffic at peak
bandwidth, divided by 0.6. 'doubled' is the total with kernels counted twice. 'share' is the cycles of the model's
matrix products by formula (three forward passes) divided by mcycles: 1 means nothing but matrix products.
'compile_cpu_s' is the CPU time of tracing and compiling, over all cores.
"""

import importlib.metadata
import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from mevit_jax.cli import command
from mevit_jax.config.model import MEViTConfig, count_flops, variant
from mevit_jax.errors import UserError
from mevit_jax.files import write_json
from mevit_jax.models.functional import build_model
from mevit_jax.planning import chips
from mevit_jax.planning.environment import prepare_process
from mevit_jax.planning.estimate import StepPlan, plan_step

_CHIP = flags.DEFINE_list('chip', ['v5e'], 'Chips: v5e, v5p, v6e.')
_MODEL = flags.DEFINE_string('model', 'B/16', 'ViT variant.')
_BLOCKS = flags.DEFINE_list('blocks', ['4+8'], 'Number of blocks per stage: space+motion, or space+motion+class.')
_BLOCK_SIZE = flags.DEFINE_list('block_size', ['2'], 'Block sizes M.')
_FRAMES = flags.DEFINE_list('frames', ['8'], 'Frames per clip.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Clips per batch.', lower_bound=1)
_ATTENTION = flags.DEFINE_list('attention', ['auto'], "Attention implementations: 'auto', 'plain'.")
_REMAT = flags.DEFINE_list('remat', ['none'], "Rematerialization: 'none', 'block', 'residuals'.")
_JSON = flags.DEFINE_string('json', '', 'JSON file to write the results to.')

# The smallest topologies that libtpu supports; the step is compiled for the first chip.
_SMALLEST = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
_CLASSES = 400
_COLUMNS = (
  ('chip', 6, ''), ('frames', 6, ''), ('blocks', 7, ''), ('M', 3, ''), ('attention', 9, ''), ('remat', 9, ''),
  ('mcycles', 8, '.1f'), ('doubled', 8, '.1f'), ('kernels', 8, '.1f'), ('share', 6, '.3f'), ('ms', 6, '.1f'),
  ('temp_gib', 8, '.2f'), ('moved_gib', 9, '.1f'), ('compile_cpu_s', 13, '.0f'),
)  # fmt: skip


def lower_gradients(config: MEViTConfig, batch: int, device: jax.Device) -> jax.stages.Lowered:
  """Lowers the gradients of the loss of a batch with respect to all parameters for a device."""
  model = build_model(config)
  sharding = jax.sharding.SingleDeviceSharding(device)

  def loss(params, video: jax.Array, label: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, video), label).mean()

  video = jax.ShapeDtypeStruct((batch, config.frames, *config.image_size, 3), jnp.bfloat16)
  label = jax.ShapeDtypeStruct((batch,), jnp.int32)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (model.abstract, video, label)
  )
  return jax.jit(jax.grad(loss)).lower(*shapes)


def estimate(config: MEViTConfig, batch: int, chip: str) -> StepPlan:
  """Compiles the gradients for a chip and estimates their cost."""
  if chip not in _SMALLEST:
    raise UserError(f'--chip {chip!r} is not one of {", ".join(_SMALLEST)}')
  topology = chips.parse(_SMALLEST[chip])
  device = chips.devices_of(topology)[0]
  mesh = jax.sharding.Mesh(np.array([device]), ('x',))
  return plan_step(lower_gradients(config, batch, device), topology, mesh, {}, 3 * batch * count_flops(config))


def figures(step: StepPlan, chip: chips.Chip) -> dict[str, float]:
  """Returns the numbers of a row; cycles in millions."""
  total, kernels = sum(step.cycles.values()) / 1e6, step.cycles.get('kernels', 0) / 1e6
  floor = step.flops / chip.flops * chip.clock / 1e6
  return {
    'mcycles': total, 'doubled': total + kernels, 'kernels': kernels, 'floor': floor, 'share': floor / total,
    'ms': total / chip.clock * 1e9, 'temp_gib': step.memory['temporaries'] / 2**30,
    'moved_gib': step.bytes_accessed / 2**30,
    **{f'cycles of {name}': n / 1e6 for name, n in step.cycles.items()},
  }  # fmt: skip


def main(argv: Sequence[str]) -> None:
  """Compiles every combination of the flags and prints a row for each."""
  command.no_arguments(argv)
  prepare_process('benchmarks.tpu')
  rows: list[dict[str, Any]] = []
  print(f'{_MODEL.value}, batch {_BATCH.value}, gradients only, one chip; jax {jax.__version__}, '
        f'libtpu {importlib.metadata.version("libtpu")}')  # fmt: skip
  print(' '.join(f'{name:>{width}}' for name, width, _ in _COLUMNS), flush=True)
  settings = (_CHIP, _FRAMES, _BLOCKS, _BLOCK_SIZE, _ATTENTION, _REMAT)
  for chip, frames, blocks, size, attention, remat in itertools.product(*(flag.value for flag in settings)):
    config = _config(frames, blocks, size, attention, remat)
    row = {'chip': chip, 'frames': frames, 'blocks': blocks, 'M': size, 'attention': attention, 'remat': remat}
    start = time.process_time()
    step = estimate(config, _BATCH.value, chip)
    row |= figures(step, chips.CHIPS[chip]) if step.memory else {'temp_gib': step.needed / 2**30}
    row['compile_cpu_s'] = time.process_time() - start
    if step.unknown_loops:
      raise UserError(f'{step.unknown_loops} loops do not say how often they run: the sum would be too small')
    cells = (f'{row[name]:>{width}{form}}' if name in row else f'{"-":>{width}}' for name, width, form in _COLUMNS)
    print(' '.join(cells) + ('' if step.memory else '  does not fit'), flush=True)
    rows.append(row)
  if _JSON.value:
    write_json(_JSON.value, rows)


def _config(frames: str, blocks: str, size: str, attention: str, remat: str) -> MEViTConfig:
  stages = [int(count) for count in blocks.split('+')]
  names = ('space_blocks', 'motion_blocks', 'class_blocks')
  sizes = {name: value for name, value in variant(_MODEL.value).items() if name != 'depth'}
  return MEViTConfig(
    classes=_CLASSES, frames=int(frames), block_size=int(size), attention=attention, remat=remat,
    **sizes, **dict(zip(names, stages + [0] * (3 - len(stages)), strict=True)),
  )  # fmt: skip


if __name__ == '__main__':
  command.run(main)
