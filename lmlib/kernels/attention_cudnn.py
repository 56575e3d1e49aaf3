"""Attention of NVIDIA's cuDNN, through JAX: rows of one document each, causal or not, on a GPU.

Packed documents are refused: cuDNN takes them as a mask of T x S in memory, and its own packed form is not reached
through JAX. Results may differ from run to run in their last bits.
"""
import jax
import jax.numpy as jnp

WIDEST = 128


def lacking(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, added) -> list[str]:
  """What of a case is not done here; `added`: names of what is added to scores."""
  T, S, H = q_BTKGH.shape[1], k_BSKH.shape[1], q_BTKGH.shape[-1]
  cases = {'a backend but a GPU': jax.default_backend() != 'gpu', **dict.fromkeys(added, True),
           'a window in both directions': pattern.window and not pattern.causal, 'a chunk': pattern.chunk,
           'a stride': pattern.stride, 'a softcap': pattern.softcap, 'a prefix': rows.prefix_BS is not None,
           'places (a cache)': rows.place_BT is not None or rows.place_BS is not None,
           'packed documents': rows.segment_BT is not None or rows.segment_BS is not None,
           'keys in front': rows.front, 'odd lengths': T % 2 or S % 2,
           f'heads wider than {WIDEST} or not of a multiple of 8': H % 8 or H > WIDEST,
           'values of another width': v_BSKH.shape[-1] != H,
           'arrays but of bfloat16 or float16': len({x.dtype for x in (q_BTKGH, k_BSKH, v_BSKH)}) > 1
                                                or q_BTKGH.dtype not in (jnp.bfloat16, jnp.float16)}
  return [case for case, there in cases.items() if there]


def attention(q_BTKGH, k_BSKH, v_BSKH, pattern, rows):
  """Attention, BTKGH like q; see attention.attention()."""
  del rows  # they say nothing: see lacking()
  B, T, K, G, H = q_BTKGH.shape
  window = None if pattern.window is None else (pattern.window - 1, 0)
  out_BTNH = jax.nn.dot_product_attention(q_BTKGH.reshape(B, T, K * G, H), k_BSKH, v_BSKH, is_causal=pattern.causal,
                                          scale=pattern.scale, local_window_size=window, implementation='cudnn')
  return out_BTNH.reshape(q_BTKGH.shape)
