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

from collections.abc import Sequence

from absl import flags

from benchmarks import peers, turns
from mevit_jax.cli.command import no_arguments, run

import jax  # isort: skip  # after benchmarks.peers, which says how it shares a GPU
import jax.numpy as jnp  # isort: skip
import numpy as np  # isort: skip
import optax  # isort: skip

from mevit_jax.augment.clip import normalize
from mevit_jax.config.augment import AugmentConfig
from mevit_jax.config.data import Normalization
from mevit_jax.config.model import MEViTConfig, count_flops, variant
from mevit_jax.config.training import TrainingConfig
from mevit_jax.models.functional import build_model
from mevit_jax.training.losses import cross_entropy
from mevit_jax.training.malloc import configure_malloc
from mevit_jax.training.state import create_state
from mevit_jax.training.steps import make_train_step

MEAN = STD = (0.5, 0.5, 0.5)
RATE, MOMENTUM = 1e-3, 0.9


def main(argv: Sequence[str]) -> None:
  """Checks, measures, and prints a table."""
  no_arguments(argv)
  configure_malloc()  # as training does; PyTorch, in the same process, has it too
  torch = peers.import_torch()
  dtype, peak = turns.chosen_dtype(), turns.peaks(turns.chosen_dtype(), flags.FLAGS.clock)[0]
  batch, names = flags.FLAGS.batch_size or (8 if turns.on_gpu() else 1), peers.chosen_peers()
  print(f'{flags.FLAGS.size}, batch {batch}, {dtype}, torch {torch.__version__}; {turns.describe()}')
  rows = []
  for frames in map(int, flags.FLAGS.frames):
    configs = configs_of(flags.FLAGS.size, frames, flags.FLAGS.pixels, dtype, flags.FLAGS.remat, flags.FLAGS.unroll)
    ours = {n: c for model in flags.FLAGS.models for n, c in peers.by_attention(model, configs[model]).items()}
    cases = cases_of(torch, configs['timesformer'], ours, names, batch)
    print(f'{frames}x{flags.FLAGS.pixels}; peak {peak / 1e9:.0f} GFLOP/s')
    print(turns.HEAD)
    rows += turns.measure(cases, batch, peak, turns.timing(), frames=frames)
  turns.write(rows, size=flags.FLAGS.size, batch=batch, peak=peak)


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


def cases_of(
  torch, config: MEViTConfig, ours: dict[str, MEViTConfig], names: Sequence[str], batch: int
) -> dict[str, turns.Case]:
  """What is timed.

  Args:
    torch: the module.
    config: the peers' TimeSformer.
    ours: configurations by name; 'timesformer...' has the peers' weights.
    names: the peers.
    batch: clips of a step.
  """
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (batch, config.frames, *config.image_size, 3), np.uint8)
  label = rng.integers(0, config.classes, batch).astype(np.int32)
  peer = peers.peer_by(torch, config, 'eager')
  wanted = peer_gradient(torch, peer, video, label)
  params = peers.same_weights(peer.cpu(), build_model(config))
  del peer
  cases = {name: peer_case(torch, config, name, video, label, wanted) for name in names}
  for name, one in ours.items():
    cases[name] = our_case(name, one, params if name.startswith('timesformer') else None, video, label, wanted)
  return cases


def our_case(name: str, config: MEViTConfig, params: dict | None, video, label, wanted) -> turns.Case:
  """Our training step; where params are given it is the peer's function, and checked."""
  model, off_by = build_model(config), float('nan')
  if params is not None:
    loss_of = jax.jit(jax.value_and_grad(lambda x: our_loss(model, params, x, label)))
    found = loss_of(normalize(jnp.asarray(video), MEAN, STD, 'float32'))
    off_by = turns.check(name, found, wanted, config.dtype)
  optimizer = optax.sgd(RATE, MOMENTUM, nesterov=True)
  step = make_train_step(
    model, optimizer, training=TrainingConfig(), augmentation=AugmentConfig(),
    normalization=Normalization(MEAN, STD), mirrors=range(config.classes),
  )  # fmt: skip
  state = jax.jit(lambda params: create_state(optimizer, params))(params or model.init(jax.random.key(0)))
  batch = {'video': jnp.asarray(video), 'label': jnp.asarray(label)}
  compiled, took = turns.compiled(jax.jit(step, donate_argnums=0), state, batch)

  def run_step():
    nonlocal state
    state, metrics = compiled(state, batch)
    return jax.block_until_ready(metrics)

  return turns.Case(run_step, flops_of(config, len(video)), off_by, **took)


def flops_of(config: MEViTConfig, batch: int) -> int:
  """Of a step; a peer counts as ours of the same function: it multiplies by one matrix more, which we fold."""
  return 3 * batch * count_flops(config)


def our_loss(model, params: dict, pixels: jax.Array, label: np.ndarray) -> jax.Array:
  """Cross-entropy of normalised clips, the mean over the batch."""
  return cross_entropy(model.apply(params, pixels), jax.nn.one_hot(label, model.config.classes))


def peer_gradient(torch, peer, video: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Loss, and its gradient at the normalised pixels, `b t h w 3`."""
  pixels = ((peers.to_torch(torch, video) / 255 - MEAN[0]) / STD[0]).requires_grad_()
  loss = torch.nn.functional.cross_entropy(peer(pixels).logits.float(), torch.tensor(label).long().to(pixels.device))
  (gradient,) = torch.autograd.grad(loss, pixels)
  return loss.detach().cpu().numpy(), np.moveaxis(gradient.cpu().numpy(), 2, -1)


def peer_case(torch, config: MEViTConfig, name: str, video, label, wanted) -> turns.Case:
  """The training step of one of transformers' ways."""
  peer = peers.peer_by(torch, config, name)
  clips, labels = peers.to_torch(torch, video), torch.tensor(label).long().to(peers.device())
  mixed = torch.autocast(peers.device(), torch.bfloat16, enabled=config.dtype == 'bfloat16')
  with mixed:
    off_by = turns.check(name, peer_gradient(torch, peer, video, label), wanted, config.dtype)
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
  return turns.Case(run_step, flops_of(config, len(video)), off_by, **took)


if __name__ == '__main__':
  peers.define_peer_flags()
  flags.DEFINE_list('models', 'timesformer', 'Ours: of timesformer, mevit.')
  flags.DEFINE_integer('batch_size', 0, 'Clips of a step; default: 1, and 8 on a GPU.', lower_bound=0)
  flags.DEFINE_enum('remat', 'none', ['none', 'block', 'residuals'], 'What ours recomputes.')
  flags.DEFINE_integer('unroll', 0, 'Of our configuration: 1 is a loop over blocks, 0 is none.', lower_bound=0)
  run(main)
