"""Attention (Vaswani et al. 2017): softmax(q k' / sqrt(H)) v over the keys a query may see.

  out[b,t,k,g,:] = sum_s p[s] v[b,s,k,:],   p = softmax_s(q[b,t,k,g,:] . k[b,s,k,:] / sqrt(H))

A query at index t sees the keys s <= t of its own document and, wherever they are, those marked as its prefix.
G query heads share one key head (Ainslie et al. 2023). Scores and softmax are float32.
"""
import jax
import jax.numpy as jnp

from lmlib.kernels import attention_blocked


def attention(q_BTKGH, k_BSKH, v_BSKH, *, segments_BT=None, start_B=None, prefix_BS=None, implementation: str = 'auto'):
  """Causal attention, BTKGH like q.

  segments_BT: number of the document of every position (packed rows); needs T = S.
  prefix_BS: 1 where a key is seen by every query of its document, earlier ones too; needs T = S.
  start_B: index of each row's first query among its S keys (a cache); None means 0 and T = S.
  implementation: a name of IMPLEMENTATIONS; 'auto' is 'blocked' where T = S without a start or a prefix,
  which is training, else 'reference'. ValueError if the one asked for cannot do the case.
  """
  T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
  if start_B is None and T != S:
    raise ValueError(f'{T} queries and {S} keys need start_B, the index of the first query among the keys')
  if segments_BT is not None and start_B is not None:
    raise ValueError('segments_BT numbers documents of packed rows, start_B is for a cache: give one of them')
  if prefix_BS is not None and start_B is not None:
    raise ValueError('prefix_BS marks keys of whole rows, start_B is for a cache: give one of them')
  if implementation == 'auto':
    implementation = 'blocked' if start_B is None and prefix_BS is None else 'reference'
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'attention implementation={implementation!r} is none of {sorted(IMPLEMENTATIONS)}')
  if implementation == 'blocked':
    if start_B is not None:
      raise ValueError("attention implementation='blocked' has no start_B (a cache); 'reference' has")
    if prefix_BS is not None:
      raise ValueError("attention implementation='blocked' has no prefix_BS; 'reference' has")
    return attention_blocked.attention(q_BTKGH, k_BSKH, v_BSKH, segments_BT)
  return reference(q_BTKGH, k_BSKH, v_BSKH, segments_BT=segments_BT, start_B=start_B, prefix_BS=prefix_BS)


def reference(q_BTKGH, k_BSKH, v_BSKH, *, segments_BT=None, start_B=None, prefix_BS=None):
  """The equation above, word for word; all scores in memory."""
  T, S, H = q_BTKGH.shape[1], k_BSKH.shape[1], q_BTKGH.shape[-1]
  score_BKGTS = jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
  score_BKGTS = jnp.where(mask(T, S, segments_BT, start_B, prefix_BS)[:, None, None], score_BKGTS, -jnp.inf)
  prob_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BSKH.dtype)
  return jnp.einsum('BKGTS,BSKH->BTKGH', prob_BKGTS, v_BSKH)


def mask(T: int, S: int, segments_BT=None, start_B=None, prefix_BS=None):
  """Which keys a query sees, BTS (B is 1 if all rows are alike)."""
  index_BT = jnp.arange(T)[None] + (jnp.zeros((1, 1), jnp.int32) if start_B is None else start_B[:, None])
  seen_BTS = jnp.arange(S)[None, None] <= index_BT[..., None]
  if prefix_BS is not None:
    seen_BTS |= prefix_BS[:, None] > 0
  if segments_BT is not None:
    seen_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
  return seen_BTS


IMPLEMENTATIONS = {'reference': reference, 'blocked': attention_blocked.attention}
