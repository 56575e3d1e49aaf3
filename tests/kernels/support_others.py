"""Cases of the other operations, as in support_attention.py; each runs the operation itself, as a model does."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lmlib.kernels import cross_entropy, decode_attention, grouped_matmul, quantised_matmul
from lmlib.kernels.attention import Pattern
from lmlib.kernels.cross_entropy import Logits
from lmlib.kernels.decode_attention import Held
from lmlib.quant import integers
from tests.kernels import test_decode_attention as decoding
from tests.kernels import test_grouped_matmul as grouped
from tests.kernels import test_quantised_matmul as quantised

RANDOM = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Case:
  """run(implementation) and exact(): arrays that must be equal, the latter in float64."""
  run: object
  exact: object
  dtype: str = 'float32'

  def error(self, implementation: str) -> float:
    """The largest relative to the norm. ValueError if the implementation cannot do the case."""
    errors = []
    for a, b in zip(self.run(implementation), self.exact(), strict=True):
      a, b = np.asarray(a).astype(np.float64), np.asarray(b, np.float64)
      finite = np.isfinite(b)  # of a log-sum over nothing
      np.testing.assert_array_equal(np.isfinite(a), finite)
      errors.append(np.linalg.norm(a[finite] - b[finite]) / (np.linalg.norm(b[finite]) or 1))
    return max(errors)


def step(q, held, pattern=Pattern(), sink=None, dtype='float32') -> Case:
  """A step of decoding: values and log-sums."""
  held = held if dtype == 'float32' else held.replace(k=held.k.astype(dtype), v=held.v.astype(dtype))
  q = jnp.asarray(q, dtype)
  run = lambda implementation: decode_attention.partial(q, held, pattern, sink_KG=sink, implementation=implementation)
  return Case(run, lambda: decoding.loops(q, held, pattern, None, sink), dtype)


def steps() -> dict[str, Case]:
  lengths = jnp.asarray(decoding.LENGTHS)
  q, k, v, sink = decoding.arrays()
  q3, wide = decoding.arrays(T=3)[0], decoding.arrays(T=17)[0]
  rows = Held(jnp.asarray(k), jnp.asarray(v), lengths)
  ring = rows.replace(length_B=None, place_BS=jnp.where(jnp.arange(48)[None] < lengths[:, None],
                                                        jnp.arange(48)[None], -1))
  placed = lambda implementation: decode_attention.partial(
      q, ring, Pattern(), place_BT=rows.queries_BT(1), implementation=implementation)
  return {
      'rows of several lengths, one empty': step(q, decoding.filled(rows)),
      'several queries': step(q3, decoding.filled(rows)),
      'more than 16 queries': step(wide, decoding.filled(rows)),
      'pages of 16': step(q, decoding.paged(decoding.filled(rows), 16)),
      'pages of 4': step(q, decoding.paged(decoding.filled(rows), 4)),
      'places of slots': Case(placed, lambda: decoding.loops(q, ring, Pattern(), np.asarray(rows.queries_BT(1)))),
      'a window': step(q, decoding.filled(rows), Pattern(window=9)),
      'a soft-cap': step(q, decoding.filled(rows), Pattern(softcap=1.5)),
      'sinks': step(q, decoding.filled(rows), Pattern(), sink),
      'int8 with scales': step(q, decoding.filled(decoding.eight(k, v, jnp.int8))),
      'float8 with scales': step(q, decoding.filled(decoding.eight(k, v, jnp.float8_e4m3fn))),
      'values that are of the keys': step(q, Held(jnp.asarray(k), None, lengths, value_width=4)),
      'bfloat16': step(q, rows, dtype='bfloat16'),
  }


def groups(sizes, dtype='float32', known=False) -> Case:
  x, w, dout = (jnp.asarray(y, dtype) for y in grouped.arrays())
  sizes = jnp.asarray(sizes)

  def run(implementation):
    multiply = lambda x, w: grouped_matmul.grouped_matmul(x, w, sizes, most=grouped.M if known else None,
                                                          implementation=implementation)
    out, back = jax.vjp(multiply, x, w)
    return out, *back(dout)

  return Case(run, lambda: grouped.loops(*(np.asarray(y, np.float64) for y in (x, w, dout)), np.asarray(sizes)), dtype)


GROUPS = {'uneven groups': groups(grouped.SIZES['uneven']), 'empty groups': groups(grouped.SIZES['empty groups']),
          'rows beyond the last group': groups(grouped.SIZES['rows beyond']),
          'no rows at all': groups(grouped.SIZES['no rows']),
          'the largest size known': groups(grouped.SIZES['uneven'], known=True),
          'bfloat16': groups(grouped.SIZES['uneven'], 'bfloat16')}


def words(z_loss=None, dtype='float32', **settings) -> Case:
  """Cross-entropy: total, nats and the gradients of x and w."""
  B, T, D, V = 2, 9, 24, 150
  random = np.random.default_rng(1)
  x, w = (jnp.asarray(random.normal(size=shape), dtype) for shape in ((B, T, D), (D, V)))
  targets, weight = random.integers(0, V, (B, T)), random.random((B, T)).astype(np.float32)

  def run(implementation):
    logits = Logits(**settings, implementation=implementation)
    total = lambda x, w: (lambda sums: (sums[0], sums[:2]))(
        cross_entropy.cross_entropy(x, w, targets, weight, z_loss, logits))
    gradients, sums = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, w)
    return *sums, *gradients

  def exact():
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    cap, heat, z = settings.get('softcap'), settings.get('temperature') or 1.0, z_loss or 0.0
    raw = np.einsum('btd,dv->btv', x64, w64)
    capped = raw if cap is None else cap * np.tanh(raw / cap)
    logits = capped / heat
    lse = np.log(np.exp(logits).sum(-1))
    hit = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nats = ((lse - hit) * weight).sum()
    dlogits = np.exp(logits - lse[..., None]) * (weight * (1 + 2 * z * lse))[..., None]
    np.put_along_axis(dlogits, targets[..., None], np.take_along_axis(dlogits, targets[..., None], -1)
                      - weight[..., None], -1)
    dlogits = dlogits / heat * (1 if cap is None else 1 - (capped / cap)**2)
    return (nats + z * (lse**2 * weight).sum(), nats, np.einsum('btv,dv->btd', dlogits, w64),
            np.einsum('btd,btv->dv', x64, dlogits))

  return Case(run, exact, dtype)


WORDS = {'weights of labels': words(), 'a z-loss': words(1e-2), 'a soft-cap': words(softcap=2.0),
         'a temperature': words(temperature=0.7), 'a tied matrix': words(tied=True),
         'bfloat16': words(dtype='bfloat16')}


def bits(name: str, block=None, zero=False, dtype='float32') -> Case:
  """A product with weights of few bits, and the gradient of x."""
  *case, w64 = quantised.weights(name, block, zero)
  x, dout = quantised.normal(quantised.M, quantised.D, dtype=dtype), quantised.normal(quantised.M, quantised.F,
                                                                                      dtype=dtype, seed=2)
  run = lambda implementation: quantised.both(
      lambda x, *case: quantised_matmul.quantised_matmul(x, *case, implementation=implementation), x, dout, *case)
  exact = lambda: (np.asarray(x, np.float64) @ w64, np.asarray(dout, np.float64) @ w64.T)
  return Case(run, exact, dtype)


def eights(name: str, dtype, block=None) -> Case:
  """Both sides of 8 bits."""
  w_DF, scale_ZF, zero_ZF, w64 = quantised.weights(name, block, False)
  x, scale_M = integers.rows(quantised.normal(quantised.M, quantised.D), dtype)
  run = lambda implementation: (quantised_matmul.quantised_matmul(x, w_DF, scale_ZF, zero_ZF, x_scale_M=scale_M,
                                                                  implementation=implementation),)
  exact = lambda: (np.asarray(scale_M, np.float64)[:, None] * (np.asarray(x).astype(np.float64) @ w64),)
  return Case(run, exact)


BITS = {'int8, a scale a column': bits('int8'), 'int8 by blocks of 32': bits('int8', 32),
        'int4 by blocks of 64': bits('int4', 64), 'int4 with zero points': bits('int4', 32, True),
        'float8': bits('float8_e4m3fn'), 'x of bfloat16': bits('int8', 128, dtype='bfloat16'),
        'x of float16': bits('int8', dtype='float16'), 'int8 x int8': eights('int8', jnp.int8),
        'int8 x int4 by blocks': eights('int4', jnp.int8, 64),
        'float8 x float8': eights('float8_e4m3fn', jnp.float8_e4m3fn)}
