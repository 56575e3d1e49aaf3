"""Causal attention by blocks in plain jnp: half the arithmetic, and no T x S array outlives a block.

Each block of queries meets the keys up to its end. The backward pass makes the scores again from each
row's log-sum (FlashAttention, Dao et al. 2022); unlike there, a block's scores are held whole, so no
online softmax is needed. Written for XLA on CPU: its dot is several times slower where it sums over the rows
of the left operand, so the backward pass holds scores as keys x queries.
"""
import functools

import jax
import jax.numpy as jnp

SMALLEST = 128  # positions of a block
MOST = 16  # blocks a sequence, which bounds the size of the program


def lacking(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, added) -> list[str]:
  """What of a case is not done here; `added`: names of what is added to scores."""
  cases = {'both directions': not pattern.causal, 'a window': pattern.window, 'a chunk': pattern.chunk,
           'a stride': pattern.stride, 'a softcap': pattern.softcap, **dict.fromkeys(added, True),
           'a prefix': rows.prefix_BS is not None,
           'places (a cache)': rows.place_BT is not None or rows.place_BS is not None,
           'segments of keys': rows.segment_BS is not None, 'keys in front': rows.front,
           'other numbers of queries and keys': k_BSKH.shape[1] != q_BTKGH.shape[1]}
  return [case for case, there in cases.items() if there]


@jax.custom_vjp
def attention(q_BTKGH, k_BSKH, v_BSKH, segments_BT=None):
  """Causal attention of T = S positions, BTKGH like q; segments_BT numbers the documents of packed rows."""
  return _forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT)[0]


def blocks(T: int) -> list[slice]:
  """Slices that cover 0 .. T - 1."""
  size = max(SMALLEST, -(-T // MOST))
  return [slice(start, min(start + size, T)) for start in range(0, T, size)]


def _seen(queries: slice, keys: slice, segments_BT):
  """Which of these queries see which of these keys: 1 or B, 1, 1, T, S."""
  seen = (jnp.arange(queries.start, queries.stop)[:, None] >= jnp.arange(keys.start, keys.stop)[None])[None, None, None]
  if segments_BT is None:
    return seen
  return seen & (segments_BT[:, queries, None] == segments_BT[:, None, keys])[:, None, None]


product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT):
  T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
  q_BKGTH, k_BKSH = jnp.einsum('BTKGH->BKGTH', q_BTKGH), jnp.einsum('BSKH->BKSH', k_BSKH)
  v_BKSH = jnp.einsum('BSKH->BKSH', v_BSKH)
  outs, lses = [], []
  for here in blocks(T):
    keys = slice(0, here.stop)
    score_BKGTS = product('BKGTH,BKSH->BKGTS', q_BKGTH[..., here, :], k_BKSH[..., keys, :]) * H**-0.5
    score_BKGTS = jnp.where(_seen(here, keys, segments_BT), score_BKGTS, -jnp.inf)
    most_BKGT1 = score_BKGTS.max(-1, keepdims=True)
    weight_BKGTS = jnp.exp(score_BKGTS - most_BKGT1)
    sum_BKGT1 = weight_BKGTS.sum(-1, keepdims=True)
    out_BKGTH = product('BKGTS,BKSH->BKGTH', weight_BKGTS.astype(v_BSKH.dtype), v_BKSH[..., keys, :]) / sum_BKGT1
    outs.append(out_BKGTH.astype(v_BSKH.dtype))
    lses.append((most_BKGT1 + jnp.log(sum_BKGT1))[..., 0])
  out_BTKGH = jnp.einsum('BKGTH->BTKGH', jnp.concatenate(outs, axis=3))
  return out_BTKGH, (q_BTKGH, k_BSKH, v_BSKH, segments_BT, out_BTKGH, jnp.concatenate(lses, axis=3))


def _backward(saved, dout_BTKGH):
  q_BTKGH, k_BSKH, v_BSKH, segments_BT, out_BTKGH, lse_BKGT = saved
  T, H, dtype = q_BTKGH.shape[1], q_BTKGH.shape[-1], q_BTKGH.dtype
  delta_BKGT = product('BTKGH,BTKGH->BKGT', dout_BTKGH, out_BTKGH)
  q_BKGTH, dout_BKGTH = jnp.einsum('BTKGH->BKGTH', q_BTKGH), jnp.einsum('BTKGH->BKGTH', dout_BTKGH)
  k_BKSH, v_BKSH = jnp.einsum('BSKH->BKSH', k_BSKH), jnp.einsum('BSKH->BKSH', v_BSKH)
  k_BKHS = jnp.einsum('BSKH->BKHS', k_BSKH)
  dq_BKGHT, dks, dvs = 0.0, [], []
  for here in blocks(T):  # of keys, each with the queries from its start on
    queries = slice(here.start, T)
    q, dout = q_BKGTH[..., queries, :], dout_BKGTH[..., queries, :]
    score_BKGST = product('BKSH,BKGTH->BKGST', k_BKSH[..., here, :], q) * H**-0.5
    seen = jnp.swapaxes(_seen(queries, here, segments_BT), -1, -2)
    prob_BKGST = jnp.where(seen, jnp.exp(score_BKGST - lse_BKGT[..., None, queries]), 0)
    dprob_BKGST = product('BKSH,BKGTH->BKGST', v_BKSH[..., here, :], dout)
    dscore_BKGST = (prob_BKGST * (dprob_BKGST - delta_BKGT[..., None, queries]) * H**-0.5).astype(dtype)
    dvs.append(product('BKGST,BKGTH->BKSH', prob_BKGST.astype(dtype), dout))
    dks.append(product('BKGST,BKGTH->BKSH', dscore_BKGST, q))
    dq = product('BKHS,BKGST->BKGHT', k_BKHS[..., here], dscore_BKGST)
    dq_BKGHT += jnp.pad(dq, [(0, 0)] * 4 + [(here.start, 0)])
  dk_BSKH, dv_BSKH = (jnp.einsum('BKSH->BSKH', jnp.concatenate(d, axis=2)) for d in (dks, dvs))
  return jnp.einsum('BKGHT->BTKGH', dq_BKGHT).astype(dtype), dk_BSKH.astype(dtype), dv_BSKH.astype(dtype), None


attention.defvjp(_forward, _backward)
