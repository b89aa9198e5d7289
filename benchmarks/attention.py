"""Cost of motion attention alone, forward and backward, compared with other implementations and with a lower bound.

  python -m benchmarks.attention                                   # B/16 at 224x224: M in 1, 2, 3, 7, 14, 8 frames
  python -m benchmarks.attention --block_sizes=1,2 --frames=8,16,32 --batch=4
  taskset -c 0 python -m benchmarks.attention --clock=cpu          # one core of a shared machine

Input and output are `b t n h k` with n in block order, as in our model; what an implementation moves to gather the
patches of a block counts. `ours` is our plain path, `ours cudnn` (on a GPU) attention='cudnn'; `xla` is
softmax(q k / sqrt k) v in plain XLA; `jax dpa` is jax.nn.dot_product_attention (cuDNN on a GPU); `torch sdpa` is
PyTorch's (skipped if torch is not installed). Each is compared with `xla` in float32 at precision HIGHEST before
timing. The lower bound is the larger of two times: the matrix products at peak rate (2 forward, 5 backward), and the
unavoidable memory traffic (4 arrays forward, 8 backward) at peak bandwidth.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

from absl import flags

from benchmarks import timing, torch_baselines
from mevit_jax.cli.command import no_arguments, run
from mevit_jax.errors import UserError

import jax  # isort: skip  # after benchmarks.torch_baselines, which sets how JAX shares a GPU
import jax.numpy as jnp  # isort: skip
import numpy as np  # isort: skip

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.attention import Heads, attend_by_cudnn, motion_attention, motion_groups

WIDTH = 64  # head width


def main(argv: Sequence[str]) -> None:
  """Checks and times all cases and prints a table."""
  no_arguments(argv)
  dtype = timing.parse_dtype()
  batch = flags.FLAGS.batch or (16 if timing.has_gpu() else 1)
  flops, bandwidth = timing.peak_rates(dtype, flags.FLAGS.clock)
  print(
    f'{batch} x {flags.FLAGS.grid}x{flags.FLAGS.grid} patches, {flags.FLAGS.heads} heads, {dtype}; '
    f'{timing.describe_device()}'
  )
  print(f'peak {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s; ms, and speed relative to xla')
  rows = []
  for frames in map(int, flags.FLAGS.frames):
    for block_size in map(int, flags.FLAGS.block_sizes):
      side = flags.FLAGS.grid
      config = MEViTConfig(
        classes=1, frames=frames, image_size=16 * side, width=WIDTH * flags.FLAGS.heads, heads=flags.FLAGS.heads,
        mlp_dim=1, block_size=block_size, dtype=dtype,
      )  # fmt: skip
      rows += measure(config, batch, flops, bandwidth, timing.parse_timing())
  timing.write_results(rows, batch=batch, flops=flops, bandwidth=bandwidth)


def measure(config: MEViTConfig, batch: int, flops: float, bandwidth: float, settings: timing.Timing) -> list[dict]:
  """Returns rows for the lower bound and for each implementation: forward, and forward with backward."""
  forward, both, errors = make_cases(config, batch)
  floors = floor(config, batch, flops, bandwidth)
  label = f't {config.frames:2} M {config.block_size:2}'
  print(f'{label} {"floor":11} forward {1e3 * floors[0]:8.2f}        with backward {1e3 * floors[1]:8.2f}')
  rows = [
    {'frames': config.frames, 'block_size': config.block_size, 'name': 'floor', 'forward': floors[0], 'both': floors[1]}
  ]
  times = timing.time_interleaved(forward, settings), timing.time_interleaved(both, settings)
  for name in forward:
    seconds = [statistics.median(seconds_by_name[name]) for seconds_by_name in times]
    faster = [timing.median_speedup(seconds_by_name, name, 'xla') for seconds_by_name in times]
    print(
      f'{label} {name:11} forward {1e3 * seconds[0]:8.2f} {faster[0]:5.2f}x with backward {1e3 * seconds[1]:8.2f} '
      f'{faster[1]:5.2f}x  error {errors[name]:.1e}',
      flush=True,
    )
    rows.append(
      {**rows[0], 'name': name, 'forward': seconds[0], 'both': seconds[1], 'speedup': faster, 'error': errors[name]}
    )
  return rows


def floor(config: MEViTConfig, batch: int, flops: float, bandwidth: float) -> tuple[float, float]:
  """Returns lower bounds in seconds of forward, and of forward with backward; 0 if the peak rates are unknown."""
  d, size = config.width, jnp.dtype(config.dtype).itemsize
  pairs = batch * sum(nh * nw * (config.frames * mh * mw) ** 2 for nh, nw, mh, mw in config.blocks)
  array = batch * config.frames * config.grid[0] * config.grid[1] * d * size
  if not flops:
    return 0.0, 0.0
  return (
    max(4 * pairs * d / flops, 4 * array / bandwidth),
    max(14 * pairs * d / flops, 12 * array / bandwidth),
  )


def make_cases(config: MEViTConfig, batch: int) -> tuple[dict[str, Callable], dict[str, Callable], dict[str, float]]:
  """Returns the forward and the forward-with-backward functions by name, and their errors."""
  rng = np.random.default_rng(0)
  shape = (batch, config.frames, config.grid[0] * config.grid[1], config.heads, WIDTH)
  arrays = [rng.normal(size=shape).astype(np.float32) for _ in range(4)]  # q, k, v, and the gradient of the output
  with jax.default_matmul_precision('highest'):
    expected = jax.block_until_ready(jax.jit(with_backward(partial(regrouped, textbook, config)))(*arrays))
  implementations = {
    'ours': lambda q, k, v: motion_attention(Heads(q, k, v), None, config)[0],
    'xla': partial(regrouped, textbook, config),
    'jax dpa': partial(regrouped, dot_product_attention, config),
  }
  if timing.has_gpu() and config.dtype == 'bfloat16':
    implementations['ours cudnn'] = lambda q, k, v: motion_attention(Heads(q, k, v), None, config, attend_by_cudnn)[0]
  inputs = [jnp.asarray(x, config.dtype) for x in arrays]
  forward, both, errors = {}, {}, {}
  for name, implementation in implementations.items():
    forward_only = jax.jit(implementation).lower(*inputs[:3]).compile()
    with_gradients = jax.jit(with_backward(implementation)).lower(*inputs).compile()
    forward[name] = lambda run=forward_only: jax.block_until_ready(run(*inputs[:3]))
    both[name] = lambda run=with_gradients: jax.block_until_ready(run(*inputs))
    errors[name] = timing.check_error(name, [np.asarray(x, np.float32) for x in both[name]()], expected, config.dtype)
  try:
    torch = torch_baselines.import_torch()
  except UserError as error:
    print(f'torch sdpa: {error}')
    return forward, both, errors
  name = 'torch sdpa'
  forward[name], both[name] = torch_cases(torch, config, arrays)
  errors[name] = timing.check_error(name, [x.float().cpu().numpy() for x in both[name]()], expected, config.dtype)
  return forward, both, errors


def textbook(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """`b g s h k`: softmax(q k / sqrt k) v."""
  logits = jnp.einsum('bgqhk,bgshk->bghqs', query, key, preferred_element_type=jnp.float32) * WIDTH**-0.5
  return jnp.einsum('bghqs,bgshk->bgqhk', jax.nn.softmax(logits).astype(value.dtype), value)


def dot_product_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Calls jax.nn.dot_product_attention, with cuDNN on a GPU if the group size allows it."""
  flat = [x.reshape(-1, *x.shape[2:]) for x in (query, key, value)]  # b·g s h k
  implementation = 'cudnn' if timing.has_gpu() and query.shape[2] % 2 == 0 and query.dtype != jnp.float32 else 'xla'
  return jax.nn.dot_product_attention(*flat, implementation=implementation).reshape(query.shape)


