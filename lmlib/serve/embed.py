"""Vectors of texts: rows of different lengths together, the like beside the like."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmlib.models import protocol
from lmlib.nn.pooling import Pooling

ROUND = 16  # rows are padded to a multiple of this, so that few lengths compile


def embed(config: protocol.Config, params, rows, pooling: Pooling = Pooling(), *, batch: int = 32) -> np.ndarray:
  """Of each row, a list of token ids with its special ones, the vector that `pooling` makes: float32, one a row.

  Rows of about the same length go through the encoder together, `batch` at once, and come back in their order.
  ValueError for a model without an encoder, an empty row, one longer than config.length and tokens outside the
  vocabulary: nothing is cut.
  """
  if not protocol.encodes(config):
    raise ValueError(f'{type(config).__module__} is a decoder: texts are embedded by an encoder')
  out = np.zeros((len(rows), config.width), np.float32)
  for some, tokens_BT, real_BT in batches(config, rows, batch):
    out[some] = _vectors(config, pooling, params, tokens_BT, real_BT)[:len(some)]
  return out


def batches(config: protocol.Config, rows, batch: int):
  """Yields the numbers of up to `batch` rows of about the same length, their tokens_BT and where they are, real_BT.

  The last batch is as large as the others. ValueError as embed() has it.
  """
  if not isinstance(batch, int) or batch < 1:
    raise ValueError(f'batch={batch!r} must be a positive number of rows')
  for i, row in enumerate(rows):
    if not 0 < len(row) <= config.length:
      raise ValueError(f"row {i} has {len(row)} tokens; it must have 1 to the model's length={config.length}")
    if min(row) < 0 or max(row) >= config.vocab:
      raise ValueError(f'row {i} holds tokens from {min(row)} to {max(row)}, outside of vocab={config.vocab}')
  order = np.argsort([-len(row) for row in rows], kind='stable')
  batch = max(1, min(batch, len(rows)))
  for start in range(0, len(rows), batch):
    some = order[start:start + batch]
    T = min(-(-len(rows[some[0]]) // ROUND) * ROUND, config.length)
    tokens_BT, real_BT = np.zeros((batch, T), np.int32), np.zeros((batch, T), np.int32)
    for b, i in enumerate(some.tolist()):
      tokens_BT[b, :len(rows[i])], real_BT[b, :len(rows[i])] = rows[i], 1
    yield some, jnp.asarray(tokens_BT), jnp.asarray(real_BT)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _vectors(config, pooling: Pooling, params, tokens_BT, real_BT):
  x_BTD = config.model().apply({'params': params}, tokens_BT, real_BT, method='encode')
  return pooling.of(x_BTD, real_BT > 0)
