"""What the benchmarks beside PyTorch share: transformers' TimeSformer with the same weights, turns, clocks, peaks."""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # a GPU's memory is PyTorch's too

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mevit_jax.errors import UserError
from mevit_jax.models.config import MEViTConfig
from mevit_jax.models.functional import Model
from mevit_jax.planning.chips import CHIPS
from mevit_jax.weights.load import load

CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


class Timing(NamedTuple):
  """How often each is timed, and by which of CLOCKS."""

  rounds: int
  clock: str


class Case(NamedTuple):
  """What is timed, and what is known of it before.

  Attributes:
    run: does it once, to its end.
    flops: of its matrix products.
    off_by: see `check`; NaN where there is nothing to compare with.
    mib: of memory that it takes.
    compile_s: seconds to compile it.
  """

  run: Callable[[], Any]
  flops: int
  off_by: float
  mib: float
  compile_s: float


# As far apart as two results may be, relative to the largest number.
TOLERANCES = {'float32': 1e-5, 'bfloat16': 4e-2}


def on_gpu() -> bool:
  """Whether JAX sees a GPU, which is then PyTorch's device too."""
  return jax.default_backend() == 'gpu'


def device() -> str:
  """PyTorch's name of it."""
  return 'cuda' if on_gpu() else 'cpu'


def import_torch() -> Any:
  """PyTorch, with as many threads as this process may use; a UserError where it is missing."""
  try:
    torch = importlib.import_module('torch')
  except ImportError as error:
    raise UserError('this needs torch and transformers: pip install -r requirements-parity.txt') from error
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  if on_gpu() and not torch.cuda.is_available():
    raise UserError(f'JAX sees a GPU and torch {torch.__version__} does not: install a build of torch for CUDA')
  return torch


@functools.cache
def let_torchvision_in(torch: Any) -> Any:
  """Lets torchvision be imported, as transformers does, where it is for GPUs and torch is for CPUs.

  That is what pip makes of a torch for CPUs and requirements-parity.txt. The operators of such a torchvision do not
  load, and at its import it asks for two of them, to say what shapes they give: here they are, with nothing behind
  them. 'FRAGMENT' adds them to names that are torchvision's; 'DEF' would claim all of these.

  Returns:
    The library, or None where it is not needed; the cache keeps it: its operators go when it goes.
  """
  try:
    theirs = importlib.metadata.version('torchvision')
  except importlib.metadata.PackageNotFoundError:
    return None
  if torch.version.cuda is not None or theirs.endswith('+cpu'):
    return None
  library = torch.library.Library('torchvision', 'FRAGMENT')
  for name in ('nms', 'qnms'):
    library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
  return library


@functools.cache
def import_transformers(torch: Any) -> Any:
  """transformers' TimeSformer."""
  let_torchvision_in(torch)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    importlib.import_module('transformers.utils.logging').disable_progress_bar()
    return importlib.import_module('transformers.models.timesformer')


def timesformer_config(**changes) -> MEViTConfig:
  """transformers' TimeSformer as a configuration of ours, B/16 with 8 frames of 224x224 by default."""
  fields = {
    'classes': 400, 'space_blocks': 0, 'motion_blocks': 12, 'class_blocks': 0,
    'block_size': 1, 'order': 'time_space', 'class_token_in_motion': False,
  }  # fmt: skip
  return MEViTConfig(**{**fields, **changes})


def make_peer(torch: Any, config: MEViTConfig) -> Any:
  """TimesformerForVideoClassification of the same sizes, for evaluation, every tensor of it at random."""
  transformers = import_transformers(torch)
  peer = transformers.TimesformerForVideoClassification(
    transformers.TimesformerConfig(
      hidden_size=config.width,
      num_attention_heads=config.heads,
      intermediate_size=config.mlp_dim,
      num_hidden_layers=config.depth,
      num_frames=config.frames,
      image_size=config.image_size[0],
      patch_size=config.patch_size[0],
      num_labels=config.classes,
      layer_norm_eps=config.layer_norm_eps,
    )
  )
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():  # most biases and norms are constants at initialisation: a swap would not be seen
    for name, parameter in peer.state_dict().items():
      parameter.copy_(torch.randn(parameter.shape, generator=generator) * (config.width * 1.5) ** -0.5)
      if 'norm' in name and name.endswith('weight'):
        parameter += 1
  return peer.eval()


