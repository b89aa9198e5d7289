"""Model configuration: sizes, stages, and the choices where the paper is silent."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

from mevit_jax.config.validation import COUNT, COUNT_OR_ZERO, DECAY, NOT_NEGATIVE, Range, Validated
from mevit_jax.errors import UserError

_SIZE = Range(1, 10**5)

# Fields that pretrained weights determine: with other values the same weights are another function.
WEIGHT_FIELDS = ('layer_norm_eps', 'activation', 'pre_norm', 'rotary_theta')

# Fields that the weights of an image encoder determine, see `space_encoder`.
ENCODER_FIELDS = ('width', 'heads', 'mlp_dim', 'patch_size', 'space_blocks', 'frame_tokens')

# The ViT family: width, heads, width of the MLP, number of blocks (Dosovitskiy et al. 2021, table 1; DeiT's Ti and S).
_SIZES = {
  'Ti': (192, 3, 768, 12),
  'S': (384, 6, 1536, 12),
  'B': (768, 12, 3072, 12),
  'L': (1024, 16, 4096, 24),
  'H': (1280, 16, 5120, 32),
}


@dataclasses.dataclass(frozen=True)
class MEViTConfig(Validated):
  """A MEViT: three stages of blocks over the patches of a clip.

  Attributes:
    classes: number of classes; 0 in a config file means as many as the dataset has.
    frames: frames per clip, `t`.
    image_size: height and width of a frame in pixels; one number means a square.
    patch_size: height and width of a patch in pixels; one number means a square.
    width: model width, `d`.
    heads: attention heads, `h`; must divide the width.
    mlp_dim: hidden units of the MLP.
    space_blocks: number of blocks with space attention only (eqs. 6, 5), the first stage.
    motion_blocks: number of blocks with space and motion attention (eqs. 6, 8, 5), the second stage.
    class_blocks: number of class-attention blocks (eqs. 10, 5), the last stage. With 0 of them, the class token is an
      input of the first block.
    block_size: `M`: motion attention reads M x M patches in all frames. 1 is TimeSformer's time attention, the whole
      grid is joint space-time attention. If M does not divide the grid, the last row and column of blocks are smaller.
    attention_order: order of the two attentions within a motion block.
    motion_init: initialization of motion attention: 'zero' copies q, k, v from space attention and zeroes the output
      projection, so that it adds nothing at first; 'copy' copies all four; 'random' initializes it independently.
    class_token_in_motion: whether the class token is a key and a query of every block of motion attention (eq. 8).
    frame_tokens: learned tokens of every frame that take part in space attention only: a ViT's class token, then its
      registers (Darcet et al. 2024). With them, patch tokens are those of the ViT, frame by frame. 0 is the paper's
      model. Without class blocks, they replace the class token: logits are the mean over frames of the first one's.
    activation: activation of the MLP: 'gelu' (exact), 'gelu_tanh' (its tanh approximation: SigLIP) or 'quick_gelu'
      (x sigmoid(1.702 x): CLIP). Pretrained weights determine it, as the next three fields.
    pre_norm: whether a LayerNorm follows the embedding, as in CLIP.
    rotary_theta: base of rotary 2-D positions of the patches in all attentions, as in DINOv3 (100 there); 0 for none.
    space_encoder: whether embedding and space stage are an image encoder of their own: its final LayerNorm follows the
      space stage, and time positions are added behind it instead of in the embedding. The features of a frame then do
      not depend on other frames, so that a frozen encoder can be applied once (`training.cache_features`), and what is
      behind it can tell the order of frames.
    drop_path: stochastic depth rate of the last block, rising linearly from 0 at the first; with `space_encoder` the
      space stage has none.
    layer_norm_eps: LayerNorm epsilon; 1e-6 in weights of Google, timm, DeiT and TimeSformer, 1e-12 in Hugging Face ViT.
    dtype: dtype of activations; parameters, softmax and logits are float32 (float64 is for tests, with
      JAX_ENABLE_X64).
    attention: implementation of attention: 'auto' uses the fastest tested one of the platform, 'plain' XLA's own;
      'cudnn' is 'auto' but for NVIDIA GPUs (Ampere or newer), where bfloat16 uses cuDNN, which is not yet timed.
    unroll: number of blocks that the compiler unrolls at once; 0 unrolls all, which compiles longest and runs fastest,
      except on CPUs.
    remat: rematerialization in the backward pass: 'none', 'block' (all but the blocks' inputs), or 'residuals' (all but
      the outputs of the attentions and of the MLP's first layer).
  """

  group: ClassVar[str] = 'model'
  classes: Annotated[int, Range(0, 10**6)] = 0
  frames: Annotated[int, Range(1, 10**4)] = 8
  image_size: Annotated[tuple[int, int], _SIZE] = (224, 224)
  patch_size: Annotated[tuple[int, int], _SIZE] = (16, 16)
  width: Annotated[int, _SIZE] = 768
  heads: Annotated[int, _SIZE] = 12
  mlp_dim: Annotated[int, Range(1, 10**6)] = 3072
  space_blocks: Annotated[int, Range(0, 1000)] = 4
  motion_blocks: Annotated[int, Range(0, 1000)] = 7
  class_blocks: Annotated[int, Range(0, 1000)] = 1
  block_size: Annotated[int, COUNT] = 2
  attention_order: Literal['space_time', 'time_space'] = 'space_time'
  motion_init: Literal['zero', 'copy', 'random'] = 'zero'
  class_token_in_motion: bool = True
  frame_tokens: Annotated[int, Range(0, 1000)] = 0
  activation: Literal['gelu', 'gelu_tanh', 'quick_gelu'] = 'gelu'
  pre_norm: bool = False
  rotary_theta: Annotated[float, NOT_NEGATIVE] = 0.0
  space_encoder: bool = False
  drop_path: Annotated[float, DECAY] = 0.0
  layer_norm_eps: Annotated[float, Range(0, 1)] = 1e-6
  dtype: Literal['float32', 'bfloat16', 'float64'] = 'bfloat16'
  attention: Literal['auto', 'cudnn', 'plain'] = 'auto'
  unroll: Annotated[int, COUNT_OR_ZERO] = 0
  remat: Literal['none', 'block', 'residuals'] = 'none'

  def __post_init__(self) -> None:
    for name in ('image_size', 'patch_size'):
      object.__setattr__(self, name, _pair(self.path(name), getattr(self, name)))
    super().__post_init__()
    self.require(self.depth > 0, 'space_blocks', 'motion_blocks and class_blocks are all 0: the model has no blocks')
    self.require(self.width % self.heads == 0, 'width', f'{self.width} is not divisible by model.heads {self.heads}')
    self.require(
      not self.rotary_theta or self.width // self.heads % 4 == 0,
      'rotary_theta',
      f'needs heads whose width is a multiple of 4, not {self.width // self.heads}; set 0 or change model.heads',
    )
    self.require(
      not self.space_encoder or (self.space_blocks > 0 and (self.class_blocks > 0 or self.frame_tokens > 0)),
      'space_encoder',
      'needs space_blocks, and class_blocks or frame_tokens: a class token of its own would join the frames',
    )
    for side, patch in zip(self.image_size, self.patch_size, strict=True):
      self.require(
        side % patch == 0, 'image_size', f'{self.image_size} is not divisible by model.patch_size {self.patch_size}'
      )
    self.require(
      self.motion_blocks == 0 or self.block_size <= max(self.grid),
      'block_size',
      f'{self.block_size} is larger than the {self.grid[0]}x{self.grid[1]} grid of patches; '
      f'use {max(self.grid)} for the whole grid',
    )

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
  def patches(self) -> int:
    """Patches of a frame, `n`."""
    return math.prod(self.grid)

  @property
  def has_class_token(self) -> bool:
    """True unless the first frame token has its place."""
    return self.class_blocks > 0 or self.frame_tokens == 0

  @property
  def attentions(self) -> tuple[str, str]:
    """The attentions of a motion block, in their order."""
    return ('space', 'motion') if self.attention_order == 'space_time' else ('motion', 'space')

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


def usual_heads(width: int) -> int | None:
  """Returns the number of attention heads of the ViT of this width; None if there is none."""
  return next((heads for size, heads, *_ in _SIZES.values() if size == width), None)


def count_flops(config: MEViTConfig) -> int:
  """FLOPs of one view's forward pass in its matrix products; a multiply-add is two.

  Papers on video transformers mostly print multiply-adds and call them FLOPs: half of this.
  """
  c, d = config, config.width
  patches, frame_tokens = c.frames * c.patches, c.frames * c.frame_tokens
  token = 1 if c.class_blocks == 0 and c.has_class_token else 0

  def projections(queries: int, keys: int) -> int:
    return d * d * (2 * queries + 2 * keys)  # q and o, k and v

  def within(groups: int, size: int, token: int) -> int:
    return 2 * groups * (size + token) ** 2 * d  # logits and weighted sum

  mlp = 2 * d * c.mlp_dim
  in_space = patches + frame_tokens + token
  space = projections(in_space, in_space) + within(c.frames, c.patches + c.frame_tokens, token)
  joins = token if c.class_token_in_motion else 0
  motion = projections(patches + joins, patches + joins) + sum(
    within(nh * nw, c.frames * mh * mw, joins) for nh, nw, mh, mw in c.blocks
  )
  total = patches * 3 * math.prod(c.patch_size) * d + d * c.classes
  total += (c.space_blocks + c.motion_blocks) * (space + in_space * mlp)
  total += c.motion_blocks * motion
  total += c.class_blocks * (projections(1, patches) + 2 * patches * d + mlp)
  return 2 * total


def _cut(side: int, block: int) -> list[tuple[int, int]]:
  """A side of the grid as runs of (number of blocks, size of each): full blocks, then what is left."""
  runs = [(side // block, block), (1, side % block)]
  return [(count, size) for count, size in runs if count and size]


def _pair(path: str, value: int | tuple[int, ...]) -> tuple[int, int]:
  sides = (value,) if isinstance(value, int) else tuple(value)
  if len(sides) not in (1, 2) or not all(isinstance(side, int) for side in sides):
    raise UserError(f'{path} must be one or two integers, not {value!r}')
  return sides[0], sides[-1]
