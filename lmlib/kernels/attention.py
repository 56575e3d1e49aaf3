"""Attention (Vaswani et al. 2017): softmax(scale q k' + bias) v over the keys a query may see.

  score[b,k,g,t,s] = cap(scale q[b,t,k,g,:] . k[b,s,k,:]) + slope[k,g] (place[s] - place[t]) + bias[b,k,g,t,s]
  out[b,t,k,g,:] = sum_s p[s] v[b,s,k,:],   p[s] = exp(score[s]) / (exp(sink[k,g]) + sum_s' exp(score[s']))

G query heads share one key head (Ainslie et al. 2023). cap(x) = c tanh(x / c) (Gemma 2, 2024); slopes are those
of ALiBi (Press et al. 2022), a bias is that of T5 (Raffel et al. 2020), sinks are those of GPT-OSS (2025). Scores
and softmax are float32. A query that sees nothing gets zeros.
"""
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lmlib import sharding
from lmlib.kernels import (
    attention_blocked,
    attention_cudnn,
    attention_gpu,
    attention_hopper,
    attention_parts,
    attention_tpu,
    choice,
    ring_attention,
    tpu,
)

PROVEN = ('H100', 'H200')  # GPUs on which the kernels were held to float64 and timed: benchmarks/RESULTS.md
SHORT = 64  # fewer queries than this are a step of decoding
SHORT_TPU = 128  # and than this leave a tile of a TPU half empty


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Who sees whom by place alone, and how scores are made: what a layer's attention has fixed.

  A row of `chunk` places in one layer and a `stride` of as many in the next are axial attention (Ho et al. 2019)
  over a sequence that is folded into lines.
  """
  causal: bool = True  # a query sees its own place and those before
  window: int | None = None  # only places less than this far away (Beltagy et al. 2020)
  chunk: int | None = None  # only places of its own block of so many (Child et al. 2019)
  stride: int | None = None  # only places a multiple of this away
  softcap: float | None = None  # scores lie between -softcap and softcap
  scale: float | None = None  # of scores; None: 1 / sqrt(H)

  def __post_init__(self):
    for name in ('window', 'chunk', 'stride'):
      value = getattr(self, name)
      if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f'attention.Pattern.{name}={value!r} must be a positive number of places; None: all')
    for name in ('softcap', 'scale'):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f'attention.Pattern.{name}={value!r} must be positive; None turns it off')

  @property
  def local(self) -> bool:
    return self.window is not None or self.chunk is not None

  def seen(self, place_BT1, place_B1S):
    """Which keys a query sees, from the places of both; a key at a negative place is none."""
    away = place_BT1 - place_B1S
    seen_BTS = (place_B1S >= 0) & (place_BT1 >= 0)
    if self.causal:
      seen_BTS &= away >= 0
    if self.window is not None:
      seen_BTS &= abs(away) < self.window
    if self.chunk is not None:
      seen_BTS &= place_BT1 // self.chunk == place_B1S // self.chunk
    if self.stride is not None:
      seen_BTS &= away % self.stride == 0
    return seen_BTS

  def mean_keys(self, length: int) -> float:
    """How many keys a query sees, mean over a sequence of `length` places."""
    place_T, reach, chunk = np.arange(length), (self.window or length) - 1, self.chunk or length
    first_T = np.maximum(place_T - reach, place_T // chunk * chunk)
    last_T = place_T if self.causal else np.minimum(place_T + reach, place_T // chunk * chunk + chunk - 1)
    before_T, after_T = place_T - np.maximum(first_T, 0), np.minimum(last_T, length - 1) - place_T
    return float((before_T // (self.stride or 1) + after_T // (self.stride or 1) + 1).mean())


@struct.dataclass
class Rows:
  """Who sees whom in the rows of a batch, beyond their layer's Pattern. None where a row says nothing of it."""
  place_BT: jax.Array | None = None  # of the queries: their index in the row; None: 0 .. T - 1
  place_BS: jax.Array | None = None  # of the keys, negative where there is none; None: 0 .. S - 1
  segment_BT: jax.Array | None = None  # document of each query in a packed row: it sees keys of the same
  segment_BS: jax.Array | None = None  # of each key; None: as segment_BT
  prefix_BS: jax.Array | None = None  # 1 where a key is seen from everywhere in its document
  front: int = struct.field(pytree_node=False, default=0)  # keys before all others, of no place: every query sees them