def same_weights(peer: Any, model: Model) -> dict:
  """The peer's weights as params of ours."""
  with tempfile.TemporaryDirectory() as folder:
    peer.save_pretrained(folder)
    return jax.tree.map(jnp.asarray, load(folder, model, head='keep').params)


def use_sdpa(torch: Any, peer: Any) -> Any:
  """The peer with its attention by scaled_dot_product_attention: transformers has only the plain one for it."""

  def forward(self, hidden_states, output_attentions=False):
    b, s, d = hidden_states.shape
    qkv = self.qkv(hidden_states).reshape(b, s, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
    output = torch.nn.functional.scaled_dot_product_attention(*qkv)  # b h s k
    return (output.transpose(1, 2).reshape(b, s, d),)

  for layer in peer.modules():
    if type(layer).__name__ == 'TimesformerSelfAttention':
      layer.forward = types.MethodType(forward, layer)
  return peer


def peer_by(torch: Any, config: MEViTConfig, name: str) -> Any:
  """The peer on PyTorch's device, as it is ('eager'), with `use_sdpa` ('sdpa'), or compiled besides ('compile')."""
  peer = make_peer(torch, config).to(device())
  if name != 'eager':
    use_sdpa(torch, peer)
  if name == 'compile':
    peer.compile()
  return peer


def first_call(torch: Any, name: str, run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
  """What a peer's first call gives, and its `mib` and `compile_s`: NaN where PyTorch does not tell or compile."""
  if on_gpu():
    torch.cuda.reset_peak_memory_stats()
  start = time.perf_counter()
  result = run()
  seconds = time.perf_counter() - start if name == 'compile' else math.nan
  return result, {'mib': torch.cuda.max_memory_allocated() / 2**20 if on_gpu() else math.nan, 'compile_s': seconds}


def compiled(function: jax.stages.Wrapped, *arguments: Any) -> tuple[jax.stages.Compiled, dict[str, float]]:
  """A function of ours for these arguments, and its `mib` and `compile_s`."""
  start = time.perf_counter()
  result = function.lower(*arguments).compile()
  seconds, used = time.perf_counter() - start, result.memory_analysis()
  made = used.output_size_in_bytes - used.alias_size_in_bytes  # what is donated is an argument already
  mib = (used.temp_size_in_bytes + used.argument_size_in_bytes + made) / 2**20
  return result, {'mib': mib, 'compile_s': seconds}


def wait(torch: Any) -> None:
  """Until PyTorch's device has done what it was given."""
  if on_gpu():
    torch.cuda.synchronize()


def to_torch(torch: Any, video: np.ndarray) -> Any:
  """`b t h w 3` -> `b t 3 h w` on PyTorch's device."""
  return torch.tensor(np.ascontiguousarray(np.moveaxis(video, -1, 2))).to(device())


def check(name: str, found: Iterable, wanted: Iterable, dtype: str) -> float:
  """The largest difference relative to the largest number; a UserError if that is no rounding."""
  worst = 0.0
  for one, other in zip(found, wanted, strict=True):
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    worst = float(np.maximum(worst, np.abs(a - b).max() / np.abs(b).max()))  # NaN stays
  if not worst <= TOLERANCES[dtype]:
    raise UserError(f'{name} is {worst:.1e} of the largest number off: what computes something else is not timed')
  return worst


def take_turns(cases: dict[str, Callable[[], Any]], timing: Timing) -> dict[str, list[float]]:
  """Seconds of each case in every round, one after the other; a first round does not count."""
  now, times = CLOCKS[timing.clock], {name: [] for name in cases}
  for round_ in range(timing.rounds + 1):
    for name, run in cases.items():
      start = now()
      run()
      if round_:
        times[name].append(now() - start)
  return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
  """How many times as fast as `base`: the median over the rounds."""
  return statistics.median(b / a for a, b in zip(times[name], times[base], strict=True))


HEAD = (
  f'{"batch":>6} {"":17} {"ms":>10} {"clips/s":>9} {"x first":>8} {"of peak":>8} {"off by":>8} {"MiB":>8} '
  f'{"compile s":>9}'
)


def measure(cases: dict[str, Case], batch: int, peak: float, timing: Timing, **about) -> list[dict[str, Any]]:
  """Times cases of `batch` clips in turns; a row for each, with `about`, printed below HEAD: the first is the base."""
  times, base, rows = take_turns({name: case.run for name, case in cases.items()}, timing), next(iter(cases)), []
  for name, case in cases.items():
    seconds, faster = statistics.median(times[name]), ratio(times, name, base)
    share = case.flops / seconds / peak if peak else math.nan
    known = {'off_by': case.off_by, 'mib': case.mib, 'compile_s': case.compile_s}
    found = {'seconds': seconds, 'times_first_peer': faster, 'share': share}
    rows.append({**about, 'batch': batch, 'name': name, **found, **known})
    print(
      f'{batch:6} {name:17} {1000 * seconds:10.1f} {batch / seconds:9.3f} {faster:8.2f} {share:8.1%} '
      f'{case.off_by:8.1e} {case.mib:8.0f} {case.compile_s:9.1f}',
      flush=True,
    )
  return rows


def peaks(dtype: str, clock: str = 'wall') -> tuple[float, float]:
  """FLOP/s of matrix products and bytes/s of memory: a GPU's by its data sheet, else measured here; 0 if unknown."""
  kind = jax.devices()[0].device_kind.lower()
  for chip in CHIPS.values():
    if chip.platform == 'cuda' and chip.name in kind:
      return chip.flops, chip.speed  # float32 has no such peak
  if on_gpu():
    return 0.0, 0.0
  side, numbers = 2048, 2**25
  x = jnp.ones((side, side), dtype)
  flops = 2 * side**3 / _best(clock, jax.jit(jnp.matmul).lower(x, x).compile(), x, x)
  x = jnp.ones(numbers, jnp.float32)
  return flops, 2 * 4 * numbers / _best(clock, jax.jit(lambda x: x + 1, donate_argnums=0), x)


def _best(clock: str, run: Callable, *args) -> float:
  """Seconds of the fastest of some calls; what is donated comes back as the result."""
  times = []
  for _ in range(8):
    start = CLOCKS[clock]()
    result = jax.block_until_ready(run(*args))
    times.append(CLOCKS[clock]() - start)
    args = (result, *args[1:]) if len(args) == 1 else args
  return min(times)


def describe() -> str:
  """The device, and what else says how to read the figures."""
  cores = f'{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}'
  return f'{jax.devices()[0].device_kind}, {cores}, jax {jax.__version__}, Python {sys.version.split()[0]}'


def define_flags() -> None:
  """The flags that these benchmarks share; defined where one is run, so that tests may import them all."""
  flags.DEFINE_list('frames', '8', 'Frames of a clip, one number or more.')
  flags.DEFINE_enum('dtype', '', ['', 'float32', 'bfloat16'], 'Default: float32, and bfloat16 on a GPU.')
  flags.DEFINE_integer('rounds', 7, 'How often each is timed.', lower_bound=1)
  flags.DEFINE_enum('clock', 'wall', list(CLOCKS), 'Time on the clock, or CPU time of all threads.')
  flags.DEFINE_string('json', '', 'A file to write the figures to.')


def define_peer_flags() -> None:
  """Likewise, of those beside transformers."""
  define_flags()
  flags.DEFINE_string('size', 'B/16', 'A ViT.')
  flags.DEFINE_integer('pixels', 224, 'Of a side of a frame.', lower_bound=1)
  flags.DEFINE_list('attention', 'auto', 'Of ours: auto, cudnn, plain; one or more, side by side.')
  flags.DEFINE_list('peers', '', 'Of eager, sdpa, compile; default: eager,sdpa, and all on a GPU.')


def timing() -> Timing:
  """As the flags say."""
  return Timing(flags.FLAGS.rounds, flags.FLAGS.clock)


def chosen_dtype() -> str:
  """Of the computation, as the flag says or as suits the device."""
  return flags.FLAGS.dtype or ('bfloat16' if on_gpu() else 'float32')


def chosen_peers() -> list[str]:
  """transformers' ways, the first of which the others are compared with."""
  return flags.FLAGS.peers or ['eager', 'sdpa'] + ['compile'] * on_gpu()


def by_attention(name: str, config: MEViTConfig) -> dict[str, MEViTConfig]:
  """One of ours with every attention that the flag names, of which 'auto' needs no saying."""
  attentions = flags.FLAGS.attention
  return {name if a == 'auto' else f'{name} {a}': dataclasses.replace(config, attention=a) for a in attentions}


def write(rows: list[dict], **about) -> None:
  """The figures as JSON, if --json names a file."""
  if flags.FLAGS.json:
    about = {'on': describe(), 'dtype': chosen_dtype(), 'clock': flags.FLAGS.clock, **about}
    Path(flags.FLAGS.json).write_text(json.dumps({**about, 'rows': rows}, indent=2) + '\n')
