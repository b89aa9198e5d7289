"""How fast a training step is, beside transformers' TimeSformer: the same weights, clips and optimiser.

  python -m benchmarks.train_step                                  # the TimeSformer configuration of B/16, 8 frames
  python -m benchmarks.train_step --models=timesformer,mevit --frames=16 --batch_size=2
  python -m benchmarks.train_step --size=L/16 --peers=eager,sdpa,compile --batch_size=16      # on a GPU
  python -m benchmarks.train_step --attention=auto,cudnn --batch_size=16                      # likewise
  taskset -c 0 python -m benchmarks.train_step --clock=cpu         # one core, where others use the machine

Needs requirements-parity.txt. A step takes uint8 clips: normalisation, forward, backward, SGD with Nesterov momentum;
no dropout of any kind, no augmentation. `eager`, `sdpa` and `compile` are as in benchmarks.inference, and so are the
dtypes. `mevit` (space 4, motion 8, M = 2) has no peer of its own: it stands beside a TimeSformer of the same size,
which does more arithmetic. Before anything is timed loss and gradient are compared, the gradient at the clip's
pixels, behind all layers (where they are the same model).
"""

import time
from collections.abc import Callable, Sequence

from absl import flags

from benchmarks import peers
from mevit_jax.command import no_arguments, run

import jax  # isort: skip  # after benchmarks.peers, which says how it shares a GPU
import jax.numpy as jnp  # isort: skip
import numpy as np  # isort: skip
import optax  # isort: skip

from mevit_jax.models.config import MEViTConfig, count_flops, variant
from mevit_jax.models.functional import build_model
from mevit_jax.training.augment import AugmentConfig, normalise
from mevit_jax.training.objectives import cross_entropy
from mevit_jax.training.state import begin_state
from mevit_jax.training.steps import make_train_step

MEAN = STD = (0.5, 0.5, 0.5)
RATE, MOMENTUM = 1e-3, 0.9


def main(argv: Sequence[str]) -> None:
  """Checks, measures, and prints a table."""
  no_arguments(argv)
  torch = peers.import_torch()
  dtype, peak = peers.chosen_dtype(), peers.peaks(peers.chosen_dtype(), flags.FLAGS.clock)[0]
  batch, names = flags.FLAGS.batch_size or (8 if peers.on_gpu() else 1), peers.chosen_peers()
  print(f'{flags.FLAGS.size}, batch {batch}, {dtype}, torch {torch.__version__}; {peers.describe()}')
  rows = []
  for frames in map(int, flags.FLAGS.frames):
    configs = configs_of(flags.FLAGS.size, frames, flags.FLAGS.pixels, dtype, flags.FLAGS.remat, flags.FLAGS.unroll)
    ours = {n: c for model in flags.FLAGS.models for n, c in peers.by_attention(model, configs[model]).items()}
    cases, about = cases_of(torch, configs['timesformer'], ours, names, batch, dtype)
    print(f'{frames}x{flags.FLAGS.pixels}; peak {peak / 1e9:.0f} GFLOP/s')
    print(peers.HEAD)
    rows += measure(configs['timesformer'], ours, batch, cases, about, names[0], peak, peers.timing())
  peers.write(rows, size=flags.FLAGS.size, batch=batch, peak=peak)


def measure(
  timesformer: MEViTConfig, ours: dict, batch: int, cases: dict, about: dict, first: str, peak: float,
  timing: peers.Timing,
) -> list[dict]:  # fmt: skip
  """A row for each."""
  times, rows = peers.take_turns(cases, timing), []
  for name in times:
    # A peer's arithmetic is counted as ours of the same function: it multiplies by one matrix more, which we fold.
    config = ours.get(name, timesformer)
    found = peers.figures(times, name, first, 3 * batch * count_flops(config), peak)
    rows.append({'frames': config.frames, 'name': name, **found, **about[name]})
    print(peers.line(rows[-1], batch), flush=True)
  return rows


