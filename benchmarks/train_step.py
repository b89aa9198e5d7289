"""Speed of a training step, compared with transformers' TimeSformer: the same weights, clips and optimizer.

  python -m benchmarks.train_step                                  # the TimeSformer configuration of B/16, 8 frames
  python -m benchmarks.train_step --models=timesformer,mevit --frames=16 --batch_size=2
  python -m benchmarks.train_step --size=L/16 --baselines=eager,sdpa,compile --batch_size=16      # on a GPU
  python -m benchmarks.train_step --attention=auto,cudnn --batch_size=16                      # attention on a GPU
  taskset -c 0 python -m benchmarks.train_step --clock=cpu         # one core of a shared machine

Needs the extra benchmarks. A step takes uint8 clips: normalization, forward, backward, SGD with Nesterov momentum;
no dropout, no augmentation. Baselines and dtypes are those of benchmarks.inference. `mevit` (space 4, motion 8, M = 2)
has no baseline of its own: it is compared with a TimeSformer of the same size, which computes more. Before timing, the
loss and its gradient with respect to the pixels are compared (if they are the same model).
"""

from collections.abc import Sequence

from absl import flags

from benchmarks import timing, torch_baselines
from mevit_jax.cli.command import no_arguments, run

import jax  # isort: skip  # after benchmarks.torch_baselines, which sets how JAX shares a GPU
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

NORMALIZATION = Normalization()
RATE, MOMENTUM = 1e-3, 0.9


def main(argv: Sequence[str]) -> None:
  """Checks and times all cases and prints a table."""
  no_arguments(argv)
  configure_malloc()  # as in training; it also applies to PyTorch in this process
  torch = torch_baselines.import_torch()
  dtype, peak = timing.parse_dtype(), timing.peak_rates(timing.parse_dtype(), flags.FLAGS.clock)[0]
  batch, names = flags.FLAGS.batch_size or (8 if timing.has_gpu() else 1), torch_baselines.parse_baselines()
  print(f'{flags.FLAGS.size}, batch {batch}, {dtype}, torch {torch.__version__}; {timing.describe_device()}')
  rows = []
  for frames in map(int, flags.FLAGS.frames):
    configs = make_configs(flags.FLAGS.size, frames, flags.FLAGS.pixels, dtype, flags.FLAGS.remat, flags.FLAGS.unroll)
    ours = {
      n: c for model in flags.FLAGS.models for n, c in torch_baselines.attention_variants(model, configs[model]).items()
    }
    cases = make_cases(torch, configs['timesformer'], ours, names, batch)
    print(f'{frames}x{flags.FLAGS.pixels}; peak {peak / 1e9:.0f} GFLOP/s')
    print(timing.HEADER)
    rows += timing.measure(cases, batch, peak, timing.parse_timing(), frames=frames)
  timing.write_results(rows, size=flags.FLAGS.size, batch=batch, peak=peak)


def make_configs(
  size: str, frames: int, pixels: int, dtype: str, remat: str, unroll: int = 0
) -> dict[str, MEViTConfig]:
  """Returns our models by name: TimeSformer, and MEViT with motion attention in two thirds of the blocks."""
  fields = {'frames': frames, 'image_size': (pixels, pixels), 'dtype': dtype, **variant(size)}
  fields |= {'remat': remat, 'unroll': unroll}
  depth = fields.pop('depth')
  space = {'space_blocks': depth // 3, 'motion_blocks': depth - depth // 3, 'class_blocks': 0}
  return {
    'timesformer': torch_baselines.timesformer_config(motion_blocks=depth, **fields),
    'mevit': MEViTConfig(classes=400, block_size=2, **space, **fields),
  }


def make_cases(
  torch, config: MEViTConfig, ours: dict[str, MEViTConfig], names: Sequence[str], batch: int
) -> dict[str, timing.Case]:
  """Builds all cases.

  Args:
    torch: PyTorch.
    config: config of the baselines.
    ours: configs of our models by name; names that start with 'timesformer' use the baselines' weights.
    names: names of the baselines.
    batch: clips per step.
  """
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (batch, config.frames, *config.image_size, 3), np.uint8)
  label = rng.integers(0, config.classes, batch).astype(np.int32)
  baseline = torch_baselines.make_baseline(torch, config, 'eager')
  expected = baseline_gradient(torch, baseline, video, label)
  params = torch_baselines.convert_weights(baseline.cpu(), build_model(config))
  del baseline
  cases = {name: baseline_case(torch, config, name, video, label, expected) for name in names}
  for name, model_config in ours.items():
    cases[name] = mevit_case(
      name, model_config, params if name.startswith('timesformer') else None, video, label, expected
    )
  return cases


