"""Products of rows with the matrix of their group, a block of rows of one group at a time, in a loop.

The work is that of the rows there are: a group without rows is not touched, so few tokens read few experts.
Written for XLA on CPU, which computes a ragged product by every group with every row.
"""
import jax
import jax.numpy as jnp

LEAST, MOST = 8, 256  # rows of a block


def rows_of_block(M: int, E: int) -> int:
  """About the mean size of a group, a power of two."""
  return min(MOST, max(LEAST, 1 << (max(1, M // E) - 1).bit_length()))


@jax.custom_vjp
def grouped_matmul(x_MD, w_EDF, sizes_E):
  """out[m] = x[m] w[e(m)], MF; rows beyond the last group are zeros."""
  return _products(x_MD, w_EDF, sizes_E, transposed=False)


def _blocks(sizes_E, M: int):
  """(how many blocks there are, the group of each, the first row of each)."""
  E = sizes_E.shape[0]
  rows = rows_of_block(M, E)
  number_E = -(-sizes_E // rows)
  last_E = jnp.cumsum(number_E)
  block = jnp.arange(-(-M // rows) + E)
  group = jnp.minimum(jnp.searchsorted(last_E, block, side='right'), E - 1)
  start_E = jnp.cumsum(sizes_E) - sizes_E
  return last_E[-1], group, start_E[group] + (block - (last_E - number_E)[group]) * rows


def _products(x_MD, w_EDF, sizes_E, *, transposed: bool):
  M, E = x_MD.shape[0], w_EDF.shape[0]
  rows = rows_of_block(M, E)
  number, group, first = _blocks(sizes_E, M)
  x_MD = jnp.pad(x_MD, [(0, rows), (0, 0)])

  def one(i, out_MF):
    x = jax.lax.dynamic_slice_in_dim(x_MD, first[i], rows)
    w = jax.lax.dynamic_index_in_dim(w_EDF, group[i], keepdims=False)
    # What this writes past its group's end, the blocks of the next groups overwrite.
    return jax.lax.dynamic_update_slice_in_dim(out_MF, x @ (w.T if transposed else w), first[i], 0)

  out_MF = jnp.zeros((M + rows, w_EDF.shape[1 if transposed else 2]), x_MD.dtype)
  out_MF = jax.lax.fori_loop(0, number, one, out_MF)[:M]
  return jnp.where((jnp.arange(M) < sizes_E.sum())[:, None], out_MF, 0)


def backward(saved, dout_MF):
  """The gradients of x and w, and none of sizes; saved: (x_MD, w_EDF, sizes_E)."""
  x_MD, w_EDF, sizes_E = saved
  M, E = x_MD.shape[0], w_EDF.shape[0]
  rows = rows_of_block(M, E)
  number, group, first = _blocks(sizes_E, M)
  end_E = jnp.cumsum(sizes_E)
  x_padded, dout_padded = (jnp.pad(y, [(0, rows), (0, 0)]) for y in (x_MD, dout_MF))

  def one(i, dw_EDF):
    x = jax.lax.dynamic_slice_in_dim(x_padded, first[i], rows)
    dout = jax.lax.dynamic_slice_in_dim(dout_padded, first[i], rows)
    x = jnp.where((first[i] + jnp.arange(rows) < end_E[group[i]])[:, None], x, 0)
    dw = jax.lax.dynamic_index_in_dim(dw_EDF, group[i], keepdims=False)
    dw += jnp.einsum('MD,MF->DF', x, dout, preferred_element_type=jnp.float32)
    return jax.lax.dynamic_update_index_in_dim(dw_EDF, dw, group[i], 0)

  dw_EDF = jax.lax.fori_loop(0, number, one, jnp.zeros(w_EDF.shape, jnp.float32))
  dx_MD = _products(dout_MF, w_EDF, sizes_E, transposed=True)
  return dx_MD, dw_EDF.astype(w_EDF.dtype), None


grouped_matmul.defvjp(lambda x, w, sizes: (grouped_matmul(x, w, sizes), (x, w, sizes)), backward)
