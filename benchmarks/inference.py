"""How fast the TimeSformer configuration classifies clips, beside transformers' TimeSformer with the same weights.

  python -m benchmarks.inference                                   # B/16, 8 frames of 224x224, batches of 1 and 4
  python -m benchmarks.inference --peers=eager,sdpa,compile --batch_sizes=1,8,64
  taskset -c 0 python -m benchmarks.inference --clock=cpu          # one core, where others use the machine

Needs requirements-parity.txt. `eager` is transformers as it is, `sdpa` the same with PyTorch's fused attention in its
place, `compile` that under torch.compile. float32 on a CPU; on a GPU ours in bfloat16 and PyTorch under autocast, and no
float32 product in TF32. A batch of 1 is the latency. Logits are compared before anything is timed.
"""

import statistics
import time
from collections.abc import Callable, Sequence

from absl import flags

from benchmarks import peers
from mevit_jax.command import no_arguments, run

import jax  # isort: skip  # after benchmarks.peers, which says how it shares a GPU
import jax.numpy as jnp  # isort: skip
import numpy as np  # isort: skip

from mevit_jax.models.config import count_flops, variant
from mevit_jax.models.functional import build_model

_MODEL = flags.DEFINE_string('model', 'B/16', 'A ViT.')
_FRAMES = flags.DEFINE_integer('frames', 8, 'Frames of a clip.', lower_bound=1)
_SIZE = flags.DEFINE_integer('size', 224, 'Pixels of a side.', lower_bound=1)
_BATCH_SIZES = flags.DEFINE_list('batch_sizes', '1,4', 'Clips at once.')
_PEERS = flags.DEFINE_list('peers', '', "Of eager, sdpa, compile; default: eager,sdpa, and all on a GPU.")
_DTYPE = flags.DEFINE_enum('dtype', '', ['', 'float32', 'bfloat16'], 'Of the computation; default: as said above.')
_ROUNDS = flags.DEFINE_integer('rounds', 7, 'How often each is timed.', lower_bound=1)
_CLOCK = flags.DEFINE_enum('clock', 'wall', list(peers.CLOCKS), 'Time on the clock, or CPU time of all threads.')
_JSON = flags.DEFINE_string('json', '', 'A file to write the figures to.')


def main(argv: Sequence[str]) -> None:
  """Checks, measures, and prints a table."""
  no_arguments(argv)
  torch = peers.import_torch()
  dtype = _DTYPE.value or ('bfloat16' if peers.on_gpu() else 'float32')
  names = _PEERS.value or ['eager', 'sdpa'] + ['compile'] * peers.on_gpu()
  sizes = variant(_MODEL.value)
  config = peers.timesformer_config(
    motion_blocks=sizes.pop('depth'), frames=_FRAMES.value, image_size=(_SIZE.value,) * 2, dtype=dtype, **sizes
  )
  peak, _ = peers.peaks(dtype, _CLOCK.value)
  print(f'TimeSformer {_MODEL.value}, {_FRAMES.value}x{_SIZE.value}, {dtype}, torch {torch.__version__}; {peers.describe()}')
  print(f'{count_flops(config) / 1e9:.1f} GFLOP a clip in matrix products, whose peak here is {peak / 1e9:.0f} GFLOP/s')
  rows = []
  print(f'{"batch":>6} {"":10} {"ms":>10} {"clips/s":>9} {"x eager":>8} {"of peak":>8} {"off by":>8} {"MiB":>7} {"compile s":>9}')
  for batch in map(int, _BATCH_SIZES.value):
    rows += measure(torch, config, batch, names, dtype, peak)
  peers.write(_JSON.value, rows, model=_MODEL.value, frames=_FRAMES.value, dtype=dtype, clock=_CLOCK.value)


def measure(torch, config, batch: int, names: Sequence[str], dtype: str, peak: float) -> list[dict]:
  """A row for ours and for each peer."""
  cases, about = cases_of(torch, config, batch, names, dtype)
  times = peers.take_turns(cases, _ROUNDS.value, _CLOCK.value)
  rows = []
  for name, found in times.items():
    seconds = statistics.median(found)
    share = batch * count_flops(config) / seconds / peak if peak else float('nan')
    faster = peers.ratio(times, name, names[0])
    rows.append({'batch': batch, 'name': name, 'seconds': seconds, 'times_first_peer': faster, 'share': share, **about[name]})
    print(
      f'{batch:6} {name:10} {1000 * seconds:10.1f} {batch / seconds:9.3f} {faster:8.2f} {share:8.1%} '
      f'{about[name]["off_by"]:8.1e} {about[name]["mib"]:7.0f} {about[name]["compile_s"]:9.1f}',
      flush=True,
    )
  return rows


def cases_of(torch, config, batch: int, names: Sequence[str], dtype: str) -> tuple[dict[str, Callable], dict[str, dict]]:
  """What is timed, and what is known of each before: its distance from the first peer in float32, memory, compilation."""
  video = np.random.default_rng(0).normal(size=(batch, config.frames, *config.image_size, 3)).astype(np.float32)
  peer = peers.make_peer(torch, config)
  model = build_model(config)
  params = model.unstack(peers.same_weights(peer, model))
  device, pixels = ('cuda' if peers.on_gpu() else 'cpu'), peers.to_torch(torch, video)
  with torch.inference_mode():
    wanted = peer.to(device)(pixels).logits.cpu().numpy()
  del peer
  cases, about = {}, {}
  for name in names:
    cases[name], about[name] = peer_case(torch, config, name, pixels, dtype, wanted)
  start = time.perf_counter()
  compiled = jax.jit(model.apply).lower(params, jnp.asarray(video)).compile()
  seconds, on_device = time.perf_counter() - start, jnp.asarray(video)
  cases['ours'] = lambda: compiled(params, on_device).block_until_ready()
  used = compiled.memory_analysis()
  mib = (used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes) / 2**20
  about['ours'] = {'off_by': peers.check('ours', [cases['ours']()], [wanted], dtype), 'mib': mib, 'compile_s': seconds}
  return cases, about


def peer_case(torch, config, name: str, pixels, dtype: str, wanted: np.ndarray) -> tuple[Callable, dict]:
  """One of transformers' ways; PyTorch tells its memory on GPUs alone."""
  peer = peers.make_peer(torch, config).to(pixels.device)
  if name != 'eager':
    peers.use_sdpa(torch, peer)
  if name == 'compile':
    peer.compile()

  def classify():
    with torch.inference_mode(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=dtype == 'bfloat16'):
      logits = peer(pixels).logits
    if peers.on_gpu():
      torch.cuda.synchronize()
    return logits

  if peers.on_gpu():
    torch.cuda.reset_peak_memory_stats()
  start = time.perf_counter()
  logits = classify().float().cpu().numpy()
  seconds = time.perf_counter() - start if name == 'compile' else float('nan')
  mib = torch.cuda.max_memory_allocated() / 2**20 if peers.on_gpu() else float('nan')
  return classify, {'off_by': peers.check(name, [logits], [wanted], dtype), 'mib': mib, 'compile_s': seconds}


if __name__ == '__main__':
  run(main)
