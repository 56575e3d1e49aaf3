"""Products of rows with the matrix of their group (Gale et al. 2023): what the experts of a layer compute.

  out[m] = x[m] w[e(m)]    rows in the order of their groups: sizes[0] of group 0, then sizes[1] of group 1, ...

Rows beyond the last group give zeros. A group may be empty. All of it is on one device: nn/dispatch.py says which rows
and matrices of a layer those are.
"""
import jax
import jax.numpy as jnp

from lmlib.kernels import choice, grouped_matmul_blocked, grouped_matmul_gpu, grouped_matmul_tpu, tpu


def grouped_matmul(x_MD, w_EDF, sizes_E, *, most: int | None = None, implementation: str = 'auto'):
  """The products, MF in the type of x.

  most: no group is larger, which the caller must know. implementation: a name of IMPLEMENTATIONS, or 'auto': see
  chosen(). ValueError if there is none of that name or if the one asked for cannot do the case. 'tpu' runs on a
  CPU too, interpreted and slow, and so does 'gpu'.
  """
  case = x_MD, w_EDF, sizes_E, most
  name = choice.chosen('grouped_matmul', implementation, _here, LACKING, case)
  if name == 'padded':
    return padded(*case)
  # What is compiled for one platform may run on another: 'auto' is all of them, in one program.
  return _by_platform(*case[:3]) if implementation == 'auto' else IMPLEMENTATIONS[name](*case[:3])


def _here(x_MD, w_EDF, sizes_E, most) -> str:
  platform = 'tpu' if tpu.chip() is not None else jax.default_backend()
  return chosen(x_MD, w_EDF, sizes_E, most, platform=platform)


def chosen(x_MD, w_EDF, sizes_E, most: int | None = None, *, platform: str) -> str:
  """What 'auto' takes on a platform: 'cpu', 'tpu' or another.

  'padded' where `most` is given: the products are then one batch of E x most rows. Else 'blocked' on a CPU, 'tpu' on
  a TPU where that can do the case, and 'ragged'. Never 'gpu', which has not been timed.
  """
  if most is not None:
    return 'padded'
  if platform == 'tpu' and not grouped_matmul_tpu.lacking(x_MD, w_EDF, sizes_E):
    return 'tpu'
  return 'blocked' if platform == 'cpu' else 'ragged'


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


def _both(product):
  """(the product, its gradients for x and w), which know vmap over rows: XLA's ragged product does not."""

  def gradients(x_MD, w_EDF, sizes_E, dout_MF):
    return jax.vjp(lambda x, w: product(x, w, sizes_E), x_MD, w_EDF)[1](dout_MF)

  return jax.custom_batching.sequential_vmap(product), jax.custom_batching.sequential_vmap(gradients)


def _branches(which: int, *case):
  """The functions of BOTH that are chosen, by the platform that a program may be compiled for."""
  platforms = {'cpu': 'cpu', 'default': 'gpu'}
  if tpu.chip() is not None:
    platforms['tpu'] = 'tpu'
  return {name: BOTH[chosen(*case, platform=platform)][which] for name, platform in platforms.items()}


@jax.custom_vjp
def _by_platform(x_MD, w_EDF, sizes_E):
  case = x_MD, w_EDF, sizes_E
  return jax.lax.platform_dependent(*case, **_branches(0, *case))


def _backward(saved, dout_MF):
  return *jax.lax.platform_dependent(*saved, dout_MF, **_branches(1, *saved)), None


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
                   'blocked': grouped_matmul_blocked.grouped_matmul,
                   'gpu': grouped_matmul_gpu.grouped_matmul, 'tpu': grouped_matmul_tpu.grouped_matmul}
# What of a case each cannot do: functions of (x, w, sizes, most) -> names.
LACKING = {**dict.fromkeys(IMPLEMENTATIONS, lambda *case: []),
           'gpu': grouped_matmul_gpu.lacking, 'tpu': grouped_matmul_tpu.lacking,
           'padded': lambda x_MD, w_EDF, sizes_E, most: [] if most is not None else ['groups without `most`']}
BOTH = {'ragged': _both(ragged), 'tpu': _both(grouped_matmul_tpu.grouped_matmul),
        'blocked': (grouped_matmul_blocked.grouped_matmul,
                    lambda *arguments: grouped_matmul_blocked.backward(arguments[:3], arguments[3])[:2])}
