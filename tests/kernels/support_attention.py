"""Cases of attention, one for each thing that an implementation may not be able to do, and their oracle in float64."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmlib.kernels import attention
from lmlib.kernels.attention import Pattern, Rows

B, T = 2, 24
RANDOM = np.random.default_rng(0)
DOCUMENT_BT = np.sort(RANDOM.integers(1, 4, (B, T)), axis=1).astype(np.int32)
PREFIX_BS = np.tile(np.arange(T) < 7, (B, 1)).astype(np.int32)
START_B1 = np.array([[3], [11]], np.int32)  # of queries after a cache
KEYS_BS = np.array([[1] * 10 + [2] * 14, [1] * 20 + [4] * 4], np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
  """What is asked of an implementation: sees(t, s, b) says who sees whom, of places in NumPy."""
  sees: object = staticmethod(lambda t, s, b: s <= t)
  pattern: Pattern = Pattern()
  rows: Rows = Rows()
  heads: tuple[int, int] = (2, 2)  # K and G
  widths: tuple[int, int] = (16, 16)  # of queries and keys, and of values
  lengths: tuple[int, int] = (T, T)
  added: str | None = None
  dtype: str = 'float32'
  of_dtype: bool = False  # the case is about it

  @functools.cached_property
  def arrays(self):
    """q, k, v, a gradient of the output, and what is added to scores."""
    (K, G), (H, W), (T, S) = self.heads, self.widths, self.lengths
    shapes = (B, T, K, G, H), (B, S, K, H), (B, S, K, W), (B, T, K, G, W)
    added = {'slope_KG': (K, G), 'bias_BKGTS': (1, K, G, T, S), 'sink_KG': (K, G)}
    random = np.random.default_rng(1)
    given = [jnp.asarray(random.normal(size=shape), self.dtype) for shape in shapes]
    return given, {self.added: jnp.asarray(random.normal(size=added[self.added]), jnp.float32)} if self.added else {}

  @property
  def seen_BTS(self):
    (T, S), place_BT = self.lengths, np.arange(self.lengths[0])[None]
    if self.rows.place_BT is not None:
      place_BT = np.asarray(self.rows.place_BT)
    t, s, b = place_BT[:, :, None], np.arange(S)[None, None], np.arange(B)[:, None, None]
    return np.broadcast_to(self.sees(t, s, b), (B, T, S))

  def error(self, implementation: str) -> float:
    """The largest error of values and gradients, relative to their norm. ValueError if it cannot do the case."""
    given, added = self.arrays

    @jax.jit
    def both(q, k, v, dout, added):
      attend = lambda q, k, v: attention.attention(q, k, v, self.pattern, self.rows, implementation=implementation,
                                                   **added)
      out, back = jax.vjp(attend, q, k, v)
      return out, *back(dout)

    found, expected = both(*given, added), self.exact()
    return max(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in zip(found, expected))

  def refused(self, implementation: str) -> bool:
    """Whether it says that it cannot do this, where all else is as it likes it: on its chip, 16 bits, round lengths."""
    (K, G), (H, W), (T, S) = self.heads, self.widths, self.lengths
    H, W = (128, 128) if (H, W) == (16, 16) else (H, W)
    T, S = (128, 128) if (T, S) == (24, 24) else (T, S)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, self.dtype if self.of_dtype else 'bfloat16')
    lacking = attention.LACKING[implementation](of(B, T, K, G, H), of(B, S, K, H), of(B, S, K, W), self.pattern,
                                                self.rows, [self.added] if self.added else [])
    return any('backend' not in reason and 'jax before' not in reason for reason in lacking)

  def exact(self):
    """(out, dq, dk, dv) in float64."""
    given, added = self.arrays
    q, k, v, dout = (np.asarray(x, np.float64) for x in given)
    slope, bias, sink = (np.asarray(added[name], np.float64) if name in added else None
                         for name in ('slope_KG', 'bias_BKGTS', 'sink_KG'))
    scale, cap = self.pattern.scale or q.shape[-1]**-0.5, self.pattern.softcap or np.inf
    raw = np.einsum('btkgh,bskh->bkgts', q, k) * scale
    tanh = np.tanh(raw / cap) if np.isfinite(cap) else None
    score = raw if tanh is None else cap * tanh
    if slope is not None:
      (T, S) = self.lengths
      score = score + slope[None, :, :, None, None] * (np.arange(S)[None] - np.arange(T)[:, None])
    score = score if bias is None else score + bias
    weight = np.where(self.seen_BTS[:, None, None], np.exp(score), 0)
    total = weight.sum(-1, keepdims=True) + (0 if sink is None else np.exp(sink)[None, :, :, None, None])
    prob = weight / np.where(total == 0, 1, total)
    out = np.einsum('bkgts,bskh->btkgh', prob, v)
    dprob = np.einsum('btkgh,bskh->bkgts', dout, v)
    dscore = prob * (dprob - (prob * dprob).sum(-1, keepdims=True)) * scale
    dscore = dscore if tanh is None else dscore * (1 - tanh**2)
    return (out, np.einsum('bkgts,bskh->btkgh', dscore, k), np.einsum('bkgts,btkgh->bskh', dscore, q),
            np.einsum('bkgts,btkgh->bskh', prob, dout))


same = lambda t, s, b: DOCUMENT_BT[b, t] == DOCUMENT_BT[b, s]
CASES = {
    'causal': Case(),
    'both directions': Case(lambda t, s, b: s >= 0 * t, Pattern(causal=False)),
    'a window': Case(lambda t, s, b: (s <= t) & (t - s < 7), Pattern(window=7)),
    'a window in both directions': Case(lambda t, s, b: abs(t - s) < 7, Pattern(causal=False, window=7)),
    'chunks': Case(lambda t, s, b: (s <= t) & (t // 5 == s // 5), Pattern(chunk=5)),
    'a stride': Case(lambda t, s, b: (s <= t) & ((t - s) % 3 == 0), Pattern(stride=3)),
    'a prefix seen from everywhere': Case(lambda t, s, b: (s <= t) | (s < 7), rows=Rows(prefix_BS=PREFIX_BS)),
    'packed documents': Case(lambda t, s, b: (s <= t) & same(t, s, b), rows=Rows(segment_BT=DOCUMENT_BT)),
    'documents of keys apart, rows that see nothing': Case(
        lambda t, s, b: DOCUMENT_BT[b, t] == KEYS_BS[b, s], Pattern(causal=False),
        Rows(segment_BT=DOCUMENT_BT, segment_BS=KEYS_BS)),
    'queries after a cache': Case(rows=Rows(place_BT=START_B1 + np.arange(9, dtype=np.int32)[None]), lengths=(9, T)),
    'keys in front': Case(lambda t, s, b: s <= t + 3, rows=Rows(front=3), lengths=(T, T + 3)),
    'a soft-cap': Case(pattern=Pattern(softcap=1.5)),
    'a scale': Case(pattern=Pattern(scale=0.7)),
    'sinks': Case(added='sink_KG'),
    'slopes (ALiBi)': Case(added='slope_KG'),
    'a bias (T5)': Case(added='bias_BKGTS'),
    'one key head': Case(heads=(1, 4)),
    'as many key heads as heads': Case(heads=(3, 1)),
    'a length that no block divides': Case(lengths=(T - 5, T - 5)),
    'values of another width': Case(widths=(24, 16)),
    'heads of 64': Case(heads=(1, 2), widths=(64, 64)),
    'heads of 128': Case(heads=(1, 2), widths=(128, 128)),
    'heads of 256': Case(heads=(1, 2), widths=(256, 256)),
    'float32': Case(of_dtype=True),
    'bfloat16': Case(dtype='bfloat16', of_dtype=True),
}
