"""What the kernels cost, and which shapes they take."""

from typing import NamedTuple

from mevit_jax.models.kernels.windows import LANES, Plan, lanes_of, registers_of, round_up

ROWS = 1024  # of a window: all its logits stand in VMEM at once
VMEM = 40 * 2**20  # of the smallest chip's 64 MiB, the compiler's own needs aside


class Cost(NamedTuple):
  """Of one call.

  Attributes:
    flops: of the matrix units, their 128 x 128 tiles padded; a multiply-add is two.
    bytes: to and from the chip's memory.
    exponentials: padding among them.
  """

  flops: int
  bytes: int
  exponentials: int


def cost(shape: tuple[int, int, int, int], heads: int, plan: Plan, token: bool, backward: bool, itemsize: int) -> Cost:
  """Counts a forward or a backward pass over `b t n d`: what the kernel does, not what attention needs."""
  b, t, n, d = shape
  lanes, width = lanes_of(d, heads), d // heads
  down, across = plan.rows, -(-plan.rows // LANES)  # keys, and tiles of queries or of keys
  tiles = 0  # rows that go through a tile, of one window and of all heads
  for head in range(lanes // width):
    first, last = registers_of(head, width, lanes)
    registers = -(-(last - first) // LANES)
    logits, values = down * across * registers, width * across * across
    tiles += 2 * logits + 3 * values if backward else logits + values
  programs = b * (d // lanes)
  exponentials = down * across * LANES * (lanes // width) * len(plan.starts)
  arrays = 7 if backward else 4
  tokens = (3 + 6 + 1 if backward else 3 + 2) * b * d if token else 0
  return Cost(
    flops=2 * LANES * LANES * tiles * len(plan.starts) * programs,
    bytes=arrays * b * t * n * d * itemsize + tokens * itemsize + plan.bias.nbytes,
    exponentials=exponentials * programs,
  )


def vmem_bytes(shape: tuple[int, int, int, int], heads: int, plan: Plan, itemsize: int) -> int:
  """What the backward pass, the larger one, holds in VMEM: its arrays twice, as the next ones are on their way."""
  _, t, _, d = shape
  lanes = lanes_of(d, heads)
  array = t * round_up(plan.padded, 8) * round_up(lanes, LANES) * itemsize
  logits = plan.rows * round_up(plan.rows, LANES) * (4 + 4 + 2 * itemsize)
  return 2 * (7 * array + plan.bias.nbytes) + plan.at_once * (lanes // (d // heads)) * logits
