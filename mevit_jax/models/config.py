"""What a MEViT is: its sizes, its stages, and the choices where the paper is silent."""

import dataclasses
import math
from typing import Literal, get_args

from mevit_jax.errors import UserError

# The ViT family: width, heads, width of the MLP, number of blocks (Dosovitskiy et al. 2021, table 1; DeiT's Ti and S).
_SIZES = {
  'Ti': (192, 3, 768, 12),
  'S': (384, 6, 1536, 12),
  'B': (768, 12, 3072, 12),
  'L': (1024, 16, 4096, 24),
  'H': (1280, 16, 5120, 32),
}


@dataclasses.dataclass(frozen=True)
class MEViTConfig:
  """A MEViT: three stages of blocks over the patches of a clip.

  Attributes:
    classes: number of labels; in a recipe, 0 is as many as the dataset has.
    frames: frames of a clip, `t`.
    image_size: height and width of a frame in pixels; one number is a square.
    patch_size: height and width of a patch in pixels; one number is a square.
    width: width of a token, `d`.
    heads: heads of every attention, `h`; divides the width.
    mlp_dim: hidden width of the feed-forward network.
    space_blocks: blocks with space attention only (eqs. 6, 5), first.
    motion_blocks: blocks with space and motion attention (eqs. 6, 8, 5).
    class_blocks: class-attention blocks (eqs. 10, 5), last. With 0 of them the class token is there from the input on.
    block_size: `M`: motion attention reads M x M patches in all frames. 1 is TimeSformer's time attention, the whole
      grid is joint space-time attention. Where M does not divide the grid the last blocks are smaller.
    order: of the two attentions within a motion block.
    motion_start: how motion attention starts: 'zero' copies q, k, v from space attention and zeroes the output, so that
      it adds nothing at first; 'copy' copies all; 'random' leaves its own initialisation.
    class_token_in_motion: whether the class token is a key and a query of every block of motion attention (eq. 8).
    drop_path: rate of stochastic depth at the last block, rising linearly from 0 at the first.
    layer_norm_eps: 1e-6 for weights of Google, timm, DeiT and TimeSformer; 1e-12 for HF ViT.
    dtype: of the computation; parameters, softmax and logits are float32 (float64 is for tests, with
      JAX_ENABLE_X64).
    attention: how attention runs: 'auto' is what is fastest on the platform that it is compiled for, 'plain' XLA's own.
      'cudnn' is 'auto' but for NVIDIA GPUs (Ampere or newer), where bfloat16 goes through cuDNN: not yet timed.
    unroll: how many blocks the compiler sees at once; 0 is all: the longest compilation, the fastest step but on CPUs.
    remat: what the backward pass recomputes: 'none', 'block' (all but the blocks' inputs), or 'residuals' (all but the
      outputs of the attentions and of the feed-forward's first layer).
  """

  classes: int = 0
  frames: int = 8
  image_size: tuple[int, int] = (224, 224)
  patch_size: tuple[int, int] = (16, 16)
  width: int = 768
  heads: int = 12
  mlp_dim: int = 3072
  space_blocks: int = 4
  motion_blocks: int = 7
  class_blocks: int = 1
  block_size: int = 2
  order: Literal['space_time', 'time_space'] = 'space_time'
  motion_start: Literal['zero', 'copy', 'random'] = 'zero'
  class_token_in_motion: bool = True
  drop_path: float = 0.0
  layer_norm_eps: float = 1e-6
  dtype: Literal['float32', 'bfloat16', 'float64'] = 'bfloat16'
  attention: Literal['auto', 'cudnn', 'plain'] = 'auto'
  unroll: int = 0
  remat: Literal['none', 'block', 'residuals'] = 'none'

  def __post_init__(self):
    for name in ('image_size', 'patch_size'):
      object.__setattr__(self, name, _pair(name, getattr(self, name)))
    for name in ('frames', 'width', 'heads', 'mlp_dim', 'block_size'):
      _check(getattr(self, name) >= 1, f'{name} must be at least 1, not {getattr(self, name)}')
    for name in ('classes', 'space_blocks', 'motion_blocks', 'class_blocks', 'unroll'):
      _check(getattr(self, name) >= 0, f'{name} must not be negative, and is {getattr(self, name)}')
    _check(self.depth > 0, 'space_blocks, motion_blocks and class_blocks are all 0: no model')
    _check(self.width % self.heads == 0, f'width {self.width} is no multiple of heads {self.heads}')
    _check(0 <= self.drop_path < 1, f'drop_path must be in [0, 1), not {self.drop_path}')
    for side, patch in zip(self.image_size, self.patch_size, strict=True):
      _check(
        side % patch == 0,
        f'image_size {self.image_size} is no multiple of patch_size {self.patch_size}',
      )
    _check(
      self.motion_blocks == 0 or self.block_size <= max(self.grid),
      f'block_size {self.block_size} is larger than the {self.grid[0]}x{self.grid[1]} grid of patches; '
      f'the whole grid is {max(self.grid)}',
    )
    for field in dataclasses.fields(self):
      if isinstance(field.default, str):
        value, choices = getattr(self, field.name), get_args(field.type)
        _check(value in choices, f'{field.name} must be one of {list(choices)}, not {value!r}')

  @property
  def grid(self) -> tuple[int, int]:
    """Patches down and across a frame."""
    (height, width), (patch_height, patch_width) = self.image_size, self.patch_size
    return height // patch_height, width // patch_width

  @property
  def depth(self) -> int:
    """Blocks of all stages."""
    return self.space_blocks + self.motion_blocks + self.class_blocks

  @property
  def attentions(self) -> tuple[str, str]:
    """The attentions of a motion block, in their order."""
    return ('space', 'motion') if self.order == 'space_time' else ('motion', 'space')

  @property
  def blocks(self) -> tuple[tuple[int, int, int, int], ...]:
    """The blocks of a frame by region: (blocks down, blocks across, block height, block width), at most four."""
    down, across = (_cut(side, self.block_size) for side in self.grid)
    return tuple((nh, nw, mh, mw) for nh, mh in down for nw, mw in across)