def attention(q_BTKGH, k_BSKH, v_BSKH, pattern: Pattern = Pattern(), rows: Rows = Rows(), *, slope_KG=None,
              bias_BKGTS=None, sink_KG=None, implementation: str = 'auto'):
  """Attention, BTKGH like q; the H of v may be another.

  implementation: a name of IMPLEMENTATIONS, or 'auto': see chosen(). ValueError if the one asked for cannot do the
  case. 'gpu' and 'tpu' run on a CPU too, interpreted and slow.
  """
  T, S = q_BTKGH.shape[1], k_BSKH.shape[1] - rows.front
  if T != S and rows.place_BT is rows.place_BS is None and (pattern.causal or pattern.local or pattern.stride):
    raise ValueError(f'{T} queries and {S} keys need their places in Rows')
  if rows.front and (slope_KG is not None or bias_BKGTS is not None):
    raise ValueError(f'Rows.front={rows.front} keys have no place: there are no slopes and no bias for them')
  added = {'slopes': slope_KG, 'a bias': bias_BKGTS, 'sinks': sink_KG}
  case = q_BTKGH, k_BSKH, v_BSKH, pattern, rows, [name for name, there in added.items() if there is not None]
  if ring_attention.needed(q_BTKGH, k_BSKH, rows):
    implementation = choice.chosen('attention around a ring', implementation, _chosen_of_parts, OF_PARTS, case)
    return ring_attention.attention(ring_attention.KERNELS[implementation], q_BTKGH, k_BSKH, v_BSKH, pattern, rows,
                                    slope_KG=slope_KG, bias_BKGTS=bias_BKGTS, sink_KG=sink_KG)
  implementation = choice.chosen('attention', implementation, chosen, LACKING, case)
  return IMPLEMENTATIONS[implementation](q_BTKGH, k_BSKH, v_BSKH, pattern, rows, slope_KG=slope_KG,
                                         bias_BKGTS=bias_BKGTS, sink_KG=sink_KG)


def chosen(q_BTKGH, k_BSKH, v_BSKH, pattern: Pattern, rows: Rows, added) -> str:
  """The fastest implementation that is proven for a case.

  On the GPUs of PROVEN and for 16-bit arrays, unless it is a step of decoding or has slopes or a bias, which the
  kernels have not met there: 'hopper', else 'gpu'. On TPUs, and in programs compiled for them elsewhere, 'tpu' for at
  least SHORT_TPU queries: it is proven by the simulator of a TPU and by compilation for five chips, and has not been
  timed. Else, and everywhere else, 'blocked' where that can do the case, which is causal training on plain or packed
  rows; else 'reference'. 'cudnn' is never chosen: its results may differ from run to run.
  """
  names = ['blocked']
  if tpu.chip() is not None:
    names = ['tpu'] * (q_BTKGH.shape[1] >= SHORT_TPU) + names
  if _proven() and q_BTKGH.dtype != jnp.float32 and q_BTKGH.shape[1] >= SHORT and set(added) <= {'sinks'}:
    names = ['hopper', 'gpu', 'blocked']
  able = [name for name in names if not LACKING[name](q_BTKGH, k_BSKH, v_BSKH, pattern, rows, added)]
  return able[0] if able else 'reference'


def _chosen_of_parts(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, added) -> str:
  """What meets a part of the keys where rows are split among devices; keys in front are in none."""
  case = q_BTKGH, k_BSKH, v_BSKH, pattern, rows.replace(front=0), added
  wanted = chosen(*case)
  wanted = {'hopper': 'gpu'}.get(wanted, wanted)
  return wanted if wanted in OF_PARTS and not OF_PARTS[wanted](*case) else 'reference'


def _proven() -> bool:
  return jax.default_backend() == 'gpu' and any(name in jax.devices()[0].device_kind for name in PROVEN)


def _blocked(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, **none):
  if pattern.scale is not None:
    q_BTKGH = q_BTKGH * jnp.asarray(pattern.scale * q_BTKGH.shape[-1]**0.5, q_BTKGH.dtype)
  return attention_blocked.attention(q_BTKGH, k_BSKH, v_BSKH, rows.segment_BT)


def _apart(kernel):
  """A file's kernel, which XLA cannot split, run by every device on its own rows and heads."""

  def run(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, *, slope_KG=None, bias_BKGTS=None, sink_KG=None):
    named = {'place_BT': 'BT', 'place_BS': 'BS', 'segment_BT': 'BT', 'segment_BS': 'BS', 'prefix_BS': 'BS'}
    given = {name: getattr(rows, name) for name in named if getattr(rows, name) is not None}
    named |= {'slope_KG': 'KG', 'bias_BKGTS': 'BKGTS', 'sink_KG': 'KG'}
    more = {'slope_KG': slope_KG, 'bias_BKGTS': bias_BKGTS, 'sink_KG': sink_KG}
    more = {name: x for name, x in more.items() if x is not None}
    if bias_BKGTS is not None:  # split over heads as queries are
      scores = (q_BTKGH.shape[2], q_BTKGH.shape[3], q_BTKGH.shape[1], k_BSKH.shape[1])
      more['bias_BKGTS'] = jnp.broadcast_to(bias_BKGTS, (bias_BKGTS.shape[0], *scores))

    def mine(q_BTKGH, k_BSKH, v_BSKH, *arrays):
      arrays = dict(zip([*given, *more], arrays))
      here = rows.replace(**{name: arrays[name] for name in given})
      attend = functools.partial(attention_parts.behind, kernel.partial_attention) if rows.front else kernel.attention
      return attend(q_BTKGH, k_BSKH, v_BSKH, pattern, here, **{name: arrays[name] for name in more})

    axes = ['BTKGH', 'BSKH', 'BSKH', *(named[name] for name in (*given, *more))]
    return sharding.each(mine, axes, 'BTKGH')(q_BTKGH, k_BSKH, v_BSKH, *given.values(), *more.values())

  return run


