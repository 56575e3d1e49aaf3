"""Attention to parts of the keys, joined by the logs of their sums, and to a part in plain jnp.

  lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

A ring of devices meets one part after the other (ring_attention.py); keys in front of all rows are a part beside a
kernel that knows none (Prefix-Tuning, Li and Liang 2021).
"""
import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from lmlib.kernels import attention_tile

NOTHING = -1e30  # lse of no key at all: finite, so that no difference is NaN


def behind(partial, q_BTKGH, k_BSKH, v_BSKH, pattern, rows, *, sink_KG=None, **added):
  """Attention, BTKG and the width of v, where the first rows.front keys are in front; see attention.attention().

  partial: a kernel's partial_attention, for the keys behind them.
  """
  front_BSKH, k_BSKH = jnp.split(k_BSKH, [rows.front], axis=1)
  front_v_BSKH, v_BSKH = jnp.split(v_BSKH, [rows.front], axis=1)
  found = finite(*partial(q_BTKGH, k_BSKH, v_BSKH, pattern, rows.replace(front=0), **added))
  return sunk(joined(found, in_front(q_BTKGH, front_BSKH, front_v_BSKH, pattern)), sink_KG).astype(v_BSKH.dtype)


def in_front(q_BTKGH, k_BSKH, v_BSKH, pattern):
  """(out, lse_BTKG) with keys that every query sees."""
  free = dataclasses.replace(pattern, causal=False, window=None, chunk=None, stride=None)
  place = lambda x: jnp.zeros((1, x.shape[1]), jnp.int32)
  return finite(*plain(q_BTKGH, k_BSKH, v_BSKH, pattern=free, rows=Part(place(q_BTKGH), place(k_BSKH))))


def finite(out_BTKGH, lse_BTKG):
  """The same, with NOTHING in the place of -inf."""
  return out_BTKGH, jnp.where(jnp.isneginf(lse_BTKG), NOTHING, lse_BTKG)


def sunk(found, sink_KG=None):
  """The result of all parts, with one more key that has no value."""
  out_BTKGH, lse_BTKG = found
  if sink_KG is None:
    return out_BTKGH
  return out_BTKGH * jax.nn.sigmoid(lse_BTKG - sink_KG.astype(jnp.float32)[None, None])[..., None]


def joined(found, more):
  """(out in float32, lse_BTKG) for two parts of the keys together."""
  (a_BTKGH, a_BTKG), (b_BTKGH, b_BTKG) = found, more
  both_BTKG = jnp.logaddexp(a_BTKG, b_BTKG)
  share = lambda lse_BTKG: jnp.exp(lse_BTKG - both_BTKG)[..., None]
  return a_BTKGH.astype(jnp.float32) * share(a_BTKG) + b_BTKGH.astype(jnp.float32) * share(b_BTKG), both_BTKG


@struct.dataclass
class Part:
  """The attention.Rows of queries and a part of the keys, with all places given."""
  place_BT: jax.Array
  place_BS: jax.Array
  segment_BT: jax.Array | None = None
  segment_BS: jax.Array | None = None
  prefix_BS: jax.Array | None = None
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
