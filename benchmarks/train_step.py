"""How fast a training step is, beside transformers' TimeSformer: the same weights, clips and optimiser.

  python -m benchmarks.train_step                                  # the TimeSformer configuration of B/16, 8 frames
  python -m benchmarks.train_step --models=timesformer,mevit --frames=16 --batch_size=2
  python -m benchmarks.train_step --size=L/16 --peers=eager,sdpa,compile --batch_size=16      # on a GPU
  taskset -c 0 python -m benchmarks.train_step --clock=cpu         # one core, where others use the machine

Needs requirements-parity.txt. A step takes uint8 clips: normalisation, forward, backward, SGD with Nesterov momentum; no
dropout of any kind, no augmentation. `eager`, `sdpa` and `compile` are as in benchmarks.inference, and so are the
dtypes. `mevit` (space 4, motion 8, M = 2) has no peer of its own: it stands beside a TimeSformer of the same size, which
does more arithmetic. Before anything is timed loss and gradient are compared, the gradient at the clip's pixels, behind
all layers (where they are the same model).
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
import optax  # isort: skip

from mevit_jax.models.config import MEViTConfig, count_flops, variant
from mevit_jax.models.functional import build_model
from mevit_jax.training.augment import AugmentConfig, normalise
from mevit_jax.training.objectives import cross_entropy
from mevit_jax.training.state import begin_state
from mevit_jax.training.steps import make_train_step

_MODELS = flags.DEFINE_list('models', 'timesformer', 'Ours: of timesformer, mevit.')
_SIZE = flags.DEFINE_string('size', 'B/16', 'A ViT.')
_FRAMES = flags.DEFINE_integer('frames', 8, 'Frames of a clip.', lower_bound=1)
_PIXELS = flags.DEFINE_integer('pixels', 224, 'Of a side.', lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 0, 'Clips of a step; default: 1, and 8 on a GPU.', lower_bound=0)
_PEERS = flags.DEFINE_list('peers', '', 'Of eager, sdpa, compile; default: eager,sdpa, and all on a GPU.')
_DTYPE = flags.DEFINE_enum('dtype', '', ['', 'float32', 'bfloat16'], 'Of the computation.')
_REMAT = flags.DEFINE_enum('remat', 'none', ['none', 'block', 'residuals'], 'What ours recomputes.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'How often each is timed.', lower_bound=1)
_CLOCK = flags.DEFINE_enum('clock', 'wall', list(peers.CLOCKS), 'Time on the clock, or CPU time of all threads.')
_JSON = flags.DEFINE_string('json', '', 'A file to write the figures to.')

MEAN = STD = (0.5, 0.5, 0.5)
RATE, MOMENTUM = 1e-3, 0.9


def main(argv: Sequence[str]) -> None:
  """Checks, measures, and prints a table."""
  no_arguments(argv)
  torch = peers.import_torch()
  dtype = _DTYPE.value or ('bfloat16' if peers.on_gpu() else 'float32')
  batch = _BATCH_SIZE.value or (8 if peers.on_gpu() else 1)
  names = _PEERS.value or ['eager', 'sdpa'] + ['compile'] * peers.on_gpu()
  configs = configs_of(_SIZE.value, _FRAMES.value, _PIXELS.value, dtype, _REMAT.value)
  peak, _ = peers.peaks(dtype, _CLOCK.value)
  print(f'{_SIZE.value}, {_FRAMES.value}x{_PIXELS.value}, batch {batch}, {dtype}, torch {torch.__version__}; {peers.describe()}')
  cases, about = cases_of(torch, configs, _MODELS.value, names, batch, dtype)
  times = peers.take_turns(cases, _ROUNDS.value, _CLOCK.value)
  rows = []
  print(f'{"":12} {"ms":>10} {"clips/s":>9} {"x eager":>8} {"of peak":>8} {"off by":>8} {"MiB":>8} {"compile s":>9}')
  for name, found in times.items():
    seconds = statistics.median(found)
    # A peer's arithmetic is counted as ours of the same function: it multiplies by one matrix more, which we fold.
    flops = 3 * batch * count_flops(configs.get(name, configs['timesformer']))
    row = {'name': name, 'seconds': seconds, 'times_first_peer': peers.ratio(times, name, names[0])}
    rows.append({**row, 'share': flops / seconds / peak if peak else float('nan'), **about[name]})
    print(
      f'{name:12} {1000 * seconds:10.1f} {batch / seconds:9.3f} {row["times_first_peer"]:8.2f} {rows[-1]["share"]:8.1%} '
      f'{about[name]["off_by"]:8.1e} {about[name]["mib"]:8.0f} {about[name]["compile_s"]:9.1f}'
    )
  peers.write(
    _JSON.value, rows, size=_SIZE.value, frames=_FRAMES.value, batch=batch, dtype=dtype, clock=_CLOCK.value, peak=peak
  )


def configs_of(size: str, frames: int, pixels: int, dtype: str, remat: str) -> dict[str, MEViTConfig]:
  """Ours by name: TimeSformer, and MEViT with a third of its blocks without motion attention."""
  fields = {'frames': frames, 'image_size': (pixels, pixels), 'dtype': dtype, 'remat': remat, **variant(size)}
  depth = fields.pop('depth')
  space = {'space_blocks': depth // 3, 'motion_blocks': depth - depth // 3, 'class_blocks': 0}
  return {
    'timesformer': peers.timesformer_config(motion_blocks=depth, **fields),
    'mevit': MEViTConfig(classes=400, block_size=2, **space, **fields),
  }


def cases_of(torch, configs: dict, models: Sequence[str], names: Sequence[str], batch: int, dtype: str):
  """What is timed, and what is known of each before: distance, memory, compilation."""
  config, rng = configs['timesformer'], np.random.default_rng(0)
  video = rng.integers(0, 256, (batch, config.frames, *config.image_size, 3), np.uint8)
  label = rng.integers(0, config.classes, batch).astype(np.int32)
  peer = peers.make_peer(torch, config).to('cuda' if peers.on_gpu() else 'cpu')
  wanted = peer_gradient(torch, peer, video, label)
  params = peers.same_weights(peer.cpu(), build_model(config))
  del peer
  cases, about = {}, {}
  for name in names:
    cases[name], about[name] = peer_case(torch, config, name, video, label, dtype, wanted)
  for name in models:
    same = params if name == 'timesformer' else None
    cases[name], about[name] = our_case(configs[name], same, video, label, dtype, wanted)
  return cases, about


def our_case(config: MEViTConfig, params: dict | None, video, label, dtype: str, wanted) -> tuple[Callable, dict]:
  """Our training step; where params are given it is the peer's function, and checked."""
  model, off_by = build_model(config), float('nan')
  if params is not None:
    loss_of = jax.jit(jax.value_and_grad(lambda x: our_loss(model, params, x, label)))
    found = loss_of(normalise(jnp.asarray(video), MEAN, STD, 'float32'))
    off_by = peers.check('timesformer', found, wanted, dtype)
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
  """The training step of one of transformers' ways; PyTorch tells its memory on GPUs alone."""
  device = 'cuda' if peers.on_gpu() else 'cpu'
  peer = peers.make_peer(torch, config).to(device)
  if name != 'eager':
    peers.use_sdpa(torch, peer)
  if name == 'compile':
    peer.compile()
  clips, labels = peers.to_torch(torch, video), torch.tensor(label).long().to(device)
  mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16')
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

  if peers.on_gpu():
    torch.cuda.reset_peak_memory_stats()
  start = time.perf_counter()
  run_step()
  seconds = time.perf_counter() - start if name == 'compile' else float('nan')
  mib = torch.cuda.max_memory_allocated() / 2**20 if peers.on_gpu() else float('nan')
  return run_step, {'off_by': off_by, 'mib': mib, 'compile_s': seconds}


if __name__ == '__main__':
  run(main)
