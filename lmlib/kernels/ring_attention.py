"""Attention of rows that are split among devices: keys and values go round in a ring (Liu et al. 2023).

Each device keeps its queries and meets one part of the keys after the other; the results for parts are joined by the
logs of their sums,

  lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

and the gradient goes round the other way, by differentiation. With a causal mask the last device would have all the
work: before the ring parts change places, so that device i of c has the parts i and 2c - 1 - i of 2c (as in Llama 3,
Dubey et al. 2024; Striped Attention, Brandon et al. 2023, deals out single tokens), and back after it. Unlike there
nobody outside sees another order: embeddings, losses and whatever looks at neighbours find tokens where they were.
Packed documents, prefixes, windows and sinks are those of a row on one device, for every part carries its places and
documents along. A bias stays with the queries, each device's with all keys of the row. Keys in front of all rows are on
every device, and met before the first part.
"""
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmlib import sharding
from lmlib.kernels import attention_gpu, attention_tile, attention_tpu

NOTHING = -1e30  # lse of no key at all: finite, so that no difference is NaN
FRONT = 'front_k', 'front_v'


def needed(q_BTKGH, k_BSKH, rows) -> bool:
  """Whether these queries are split along T, and their keys are of the same tokens."""
  T, S = q_BTKGH.shape[1], k_BSKH.shape[1] - rows.front
  return T == S and rows.place_BS is None and bool(ways(q_BTKGH))


def ways(q_BTKGH) -> tuple[str, ...]:
  """The mesh axes that T is split over."""
  return sharding.split('BTKGH', q_BTKGH.shape)[1]


def lacking(kernel, q_BTKGH, k_BSKH, v_BSKH, pattern, rows, added) -> list[str]:
  """What of a case cannot be done around a ring; kernel: the implementation of a part, None for plain jnp."""
  return kernel.lacking(q_BTKGH, k_BSKH, v_BSKH, pattern, rows.replace(front=0), added) if kernel else []


def attention(kernel, q_BTKGH, k_BSKH, v_BSKH, pattern, rows, *, slope_KG=None, bias_BKGTS=None, sink_KG=None):
  """Attention, BTKG and the width of v; see attention.attention()."""
  T, front, column_BT = q_BTKGH.shape[1], rows.front, jnp.arange(q_BTKGH.shape[1], dtype=jnp.int32)[None]
  given = {'q': q_BTKGH, 'k': k_BSKH[:, front:], 'v': v_BSKH[:, front:],
           'place': column_BT if rows.place_BT is None else rows.place_BT,
           'segment': rows.segment_BT, 'of_keys': rows.segment_BT if rows.segment_BS is None else rows.segment_BS,
           'prefix': rows.prefix_BS, 'slope': slope_KG}
  if bias_BKGTS is not None:
    bias_BKGTS = jnp.broadcast_to(bias_BKGTS, (bias_BKGTS.shape[0], *q_BTKGH.shape[2:4], T, T))
    given |= {'bias': jnp.einsum('BKGTS->BTKGS', bias_BKGTS), 'column': column_BT}
  if front:
    given |= {'front_k': k_BSKH[:, :front], 'front_v': v_BSKH[:, :front]}
  given = {name: x for name, x in given.items() if x is not None}
  letters = {'q': 'BTKGH', 'k': 'BTKH', 'v': 'BTKH', 'slope': 'KG', 'bias': 'BTKGS', **dict.fromkeys(FRONT, 'BSKH')}
  specs = {name: PartitionSpec(*(axes or None for axes in sharding.split(letters.get(name, 'BT'), x.shape)))
           for name, x in given.items()}
  [axis] = ways(q_BTKGH)
  devices, partial = sharding.size(axis), plain if kernel is None else kernel.partial_attention
  mixed = pattern.causal and T % (2 * devices) == 0
  free = dataclasses.replace(pattern, causal=False, window=None, chunk=None, stride=None)  # as keys in front are seen
  mine = functools.partial(_mine, functools.partial(partial, pattern=pattern), functools.partial(plain, pattern=free),
                           axis, devices, mixed)
  run = jax.shard_map(mine, in_specs=(specs,), out_specs=(specs['q'], PartitionSpec(*specs['q'][:4])), check_vma=False)
  out_BTKGH, lse_BTKG = run(given)
  if sink_KG is not None:  # one more key, without a value
    out_BTKGH *= jax.nn.sigmoid(lse_BTKG - sink_KG.astype(jnp.float32)[None, None])[..., None]
  return out_BTKGH.astype(v_BSKH.dtype)


