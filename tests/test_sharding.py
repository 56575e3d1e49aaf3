"""One alphabet and its tables: which mesh axes split which axis of an array, and meshes that are refused."""
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lmlib import sharding
from lmlib.sharding import ARRAYS, WEIGHTS, Layout, spec

MESH = Layout(data=2, fsdp=2, tensor=2).mesh()


@pytest.mark.parametrize(('axes', 'shape', 'rules', 'expected'), [
    ('DF', (8, 8), WEIGHTS, P('fsdp', 'tensor')), ('FD', (8, 8), WEIGHTS, P('tensor', 'fsdp')),
    ('LDF', (3, 8, 8), WEIGHTS, P(None, 'fsdp', 'tensor')), ('VD', (8, 8), WEIGHTS, P('tensor', 'fsdp')),
    ('D', (8,), WEIGHTS, P('fsdp')), ('BTD', (8, 5, 8), ARRAYS, P(('data', 'fsdp'), None, None)),
    ('BTF', (8, 5, 8), ARRAYS, P(('data', 'fsdp'), None, 'tensor')),
    ('BTV', (8, 5, 8), ARRAYS, P(('data', 'fsdp'), None, 'tensor')),
    # An axis of the mesh that does not divide a dimension leaves it whole.
    ('DF', (7, 8), WEIGHTS, P(None, 'tensor')), ('BTD', (6, 5, 8), ARRAYS, P(None, None, None)),
    # 'tensor' splits key heads, or, where it does not divide them, the query heads of each; never both.
    ('DKGH', (8, 2, 4, 8), WEIGHTS, P('fsdp', 'tensor', None, None)),
    ('DKGH', (8, 3, 4, 8), WEIGHTS, P('fsdp', None, 'tensor', None)),
    ('DKGH', (8, 3, 3, 8), WEIGHTS, P('fsdp', None, None, None))])
def test_rules(axes, shape, rules, expected):
  assert spec(axes, shape, MESH, rules) == expected


def test_a_mesh_axis_splits_one_axis_of_an_array():
  both = (('K', ('tensor',)), ('G', ('tensor',)), ('H', ('tensor', 'data')))
  assert spec('KGH', (2, 2, 4), MESH, both) == P('tensor', None, None)


def test_a_letter_may_have_several_rows_and_the_first_that_fits_holds():
  rules = (('B', ('data', 'fsdp')), ('B', ('data',)))
  assert spec('B', (8,), MESH, rules) == P(('data', 'fsdp'))
  assert spec('B', (6,), MESH, rules) == P('data')


def test_letters_outside_the_alphabet_are_refused():
  with pytest.raises(ValueError, match=r"'BTx' uses \['x'\]"):
    spec('BTx', (1, 1, 1), MESH, ARRAYS)
  with pytest.raises(ValueError, match=r"'x'.*letters are ABCDE"):
    Layout(weights=(('x', ('fsdp',)),))
  with pytest.raises(ValueError, match=r"'T', \('context', 'tensor'\).*a ring of one mesh axis"):
    Layout(arrays=(('T', ('context', 'tensor')),))
  with pytest.raises(ValueError, match=r"'model'.*'data', 'stage', 'fsdp', 'expert', 'context', 'tensor'"):
    Layout(arrays=(('B', ('model',)),))


@pytest.mark.parametrize(('sizes', 'expected'), [
    (dict(), {'data': 8}), (dict(data=1, fsdp=-1), {'fsdp': 8}), (dict(data=-1, tensor=4), {'data': 2, 'tensor': 4}),
    (dict(data=2, fsdp=2, tensor=-1), {'data': 2, 'fsdp': 2, 'tensor': 2}), (dict(data=8), {'data': 8}),
    (dict(data=1, context=-1, tensor=2), {'context': 4, 'tensor': 2}),
    (dict(data=1, stage=2, expert=-1), {'stage': 2, 'expert': 4})])
def test_a_size_of_minus_1_takes_the_devices_that_are_left(sizes, expected):
  mesh = Layout(**sizes).mesh()
  assert {name: size for name, size in mesh.shape.items() if size > 1} == expected
  assert tuple(mesh.shape) == sharding.MESH_AXES


@pytest.mark.parametrize(('sizes', 'expected'), [
    (dict(data=16), r'data=16.*needs 16 devices, but there are 8'),
    (dict(data=4), r'data=4.*uses 4 of 8 devices'),
    (dict(data=-1, tensor=3), r'tensor=3.*multiple of 3 devices, but there are 8'),
    (dict(data=0), r'data=0 must be'), (dict(data=-2), r'data=-2 must be'),
    (dict(data=1.5), r'data=1.5 must be'),
    (dict(data=-1, fsdp=-1), r'data=-1, fsdp=-1.*only one may be -1')])
def test_meshes_that_do_not_fit_are_refused(sizes, expected):
  with pytest.raises(ValueError, match=expected):
    Layout(**sizes).mesh()


def test_a_mesh_may_leave_devices_to_others():
  assert Layout(data=2).mesh(jax.devices()[:2]).size == 2
  assert Layout().mesh(jax.devices()[:1]).size == 1


