"""Pairs of tokens: which token came before, and how evenly pairs share the rows of a table."""
import jax.numpy as jnp
import numpy as np

from lmlib.nn import bigrams


def test_the_token_before_is_of_the_same_document():
  tokens_BT, segments_BT = jnp.array([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]]), jnp.array([[1, 1, 2, 2, 3], [1, 1, 1, 1, 1]])
  np.testing.assert_array_equal(bigrams.before(tokens_BT, segments_BT), [[-1, 5, -1, 7, -1], [-1, 1, 2, 3, 4]])
  np.testing.assert_array_equal(bigrams.before(tokens_BT, None, jnp.array([3, -1]))[:, 0], [3, -1])


def test_pairs_share_rows_evenly_and_order_counts():
  """As many pairs as rows, drawn at random, leave 1 / e of the rows empty."""
  rows, side = 10_000, 100
  token_BT, before_BT = np.divmod(np.arange(side * side)[None], side)
  found_BT = np.asarray(bigrams.row(jnp.asarray(token_BT), jnp.asarray(before_BT), rows))
  assert found_BT.min() >= 0
  assert found_BT.max() < rows
  empty = 1 - len(np.unique(found_BT)) / rows
  assert abs(empty - np.exp(-1)) < 0.015  # its standard deviation is sqrt((1/e - 2/e^2) / rows) = 0.003
  swapped_BT = np.asarray(bigrams.row(jnp.asarray(before_BT), jnp.asarray(token_BT), rows))
  assert (swapped_BT == found_BT).mean() < 0.03  # those with both tokens equal, 1 in 100, and chance
