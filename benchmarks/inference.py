"""How fast the TimeSformer configuration classifies clips, beside transformers' TimeSformer with the same weights.

  python -m benchmarks.inference                                   # B/16, 8 frames of 224x224, batches of 1 and 4
  python -m benchmarks.inference --peers=eager,sdpa,compile --batch_sizes=1,8,64
  taskset -c 0 python -m benchmarks.inference --clock=cpu          # one core, where others use the machine

Needs requirements-parity.txt. `eager` is transformers as it is, `sdpa` the same with PyTorch's fused attention in its
place, `compile` that under torch.compile. float32 on a CPU; on a GPU ours in bfloat16 and PyTorch under autocast. A
batch of 1 is the latency. Logits are compared before anything is timed.
"""

from collections.abc import Sequence

from absl import flags

from benchmarks import peers, turns
from mevit_jax.cli.command import no_arguments, run

import jax  # isort: skip  # after benchmarks.peers, which says how it shares a GPU
import jax.numpy as jnp  # isort: skip
import numpy as np  # isort: skip

from mevit_jax.config.model import MEViTConfig, count_flops, variant
from mevit_jax.models.functional import build_model


def main(argv: Sequence[str]) -> None:
  """Checks, measures, and prints a table."""
  no_arguments(argv)
  torch = peers.import_torch()
  dtype, peak = turns.chosen_dtype(), turns.peaks(turns.chosen_dtype(), flags.FLAGS.clock)[0]
  print(f'TimeSformer {flags.FLAGS.size}, {dtype}, torch {torch.__version__}; {turns.describe()}')
  rows = []
  for frames in map(int, flags.FLAGS.frames):
    sizes = variant(flags.FLAGS.size)
    depth, shape = sizes.pop('depth'), {'frames': frames, 'image_size': (flags.FLAGS.pixels, flags.FLAGS.pixels)}
    config = peers.timesformer_config(motion_blocks=depth, dtype=dtype, **shape, **sizes)
    flops, ours = count_flops(config), peers.by_attention('ours', config)
    print(
      f'{frames}x{flags.FLAGS.pixels}: {flops / 1e9:.1f} GFLOP a clip in matrix products; peak {peak / 1e9:.0f} GFLOP/s'
    )
    print(turns.HEAD)
    for batch in map(int, flags.FLAGS.batch_sizes):
      cases = cases_of(torch, config, ours, batch, peers.chosen_peers())
      rows += turns.measure(cases, batch, peak, turns.timing(), frames=frames)
  turns.write(rows, size=flags.FLAGS.size, peak=peak)


def cases_of(torch, config: MEViTConfig, ours: dict, batch: int, names: Sequence[str]) -> dict[str, turns.Case]:
  """The named peers, and ours: configurations by name. `off_by` is the distance from transformers in float32."""
  video = np.random.default_rng(0).normal(size=(batch, config.frames, *config.image_size, 3)).astype(np.float32)
  peer = peers.make_peer(torch, config)
  model = build_model(config)
  params = model.unstack(peers.same_weights(peer, model))
  pixels = peers.to_torch(torch, video)
  with torch.inference_mode():
    wanted = peer.to(peers.device())(pixels).logits.cpu().numpy()
  del peer
  cases = {name: peer_case(torch, config, name, pixels, wanted) for name in names}
  return cases | {name: our_case(name, one, params, video, wanted) for name, one in ours.items()}


def our_case(name: str, config: MEViTConfig, params: dict, video: np.ndarray, wanted: np.ndarray) -> turns.Case:
  """Ours, with the blocks' weights apart."""
  on_device = jnp.asarray(video)
  compiled, took = turns.compiled(jax.jit(build_model(config).apply), params, on_device)

  def classify():
    return compiled(params, on_device).block_until_ready()

  off_by = turns.check(name, [classify()], [wanted], config.dtype)
  return turns.Case(classify, len(video) * count_flops(config), off_by, **took)


def peer_case(torch, config: MEViTConfig, name: str, pixels, wanted: np.ndarray) -> turns.Case:
  """One of transformers' ways."""
  peer = peers.peer_by(torch, config, name)

  def classify():
    with torch.inference_mode(), torch.autocast(peers.device(), torch.bfloat16, enabled=config.dtype == 'bfloat16'):
      logits = peer(pixels).logits
    peers.wait(torch)
    return logits

  logits, took = peers.first_call(torch, name, classify)
  off_by = turns.check(name, [logits.float().cpu().numpy()], [wanted], config.dtype)
  return turns.Case(classify, len(pixels) * count_flops(config), off_by, **took)


if __name__ == '__main__':
  peers.define_peer_flags()
  flags.DEFINE_list('batch_sizes', '1,4', 'Clips at once.')
  run(main)
