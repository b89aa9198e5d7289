"""Resized position embeddings against jax's and torch's own resizing."""

import jax
import numpy as np
import pytest

from mevit_jax.pretrained.positions import resize_space, resize_time
from tests.pretrained.conftest import assert_close

SIZES = [(24, 24), (7, 7), (10, 20), (13, 15), (1, 1)]


@pytest.fixture
def grid(rng):
  return rng.normal(size=(14, 14, 8)).astype(np.float32)


@pytest.mark.parametrize('size', SIZES)
def test_antialiased_resize_equals_jax(grid, size):
  assert_close(resize_space(grid, size, antialias=True), jax.image.resize(grid, (*size, 8), 'cubic'))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('antialias', [True, False])
def test_resize_equals_torch(grid, torch, size, antialias):
  theirs = torch.nn.functional.interpolate(
    torch.tensor(grid).permute(2, 0, 1)[None], size=size, mode='bicubic', antialias=antialias, align_corners=False
  )
  assert_close(resize_space(grid, size, antialias=antialias), theirs[0].permute(1, 2, 0))


@pytest.mark.parametrize('frames', [1, 4, 5, 16, 33])
def test_resize_in_time_equals_torch(rng, torch, frames):
  times = rng.normal(size=(8, 4)).astype(np.float32)
  theirs = torch.nn.functional.interpolate(torch.tensor(times).T[None], size=frames, mode='linear')[0].T
  assert_close(resize_time(times, frames), theirs)


@pytest.mark.parametrize('antialias', [True, False])
def test_resize_keeps_equal_sizes_and_constants(grid, rng, antialias):
  """The same size changes nothing, constants stay constant, and both axes are treated alike."""
  assert resize_space(grid, (14, 14), antialias=antialias) is grid
  ones = np.ones_like(grid)
  np.testing.assert_allclose(resize_space(ones, (9, 31), antialias=antialias), 1, rtol=1e-6)
  turned = resize_space(grid.swapaxes(0, 1), (20, 9), antialias=antialias).swapaxes(0, 1)
  np.testing.assert_allclose(resize_space(grid, (9, 20), antialias=antialias), turned, rtol=1e-6, atol=1e-6)
  one = rng.normal(size=(1, 4)).astype(np.float32)
  np.testing.assert_array_equal(resize_time(one, 3), np.repeat(one, 3, axis=0))
