"""Which rows of a clip a kernel reads at once: windows of patches that hold whole groups."""

import dataclasses
import functools
import math

import numpy as np

# Regions of equal blocks, each (blocks down, blocks across, block height, block width): `MEViTConfig.blocks`.
Blocks = tuple[tuple[int, int, int, int], ...]

SUBLANES = 8  # rows of a register of float32: windows start at multiples of them
PACKED = 16  # rows of a register of bfloat16
LANES = 128
MASKED = -1e30  # added to a logit whose key is of another group; finite, so that a difference of two is a number


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """The windows of an attention.

  A window is `size` patches of `frames` frames, flattened to rows; the class token's rows follow, one a group of the
  window: each is a query of its own group, and the first is a key of every group. Space attention's windows are the
  frames (`frames` is 1), and the class token stands where the padding of the last register would. Motion attention's
  windows are patches in all frames, `starts` the first of each.

  Attributes:
    space: whether a window is a frame.
    frames: frames of a window.
    size: patches of a window in each frame.
    starts: the first patch of each window; of space attention 0, once a frame.
    own: the patches of each window, from and to, that are its own; the others are of its neighbours' groups.
    groups: groups of each window.
    patterns: which bias each window has.
    bias: `patterns keys queries`: what is added to logits; 128 queries where all see the same keys.
    first_token_row: where the class token's rows begin.
    rows: rows of a window, the class token's and padding among them.
    plain: how many windows, the first ones, are all their own and hold no padding.
    patches: `n`.
    padded: patches of a frame up to the last window's end.
  """

  space: bool
  frames: int
  size: int
  starts: tuple[int, ...]
  own: tuple[tuple[int, int], ...]
  groups: tuple[int, ...]
  patterns: tuple[int, ...]
  bias: np.ndarray
  first_token_row: int
  rows: int
  plain: int
  patches: int
  padded: int

  @property
  def at_once(self) -> int:
    """Windows that a loop's body takes on: more fill the gaps between an instruction and its result."""
    return max(1, min(4, 512 // self.rows))


@functools.lru_cache(maxsize=64)
def plan_space(frames: int, patches: int, token: bool) -> Plan:
  """The windows of space attention over `t` frames of `n` patches."""
  size = round_up(patches, PACKED)
  rows = round_up(patches + token, PACKED)
  bias = np.where(np.arange(rows)[:, None] < patches + token, 0, MASKED) + np.zeros((1, LANES))
  return Plan(
    space=True,
    frames=1,
    size=size,
    starts=(0,) * frames,
    own=((0, patches),) * frames,
    groups=(1,) * frames,
    patterns=(0,) * frames,
    bias=bias[None].astype(np.float32),
    first_token_row=patches,
    rows=rows,
    plain=frames if size == patches else 0,
    patches=patches,
    padded=size,
  )


@functools.lru_cache(maxsize=64)
def plan_motion(frames: int, blocks: Blocks, token: bool) -> Plan:
  """The windows of motion attention over `t` frames, of the size that has the fewest logits."""
  sizes = [mh * mw for nh, nw, mh, mw in blocks for _ in range(nh * nw)]
  ends = np.cumsum(sizes)
  spans = [(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]
  step = SUBLANES if frames % 2 == 0 else PACKED
  least = max(round_up(last - first // step * step, step) for first, last in spans)
  choices = [_motion(frames, spans, size, step, token) for size in range(least, least + 3 * step, step)]
  beside = 2 * SUBLANES * LANES  # what a window costs beside its logits, in logits (by the compiler's schedules)
  return min(choices, key=lambda plan: len(plan.starts) * (plan.rows * round_up(plan.rows, LANES) + beside))


def _motion(frames: int, spans: list[tuple[int, int]], size: int, step: int, token: bool) -> Plan:
  windows: list[tuple[int, list[tuple[int, int]]]] = []
  for first, last in spans:
    if windows and last <= windows[-1][0] + size:
      windows[-1][1].append((first, last))
    else:
      windows.append((first // step * step, [(first, last)]))
  most = max(len(groups) for _, groups in windows)
  patch_rows = frames * size
  rows = round_up(patch_rows + most * token, PACKED)
  own = tuple((groups[0][0] - start, groups[-1][1] - start) for start, groups in windows)
  found: dict[tuple, int] = {}
  patterns = []
  for start, groups in windows:
    inside = tuple((first - start, last - start) for first, last in groups)
    patterns.append(found.setdefault(inside, len(found)))
  bias = np.stack([_bias(frames, size, inside, rows, most, token) for inside in found])
  full = [ends == (0, size) for ends in own]
  return Plan(
    space=False,
    frames=frames,
    size=size,
    starts=tuple(start for start, _ in windows),
    own=own,
    groups=tuple(len(groups) for _, groups in windows),
    patterns=tuple(patterns),
    bias=bias,
    first_token_row=patch_rows,
    rows=rows,
    plain=full.index(False) if False in full else len(full),
    patches=spans[-1][1],
    padded=windows[-1][0] + size,
  )


def _bias(frames, size, inside, rows, most, token) -> np.ndarray:
  """`keys queries` of one window: queries of no group see every key, so that their softmax is finite."""
  group = np.full(size, -1)
  for i, (first, last) in enumerate(inside):
    group[first:last] = i
  padding = rows - frames * size
  extra = np.where(np.arange(padding) < len(inside) * token, np.arange(padding), -1)
  queries = np.concatenate([np.tile(group, frames), extra])
  keys = np.concatenate([np.tile(group, frames), np.full(padding, -1)])
  allowed = (keys[:, None] == queries[None]) & (keys[:, None] >= 0) | ((keys[:, None] >= 0) & (queries[None] < 0))
  if token:
    allowed[frames * size] = True
  bias = np.where(allowed, 0, MASKED).astype(np.float32)
  return bias if most > 1 else bias[:, :1] + np.zeros((1, LANES), np.float32)


def lanes_of(width: int, heads: int) -> int:
  """Lanes of a program: whole heads and whole registers, or the whole width `d`."""
  lanes = math.lcm(width // heads, LANES)
  return lanes if width % lanes == 0 else width


def registers_of(head: int, width: int, lanes: int) -> tuple[int, int]:
  """The lanes of the registers that hold a head of this width, from and to."""
  return head * width // LANES * LANES, min(round_up((head + 1) * width, LANES), lanes)


def round_up(number: int, multiple: int) -> int:
  """The next multiple."""
  return math.ceil(number / multiple) * multiple
