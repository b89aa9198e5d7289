"""Motion attention: limits of the block size, equivariance, masking; softmax in float32."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.models.attention import Heads, attend, motion_attention
from tests.helpers import naive
from tests.helpers.cases import TINY
from tests.helpers.naive import assert_close


def random_heads(*shape):
  rng = np.random.default_rng(0)
  return Heads(*rng.standard_normal((3, *shape, 2, 4)).astype(np.float32))


def motion(grid, block_size, frames=3, token=True):
  """Returns a config with random heads of its patches and of a class token."""
  config = dataclasses.replace(TINY, image_size=grid, block_size=block_size)
  patches = random_heads(2, frames, grid[0] * grid[1])
  return config, patches, random_heads(2) if token else None


def joint(queries, keys, values, b):
  """Returns the attention output of each token of a list over all of them, for one example in float64: eqs. 3 and 4."""
  places = range(len(queries))
  k, v = ({x: np.float64(part[x][b]) for x in places} for part in (keys, values))
  return np.stack([naive.attend(np.float64(queries[x][b]), k, v, places) for x in places])


def test_a_block_of_the_full_grid_is_joint_space_time_attention():
  config, patches, token = motion((2, 3), 3)
  output, token_output = motion_attention(patches, token, config)
  flat = (x.reshape(2, -1, 2, 4).swapaxes(0, 1) for x in patches)  # t·n b h k
  heads = [[one, *many] for one, many in zip(token, flat, strict=True)]
  for b in range(2):
    expected = joint(*heads, b)
    assert_close([token_output[b], output[b].reshape(-1, 2, 4)], [expected[0], expected[1:]], 1e-6)


def test_blocks_of_one_patch_are_time_attention():
  config, patches, _ = motion((2, 3), 1, token=False)
  output, _ = motion_attention(patches, None, config)
  for b in range(2):
    for p in range(6):
      expected = joint(*(x[:, :, p].swapaxes(0, 1) for x in patches), b)  # eq. 7
      assert_close(output[b, :, p], expected, 1e-6)


@pytest.mark.parametrize('what', ['equal blocks', 'patches within each block'])
def test_motion_attention_is_equivariant_to_permutations_within_blocks(what):
  config, patches, token = motion((5, 4), 2)  # four blocks of 2x2 patches, then two of 1x2
  rng = np.random.default_rng(1)
  blocks = np.split(np.arange(20), [4, 8, 12, 16, 18])
  if what == 'equal blocks':
    order = [np.concatenate([blocks[i] for i in [2, 3, 1, 0, 5, 4]])] * 3
  else:
    order = [np.concatenate([rng.permutation(block) for block in blocks]) for _ in range(3)]

  def permuted(x):
    return np.take_along_axis(np.asarray(x), np.stack(order)[None, :, :, None, None], axis=2)

  output, token_output = motion_attention(patches, token, config)
  moved = motion_attention(Heads(*map(permuted, patches)), token, config)
  assert_close(moved, (permuted(output), token_output), 1e-6)


def test_motion_attention_reads_only_its_own_block():
  config, patches, _ = motion((5, 4), 2, token=False)
  change = np.zeros((2, 3, 20, 2, 4), np.float32)
  change[:, 1, 16] = 1  # the first patch of the first of the two smaller blocks, in one frame
  before, _ = motion_attention(patches, None, config)
  after, _ = motion_attention(Heads(*(x + change for x in patches)), None, config)
  changed = np.any(np.asarray(before != after), axis=(0, 3, 4))  # t n
  assert changed[:, 16:18].all()
  assert changed.sum() == 3 * 2


def test_softmax_of_bfloat16_heads_is_float32():
  heads = [2 * x for x in random_heads(2, 16)]  # bfloat16 changes such logits by a few percent
  heads = Heads(*(jnp.asarray(x, jnp.bfloat16) for x in heads))
  output = attend(*heads)  # b s h k
  for b in range(2):
    assert_close(output[b], joint(*(x.swapaxes(0, 1) for x in heads), b), 1.5 * 2**-8)
