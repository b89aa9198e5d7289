"""Reading datasets: files that were exchanged are noticed."""

import pytest

from mevit_jax.datasets import reader, shards
from mevit_jax.datasets.builders import moving_shapes
from mevit_jax.errors import UserError


def test_exchanged_shards_are_noticed(tmp_path):
  """Array records of few videos have the same size, so that neither sizes nor counts tell them apart."""
  shards.write(moving_shapes.build(tmp_path, {'train': 8, 'validation': 8}, frames=2, size=16))
  for name in ('train', 'validation'):
    reader.open_split(tmp_path, 'moving_shapes', name).verify()
  train, validation = sorted((tmp_path / 'moving_shapes/1.0.0').glob('*.array_record-*'))
  validation.write_bytes(train.read_bytes())
  with pytest.raises(
    UserError, match=r"first video in the shards of validation is 'train/000000', not 'validation/000000'; prepare"
  ):
    reader.open_split(tmp_path, 'moving_shapes', 'validation').verify()