def _mine(partial, in_front, axis: str, devices: int, mixed: bool, given):
  """(out, lse_BTKG) of this device's queries with all keys; given: its part of every array."""
  along = [name for name in given if name not in ('slope', *FRONT)]
  if mixed:
    given = given | {name: spread(given[name], axis, devices) for name in along}
  queries = {name: given[name] for name in ('q', 'place', 'segment', 'bias') if name in given}
  keys = {name: given[name] for name in ('k', 'v', 'place', 'of_keys', 'prefix', 'column') if name in given}
  join = jax.checkpoint(functools.partial(_joined, partial, given.get('slope')))
  B, T, K, G, _ = given['q'].shape
  found = (jnp.zeros((B, T, K, G, given['v'].shape[-1]), jnp.float32),
           jnp.full((B, T, K, G), NOTHING, jnp.float32))
  if 'front_k' in given:
    k_BSKH, v_BSKH = (given[name] for name in FRONT)
    place = lambda count: {'place': jnp.zeros((1, count), jnp.int32)}
    found = jax.checkpoint(functools.partial(_joined, in_front, None))(
        found, {'q': given['q']} | place(T), {'k': k_BSKH, 'v': v_BSKH} | place(k_BSKH.shape[1]))
  onward = [(i, (i + 1) % devices) for i in range(devices)]
  for step in range(devices):
    found = join(found, queries, keys)
    if step + 1 < devices:
      keys = jax.tree.map(lambda x: jax.lax.ppermute(x, axis, onward), keys)
  return tuple(gathered(x, axis, devices) for x in found) if mixed else found


def _joined(partial, slope_KG, found, queries, keys):
  """What was found so far, with one more part of the keys."""
  rows = Part(queries['place'], keys['place'], queries.get('segment'), keys.get('of_keys'), keys.get('prefix'))
  more = {} if slope_KG is None else {'slope_KG': slope_KG}
  if 'bias' in queries:
    more['bias_BKGTS'] = jnp.einsum('BTKGS->BKGTS', queries['bias'][..., keys['column'][0]])
  out_BTKGH, lse_BTKG = partial(queries['q'], keys['k'], keys['v'], rows=rows, **more)
  return joined(found, (out_BTKGH, jnp.where(jnp.isneginf(lse_BTKG), NOTHING, lse_BTKG)))


def joined(found, more):
  """(out in float32, lse_BTKG) for two parts of the keys together."""
  (a_BTKGH, a_BTKG), (b_BTKGH, b_BTKG) = found, more
  both_BTKG = jnp.logaddexp(a_BTKG, b_BTKG)
  share = lambda lse_BTKG: jnp.exp(lse_BTKG - both_BTKG)[..., None]
  return a_BTKGH * share(a_BTKG) + b_BTKGH.astype(jnp.float32) * share(b_BTKG), both_BTKG


@struct.dataclass
class Part:
  """The attention.Rows of queries and a part of the keys, with all places given."""
  place_BT: jax.Array
  place_BS: jax.Array
  segment_BT: jax.Array | None
  segment_BS: jax.Array | None
  prefix_BS: jax.Array | None
  front: int = struct.field(pytree_node=False, default=0)


def plain(q_BTKGH, k_BSKH, v_BSKH, *, pattern, rows, slope_KG=None, bias_BKGTS=None):
  """(out, lse_BTKG) of a part in plain jnp; lse is -inf where nothing is seen.

  Halves of the queries meet halves of the keys, and nothing is computed where none of those sees any of these: of a
  causal mask that is half of what comes round.
  """
  (B, T, K, G, _), W = q_BTKGH.shape, v_BSKH.shape[-1]
  cut = lambda x, axis: jnp.stack(jnp.split(x, 2 - x.shape[axis] % 2, axis))
  queries = {'q': q_BTKGH, 'place': rows.place_BT, 'segment': rows.segment_BT}
  keys = {'k': k_BSKH, 'v': v_BSKH, 'place': rows.place_BS, 'segment': rows.segment_BS, 'prefix': rows.prefix_BS}
  queries, keys = (jax.tree.map(lambda x: cut(x, 1), x) for x in (queries, keys))
  biases = None if bias_BKGTS is None else jax.vmap(lambda x: cut(x, 4))(cut(bias_BKGTS, 3))

  def of_queries(given):
    queries, biases = given

    def with_more(found, given):
      keys, bias_BKGTS = given
      here = Part(queries['place'], keys['place'], queries['segment'], keys['segment'], keys['prefix'])
      return joined(found, _block(queries['q'], keys['k'], keys['v'], pattern, here, slope_KG, bias_BKGTS)), None

    shape = queries['q'].shape[:-1]
    nothing = jnp.zeros((*shape, W), jnp.float32), jnp.full(shape, NOTHING, jnp.float32)
    return jax.lax.scan(with_more, nothing, (keys, biases))[0]

  out, lse = (jnp.moveaxis(x, 0, 1) for x in jax.lax.map(of_queries, (queries, biases)))
  lse_BTKG = lse.reshape(B, T, K, G)
  return out.reshape(B, T, K, G, W).astype(v_BSKH.dtype), jnp.where(lse_BTKG <= NOTHING, -jnp.inf, lse_BTKG)