def mevit_case(name: str, config: MEViTConfig, params: dict | None, video, label, expected) -> timing.Case:
  """Builds the case of our training step; if params are given, it is checked against the baseline."""
  model, error = build_model(config), float('nan')
  if params is not None:
    loss_of = jax.jit(jax.value_and_grad(lambda x: mevit_loss(model, params, x, label)))
    result = loss_of(normalize(jnp.asarray(video), NORMALIZATION, 'float32'))
    error = timing.check_error(name, result, expected, config.dtype)
  optimizer = optax.sgd(RATE, MOMENTUM, nesterov=True)
  step = make_train_step(
    model, optimizer, training=TrainingConfig(), augmentation=AugmentConfig(),
    normalization=NORMALIZATION, mirrors=range(config.classes),
  )  # fmt: skip
  state = jax.jit(lambda params: create_state(optimizer, params))(params or model.init(jax.random.key(0)))
  batch = {'video': jnp.asarray(video), 'label': jnp.asarray(label)}
  compiled, stats = timing.compile_function(jax.jit(step, donate_argnums=0), state, batch)

  def run_step():
    nonlocal state
    state, metrics = compiled(state, batch)
    return jax.block_until_ready(metrics)

  return timing.Case(run_step, count_step_flops(config, len(video)), error, **stats)


def count_step_flops(config: MEViTConfig, batch: int) -> int:
  """Returns the FLOPs of a step; baselines count the same, although they have one more product, which we fold."""
  return 3 * batch * count_flops(config)


def mevit_loss(model, params: dict, pixels: jax.Array, label: np.ndarray) -> jax.Array:
  """Returns the mean cross-entropy of a batch of normalized clips."""
  return cross_entropy(model.apply(params, pixels), jax.nn.one_hot(label, model.config.classes))


def baseline_gradient(torch, baseline, video: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the loss and its gradient with respect to the normalized pixels, `b t h w 3`."""
  mean, std = NORMALIZATION.mean[0], NORMALIZATION.std[0]
  pixels = ((torch_baselines.to_torch(torch, video) / 255 - mean) / std).requires_grad_()
  loss = torch.nn.functional.cross_entropy(
    baseline(pixels).logits.float(), torch.tensor(label).long().to(pixels.device)
  )
  (gradient,) = torch.autograd.grad(loss, pixels)
  return loss.detach().cpu().numpy(), np.moveaxis(gradient.cpu().numpy(), 2, -1)


def baseline_case(torch, config: MEViTConfig, name: str, video, label, expected) -> timing.Case:
  """Builds the case of a baseline's training step."""
  mean, std = NORMALIZATION.mean[0], NORMALIZATION.std[0]
  baseline = torch_baselines.make_baseline(torch, config, name)
  clips, labels = torch_baselines.to_torch(torch, video), torch.tensor(label).long().to(torch_baselines.device())
  mixed = torch.autocast(torch_baselines.device(), torch.bfloat16, enabled=config.dtype == 'bfloat16')
  with mixed:
    error = timing.check_error(name, baseline_gradient(torch, baseline, video, label), expected, config.dtype)
  optimizer = torch.optim.SGD(baseline.parameters(), RATE, MOMENTUM, nesterov=True)

  def run_step():
    with mixed:
      logits = baseline((clips / 255 - mean) / std).logits
    loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()  # waits for the device

  _, stats = torch_baselines.first_call(torch, name, run_step)
  return timing.Case(run_step, count_step_flops(config, len(video)), error, **stats)


if __name__ == '__main__':
  torch_baselines.define_flags()
  flags.DEFINE_list('models', 'timesformer', 'Our models: timesformer, mevit.')
  flags.DEFINE_integer('batch_size', 0, 'Clips per step; default: 1, on a GPU 8.', lower_bound=0)
  flags.DEFINE_enum('remat', 'none', ['none', 'block', 'residuals'], 'Rematerialization of our models.')
  flags.DEFINE_integer('unroll', 0, 'Unrolled blocks: 1 loops over all blocks, 0 unrolls all.', lower_bound=0)
  run(main)
