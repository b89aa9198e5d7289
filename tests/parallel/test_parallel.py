"""Device mesh, parameter shardings and batch slices per process."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mevit_jax.config.mesh import MeshConfig
from mevit_jax.errors import UserError
from mevit_jax.parallel.hosts import global_batch, process_batch_slice
from mevit_jax.parallel.mesh import make_mesh
from mevit_jax.parallel.placement import REPLICATED, abstract_with_shardings, batch_sharding, param_shardings

DEVICES = jax.device_count()


def test_mesh_has_all_devices_or_the_requested_number():
  assert DEVICES == 8  # set by tests/conftest.py
  assert make_mesh(MeshConfig()).size == 8
  assert make_mesh(MeshConfig(data=2)).size == 2
  assert make_mesh(MeshConfig(), jax.devices()[:3]).size == 3


def test_data_axis_gets_the_remaining_devices():
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
  assert dict(mesh.shape) == {'slice': 1, 'data': 2, 'fsdp': 2, 'tensor': 2}
  assert [device.id for device in mesh.devices.ravel()] == list(range(8))
  assert make_mesh(MeshConfig(data=1, fsdp=2)).size == 2


@pytest.mark.parametrize('count', [0, 9])
def test_data_axis_larger_than_the_devices_or_zero_is_refused(count):
  with pytest.raises(UserError, match=f'mesh.data is {count}, but there are 8 devices'):
    make_mesh(MeshConfig(data=count))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'fsdp': 0}, r'mesh.fsdp must be in \[1, 1e\+06\], not 0'),
    ({'tensor': -1}, r'mesh.tensor must be in \[1, 1e\+06\], not -1'),
    ({'data': -2}, r'mesh.data must be in \[-1, 1e\+06\], not -2'),
    ({'fsdp': 3}, '8 devices are not divisible by mesh.slice 1 x mesh.fsdp 3 x mesh.tensor 1 = 3'),
    ({'fsdp': 16}, '8 devices are not divisible by .*mesh.fsdp 16'),
    ({'data': 3, 'fsdp': 4}, r'mesh.data is 3 \(x 4 along the other axes\), but there are 8 devices'),
  ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(fields, message):
  with pytest.raises(UserError, match=message):
    make_mesh(MeshConfig(**fields))


@dataclasses.dataclass(frozen=True)
class Chip:
  """Fake device."""

  id: int
  process_index: int
  slice_index: int
  platform: str = 'tpu'


def test_slices_are_outermost_and_devices_of_a_host_are_adjacent():
  chips = [Chip(id, process_index=id % 4, slice_index=id % 2) for id in range(8)]
  mesh = make_mesh(MeshConfig(slice=2, fsdp=2, tensor=2), chips)
  assert [(chip.slice_index, chip.process_index) for chip in mesh.devices.ravel()] == [
    (0, 0), (0, 0), (0, 2), (0, 2), (1, 1), (1, 1), (1, 3), (1, 3),
  ]  # fmt: skip
  for count in (1, 4):
    with pytest.raises(UserError, match=f'mesh.slice is {count}, but the 8 devices form 2 TPU slices'):
      make_mesh(MeshConfig(slice=count), chips)


def test_a_single_process_has_the_full_batch():
  for count in (1, 4, 8):
    assert process_batch_slice(batch_sharding(make_mesh(MeshConfig(data=count))), 16) == slice(0, 16)
  assert process_batch_slice(batch_sharding(make_mesh(MeshConfig(fsdp=2, tensor=2))), 4) == slice(0, 4)


def test_batch_size_must_be_divisible_by_the_batch_shards():
  with pytest.raises(UserError, match=r'training\.batch_size 12 is not divisible by the 8 devices'):
    process_batch_slice(batch_sharding(make_mesh(MeshConfig())), 12)
  with pytest.raises(UserError, match='12 is not divisible by the 8 devices'):
    process_batch_slice(batch_sharding(make_mesh(MeshConfig(fsdp=4))), 12)
  with pytest.raises(UserError, match='6 is not divisible by the 4 groups of 2 devices'):
    process_batch_slice(batch_sharding(make_mesh(MeshConfig(tensor=2))), 6)


def test_non_contiguous_slice_of_a_process_is_refused(monkeypatch):
  """The devices of the process are the first and the last of the mesh."""
  sharding = batch_sharding(make_mesh(MeshConfig()))
  indices = {device: (slice(i, i + 2),) for device, i in zip(jax.devices(), (0, 14), strict=False)}
  monkeypatch.setattr(type(sharding), 'addressable_devices_indices_map', lambda self, shape: indices)
  with pytest.raises(UserError, match=r'process 0 has batch ranges \[\(0, 2\), \(14, 16\)\], which are not contiguous'):
    process_batch_slice(sharding, 16)


def test_batch_is_sharded_over_devices_in_order():
  batch = {'video': np.arange(48).reshape(16, 3), 'label': np.arange(16)}
  arrays = global_batch(batch, batch_sharding(make_mesh(MeshConfig())))
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, batch[name])
    shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
    for i, shard in enumerate(shards):
      np.testing.assert_array_equal(shard.data, batch[name][2 * i : 2 * i + 2])


def test_first_matching_rule_applies():
  mesh = make_mesh(MeshConfig())
  tree = {'mlp': {'kernel': np.zeros((8, 2)), 'bias': np.zeros(8)}, 'head': np.zeros(3)}
  rules = (('mlp/kernel$', PartitionSpec('data')), ('mlp', PartitionSpec(None)), ('^head$', PartitionSpec()))
  specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(tree, mesh, rules))
  assert specs == {
    'mlp': {'kernel': PartitionSpec('data'), 'bias': PartitionSpec(None)},
    'head': PartitionSpec(),
  }
  with pytest.raises(ValueError, match='no sharding rule matches head'):
    param_shardings(tree, mesh, rules[:2])


def test_parameter_dimension_must_be_divisible_by_its_mesh_axes():
  mesh = make_mesh(MeshConfig(fsdp=8))
  with pytest.raises(
    UserError, match=r'dimension 12 of head/kernel \(12, 5\) is not divisible by mesh.fsdp 8; use a divisor'
  ):
    param_shardings({'head': {'kernel': np.zeros((12, 5))}}, mesh)
  with pytest.raises(UserError, match=r'dimension 12 of mlp/up/kernel \(3, 8, 12\) is not divisible by mesh.tensor 8'):
    param_shardings({'mlp': {'up': {'kernel': np.zeros((3, 8, 12))}}}, make_mesh(MeshConfig(tensor=8)))


def test_parameters_without_a_rule_are_replicated():
  mesh = make_mesh(MeshConfig(fsdp=2))
  shape = jax.ShapeDtypeStruct((3, 4), np.float32)
  assert param_shardings({'a': shape}, mesh)['a'] == param_shardings({'a': shape}, mesh, REPLICATED)['a']
  target = abstract_with_shardings({'a': [shape]}, mesh)['a'][0]
  assert (target.shape, target.dtype) == (shape.shape, shape.dtype)
  assert target.sharding.is_fully_replicated
  assert target.sharding.device_set == set(jax.devices())