def _block(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, slope_KG, bias_BKGTS):
  """(out in float32, lse_BTKG) with all scores in memory; zeros and NOTHING where nothing is seen."""
  tile = attention_tile.Tile(**attention_tile.of_case(pattern, rows, q_BTKGH.shape[-1], False))
  place_BT1, place_B1S = rows.place_BT[:, :, None], rows.place_BS[:, None, :]
  of_queries = lambda x_BT: None if x_BT is None else x_BT[:, :, None]
  of_keys = lambda x_BS: None if x_BS is None else x_BS[:, None, :]
  seen_BTS = tile.seen(place_BT1, place_B1S, of_queries(rows.segment_BT), of_keys(rows.segment_BS),
                       of_keys(rows.prefix_BS))
  seen_BKGTS = seen_BTS[:, None, None]

  def computed(q_BTKGH, k_BSKH, v_BSKH, slope_KG, bias_BKGTS):
    score_BKGTS = jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * tile.scale
    if pattern.softcap is not None:
      score_BKGTS = pattern.softcap * jnp.tanh(score_BKGTS / pattern.softcap)
    if slope_KG is not None:
      score_BKGTS += slope_KG[None, :, :, None, None] * (place_B1S - place_BT1)[:, None, None]
    if bias_BKGTS is not None:
      score_BKGTS += bias_BKGTS
    score_BKGTS = jnp.where(seen_BKGTS, score_BKGTS, NOTHING)
    most_BKGT1 = jax.lax.stop_gradient(score_BKGTS.max(-1, keepdims=True))
    weight_BKGTS = jnp.where(seen_BKGTS, jnp.exp(score_BKGTS - most_BKGT1), 0)
    sum_BKGT = weight_BKGTS.sum(-1)
    empty_BKGT = sum_BKGT == 0
    sum_BKGT = jnp.where(empty_BKGT, 1, sum_BKGT)
    prob_BKGTS = (weight_BKGTS / sum_BKGT[..., None]).astype(v_BSKH.dtype)
    lse_BKGT = jnp.where(empty_BKGT, NOTHING, most_BKGT1[..., 0] + jnp.log(sum_BKGT))
    out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', prob_BKGTS, v_BSKH)
    return out_BTKGH.astype(jnp.float32), jnp.einsum('BKGT->BTKG', lse_BKGT)

  def nothing(*_):
    return jnp.zeros((*q_BTKGH.shape[:-1], v_BSKH.shape[-1])), jnp.full(q_BTKGH.shape[:-1], NOTHING, jnp.float32)

  return jax.lax.cond(seen_BTS.any(), computed, nothing, q_BTKGH, k_BSKH, v_BSKH, slope_KG, bias_BKGTS)


def _routes(devices: int):
  """Where the even and the odd one of each device's two parts go, as ppermute wants it."""
  owner = lambda part: part if part < devices else 2 * devices - 1 - part
  return [[(i, owner(2 * i + odd)) for i in range(devices)] for odd in (0, 1)]


def spread(x_BT, axis: str, devices: int):
  """A device's two neighbouring parts along T for the parts i and 2c - 1 - i."""
  halves = jnp.split(x_BT, 2, axis=1)
  even, odd = (jax.lax.ppermute(half, axis, route) for half, route in zip(halves, _routes(devices)))
  swap = jax.lax.axis_index(axis) % 2 == 1  # an odd device's own number is that of an odd part
  return jnp.where(swap, jnp.concatenate([odd, even], 1), jnp.concatenate([even, odd], 1))


def gathered(x_BT, axis: str, devices: int):
  """The other way."""
  first, second = jnp.split(x_BT, 2, axis=1)
  swap = jax.lax.axis_index(axis) % 2 == 1
  even, odd = jnp.where(swap, second, first), jnp.where(swap, first, second)
  back = lambda route: [(there, here) for here, there in route]
  return jnp.concatenate([jax.lax.ppermute(half, axis, back(route))
                          for half, route in zip((even, odd), _routes(devices))], 1)


KERNELS = {'reference': None, 'gpu': attention_gpu, 'tpu': attention_tpu}