def reference(q_BTKGH, k_BSKH, v_BSKH, pattern: Pattern = Pattern(), rows: Rows = Rows(), *, slope_KG=None,
              bias_BKGTS=None, sink_KG=None):
  """The equation above, word for word; all scores in memory."""
  (B, T, K, G, H), S = q_BTKGH.shape, k_BSKH.shape[1]
  scale = H**-0.5 if pattern.scale is None else pattern.scale
  # All queries of a key head are rows of one matrix, N: of two axes XLA on CPU makes a product several times slower.
  q_BKNH = jnp.moveaxis(q_BTKGH, 1, 3).reshape(B, K, G * T, H)
  score_BKNS = jnp.einsum('BKNH,BSKH->BKNS', q_BKNH, k_BSKH, preferred_element_type=jnp.float32) * scale
  score_BKGTS = score_BKNS.reshape(B, K, G, T, S)
  if pattern.softcap is not None:
    score_BKGTS = pattern.softcap * jnp.tanh(score_BKGTS / pattern.softcap)
  if slope_KG is not None:
    place_BT1, place_B1S = places(T, S, rows)
    score_BKGTS += slope_KG[None, :, :, None, None] * (place_B1S - place_BT1)[:, None, None]
  if bias_BKGTS is not None:
    score_BKGTS += bias_BKGTS
  score_BKGTS = jnp.where(mask(T, S, pattern, rows)[:, None, None], score_BKGTS, -jnp.inf)
  most_BKGT1 = score_BKGTS.max(-1, keepdims=True)
  if sink_KG is not None:
    sink_BKGT1 = sink_KG.astype(jnp.float32)[None, :, :, None, None]
    most_BKGT1 = jnp.maximum(most_BKGT1, sink_BKGT1)
  most_BKGT1 = jax.lax.stop_gradient(jnp.where(jnp.isfinite(most_BKGT1), most_BKGT1, 0))
  prob_BKGTS = jnp.exp(score_BKGTS - most_BKGT1)
  sum_BKGT1 = prob_BKGTS.sum(-1, keepdims=True)
  if sink_KG is not None:
    sum_BKGT1 += jnp.exp(sink_BKGT1 - most_BKGT1)
  prob_BKGTS = (prob_BKGTS / jnp.where(sum_BKGT1 == 0, 1, sum_BKGT1)).astype(v_BSKH.dtype)
  out_BKNH = jnp.einsum('BKNS,BSKH->BKNH', prob_BKGTS.reshape(B, K, G * T, S), v_BSKH)
  return jnp.moveaxis(out_BKNH.reshape(B, K, G, T, -1), 3, 1)


def places(T: int, S: int, rows: Rows) -> tuple[jax.Array, jax.Array]:
  """The places of queries, BT1, and of keys, B1S (B is 1 if all rows are alike)."""
  place_BT = jnp.arange(T)[None] if rows.place_BT is None else rows.place_BT
  place_BS = jnp.arange(S)[None] if rows.place_BS is None else rows.place_BS
  return place_BT[:, :, None], place_BS[:, None, :]


def mask(T: int, S: int, pattern: Pattern = Pattern(), rows: Rows = Rows()):
  """Which keys a query sees, BTS (B is 1 if all rows are alike)."""
  if rows.front:
    seen_BTS = mask(T, S - rows.front, pattern, rows.replace(front=0))
    return jnp.pad(seen_BTS, [(0, 0), (0, 0), (rows.front, 0)], constant_values=True)
  place_BT1, place_B1S = places(T, S, rows)
  seen_BTS = pattern.seen(place_BT1, place_B1S)
  if rows.prefix_BS is not None:
    seen_BTS |= (rows.prefix_BS[:, None] > 0) & dataclasses.replace(pattern, causal=False).seen(place_BT1, place_B1S)
  if rows.segment_BT is not None:
    segment_BS = rows.segment_BT if rows.segment_BS is None else rows.segment_BS
    seen_BTS &= rows.segment_BT[:, :, None] == segment_BS[:, None, :]
  return seen_BTS


IMPLEMENTATIONS = {'reference': reference, 'blocked': _blocked, 'gpu': _apart(attention_gpu),
                   'hopper': _apart(attention_hopper), 'cudnn': _apart(attention_cudnn), 'tpu': _apart(attention_tpu)}
# What of a case each cannot do: functions of (q, k, v, pattern, rows, what is added to scores) -> names.
LACKING = {'reference': lambda *case: [], 'blocked': attention_blocked.lacking, 'gpu': attention_gpu.lacking,
           'hopper': attention_hopper.lacking, 'cudnn': attention_cudnn.lacking, 'tpu': attention_tpu.lacking}
OF_PARTS = {name: functools.partial(ring_attention.lacking, kernel) for name, kernel in ring_attention.KERNELS.items()}
LACKING |= {name: OF_PARTS[name] for name in ('gpu', 'tpu')}  # keys in front are a part beside them