def test_the_layout_in_use_ends_with_its_block():
  assert not sharding.in_use()
  assert sharding.batch_devices() == 1
  with sharding.use(Layout(data=2, fsdp=2, tensor=2)):
    assert sharding.in_use()
    assert sharding.batch_devices() == 4
    with sharding.use(Layout(data=8)):
      assert sharding.batch_devices() == 8
    assert sharding.batch_devices() == 4
  with pytest.raises(RuntimeError, match='inside'), sharding.use(Layout()):
    raise RuntimeError('inside')
  assert not sharding.in_use()


def test_constrain_places_and_outside_leaves_alone():
  x_BTD = jnp.ones((8, 2, 4))
  assert sharding.constrain(x_BTD, 'BTD') is x_BTD
  with sharding.use(Layout(data=2, fsdp=2, tensor=2)):
    placed_BTD = jax.jit(lambda x: sharding.constrain(x, 'BTD'))(x_BTD)
    assert placed_BTD.addressable_shards[0].data.shape == (2, 2, 4)
    with pytest.raises(AssertionError):
      sharding.constrain(x_BTD, 'BT')


def test_a_batch_is_placed_by_the_letters_of_its_names():
  batch = {'tokens_BT': jnp.zeros((8, 4), jnp.int32), 'row_B': jnp.zeros((8,), jnp.uint32)}
  with sharding.use(Layout(data=4, tensor=2)):
    placed = sharding.placer()(batch)
  shard = lambda x: x.addressable_shards[0].data.shape
  assert jax.tree.map(shard, placed) == {'tokens_BT': (2, 4), 'row_B': (2,)}
  assert all(len(x.devices()) == 1 for x in sharding.placer()(batch).values())


@pytest.mark.parametrize(('sizes', 'expected'), [
    (dict(zero=0), 'zero=0 must be 1, 2 or 3'), (dict(zero=1), r'zero=1 says what fsdp=1 device splits: nothing'),
    (dict(sequence=True), r'sequence=True splits rows over tensor=1 device: nothing'),
    (dict(slices=0), 'slices=0 must be'), (dict(across='pipe'), "across='pipe' must be one of"),
    (dict(data=3, slices=2), r'data=3 goes over slices=2, which do not divide it: data=4 would, or -1'),
    (dict(data=-1, tensor=8, slices=2), r'data=-1 is 1 on 8 devices, which slices=2 do not divide: slices=1 would')])
def test_settings_of_a_layout_that_cannot_be(sizes, expected):
  with pytest.raises(ValueError, match=expected):
    Layout(**sizes).mesh()


@pytest.mark.parametrize(('layout', 'inside'), [
    (Layout(data=2, fsdp=4, slices=2), ('fsdp',)), (Layout(data=4, tensor=2, slices=2), ('tensor',)),
    (Layout(data=2, stage=2, tensor=2, slices=2, across='stage'), ('data', 'tensor')),
    (Layout(data=1, fsdp=-1, slices=4, across='fsdp'), ())], ids=str)
def test_one_axis_goes_over_slices_and_the_others_stay_inside(layout, inside):
  mesh, size = layout.mesh(), 8 // layout.slices
  slice_of = np.vectorize(lambda device: device.id // size)(mesh.devices)  # equal runs of devices
  names = sharding.MESH_AXES
  across = np.moveaxis(slice_of, names.index(layout.across), 0)
  assert (np.diff(across, axis=0) >= 0).all()
  for axis in inside:
    along = np.moveaxis(slice_of, names.index(axis), 0)
    assert (along == along[:1]).all(), axis
  runs = across.reshape(layout.slices, -1)
  assert (runs == np.arange(layout.slices)[:, None]).all()


def test_zero_says_what_fsdp_splits():
  split = {zero: [what for what in ('weights', 'gradients', 'moments')
                  if spec('DF', (8, 8), MESH, Layout(fsdp=2, zero=zero).table(what)) == P('fsdp', 'tensor')]
           for zero in (1, 2, 3)}
  assert split == {1: ['moments'], 2: ['gradients', 'moments'], 3: ['weights', 'gradients', 'moments']}
  assert spec('DF', (8, 8), MESH, Layout(fsdp=2, zero=1).table('weights')) == P(None, 'tensor')


def test_the_stream_is_split_along_rows_where_that_is_asked_and_possible():
  layout = Layout(data=2, context=2, tensor=2, sequence=True)
  mesh = layout.mesh()
  where = lambda T, layout: spec('BTD', (4, T, 8), mesh, layout.table('stream'))
  assert where(8, layout) == P('data', ('context', 'tensor'), None)
  assert where(6, layout) == P('data', 'context', None)
  assert where(8, dataclasses.replace(layout, sequence=False)) == P('data', 'context', None)
  assert where(1, layout) == P('data', None, None)


def test_moments_wait_only_where_hosts_have_memory_for_it(monkeypatch):
  monkeypatch.setattr(sharding, 'HOST', 'memory_of_others')
  said = (r"Layout.offload=True needs memory of kind 'memory_of_others', but cpu devices have "
          r"\['device', 'pinned_host', 'unpinned_host'\]: leave offload=False")
  with pytest.raises(ValueError, match=said), sharding.use(Layout(offload=True)):
    pass
