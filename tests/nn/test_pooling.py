"""One vector a text."""
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.nn.pooling import Pooling

X_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)), jnp.float32)
REAL_BT = jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]) > 0  # padded on the right, on the left


@pytest.mark.parametrize(('kind', 'expected'), [
    ('mean', lambda x_TD: x_TD.mean(0)), ('first', lambda x_TD: x_TD[0]), ('max', lambda x_TD: x_TD.max(0))])
def test_only_real_tokens_count(kind, expected):
  found_BD = Pooling(kind, normalised=False).of(X_BTD, REAL_BT)
  for b in range(3):
    np.testing.assert_allclose(found_BD[b], expected(X_BTD[b][REAL_BT[b]]), rtol=1e-6)
  unit_BD = Pooling(kind).of(X_BTD, REAL_BT)
  np.testing.assert_allclose(unit_BD, found_BD / jnp.linalg.norm(found_BD, axis=1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize('kind', ['mean', 'first', 'max'])
def test_a_row_of_padding_is_zeros(kind):
  np.testing.assert_array_equal(Pooling(kind).of(X_BTD, REAL_BT & False), 0)


def test_another_kind_is_refused():
  with pytest.raises(ValueError, match="kind='last' must be one of"):
    Pooling('last')
