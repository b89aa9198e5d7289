"""Parsing HLO text, as the CPU, GPU and TPU compilers write it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.planning.hlo import read_program


def program(*lines, before=''):
  body = '\n'.join(f'  {line}' for line in lines)
  return read_program(f'HloModule m\n{before}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n')


@pytest.mark.parametrize(
  ('written', 'groups'),
  [
    ('replica_groups={{0,1},{2,3}}', [[0, 1], [2, 3]]),
    ('replica_groups=[2,2]<=[4]', [[0, 1], [2, 3]]),
    ('replica_groups=[2,2]<=[2,2]T(1,0)', [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
  ],
)
def test_replica_groups(written, groups):
  (parsed,) = program(f'%x = f32[4,2]{{1,0}} all-reduce(%p), channel_id=1, {written}, to_apply=%add').collectives
  assert parsed.groups.tolist() == groups
  assert (parsed.kind, parsed.shapes, parsed.size, parsed.executions) == ('all-reduce', ((4, 2),), 32, 1)
  n = len(groups[0])
  assert parsed.bytes_sent(n) == pytest.approx(2 * 32 * (n - 1) / n)


@pytest.mark.parametrize(
  ('line', 'kind', 'size'),
  [
    ('(bf16[8]{0}, f32[2]{0}) all-reduce-start(%a, %b), replica_groups=[1,4]<=[4]', 'all-reduce', 24),
    ('(bf16[2]{0}, bf16[8]{0}) all-gather-start(%a), replica_groups=[1,4]<=[4]', 'all-gather', 16),
    ('f32[2]{0:T(128)S(1)} reduce-scatter(%a), replica_groups=[1,4]<=[4]', 'reduce-scatter', 32),
    ('(s8[6]{0}, s8[6]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}',
     'collective-permute', 6),
    ('pred[6]{0} all-to-all(%a), replica_groups=[2,2]<=[4]', 'all-to-all', 6),
  ],
)  # fmt: skip
def test_collective_sizes(line, kind, size):
  (parsed,) = program(f'%x = {line}').collectives
  assert (parsed.kind, parsed.size) == (kind, size)


def test_bytes_sent_in_a_ring():
  (gather,) = program('%x = bf16[8]{0} all-gather(%a), replica_groups=[1,4]<=[4]').collectives
  assert gather.bytes_sent(4) == 12


def test_async_collective_is_counted_once_and_tpu_reduce_scatter_is_recognized():
  gather = '%g = bf16[8]{0} all-gather(%p0), channel_id=7, replica_groups=[1,4]<=[4]'
  reduce = '%r = bf16[8]{0} all-reduce(%p0), channel_id=1, replica_groups=[1,4]<=[4]'
  pieces = {'start': gather, 'async_collective_fusion.2': gather, 'done': gather, 'never_called': gather}
  pieces |= {'all-reduce-scatter.1': reduce, 'all-reduce-scatter.2': reduce}  # two with the same channel id
  parsed = program(
    '%async-collective-start.1 = bf16[8]{0} fusion(%p), kind=kCustom, calls=%start',
    '%c = bf16[8]{0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.2',
    '%async-collective-done.1 = bf16[8]{0} fusion(%p), kind=kCustom, calls=%done',
    '%b = bf16[2]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1',
    '%d = bf16[2]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.2',
    before='\n'.join(f'%{name} (p0: bf16[8]) -> bf16[8] {{\n  {line}\n}}\n' for name, line in pieces.items()),
  ).collectives
  assert sorted((item.kind, item.size) for item in parsed) == [('all-gather', 16), *[('reduce-scatter', 16)] * 2]


def test_collective_between_slices():
  """In the notation of libtpu."""
  (parsed,) = program(
    '%send = (f32[256,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%bitcast, %after-all), channel_id=2, '
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3}x{0:3}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}, backend_config={"flag_configs":[]}',
    '%recv = (f32[256,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, '
    'frontend_attributes={_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
    '%done = token[] send-done(%send), channel_id=2, is_host_transfer=true',
  ).collectives
  assert (parsed.kind, parsed.slices, parsed.size) == ('all-reduce', 3, 4 * 256 * 8 * 128)


LOOP = """
%condition (s: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%inner (p0: f32[4]) -> f32[4] {
  ROOT %d = f32[4]{0} convolution(%p0, %p0), dim_labels=bf_io->bf
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f = f32[4]{0} fusion(%s), kind=kOutput, calls=%inner, backend_config={"estimated_cycles":"100"}
  %r = f32[4]{0} all-reduce(%f), channel_id=3, replica_groups=[1,2]<=[2]
  %c = f32[4]{0} copy(%r), backend_config={"estimated_cycles":"10"}
}
"""


def test_loop_body_counts_once_per_iteration():
  add = '%a = f32[4]{0} fusion(%p), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"3"}'
  parsed = program('%w = (s32[], f32[4]) while(%t), condition=%condition, body=%body', add, before=LOOP)
  assert parsed.cycles == {'matmul': 500, 'copies': 50, 'other fusions': 3}
  assert [(item.kind, item.executions) for item in parsed.collectives] == [('all-reduce', 5)]
  assert parsed.unknown_loops == 0
  known = '%w = (s32[]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"}}'
  assert program(known, before=LOOP).cycles['matmul'] == 700
  unknown = program('%w = (s32[]) while(%t), condition=%c, body=%body', before=LOOP)
  assert (unknown.cycles['matmul'], unknown.unknown_loops) == (100, 1)
  never = known.replace('"7"', '"0"')
  parsed = program(never, before=LOOP)
  assert (parsed.cycles, parsed.collectives, parsed.unknown_loops) == ({}, (), 0)
  assert program(never, known, before=LOOP).cycles['matmul'] == 700  # both loops have the same body; one of them runs


def test_compiled_program_with_a_loop():
  """HLO of this backend: an all-reduce in each of three iterations."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('x',))
  sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'x'))
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def sums(x):
    return jax.lax.map(lambda row: jnp.sin(row).sum(axis=0), x)

  shape = jax.ShapeDtypeStruct((3, 8, 5), jnp.float32, sharding=sharded)
  parsed = read_program(jax.jit(sums, out_shardings=replicated).lower(shape).compile().as_text())
  assert parsed.unknown_loops == 0
  assert {(item.kind, item.groups.shape) for item in parsed.collectives} == {('all-reduce', (1, 4))}
  assert sum(item.executions * item.size for item in parsed.collectives) == 3 * 5 * 4


@pytest.mark.parametrize(('estimate', 'flops', 'size'), [
  ('', 0, 3 * 64 * 2 + 64 * 4),
  ('"cost_estimate":{"flops":"700","transcendentals":"5","bytes_accessed":"9999","remote_bytes_transferred":"0"}', 700,
   9999),
])  # fmt: skip
def test_custom_kernels(estimate, flops, size):
  """Costs are those of the `CostEstimate`, with at least the bytes of operands and outputs, per execution."""
  kernel = (
    '%fused_attention.7 = (bf16[8,8]{1,0:T(8,128)(2,1)}, f32[64]{0:T(128)}) custom-call(%a, %b), '
    'custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8,8]{1,0}, bf16[64]{0}}, '
    f'backend_config={{"custom_call_config":{{"body":"TUzv",{estimate}}}}}'
  )
  (parsed,) = program(kernel).kernels
  assert (parsed.name, parsed.flops, parsed.bytes, parsed.executions) == ('fused_attention', flops, size, 1)
  body = LOOP.replace('%f = f32', f'{kernel}\n  %f = f32')
  (parsed,) = program('%w = (s32[]) while(%t), condition=%condition, body=%body', before=body).kernels
  assert parsed.executions == 5
