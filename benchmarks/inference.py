"""Inference speed of the TimeSformer configuration, compared with transformers' TimeSformer with the same weights.

  python -m benchmarks.inference                                   # B/16, 8 frames of 224x224, batches of 1 and 4
  python -m benchmarks.inference --baselines=eager,sdpa,compile --batch_sizes=1,8,64
  taskset -c 0 python -m benchmarks.inference --clock=cpu          # one core of a shared machine

Needs the extra benchmarks. Baselines: `eager` is unchanged transformers, `sdpa` uses PyTorch's fused attention,
`compile` is `sdpa` with torch.compile. float32 on a CPU; on a GPU our model uses bfloat16 and PyTorch autocast. A batch
of 1 measures latency. Logits are compared before timing.
"""

from collections.abc import Sequence

from absl import flags

from benchmarks import timing, torch_baselines
from mevit_jax.cli.command import no_arguments, run

import jax  # isort: skip  # after benchmarks.torch_baselines, which sets how JAX shares a GPU
import jax.numpy as jnp  # isort: skip
import numpy as np  # isort: skip

from mevit_jax.config.model import MEViTConfig, count_flops, variant
from mevit_jax.models.functional import build_model


def main(argv: Sequence[str]) -> None:
  """Checks and times all cases and prints a table."""
  no_arguments(argv)
  torch = torch_baselines.import_torch()
  dtype, peak = timing.parse_dtype(), timing.peak_rates(timing.parse_dtype(), flags.FLAGS.clock)[0]
  print(f'TimeSformer {flags.FLAGS.size}, {dtype}, torch {torch.__version__}; {timing.describe_device()}')
  rows = []
  for frames in map(int, flags.FLAGS.frames):
    sizes = variant(flags.FLAGS.size)
    depth, shape = sizes.pop('depth'), {'frames': frames, 'image_size': (flags.FLAGS.pixels, flags.FLAGS.pixels)}
    config = torch_baselines.timesformer_config(motion_blocks=depth, dtype=dtype, **shape, **sizes)
    flops, ours = count_flops(config), torch_baselines.attention_variants('ours', config)
    print(
      f'{frames}x{flags.FLAGS.pixels}: {flops / 1e9:.1f} GFLOPs per clip in matrix products; '
      f'peak {peak / 1e9:.0f} GFLOP/s'
    )
    print(timing.HEADER)
    for batch in map(int, flags.FLAGS.batch_sizes):
      cases = make_cases(torch, config, ours, batch, torch_baselines.parse_baselines())
      rows += timing.measure(cases, batch, peak, timing.parse_timing(), frames=frames)
  timing.write_results(rows, size=flags.FLAGS.size, peak=peak)


def make_cases(torch, config: MEViTConfig, ours: dict, batch: int, names: Sequence[str]) -> dict[str, timing.Case]:
  """Builds the named baselines and our models (configs by name); errors are relative to transformers in float32."""
  video = np.random.default_rng(0).normal(size=(batch, config.frames, *config.image_size, 3)).astype(np.float32)
  baseline = torch_baselines.make_timesformer(torch, config)
  model = build_model(config)
  params = model.unstack(torch_baselines.convert_weights(baseline, model))
  pixels = torch_baselines.to_torch(torch, video)
  with torch.inference_mode():
    expected = baseline.to(torch_baselines.device())(pixels).logits.cpu().numpy()
  del baseline
  cases = {name: baseline_case(torch, config, name, pixels, expected) for name in names}
  return cases | {
    name: mevit_case(name, variant_config, params, video, expected) for name, variant_config in ours.items()
  }


def mevit_case(name: str, config: MEViTConfig, params: dict, video: np.ndarray, expected: np.ndarray) -> timing.Case:
  """Builds the case of our model, with unstacked blocks."""
  on_device = jnp.asarray(video)
  compiled, stats = timing.compile_function(jax.jit(build_model(config).apply), params, on_device)

  def classify():
    return compiled(params, on_device).block_until_ready()

  error = timing.check_error(name, [classify()], [expected], config.dtype)
  return timing.Case(classify, len(video) * count_flops(config), error, **stats)


def baseline_case(torch, config: MEViTConfig, name: str, pixels, expected: np.ndarray) -> timing.Case:
  """Builds the case of a baseline."""
  baseline = torch_baselines.make_baseline(torch, config, name)
  autocast = torch.autocast(torch_baselines.device(), torch.bfloat16, enabled=config.dtype == 'bfloat16')

  def classify():
    with torch.inference_mode(), autocast:
      logits = baseline(pixels).logits
    torch_baselines.synchronize(torch)
    return logits

  logits, stats = torch_baselines.first_call(torch, name, classify)
  error = timing.check_error(name, [logits.float().cpu().numpy()], [expected], config.dtype)
  return timing.Case(classify, len(pixels) * count_flops(config), error, **stats)


if __name__ == '__main__':
  torch_baselines.define_flags()
  flags.DEFINE_list('batch_sizes', '1,4', 'Clips per batch.')
  run(main)
