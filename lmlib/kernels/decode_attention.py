"""Attention of a step of decoding: one or a few queries a row, and keys that a cache holds, in a row or in pages.

  score[r,s] = cap(scale q[r] . k[s] k_scale[s])       of the rows r = (t, g) of a key head
  out[r] = sum_s p[s] v_scale[s] v[s],   p[s] = exp(score[r,s]) / (exp(sink) + sum_s' exp(score[r,s']))
  lse[r] = log(exp(sink) + sum_s exp(score[r,s]))      joins attention to parts of the keys: see joined()

Pages are those of vLLM (Kwon et al. 2023): slot s of row b is slot s % S of page page_BX[b, s // S]. Keys and values
lie as nn/cache.py keeps them, places behind heads. What nobody sees is not read by the kernels: no page or block
beyond a row's length or before its window, and no entry of the table that stands for one.
"""
import functools

from flax import struct
import jax
import jax.numpy as jnp

from lmlib import sharding
from lmlib.kernels import choice, decode_attention_gpu, decode_attention_tpu, tpu

MOST = 16  # queries of a row: more are no step of decoding
QUANTISED = (jnp.int8, jnp.float8_e4m3fn)
AXES = {'k': 'BKSH', 'v': 'BKSH', 'length_B': 'B', 'page_BX': 'BX', 'k_scale': 'BKS', 'v_scale': 'BKS',
        'place_BS': 'BS'}


@struct.dataclass
class Held:
  """What a cache holds: k and v, BKSH of whole rows, or ZKSH of pages that page_BX gives to rows."""
  k: jax.Array  # its H may be wider than that of queries, and ends in zeros then: see decode_attention_tpu
  v: jax.Array | None  # its H may be another; None: keys begin with the values (latent attention)
  length_B: jax.Array | None = None  # slots that are filled, new ones included; 0 of an empty row
  page_BX: jax.Array | None = None  # int32; entries of no filled slot may be any number
  k_scale: jax.Array | None = None  # BKS or ZKS, float32: of int8 and float8_e4m3fn, by which they are multiplied
  v_scale: jax.Array | None = None  # None where values are of the keys
  place_BS: jax.Array | None = None  # of each slot, negative for none, instead of length_B; not of pages
  value_width: int | None = struct.field(pytree_node=False, default=None)  # the entries of a value; None: all of v

  @property
  def slots(self) -> int:
    """How many slots a row has."""
    return self.k.shape[2] * (1 if self.page_BX is None else self.page_BX.shape[1])

  @property
  def width(self) -> int:
    """Of a value."""
    return self.v.shape[-1] if self.value_width is None else self.value_width

  @property
  def axes(self) -> dict[str, str]:
    """The letters of the arrays that are given."""
    of = lambda axes: axes if self.page_BX is None else axes.replace('BK', 'ZK')
    return {name: of(axes) for name, axes in AXES.items() if getattr(self, name) is not None}

  def places_BS(self) -> jax.Array:
    """The place of every slot, negative where it is not filled."""
    if self.place_BS is not None:
      return self.place_BS
    slot_1S = jnp.arange(self.slots, dtype=jnp.int32)[None]
    return jnp.where(slot_1S < self.length_B[:, None], slot_1S, -1)

  def whole(self, x_ZKS):
    """Pages as whole rows, BKS and what follows; of a slot that is not filled anything. Else what is given."""
    if self.page_BX is None or x_ZKS is None:
      return x_ZKS
    size = self.k.shape[2]
    used_BX = jnp.arange(self.page_BX.shape[1])[None] * size < self.length_B[:, None]
    x_BXKS = x_ZKS.at[jnp.where(used_BX, self.page_BX, 0)].get(mode='clip')
    x_BKXS = jnp.moveaxis(x_BXKS, 1, 2)
    return x_BKXS.reshape(*x_BKXS.shape[:2], self.slots, *x_BKXS.shape[4:])

  def queries_BT(self, T: int) -> jax.Array:
    """The places of T queries, which are the last of their rows; negative where a row has fewer."""
    return self.length_B[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None]


def decode_attention(q_BTKGH, held: Held, pattern, **settings):
  """Attention, BTKG and the width of values; zeros of a query that sees nothing. Settings: those of partial()."""
  return partial(q_BTKGH, held, pattern, **settings)[0]


