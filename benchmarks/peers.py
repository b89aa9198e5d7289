"""transformers' TimeSformer with the weights of ours, in the ways that people run it."""

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

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # a GPU's memory is PyTorch's too

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import turns
from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.models.functional import Model
from mevit_jax.pretrained.load import load


def device() -> str:
  """PyTorch's name of it."""
  return 'cuda' if turns.on_gpu() else 'cpu'


def import_torch() -> Any:
  """PyTorch, with as many threads as this process may use; a UserError where it is missing."""
  try:
    torch = importlib.import_module('torch')
  except ImportError as error:
    raise UserError('this needs torch and transformers: pip install -r requirements-parity.txt') from error
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  if turns.on_gpu() and not torch.cuda.is_available():
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
  if turns.on_gpu():
    torch.cuda.reset_peak_memory_stats()
  start = time.perf_counter()
  result = run()
  seconds = time.perf_counter() - start if name == 'compile' else math.nan
  return result, {
    'mib': torch.cuda.max_memory_allocated() / 2**20 if turns.on_gpu() else math.nan,
    'compile_s': seconds,
  }


def wait(torch: Any) -> None:
  """Until PyTorch's device has done what it was given."""
  if turns.on_gpu():
    torch.cuda.synchronize()


def to_torch(torch: Any, video: np.ndarray) -> Any:
  """`b t h w 3` -> `b t 3 h w` on PyTorch's device."""
  return torch.tensor(np.ascontiguousarray(np.moveaxis(video, -1, 2))).to(device())


def define_peer_flags() -> None:
  """Likewise, of those beside transformers."""
  turns.define_flags()
  flags.DEFINE_string('size', 'B/16', 'A ViT.')
  flags.DEFINE_integer('pixels', 224, 'Of a side of a frame.', lower_bound=1)
  flags.DEFINE_list('attention', 'auto', 'Of ours: auto, cudnn, plain; one or more, side by side.')
  flags.DEFINE_list('peers', '', 'Of eager, sdpa, compile; default: eager,sdpa, and all on a GPU.')


def chosen_peers() -> list[str]:
  """transformers' ways, the first of which the others are compared with."""
  return flags.FLAGS.peers or ['eager', 'sdpa'] + ['compile'] * turns.on_gpu()


def by_attention(name: str, config: MEViTConfig) -> dict[str, MEViTConfig]:
  """One of ours with every attention that the flag names, of which 'auto' needs no saying."""
  attentions = flags.FLAGS.attention
  return {name if a == 'auto' else f'{name} {a}': dataclasses.replace(config, attention=a) for a in attentions}
