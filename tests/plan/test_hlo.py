"""Collectives of compiled programs: kinds, mesh axes, loops and bytes, of programs made here and of text of TPUs."""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from lmlib import sharding
from lmlib.plan import hlo
from lmlib.sharding import Layout

MESH = Layout(data=2, fsdp=2, tensor=2).mesh()
N = 64  # float32 numbers of a device


def text(function, out) -> str:
  mapped = jax.shard_map(function, mesh=MESH, in_specs=P(('data', 'fsdp', 'tensor')), out_specs=out, check_vma=False)
  return jax.jit(mapped).lower(jax.ShapeDtypeStruct((8 * N,), jnp.float32)).compile().as_text()


def ring(x):
  return jax.lax.ppermute(x, 'tensor', [(0, 1), (1, 0)])


@pytest.mark.parametrize(('function', 'kind', 'axis', 'sent'), [
    (lambda x: jax.lax.psum(x, 'data'), 'all-reduce', 'data', 2 * 4 * N // 2),
    (lambda x: jax.lax.psum(x, ('data', 'tensor')), 'all-reduce', 'data+tensor', 2 * 4 * N * 3 // 4),
    (lambda x: jax.lax.all_gather(x, ('data', 'fsdp', 'tensor'), tiled=True), 'all-gather', 'data+fsdp+tensor',
     8 * 4 * N * 7 // 8),
    (lambda x: jax.lax.psum_scatter(x, 'fsdp', tiled=True), 'reduce-scatter', 'fsdp', 4 * N // 2),
    (lambda x: jax.lax.all_to_all(x, 'tensor', 0, 0, tiled=True), 'all-to-all', 'tensor', 4 * N // 2),
    (ring, 'collective-permute', 'tensor', 4 * N)], ids=lambda value: value if isinstance(value, str) else '')
def test_kinds_axes_and_bytes(function, kind, axis, sent):
  found = hlo.collectives(text(function, P(('data', 'fsdp', 'tensor'))), MESH)
  assert [(c.kind, c.axis, c.dtype, c.count, c.sent) for c in found.collectives] == [(kind, axis, 'f32', 1, sent)]
  assert found.sent() == found.sent(kind=kind, axis=axis) == sent
  assert found.sent(axis='stage') == 0


def test_a_loop_counts_as_often_as_it_runs():
  def looped(x):
    twice = lambda x, _: (jax.lax.psum(ring(x), 'fsdp'), None)
    body = lambda x, _: (jax.lax.scan(twice, x, length=3)[0] + 1, None)
    return jax.lax.scan(body, x, length=5)[0]

  found = hlo.collectives(text(looped, P(('data', 'fsdp', 'tensor'))), MESH)
  assert {(c.kind, c.axis): (c.places, c.count) for c in found.collectives} == {
      ('all-reduce', 'fsdp'): (1, 15), ('collective-permute', 'tensor'): (1, 15)}
  assert found.unknown_loops == 0


def test_a_loop_that_nobody_can_count_is_said():
  def looped(x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: jax.lax.psum(x, 'data') - 1, x)

  found = hlo.collectives(text(looped, P(('data', 'fsdp', 'tensor'))), MESH)
  assert found.unknown_loops == 1
  assert found.sent(kind='all-reduce', axis='data') == 4 * N
  assert str(found).endswith('1 loops of unknown length count once')


# As XLA writes programs for TPUs: a reduce-scatter inside a fusion, a bound that only the loop's condition knows, and
# what a kernel says of itself in lines of its own.
TPU = '''HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input: f32[64,8]) -> f32[32,8] {
  %input = f32[64,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.7 = f32[64,8]{1,0:T(8,128)} all-reduce(%input), channel_id=4, replica_groups={{0,2},{1,3},{4,6},{5,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %slice = f32[32,8]{1,0} dynamic-slice(%all-reduce.7, %c, %c), dynamic_slice_sizes={32,8}
}

%body (p: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %p = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) parameter(0)
  %kernel = f32[64,8]{1,0:T(8,128)} custom-call(%p), custom_call_target="tpu_custom_call", metadata={kernel_metadata="
}}
 all-reduce(
}"}
  %fusion.3 = f32[32,8]{1,0:T(8,128)S(1)} fusion(%kernel), kind=kCustom, calls=%all-reduce-scatter.1
  %collective-permute-start.2 = (bf16[16,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=5, source_target_pairs={{0,4},{1,5},{2,6},{3,7},{4,0},{5,1},{6,2},{7,3}}
  ROOT %out = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) tuple(%i, %y)
}

%condition (p: (s32[], f32[64,8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main.1_spmd (param: f32[64,8]) -> f32[64,8] {
  %while.1 = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) while(%tuple), condition=%condition, body=%body
  %all-reduce.9 = (f32[]{:T(128)}, /*index=1*/bf16[100]{0}) all-reduce(%a, %b), channel_id=6, replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add
  ROOT %all-gather.3 = f32[64,8]{1,0:T(8,128)} all-gather(%c), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1':(2)2}, dimensions={0}, use_global_device_ids=true
}
'''  # noqa: E501


def test_text_of_a_tpu():
  found = hlo.collectives(TPU, MESH)
  assert {(c.kind, c.axis, c.dtype): (c.count, c.sent) for c in found.collectives} == {
      ('reduce-scatter', 'fsdp', 'f32'): (12, 12 * 64 * 8 * 4 // 2),
      ('collective-permute', 'data', 'bf16'): (12, 12 * 16 * 8 * 2),
      ('all-reduce', 'data+fsdp', 'f32'): (1, 2 * 4 * 3 // 4),
      ('all-reduce', 'data+fsdp', 'bf16'): (1, 2 * 200 * 3 // 4),
      ('all-gather', 'fsdp', 'f32'): (1, 64 * 8 * 4 // 2)}
  assert found.unknown_loops == 0


def test_weights_that_are_split_are_gathered_and_their_gradients_reduced():
  """Data parallelism reduces gradients along data and nothing else; a step of ZeRO-3 communicates along fsdp."""
  loss = lambda w_DF, x_BD: (sharding.constrain(x_BD @ w_DF, 'BF') ** 2).sum()
  sent = {}
  for name, layout in {'data': Layout(data=8), 'fsdp': Layout(data=1, fsdp=8)}.items():
    with sharding.use(layout) as mesh:
      place = functools.partial(jax.sharding.NamedSharding, mesh)
      w, x = (jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=place(where)) for where in (
          sharding.spec('DF', (64, 64), mesh, layout.weights), sharding.spec('BD', (64, 64), mesh, layout.arrays)))
      program = jax.jit(jax.grad(loss), out_shardings=w.sharding).lower(w, x).compile()
      sent[name] = hlo.collectives(program.as_text(), mesh)
  assert {c.axis for c in sent['data'].collectives} == {'data'}
  assert sent['data'].sent(kind='all-reduce') == 2 * 64 * 64 * 4 * 7 // 8
  assert {c.axis for c in sent['fsdp'].collectives} == {'fsdp'}