def partial(q_BTKGH, held: Held, pattern, *, place_BT=None, sink_KG=None, implementation: str = 'auto'):
  """(out, lse_BTKG), by a kernels.attention.Pattern; lse is -inf of a query that sees nothing, and counts the sink.

  place_BT: of the queries, negative for none; None: the last T of each row. implementation: a name of
  IMPLEMENTATIONS, or 'auto': 'tpu' on TPUs where it can do the case, else 'reference'. ValueError if the one asked
  for cannot do the case, or if the arrays do not fit each other. There are no gradients but of 'reference'.
  """
  _check(q_BTKGH, held, place_BT)
  implementation = choice.chosen('decode_attention', implementation, chosen, LACKING, (q_BTKGH, held))
  place_BT = held.queries_BT(q_BTKGH.shape[1]) if place_BT is None else place_BT
  return _apart(IMPLEMENTATIONS[implementation], q_BTKGH, held, pattern, place_BT, sink_KG)


def chosen(q_BTKGH, held: Held) -> str:
  """'tpu' on a TPU where that can do the case, else 'reference'."""
  return 'tpu' if tpu.chip() is not None and not decode_attention_tpu.lacking(q_BTKGH, held) else 'reference'


def joined(parts):
  """(out, lse_BTKG) of attention to all keys, from (out, lse_BTKG) of parts of them; a sink belongs to one part."""
  out_NBTKGH, lse_NBTKG = (jnp.stack(x) for x in zip(*parts))
  lse_BTKG = jax.nn.logsumexp(lse_NBTKG, axis=0)
  share_NBTKG = jnp.exp(lse_NBTKG - jnp.where(jnp.isneginf(lse_BTKG), 0, lse_BTKG)[None])
  out_BTKGH = (out_NBTKGH.astype(jnp.float32) * share_NBTKG[..., None]).sum(0)
  return out_BTKGH.astype(out_NBTKGH.dtype), lse_BTKG


def reference(q_BTKGH, held: Held, pattern, place_BT, sink_KG=None):
  """The equation above, word for word, of every slot, in float32; all scores in memory."""
  scale = q_BTKGH.shape[-1]**-0.5 if pattern.scale is None else pattern.scale
  seen_BTS = pattern.seen(place_BT[:, :, None], held.places_BS()[:, None])
  k_BKSH, v_BKSH = _rows(held, seen_BTS.any(1), q_BTKGH.shape[-1])
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  score_BTKGS = product('BTKGH,BKSH->BTKGS', q_BTKGH.astype(jnp.float32), k_BKSH) * scale
  if pattern.softcap is not None:
    score_BTKGS = pattern.softcap * jnp.tanh(score_BTKGS / pattern.softcap)
  score_BTKGS = jnp.where(seen_BTS[:, :, None, None], score_BTKGS, -jnp.inf)
  most_BTKG1 = score_BTKGS.max(-1, keepdims=True)
  if sink_KG is not None:
    most_BTKG1 = jnp.maximum(most_BTKG1, sink_KG[None, None, :, :, None])
  most_BTKG1 = jnp.where(jnp.isfinite(most_BTKG1), most_BTKG1, 0)
  prob_BTKGS = jnp.exp(score_BTKGS - most_BTKG1)
  sum_BTKG1 = prob_BTKGS.sum(-1, keepdims=True)
  if sink_KG is not None:
    sum_BTKG1 += jnp.exp(sink_KG[None, None, :, :, None] - most_BTKG1)
  out_BTKGH = product('BTKGS,BKSH->BTKGH', prob_BTKGS, v_BKSH)
  out_BTKGH /= jnp.where(sum_BTKG1 == 0, 1, sum_BTKG1)
  return out_BTKGH.astype(q_BTKGH.dtype), (jnp.log(sum_BTKG1) + most_BTKG1)[..., 0]


def _rows(held: Held, seen_BS, H: int):
  """Keys, H wide, and values of whole rows, BKSH, float32; zeros where nobody sees them."""

  def row(x, scale):
    x, scale = held.whole(x), held.whole(scale)
    x = x.astype(jnp.float32) * (1 if scale is None else scale[..., None])
    return jnp.where(seen_BS[:, None, :, None], x, 0)

  k_BKSH = row(held.k, held.k_scale)
  v_BKSH = k_BKSH if held.v is None else row(held.v, held.v_scale)
  return k_BKSH[..., :H], v_BKSH[..., :held.width]


