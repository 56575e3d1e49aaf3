"""Rows that travel between devices arrive where they should, by either way, and gradients come back."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lmlib import sharding
from lmlib.kernels import exchange
from lmlib.kernels.exchange import Trip

DEVICES, M, D = 4, 6, 3


def drawn(seed: int, rows: int):
  """(counts from device to device, where they start, where they arrive), with gaps."""
  random = np.random.default_rng(seed)
  count, start, there = np.zeros((3, DEVICES, DEVICES), np.int32)
  for i in range(DEVICES):
    ends = np.sort(random.integers(0, M + 1, DEVICES))
    start[i] = np.concatenate([[0], ends[:-1]])
    count[i] = random.integers(0, ends - start[i] + 1)
  count //= max(1, -(-count.sum(0).max() // rows))
  for i in range(DEVICES):
    there[:, i] = np.cumsum(count[:, i]) - count[:, i]
    there[random.integers(0, DEVICES):, i] += rows - count[:, i].sum()
  return count, start, there


def moved(x, count, start, there, rows: int):
  """By loops."""
  out = np.zeros((DEVICES, rows, D), np.float32)
  for i, j in np.ndindex(DEVICES, DEVICES):
    out[j, there[i, j]:there[i, j] + count[i, j]] = x[i, start[i, j]:start[i, j] + count[i, j]]
  return out


def operation(operand, output, start, count, there, coming, *, axis_name):
  """What the documentation of jax.lax.ragged_all_to_all says, by gathering everything; XLA on CPU has none."""
  x, start, count, there = jax.lax.all_gather((operand, start, count, there), axis_name)
  me, row = jax.lax.axis_index(axis_name), jnp.arange(operand.shape[0])
  for i in range(DEVICES):
    at = there[i, me] + row - start[i, me]
    inside = (row >= start[i, me]) & (row < start[i, me] + count[i, me])
    output = output.at[jnp.where(inside, at, len(output))].set(x[i], mode='drop')
  return output


@pytest.mark.parametrize('way', ['padded', 'ragged'])
@pytest.mark.parametrize('rows', [4, 6, 11])
def test_rows_arrive_and_gradients_come_back(rows, way, monkeypatch):
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', operation)
  monkeypatch.setattr(exchange, 'padded', getattr(exchange, way))
  x, dout = (np.random.default_rng(9).normal(size=(DEVICES, n, D)).astype(np.float32) for n in (M, rows))

  @jax.jit
  def run(x, dout, count, start, there):

    def mine(x, dout, *ways):
      here = jax.lax.axis_index('expert')
      (count, start, there), (coming, back, arrive) = (w[here] for w in ways), (w[:, here] for w in ways)
      trip = Trip(start, count, there, coming, arrive, back)
      out, way_back = jax.vjp(lambda x: exchange.exchange(x, trip, rows, 'expert'), x[0])
      return out[None], way_back(dout[0])[0][None]

    return jax.shard_map(mine, in_specs=(P('expert'), P('expert'), P(), P(), P()), out_specs=P('expert'),
                         check_vma=False)(x, dout, count, start, there)

  with sharding.use(sharding.Layout(data=1, expert=4), jax.devices()[:4]):
    for seed in range(4):
      count, start, there = drawn(seed, rows)
      out, dx = run(x, dout, count, start, there)
      np.testing.assert_array_equal(out, moved(x, count, start, there, rows))
      np.testing.assert_array_equal(dx, moved(dout, count.T, there.T, start.T, M))
