"""Cost and memory of the kernels."""

from typing import NamedTuple

from mevit_jax.models.kernels.windows import LANES, Plan, lanes_of, registers_of, round_up

ROWS = 1024  # maximum rows of a window, whose logits are all in VMEM at once
VMEM = 40 * 2**20  # bytes; the smallest chip has 64 MiB, part of which the compiler needs


class Cost(NamedTuple):
  """Cost of one call.

  Attributes:
    flops: matrix unit FLOPs, including the padding of 128 x 128 tiles; a multiply-add is two.
    bytes: HBM traffic.
    exponentials: number of exponentials, including padding.
  """

  flops: int
  bytes: int
  exponentials: int


def cost(shape: tuple[int, int, int, int], heads: int, plan: Plan, token: bool, backward: bool, itemsize: int) -> Cost:
  """Counts what the kernel executes, padding included, in a forward or backward pass over `b t n d`."""
  b, t, n, d = shape
  lanes, width = lanes_of(d, heads), d // heads
  down, across = plan.rows, -(-plan.rows // LANES)  # keys; tiles of queries or keys
  tiles = 0  # rows passed through a tile, for one window and all heads
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
  """Estimates the VMEM of the backward pass, the larger one; its arrays are double-buffered."""
  _, t, _, d = shape
  lanes = lanes_of(d, heads)
  array = t * round_up(plan.padded, 8) * round_up(lanes, LANES) * itemsize
  logits = plan.rows * round_up(plan.rows, LANES) * (4 + 4 + 2 * itemsize)
  return 2 * (7 * array + plan.bias.nbytes) + plan.at_once * (lanes // (d // heads)) * logits