def _check(q_BTKGH, held: Held, place_BT):
  """ValueError where arrays do not fit each other."""
  K, H = q_BTKGH.shape[2], q_BTKGH.shape[-1]
  if held.k.shape[1] != K or held.k.shape[3] < H:
    raise ValueError(f'queries of K={K} heads of width {H}, and keys {held.k.shape}: they are BKSH, or ZKSH in pages')
  if (held.length_B is None) == (held.place_BS is None):
    raise ValueError('give length_B or place_BS, one of them')
  if held.place_BS is not None and (held.page_BX is not None or place_BT is None):
    raise ValueError('place_BS is of whole rows and not of pages, and needs the place_BT of queries')
  if held.v is None and held.value_width is None:
    raise ValueError('give v, or the value_width of the values that keys begin with')
  if not 0 < held.width <= (most := (held.k if held.v is None else held.v).shape[-1]):
    raise ValueError(f'value_width={held.width} must lie between 1 and the width {most} of what holds values')
  for name, x, scale in (('k', held.k, held.k_scale), ('v', held.v, held.v_scale)):
    if ((x is not None and x.dtype in QUANTISED) != (scale is not None)):
      raise ValueError(f'{name} is {None if x is None else x.dtype.name} and {name}_scale '
                       f'{"None" if scale is None else "given"}: int8 and float8_e4m3fn have one, others none')
    if scale is not None and scale.shape != x.shape[:3]:
      raise ValueError(f'{name}_scale is {scale.shape}, and {name} {x.shape}: one a token and key head')
    if x is not None and x.shape[:3] != held.k.shape[:3]:
      raise ValueError(f'v is {x.shape}, and k {held.k.shape}: only their widths may differ')


def _apart(kernel, q_BTKGH, held: Held, pattern, place_BT, sink_KG):
  """kernel(...), run by every device on its own rows and heads; a pool of pages is whole on each but for heads."""
  arrays = {name: getattr(held, name) for name in held.axes}
  more = [] if sink_KG is None else [sink_KG]

  def mine(q_BTKGH, place_BT, *given):
    parts = dict(zip(arrays, given))
    return kernel(q_BTKGH, held.replace(**parts), pattern, place_BT, *given[len(parts):])

  axes = ['BTKGH', 'BT', *held.axes.values(), *(['KG'] if more else [])]
  return sharding.each(mine, axes, ('BTKGH', 'BTKG'))(q_BTKGH, place_BT, *arrays.values(), *more)


def of_step(q_BTKGH, held: Held, added: list[str], asked: str) -> str | None:
  """The implementation by which a model's step reads its cache in its place: the kernel that is asked for, one of
  DECODING, or, by 'auto', the one that is proven for the case.

  None: there is none, and kernels.attention meets the keys as whole arrays. added: what else there is to scores or
  keys, which no kernel of here can do. ValueError if the kernel that was asked for cannot do the case.
  """
  if asked == 'reference' or (asked == 'auto' and (added or chosen(q_BTKGH, held) == 'reference')):
    return None
  lacking = {name: lambda q, held, by=by: added + LACKING[by](q, held) for name, by in DECODING.items()}
  lacking['reference'] = lambda q, held: []
  auto = lambda q, held: f'decode_{chosen(q, held)}'
  return DECODING[choice.chosen('attention of steps', asked, auto, lacking, (q_BTKGH, held))]


def _lacking(kernel):
  """What a kernel cannot do, and too many queries."""
  many = lambda q_BTKGH: [f'more than {MOST} queries a row'] if q_BTKGH.shape[1] > MOST else []
  return lambda q_BTKGH, held: many(q_BTKGH) + kernel.lacking(q_BTKGH, held)


# Functions of (q, held, pattern, place_BT, sink_KG or nothing) -> (out, lse).
IMPLEMENTATIONS = {'reference': reference, 'tpu': decode_attention_tpu.attention,
                   'gpu': decode_attention_gpu.attention}
LACKING = {'reference': lambda q_BTKGH, held: [], 'tpu': _lacking(decode_attention_tpu),
           'gpu': _lacking(decode_attention_gpu)}
DECODING = {'reference': 'reference', 'decode_tpu': 'tpu', 'decode_gpu': 'gpu'}  # names of them in Execution.decoding
