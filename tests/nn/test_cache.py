"""What a cache keeps of places: all of them, or the last in a ring; against lists in plain Python."""
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.nn.cache import Cache, held

SHAPE = (1,)


def filled(window, chunks, lengths_B=None, length=12):
  """A cache after chunks of places: chunk i holds its places' numbers, plus 100 a row; and all entries put in."""
  cache = Cache.empty((SHAPE,), layers=1, batch=2, length=length, dtype='float32', window=window)
  done = 0
  for size in chunks:
    place_BT = jnp.arange(done, done + size)[None] + jnp.array([[0], [100]])
    real_BT = None if lengths_B is None else (jnp.arange(done, done + size)[None] < lengths_B[:, None]).astype(int)
    coming = cache.coming(size, real_BT)
    kept = coming.put(tuple(x[0] for x in cache.layers), (place_BT[..., None].astype(jnp.float32),))
    cache, done = cache.after(tuple(x[None] for x in kept), place_BT, coming), done + size
  return cache


def content(cache, b: int) -> dict[int, float]:
  """Place to entry, of the slots that hold one."""
  places = np.asarray(held(cache.used_B, cache.slots))[b]
  return {int(place): float(cache.layers[0][0, b, slot, 0]) for slot, place in enumerate(places) if place >= 0}


@pytest.mark.parametrize('window', [None, 4])
@pytest.mark.parametrize('chunks', [(9,), (3, 6), (1,) * 9, (5, 1, 3)])
def test_it_holds_the_last_places_of_the_window(window, chunks):
  cache = filled(window, chunks)
  assert cache.slots == (window or 12)
  for b in range(2):
    assert content(cache, b) == {p: p + 100.0 * b for p in range(9 - (window or 9), 9)}
  np.testing.assert_array_equal(cache.last(), [8, 108])
  np.testing.assert_array_equal(cache.tokens_BS[:, :9], [range(9), range(100, 109)])


@pytest.mark.parametrize('window', [None, 4])
def test_padding_goes_nowhere(window):
  cache = filled(window, (4, 4), jnp.array([8, 5]))
  np.testing.assert_array_equal(cache.used_B, [8, 5])
  assert content(cache, 1) == {p: p + 100.0 for p in range(5 - (window or 5), 5)}
  np.testing.assert_array_equal(cache.last(), [7, 104])
  assert not np.asarray(cache.tokens_BS)[1, 5:].any()


def test_an_empty_cache_holds_nothing():
  cache = filled(None, ())
  assert content(cache, 0) == {}
  np.testing.assert_array_equal(cache.last(), [-1, -1])


def test_a_window_longer_than_the_cache_is_no_ring():
  cache = filled(50, (9,))
  assert (cache.slots, cache.ring) == (12, False)
