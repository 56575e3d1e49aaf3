"""Probabilities of the classes of texts, by an encoder with a head for them."""
import functools

import jax
import numpy as np

from lmlib.models import protocol
from lmlib.serve.embed import batches


def classify(config: protocol.Config, params, rows, *, several: bool = False, batch: int = 32) -> np.ndarray:
  """Of each row, a list of token ids with its special ones, the probability of every class: float32, one row a text.

  several: a text may be of several classes, or of none, each with a probability of its own (sigmoid); otherwise it is
  of exactly one (softmax). ValueError for a model without classes, and for rows as embed() has it.
  """
  if (classes := getattr(config.ends, 'classes', None)) is None:
    raise ValueError(f'{type(config).__module__} with ends={config.ends} has no classes of texts')
  if classes == 1 and not several:
    raise ValueError('a model of one class gives it the probability 1 among its classes: several=True is meant')
  out = np.zeros((len(rows), classes), np.float32)
  for some, tokens_BT, real_BT in batches(config, rows, batch):
    out[some] = _probabilities(config, several, params, tokens_BT, real_BT)[:len(some)]
  return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probabilities(config, several: bool, params, tokens_BT, real_BT):
  scores_BY, _ = config.model().apply({'params': params}, tokens_BT, real_BT)
  return jax.nn.sigmoid(scores_BY) if several else jax.nn.softmax(scores_BY, axis=-1)
