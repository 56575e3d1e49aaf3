"""Rows that travel between the devices of a mesh axis, as many from each to each as there are.

  out[there[p] + i] on device p = x[start[p] + i] here,   i < count[p]

Rows of the output that none sends are zeros. It runs inside jax.shard_map, and what comes back for gradients travels
the same way in the other direction. TPUs and GPUs have an operation that moves only the rows there are
(jax.lax.ragged_all_to_all); on a CPU every device gets as many rows as the longest message may have.
"""
import functools

from flax import struct
import jax
import jax.numpy as jnp


@struct.dataclass
class Trip:
  """What this device sends to and gets from every device of the axis, numbers of rows: Z is the other device."""
  start_Z: jax.Array  # where here the rows for it start,
  count_Z: jax.Array  # how many they are,
  there_Z: jax.Array  # and where there they arrive
  coming_Z: jax.Array  # how many come from it,
  here_Z: jax.Array  # where here they arrive: one device's behind another's, gaps allowed
  back_Z: jax.Array  # and where there they start

  def reversed(self) -> 'Trip':
    """The way back of the same rows."""
    return Trip(self.here_Z, self.coming_Z, self.back_Z, self.count_Z, self.start_Z, self.there_Z)


def exchange(x_MD, trip: Trip, rows: int, axis: str):
  """What arrives on this device, `rows` x D in the type of x; the trip must fit in it."""
  return _exchange(axis, x_MD.shape[0], rows, x_MD, trip)


def padded(x_MD, trip: Trip, rows: int, axis: str):
  """With messages of equal lengths: the longest that can leave and arrive."""
  longest = min(x_MD.shape[0], rows)
  row_ZM = trip.start_Z[:, None] + jnp.arange(longest)[None]
  sent_ZMD = x_MD[jnp.minimum(row_ZM, x_MD.shape[0] - 1)]
  came_ZMD = jax.lax.all_to_all(sent_ZMD, axis, 0, 0)
  behind_ZM = jnp.arange(rows)[None] - trip.here_Z[:, None]
  mine_ZM = (behind_ZM >= 0) & (behind_ZM < trip.coming_Z[:, None])
  from_M = mine_ZM.argmax(0)
  behind_M = jnp.take_along_axis(behind_ZM, from_M[None], 0)[0]
  out_MD = came_ZMD[from_M, jnp.clip(behind_M, 0, longest - 1)]
  return jnp.where(mine_ZM.any(0)[:, None], out_MD, 0)


def ragged(x_MD, trip: Trip, rows: int, axis: str):
  """By the operation for it, which XLA has for TPUs and GPUs."""
  return jax.lax.ragged_all_to_all(x_MD, jnp.zeros((rows, x_MD.shape[1]), x_MD.dtype), trip.start_Z, trip.count_Z,
                                   trip.there_Z, trip.coming_Z, axis_name=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchange(axis: str, leaving: int, rows: int, x_MD, trip: Trip):
  # What is compiled for one platform may run on another: both are in one program.
  run = lambda way: functools.partial(way, rows=rows, axis=axis)
  return jax.lax.platform_dependent(x_MD, trip, cpu=run(padded), default=run(ragged))


def _backward(axis: str, leaving: int, rows: int, trip: Trip, dout_MD):
  return _exchange(axis, rows, leaving, dout_MD, trip.reversed()), None


_exchange.defvjp(lambda *arguments: (_exchange(*arguments), arguments[-1]), _backward)