def regrouped(attend: Callable, config: MEViTConfig, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Computes attention within the blocks of `b t n h k`, one call per region of equal blocks."""
  outputs = []
  regions = zip(*(motion_groups(x, config) for x in (query, key, value)), strict=True)
  for (nh, nw, mh, mw), region in zip(config.blocks, regions, strict=True):
    output = attend(*region)  # b g t·m h k
    b, _, _, h, k = output.shape
    output = output.reshape(b, nh * nw, config.frames, mh * mw, h, k).swapaxes(1, 2)  # b t g m h k
    outputs.append(output.reshape(b, config.frames, -1, h, k))
  return jnp.concatenate(outputs, axis=2)  # b t n h k


def with_backward(implementation: Callable) -> Callable:
  """Returns a function (q, k, v, gradient of the output) -> output and gradients of q, k, v."""

  def both(query, key, value, gradient):
    output, backward = jax.vjp(implementation, query, key, value)
    return output, *backward(gradient)

  return both


def torch_cases(torch, config: MEViTConfig, arrays: Sequence[np.ndarray]) -> tuple[Callable, Callable]:
  """Builds the cases of PyTorch's fused attention in the same layout."""
  dtype = getattr(torch, config.dtype)
  *inputs, gradient = (torch.tensor(x, dtype=dtype, device=torch_baselines.device()) for x in arrays)
  inputs = [x.requires_grad_() for x in inputs]

  def attend():
    outputs, start = [], 0
    for nh, nw, mh, mw in config.blocks:
      g, m = nh * nw, mh * mw
      region = [x[:, :, start : start + g * m].unflatten(2, (g, m)) for x in inputs]  # b t g m h k
      region = [x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 1) for x in region]  # b·g h t·m k
      output = torch.nn.functional.scaled_dot_product_attention(*region)
      output = output.unflatten(0, (-1, g)).unflatten(3, (config.frames, m))  # b g h t m k
      outputs.append(output.permute(0, 3, 1, 4, 2, 5).flatten(2, 3))  # b t g·m h k
      start += g * m
    return torch.cat(outputs, 2)

  def forward():
    with torch.inference_mode():
      output = attend()
    torch_baselines.synchronize(torch)
    return output

  def both():
    output = attend()
    gradients = torch.autograd.grad(output, inputs, gradient)
    torch_baselines.synchronize(torch)
    return output.detach(), *gradients

  return forward, both


if __name__ == '__main__':
  timing.define_flags()
  flags.DEFINE_list('block_sizes', '1,2,3,7,14', 'M.')
  flags.DEFINE_integer('grid', 14, 'Patches of a side.', lower_bound=1)
  flags.DEFINE_integer('heads', 12, 'Heads, each of 64 numbers.', lower_bound=1)
  flags.DEFINE_integer('batch', 0, 'Clips; default: 1, and 16 on a GPU.', lower_bound=0)
  run(main)
