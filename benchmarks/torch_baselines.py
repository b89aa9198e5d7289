"""PyTorch baselines: the TimeSformer of transformers with the same weights as our model, run in three ways."""

import dataclasses
import functools
import importlib.metadata
import math
import os
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch needs memory of the GPU too

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import timing
from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.models.functional import Model
from mevit_jax.pretrained.load import load


def device() -> str:
  """Returns the name of PyTorch's device."""
  return 'cuda' if timing.has_gpu() else 'cpu'


def import_torch() -> Any:
  """Imports PyTorch and gives it all cores of this process.

  Raises:
    UserError: torch is missing, or does not see the GPU that JAX sees.
  """
  try:
    torch = importlib.import_module('torch')
  except ImportError as error:
    raise UserError('this needs torch and transformers: pip install torch transformers') from error
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  if timing.has_gpu() and not torch.cuda.is_available():
    raise UserError(f'JAX sees a GPU and torch {torch.__version__} does not: install a build of torch for CUDA')
  return torch


@functools.cache
def stub_torchvision_operators(torch: Any) -> Any:
  """Declares two torchvision operators, so that a torchvision for GPUs can be imported beside a torch for CPUs.

  pip installs this combination for a CPU build of torch with the extra slow, and transformers imports
  torchvision. The operators of such a torchvision do not load, but its import registers shapes for two of them.
  'FRAGMENT' adds operators to torchvision's namespace; 'DEF' would claim the namespace.

  Returns:
    The library, or None where it is not needed. The cache keeps it alive, and with it its operators.
  """
  try:
    version = importlib.metadata.version('torchvision')
  except importlib.metadata.PackageNotFoundError:
    return None
  if torch.version.cuda is not None or version.endswith('+cpu'):
    return None
  library = torch.library.Library('torchvision', 'FRAGMENT')
  for name in ('nms', 'qnms'):
    library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
  return library


@functools.cache
def import_transformers(torch: Any) -> Any:
  """Imports the TimeSformer module of transformers, without warnings and progress bars."""
  stub_torchvision_operators(torch)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    importlib.import_module('transformers.utils.logging').disable_progress_bar()
    return importlib.import_module('transformers.models.timesformer')


def timesformer_config(**changes) -> MEViTConfig:
  """Returns the config of a TimeSformer; by default B/16 with 8 frames of 224x224."""
  fields = {
    'classes': 400, 'space_blocks': 0, 'motion_blocks': 12, 'class_blocks': 0,
    'block_size': 1, 'attention_order': 'time_space', 'class_token_in_motion': False,
  }  # fmt: skip
  return MEViTConfig(**{**fields, **changes})


def make_timesformer(torch: Any, config: MEViTConfig) -> Any:
  """Builds a TimesformerForVideoClassification of the same sizes in evaluation mode, with random parameters."""
  transformers = import_transformers(torch)
  baseline = transformers.TimesformerForVideoClassification(
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
  with torch.no_grad():  # biases and norms are initialized to constants, which would hide swapped parameters
    for name, parameter in baseline.state_dict().items():
      parameter.copy_(torch.randn(parameter.shape, generator=generator) * (config.width * 1.5) ** -0.5)
      if 'norm' in name and name.endswith('weight'):
        parameter += 1
  return baseline.eval()


def convert_weights(baseline: Any, model: Model) -> dict:
  """Converts the parameters of a baseline to those of our model."""
  with tempfile.TemporaryDirectory() as folder:
    baseline.save_pretrained(folder)
    return jax.tree.map(jnp.asarray, load(folder, model, head='keep').params)


def use_sdpa(torch: Any, baseline: Any) -> Any:
  """Replaces the baseline's attention by scaled_dot_product_attention, which transformers does not use for it."""

  def forward(self, hidden_states, output_attentions=False):
    b, s, d = hidden_states.shape
    qkv = self.qkv(hidden_states).reshape(b, s, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
    output = torch.nn.functional.scaled_dot_product_attention(*qkv)  # b h s k
    return (output.transpose(1, 2).reshape(b, s, d),)

  for layer in baseline.modules():
    if type(layer).__name__ == 'TimesformerSelfAttention':
      layer.forward = types.MethodType(forward, layer)
  return baseline


def make_baseline(torch: Any, config: MEViTConfig, name: str) -> Any:
  """Builds a baseline on PyTorch's device: 'eager' (unchanged), 'sdpa' (`use_sdpa`) or 'compile' ('sdpa' compiled)."""
  baseline = make_timesformer(torch, config).to(device())
  if name != 'eager':
    use_sdpa(torch, baseline)
  if name == 'compile':
    baseline.compile()
  return baseline


def first_call(torch: Any, name: str, run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
  """Calls a baseline for the first time; also returns `mib` and `compile_s`, NaN where PyTorch does not report them."""
  if timing.has_gpu():
    torch.cuda.reset_peak_memory_stats()
  start = time.perf_counter()
  result = run()
  seconds = time.perf_counter() - start if name == 'compile' else math.nan
  return result, {
    'mib': torch.cuda.max_memory_allocated() / 2**20 if timing.has_gpu() else math.nan,
    'compile_s': seconds,
  }


def synchronize(torch: Any) -> None:
  """Waits until PyTorch's device has finished."""
  if timing.has_gpu():
    torch.cuda.synchronize()


def to_torch(torch: Any, video: np.ndarray) -> Any:
  """Copies a video to PyTorch's device: `b t h w 3` -> `b t 3 h w`."""
  return torch.tensor(np.ascontiguousarray(np.moveaxis(video, -1, 2))).to(device())


def define_flags() -> None:
  """Defines the flags of the benchmarks with baselines."""
  timing.define_flags()
  flags.DEFINE_string('size', 'B/16', 'ViT variant.')
  flags.DEFINE_integer('pixels', 224, 'Side length of a frame in pixels.', lower_bound=1)
  flags.DEFINE_list('attention', 'auto', 'Attention implementations of our model: auto, cudnn, plain; one or more.')
  flags.DEFINE_list('baselines', '', 'Baselines: eager, sdpa, compile. Default: eager,sdpa; all three on a GPU.')


def parse_baselines() -> list[str]:
  """Returns the baselines that --baselines names; speedups are relative to the first."""
  return flags.FLAGS.baselines or ['eager', 'sdpa'] + ['compile'] * timing.has_gpu()


def attention_variants(name: str, config: MEViTConfig) -> dict[str, MEViTConfig]:
  """Returns the config with every attention implementation of --attention, by name; 'auto' adds nothing to the name."""
  attentions = flags.FLAGS.attention
  return {name if a == 'auto' else f'{name} {a}': dataclasses.replace(config, attention=a) for a in attentions}