def configs_of(size: str, frames: int, pixels: int, dtype: str, remat: str, unroll: int = 0) -> dict[str, MEViTConfig]:
  """Ours by name: TimeSformer, and MEViT with a third of its blocks without motion attention."""
  fields = {'frames': frames, 'image_size': (pixels, pixels), 'dtype': dtype, **variant(size)}
  fields |= {'remat': remat, 'unroll': unroll}
  depth = fields.pop('depth')
  space = {'space_blocks': depth // 3, 'motion_blocks': depth - depth // 3, 'class_blocks': 0}
  return {
    'timesformer': peers.timesformer_config(motion_blocks=depth, **fields),
    'mevit': MEViTConfig(classes=400, block_size=2, **space, **fields),
  }


def cases_of(torch, config: MEViTConfig, ours: dict, names: Sequence[str], batch: int, dtype: str):
  """What is timed, and what is known of each before: distance, memory, compilation.

  Args:
    torch: the module.
    config: the peers' TimeSformer.
    ours: configurations by name; 'timesformer...' has the peers' weights.
    names: the peers.
    batch: clips of a step.
    dtype: of the computation.
  """
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (batch, config.frames, *config.image_size, 3), np.uint8)
  label = rng.integers(0, config.classes, batch).astype(np.int32)
  peer = peers.peer_by(torch, config, 'eager')
  wanted = peer_gradient(torch, peer, video, label)
  params = peers.same_weights(peer.cpu(), build_model(config))
  del peer
  cases, about = {}, {}
  for name in names:
    cases[name], about[name] = peer_case(torch, config, name, video, label, dtype, wanted)
  for name, one in ours.items():
    same = params if name.startswith('timesformer') else None
    cases[name], about[name] = our_case(name, one, same, video, label, dtype, wanted)
  return cases, about


def our_case(
  name: str, config: MEViTConfig, params: dict | None, video, label, dtype: str, wanted
) -> tuple[Callable, dict]:
  """Our training step; where params are given it is the peer's function, and checked."""
  model, off_by = build_model(config), float('nan')
  if params is not None:
    loss_of = jax.jit(jax.value_and_grad(lambda x: our_loss(model, params, x, label)))
    found = loss_of(normalise(jnp.asarray(video), MEAN, STD, 'float32'))
    off_by = peers.check(name, found, wanted, dtype)
  optimizer = optax.sgd(RATE, MOMENTUM, nesterov=True)
  step = make_train_step(
    model, optimizer, augmentation=AugmentConfig(), mirrors=range(config.classes), mean=MEAN, std=STD,
    label_smoothing=0.0, accumulate=1, seed=0,
  )  # fmt: skip
  state = jax.jit(lambda params: begin_state(optimizer, params))(params or model.init(jax.random.key(0)))
  batch = {'video': jnp.asarray(video), 'label': jnp.asarray(label)}
  start = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
  seconds, used = time.perf_counter() - start, compiled.memory_analysis()

  def run_step():
    nonlocal state
    state, metrics = compiled(state, batch)
    return jax.block_until_ready(metrics)

  mib = (used.temp_size_in_bytes + used.argument_size_in_bytes) / 2**20
  return run_step, {'off_by': off_by, 'mib': mib, 'compile_s': seconds}


def our_loss(model, params: dict, pixels: jax.Array, label: np.ndarray) -> jax.Array:
  """Cross-entropy of normalised clips, the mean over the batch."""
  return cross_entropy(model.apply(params, pixels), jax.nn.one_hot(label, model.config.classes))


def peer_gradient(torch, peer, video: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Loss, and its gradient at the normalised pixels, `b t h w 3`."""
  pixels = ((peers.to_torch(torch, video) / 255 - MEAN[0]) / STD[0]).requires_grad_()
  loss = torch.nn.functional.cross_entropy(peer(pixels).logits.float(), torch.tensor(label).long().to(pixels.device))
  (gradient,) = torch.autograd.grad(loss, pixels)
  return loss.detach().cpu().numpy(), np.moveaxis(gradient.cpu().numpy(), 2, -1)


def peer_case(torch, config, name: str, video, label, dtype: str, wanted) -> tuple[Callable, dict]:
  """The training step of one of transformers' ways."""
  peer = peers.peer_by(torch, config, name)
  clips, labels = peers.to_torch(torch, video), torch.tensor(label).long().to(peers.device())
  mixed = torch.autocast(peers.device(), torch.bfloat16, enabled=dtype == 'bfloat16')
  with mixed:
    off_by = peers.check(name, peer_gradient(torch, peer, video, label), wanted, dtype)
  optimizer = torch.optim.SGD(peer.parameters(), RATE, MOMENTUM, nesterov=True)

  def run_step():
    with mixed:
      logits = peer((clips / 255 - MEAN[0]) / STD[0]).logits
    loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()  # waits for the device

  _, took = peers.first_call(torch, name, run_step)
  return run_step, {'off_by': off_by, **took}


if __name__ == '__main__':
  peers.define_peer_flags()
  flags.DEFINE_list('models', 'timesformer', 'Ours: of timesformer, mevit.')
  flags.DEFINE_integer('batch_size', 0, 'Clips of a step; default: 1, and 8 on a GPU.', lower_bound=0)
  flags.DEFINE_enum('remat', 'none', ['none', 'block', 'residuals'], 'What ours recomputes.')
  flags.DEFINE_integer('unroll', 0, 'Of our configuration: 1 is a loop over blocks, 0 is none.', lower_bound=0)
  run(main)