def variant(name: str) -> dict:
  """The sizes of a ViT by its usual name ('B/16'): width, heads, mlp_dim, patch_size, depth."""
  size, _, patch = name.partition('/')
  if size not in _SIZES or not patch.isdigit():
    raise UserError(f"no variant {name!r}: it is one of {', '.join(_SIZES)}, a slash and the patch, as in 'B/16'")
  width, heads, mlp_dim, depth = _SIZES[size]
  return {
    'width': width,
    'heads': heads,
    'mlp_dim': mlp_dim,
    'patch_size': (int(patch), int(patch)),
    'depth': depth,
  }


def count_flops(config: MEViTConfig) -> int:
  """FLOPs of one view's forward pass in its matrix products; a multiply-add is two.

  Papers on video transformers mostly print multiply-adds and call them FLOPs: half of this.
  """
  c, d = config, config.width
  n = math.prod(c.grid)
  patches = c.frames * n
  token = 1 if c.class_blocks == 0 else 0

  def projections(queries, keys):
    return d * d * (2 * queries + 2 * keys)  # q and o, k and v

  def within(groups, size, token):
    return 2 * groups * (size + token) ** 2 * d  # logits and weighted sum

  mlp = 2 * d * c.mlp_dim
  space = projections(patches + token, patches + token) + within(c.frames, n, token)
  joins = token if c.class_token_in_motion else 0
  motion = projections(patches + joins, patches + joins) + sum(
    within(nh * nw, c.frames * mh * mw, joins) for nh, nw, mh, mw in c.blocks
  )
  total = patches * 3 * math.prod(c.patch_size) * d + d * c.classes
  total += (c.space_blocks + c.motion_blocks) * (space + (patches + token) * mlp)
  total += c.motion_blocks * motion
  total += c.class_blocks * (projections(1, patches) + 2 * patches * d + mlp)
  return 2 * total


def _cut(side: int, block: int) -> list[tuple[int, int]]:
  """A side of the grid as runs of (number of blocks, size of each): full blocks, then what is left."""
  runs = [(side // block, block), (1, side % block)]
  return [(count, size) for count, size in runs if count and size]


def _pair(name: str, value) -> tuple[int, int]:
  sides = (value,) if isinstance(value, int) else tuple(value)
  _check(
    len(sides) in (1, 2) and all(isinstance(side, int) and side >= 1 for side in sides),
    f'{name} must be one or two positive integers, not {value!r}',
  )
  return sides[0], sides[-1]


def _check(holds: bool, message: str) -> None:
  if not holds:
    raise UserError(message)
