"""Windows of patches that a kernel processes at once; each contains complete groups."""

import dataclasses
import functools
import math

import numpy as np

# `MEViTConfig.blocks`: regions of equal blocks, each (blocks down, blocks across, block height, block width).
Blocks = tuple[tuple[int, int, int, int], ...]

SUBLANES = 8  # rows of a float32 register; windows start at multiples
PACKED = 16  # rows of a bfloat16 register
LANES = 128
MASKED = -1e30  # added to logits of keys in other groups; finite, so that differences are not NaN


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """Windows of an attention.

  A window is `size` patches of `frames` frames, flattened to rows. The class token's rows follow, one per group of the
  window: each is a query of its group, and the first is a key of every group. In space attention a window is a frame
  (`frames` is 1), and the class token takes the place of the last register's padding. In motion attention a window is
  a range of patches in all frames.

  Attributes:
    space: True if windows are frames (space attention).
    frames: frames per window.
    size: patches per window and frame.
    starts: first patch of each window; 0 for each frame in space attention.
    own: range of the patches of each window that belong to its groups; the others belong to adjacent windows.
    groups: number of groups in each window.
    patterns: index into `bias` of each window.
    bias: `patterns keys queries`, added to logits; 128 queries if all queries have the same keys.
    first_token_row: first row of the class token.
    rows: rows of a window, including the class token's and padding.
    plain: number of leading windows without padding or patches of other windows.
    patches: patches per frame, `n`.
    padded: patches per frame up to the end of the last window.
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
    """Windows per loop iteration; several hide instruction latency."""
    return max(1, min(4, 512 // self.rows))


@functools.lru_cache(maxsize=64)
def plan_space(frames: int, patches: int, token: bool) -> Plan:
  """Plans the windows of space attention over `t` frames of `n` patches."""
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
  """Plans the windows of motion attention over `t` frames, with the size that minimizes the number of logits."""
  sizes = [mh * mw for nh, nw, mh, mw in blocks for _ in range(nh * nw)]
  ends = np.cumsum(sizes)
  spans = [(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]
  step = SUBLANES if frames % 2 == 0 else PACKED
  least = max(round_up(last - first // step * step, step) for first, last in spans)
  choices = [_plan_windows(frames, spans, size, step, token) for size in range(least, least + 3 * step, step)]
  overhead = 2 * SUBLANES * LANES  # fixed cost of a window, in logits (from the compiler's schedules)
  return min(choices, key=lambda plan: len(plan.starts) * (plan.rows * round_up(plan.rows, LANES) + overhead))


def _plan_windows(frames: int, spans: list[tuple[int, int]], size: int, step: int, token: bool) -> Plan:
  """Assigns groups, given by their patch ranges, to windows of `size` patches that start at multiples of `step`."""
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
  indices: dict[tuple, int] = {}
  patterns = []
  for start, groups in windows:
    ranges = tuple((first - start, last - start) for first, last in groups)
    patterns.append(indices.setdefault(ranges, len(indices)))
  bias = np.stack([_bias(frames, size, ranges, rows, most, token) for ranges in indices])
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


def _bias(frames: int, size: int, ranges: tuple[tuple[int, int], ...], rows: int, most: int, token: bool) -> np.ndarray:
  """Builds the bias `keys queries` of a window; padding queries attend to every key, for a finite softmax."""
  group = np.full(size, -1)
  for i, (first, last) in enumerate(ranges):
    group[first:last] = i
  padding = rows - frames * size
  extra = np.where(np.arange(padding) < len(ranges) * token, np.arange(padding), -1)
  queries = np.concatenate([np.tile(group, frames), extra])
  keys = np.concatenate([np.tile(group, frames), np.full(padding, -1)])
  allowed = (keys[:, None] == queries[None]) & (keys[:, None] >= 0) | ((keys[:, None] >= 0) & (queries[None] < 0))
  if token:
    allowed[frames * size] = True
  bias = np.where(allowed, 0, MASKED).astype(np.float32)
  return bias if most > 1 else bias[:, :1] + np.zeros((1, LANES), np.float32)


def lanes_of(width: int, heads: int) -> int:
  """Returns the lanes of a program: a multiple of both a head and a register, or the model width `d`."""
  lanes = math.lcm(width // heads, LANES)
  return lanes if width % lanes == 0 else width


def registers_of(head: int, width: int, lanes: int) -> tuple[int, int]:
  """Returns the range of lanes of the registers that hold a head of this width."""
  return head * width // LANES * LANES, min(round_up((head + 1) * width, LANES), lanes)


def round_up(number: int, multiple: int) -> int:
  """Rounds up to a multiple."""
  return math.ceil(number / multiple) * multiple
