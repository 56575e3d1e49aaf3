"""Attention around a ring of devices equals the equation in loops of float64: values and gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding
from lmlib.kernels import attention as kernel
from lmlib.kernels import attention_parts, ring_attention
from lmlib.kernels.attention import Pattern, Rows
from tests.kernels.test_attention import B, G, K, arrays, loops, segments

CLOSE = 2e-6  # of norms: float32 sums of some ten products
T = 16
DOCUMENTS = segments(T)
PREFIX = (np.arange(T)[None] < np.array([[5], [3]])).astype(np.int32)
same = lambda b, t, s: DOCUMENTS[b, t] == DOCUMENTS[b, s]
SINK, SLOPE = np.random.default_rng(3).normal(size=(2, K, G)).astype(np.float32)
BIAS = np.random.default_rng(4).normal(size=(1, K, G, T, T)).astype(np.float32)
# Of each case its pattern, rows, what is added to scores, and who sees whom.
CASES = {
    'causal': (Pattern(), Rows(), {}, lambda b, t, s: s <= t),
    'packed documents, a window, softcap and scale': (
        Pattern(window=5, softcap=1.5, scale=0.7), Rows(segment_BT=DOCUMENTS), {},
        lambda b, t, s: 0 <= t - s < 5 and same(b, t, s)),
    'prefixes': (Pattern(), Rows(prefix_BS=PREFIX), {}, lambda b, t, s: s <= t or PREFIX[b, s] > 0),
    'both directions, sinks': (Pattern(causal=False), Rows(segment_BT=DOCUMENTS), {'sink_KG': SINK}, same),
    'slopes': (Pattern(), Rows(), {'slope_KG': SLOPE}, lambda b, t, s: s <= t),
    'a bias, both directions': (Pattern(causal=False), Rows(segment_BT=DOCUMENTS), {'bias_BKGTS': BIAS}, same),
    'a bias': (Pattern(), Rows(), {'bias_BKGTS': BIAS}, lambda b, t, s: s <= t),
    'inputs that answers read': (  # as many of them, by chance
        Pattern(causal=False), Rows(segment_BT=DOCUMENTS, segment_BS=DOCUMENTS[::-1]), {},
        lambda b, t, s: DOCUMENTS[b, t] == DOCUMENTS[1 - b, s]),
    'keys in front': (Pattern(window=5, softcap=1.5), Rows(segment_BT=DOCUMENTS, front=3), {},
                      lambda b, t, s: s < 3 or (0 <= t - (s - 3) < 5 and same(b, t, s - 3))),
}
MIXED = '2 parts, rows and heads'
LAYOUTS = {'8 parts': dict(data=1, context=8), MIXED: dict(data=2, context=2, tensor=2),
           '4 parts': dict(data=2, context=4)}


def computed(layout, given, pattern, rows, added, implementation='auto'):
  """(out, dq, dk, dv), by devices that each have a part of every row."""

  def both(q, k, v, dout):
    attend = lambda q, k, v: kernel.attention(q, k, v, pattern, rows, implementation=implementation, **added)
    out, back = jax.vjp(attend, q, k, v)
    return out, *back(dout)

  with sharding.use(sharding.Layout(**layout)):
    return jax.jit(both)(*given)


def assert_close(found, expected):
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), found, expected):
    assert np.linalg.norm(np.asarray(a, np.float64) - b) < CLOSE * np.linalg.norm(b), name


FIRST, SECOND, *_ = CASES


@pytest.mark.parametrize(('name', 'layout'), [*((FIRST, layout) for layout in LAYOUTS), (SECOND, '8 parts'),
                                              *((name, MIXED) for name in list(CASES)[1:] if name != 'a bias')])
def test_values_and_gradients(name, layout):
  pattern, rows, added, sees = CASES[name]
  given, more = arrays(T, T + rows.front), dict(added)
  if 'bias_BKGTS' in added:
    more['bias_BKGTS'] = np.repeat(BIAS, B, 0)
  assert_close(computed(LAYOUTS[layout], given, pattern, rows, added), loops(*given, sees, pattern, **more))


@pytest.mark.parametrize(('implementation', 'name'), [('gpu', SECOND), ('tpu', SECOND), ('tpu', 'a bias')])
def test_kernels_meet_the_parts(implementation, name):
  pattern, rows, added, sees = CASES[name]
  given = arrays(T, T + rows.front)
  found = computed(dict(data=4, context=2), given, pattern, rows, added, implementation)
  more = {'bias_BKGTS': np.repeat(BIAS, B, 0)} if added else {}
  assert_close(found, loops(*given, sees, pattern, **more))


def test_parts_that_nobody_sees_are_not_computed():
  """Not even read: what is no number there changes nothing."""
  q, k, v, _ = arrays(8, 8)
  k[:, 4:] = v[:, 4:] = np.nan
  place_BT = np.concatenate([np.arange(4), np.arange(20, 24)])[None]  # keys 20 .. 23 are before no query of the first 4
  part = attention_parts.Part(place_BT, place_BT)
  out, lse = attention_parts.plain(q, k, v, pattern=Pattern(), rows=part)
  assert np.isfinite(out[:, :4]).all()
  assert np.isnan(out[:, 4:]).all()
  _, lse = attention_parts.plain(q[:, :4], k[:, 4:], v[:, 4:], pattern=Pattern(), rows=attention_parts.Part(
      place_BT[:, :4], place_BT[:, 4:]))
  assert np.isneginf(lse).all()


def test_what_is_added_has_its_gradients():
  given = arrays(T, T)

  def total(sink_KG, slope_KG, bias_BKGTS):
    out = kernel.attention(*given[:3], sink_KG=sink_KG, slope_KG=slope_KG, bias_BKGTS=bias_BKGTS)
    return (out * given[3]).sum()

  plain = jax.jit(jax.grad(total, (0, 1, 2)))(SINK, SLOPE, BIAS)
  with sharding.use(sharding.Layout(data=2, context=2, tensor=2)):
    parts = jax.jit(jax.grad(total, (0, 1, 2)))(SINK, SLOPE, BIAS)
  for a, b in zip(parts, plain):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # float32 sums over all rows


@pytest.mark.parametrize('devices', [2, 3, 4, 8])
def test_work_is_the_same_on_every_device(devices):
  """Of a causal mask each has as many pairs as all others, and parts come back to where they were."""
  place_T = np.arange(2 * devices * 3)
  mesh = jax.make_mesh((devices,), ('x',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
  along = jax.sharding.PartitionSpec(None, 'x')

  def there(x):
    return ring_attention.spread(x, 'x', devices)

  def back(x):
    return ring_attention.gathered(x, 'x', devices)

  with jax.set_mesh(mesh):
    apart = lambda run: jax.jit(jax.shard_map(run, in_specs=along, out_specs=along, check_vma=False))
    spread_1T = apart(there)(jnp.asarray(place_T)[None])
    again_1T = apart(back)(spread_1T)
  np.testing.assert_array_equal(again_1T[0], place_T)
  of_devices = np.asarray(spread_1T).reshape(devices, -1)
  assert np.ptp(of_devices.sum(1)) == 0
  assert (np.diff(of_devices, axis=1) > 0).all()  # each in order


def test_one_device_and_short_rows_need_no_ring():
  q, k, *_ = arrays(T, T)
  assert not ring_attention.needed(q, k, Rows())
  with sharding.use(sharding.Layout(data=1, context=8)):
    assert ring_attention.needed(q, k, Rows())
    assert not ring_attention.needed(q[:, :3], k[:, :3], Rows())  # three places cannot be split among eight
    assert not ring_attention.needed(q, k, Rows(place_BS=np.zeros((B, T), np.int32)))  # a cache


def test_what_a_ring_cannot_do_is_refused():
  q, k, v, _ = arrays(T, T)
  with sharding.use(sharding.Layout(data=1, context=8)):
    with pytest.raises(ValueError, match=r"a ring implementation='blocked' is none of \['gpu', 'reference', 'tpu'"):
      kernel.attention(q, k, v, implementation='blocked')
    with pytest.raises(ValueError, match='cannot do arrays but of float32 or bfloat16'):
      kernel.attention(*(x.astype('float16') for x in (q, k, v)), implementation='tpu')
