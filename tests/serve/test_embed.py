"""Embeddings do not depend on what else is in the batch."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.serve.embed import embed
from tests.laws import models
from tests.laws.encoders import BERT, made
from tests.laws.models import tokens

ROWS = [tokens(BERT, 1, size, seed=size)[0].tolist() for size in (3, 9, 1, 16, 7)]


def test_rows_of_all_lengths_come_back_in_their_order():
  params = made(BERT)
  found_ND = embed(BERT, params, ROWS, batch=2)
  assert found_ND.shape == (5, BERT.width)
  whole_ND = embed(BERT, params, ROWS[::-1], batch=8)[::-1]
  np.testing.assert_allclose(found_ND, whole_ND, atol=1e-6)  # of entries of at most 1
  np.testing.assert_allclose(np.linalg.norm(found_ND, axis=1), 1, rtol=1e-5)


def test_the_states_are_those_of_the_encoder():
  encode = jax.jit(lambda params, tokens_BT: BERT.model().apply({'params': params}, tokens_BT, method='encode'))
  x_BTD = encode(made(BERT), np.array([ROWS[3]]))
  mean_D = x_BTD[0].mean(0)
  np.testing.assert_allclose(embed(BERT, made(BERT), ROWS, batch=2)[3], mean_D / jnp.linalg.norm(mean_D), atol=1e-6)
  assert embed(BERT, made(BERT), []).shape == (0, BERT.width)


@pytest.mark.parametrize(('rows', 'message'), [
    ([[1], []], 'row 1 has 0 tokens'), ([[1] * 33], r'row 0 has 33 tokens.*length=32'),
    ([[1, 61]], 'from 1 to 61, outside of vocab=61'), ([[-1]], 'from -1')])
def test_rows_that_cannot_be_read_are_refused(rows, message):
  with pytest.raises(ValueError, match=message):
    embed(BERT, None, rows)


def test_a_decoder_is_refused():
  with pytest.raises(ValueError, match='is a decoder: texts are embedded by an encoder'):
    embed(models.CONFIGS['dense'], None, [[1]])
  with pytest.raises(ValueError, match='batch=0'):
    embed(BERT, None, [[1]], batch=0)
