"""Products of rows with the matrix of their group (Gale et al. 2023): what the experts of a layer compute.

  out[m] = x[m] w[e(m)]    rows in the order of their groups: sizes[0] of group 0, then sizes[1] of group 1, ...

Rows beyond the last group give zeros. A group may be empty.
"""
import jax
import jax.numpy as jnp

from lmlib.kernels import grouped_matmul_blocked


def grouped_matmul(x_MD, w_EDF, sizes_E, *, most: int | None = None, implementation: str = 'auto'):
  """The products, MF in the type of x.

  most: no group is larger, which the caller must know: the products are then one batch of E x most rows.
  implementation: a name of IMPLEMENTATIONS; 'auto' is 'padded' where `most` is given, else 'blocked' on a CPU
  and 'ragged' elsewhere. ValueError if there is none of that name or if 'padded' lacks `most`.
  """
  if implementation == 'auto':
    if most is not None:
      return padded(x_MD, w_EDF, sizes_E, most)
    return _by_platform(x_MD, w_EDF, sizes_E)
  if implementation == 'padded':
    if most is None:
      raise ValueError("grouped_matmul implementation='padded' needs `most`, the largest size of a group; "
                       "'ragged' does not")
    return padded(x_MD, w_EDF, sizes_E, most)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'grouped_matmul implementation={implementation!r} is none of {sorted(IMPLEMENTATIONS)}')
  return IMPLEMENTATIONS[implementation](x_MD, w_EDF, sizes_E)


def reference(x_MD, w_EDF, sizes_E):
  """The equation above: every group with all rows, those of others as zeros."""
  out_MF = jnp.zeros((x_MD.shape[0], w_EDF.shape[2]), x_MD.dtype)
  group_M = group(sizes_E, x_MD.shape[0])
  for e, w_DF in enumerate(w_EDF):
    out_MF += jnp.where((group_M == e)[:, None], x_MD, 0) @ w_DF
  return out_MF


def ragged(x_MD, w_EDF, sizes_E):
  """XLA's own, which has a kernel on TPU and GPU; on a CPU it costs as much as the reference."""
  inside_M = group(sizes_E, x_MD.shape[0]) < w_EDF.shape[0]
  return jnp.where(inside_M[:, None], jax.lax.ragged_dot(x_MD, w_EDF, sizes_E), 0)


# XLA's ragged product knows no vmap over rows; the choice below is compiled for every platform that may come.
_ragged = jax.custom_batching.sequential_vmap(ragged)


@jax.custom_batching.sequential_vmap
def _ragged_backward(x_MD, w_EDF, sizes_E, dout_MF):
  return jax.vjp(lambda x, w: ragged(x, w, sizes_E), x_MD, w_EDF)[1](dout_MF)


@jax.custom_vjp
def _by_platform(x_MD, w_EDF, sizes_E):
  return jax.lax.platform_dependent(x_MD, w_EDF, sizes_E, cpu=grouped_matmul_blocked.grouped_matmul, default=_ragged)


def _backward(saved, dout_MF):
  blocked = lambda *arguments: grouped_matmul_blocked.backward(arguments[:3], arguments[3])[:2]
  return *jax.lax.platform_dependent(*saved, dout_MF, cpu=blocked, default=_ragged_backward), None


_by_platform.defvjp(lambda *arguments: (_by_platform(*arguments), arguments), _backward)


def padded(x_MD, w_EDF, sizes_E, most: int):
  """Each group in `most` rows of its own, zeros behind it: a batch of plain products (GShard, Lepikhin et al. 2020)."""
  M, E = x_MD.shape[0], w_EDF.shape[0]
  group_M, start_E = group(sizes_E, M), jnp.cumsum(sizes_E) - sizes_E
  place_EM = start_E[:, None] + jnp.arange(most)[None]
  filled_EM = jnp.arange(most)[None] < sizes_E[:, None]
  x_EMD = jnp.where(filled_EM[..., None], x_MD[jnp.minimum(place_EM, M - 1)], 0)
  out_EMF = jnp.einsum('EMD,EDF->EMF', x_EMD, w_EDF)
  inside_M, group_M = group_M < E, jnp.minimum(group_M, E - 1)
  row_M = jnp.clip(jnp.arange(M) - start_E[group_M], 0, most - 1)
  return jnp.where(inside_M[:, None], out_EMF[group_M, row_M], 0)


def group(sizes_E, rows: int) -> jax.Array:
  """M: the group of each of so many rows, E beyond the last group."""
  return jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(rows), side='right')


IMPLEMENTATIONS = {'reference': reference, 'ragged': ragged, 'padded': padded,
                   'blocked': grouped_matmul_blocked.grouped_matmul}
