from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from lmlib.data.balancing import Balance

quick = settings(max_examples=100, derandomize=True, deadline=None, database=None)
sizes_of = st.dictionaries(st.sampled_from('abcdefgh'), st.integers(1, 10**12), min_size=1)


def rates_of(balance, *arguments):
  """The rates, or None where a source is too small to be drawn at all."""
  try:
    return balance.rates(*arguments)
  except ValueError as error:
    if 'never' not in str(error):
      raise
    return None


@quick
@given(sizes_of, st.floats(1, 100))
def test_rates_add_up_to_one_and_follow_the_power(sizes, temperature):
  if (rates := rates_of(Balance(temperature), sizes)) is None:
    return
  assert sum(rates.values()) == 1
  total = sum(size ** (1 / temperature) for size in sizes.values())
  for name, size in sizes.items():
    assert abs(rates[name] - size ** (1 / temperature) / total) <= 1.001e-6  # one part, and float64's rounding
    assert (rates[name] * 1_000_000).denominator == 1


def test_by_hand():
  sizes = {'en': 900, 'zh': 100}
  assert Balance().rates(sizes) == {'en': Fraction(9, 10), 'zh': Fraction(1, 10)}
  assert Balance(2).rates(sizes) == {'en': Fraction(3, 4), 'zh': Fraction(1, 4)}  # roots: 30 and 10
  hot = Balance(1e9).rates(sizes)
  assert abs(hot['en'] - Fraction(1, 2)) <= Fraction(1, 10**6)
  assert Balance(parts=2).rates({'a': 1, 'b': 1}) == {'a': Fraction(1, 2), 'b': Fraction(1, 2)}


@quick
@given(sizes_of, st.floats(1, 10), st.integers(1, 8), st.floats(0.01, 1))
def test_no_source_is_read_more_often_than_allowed(sizes, temperature, epochs, share):
  total = max(1, int(share * epochs * sum(sizes.values())))
  if (rates := rates_of(Balance(temperature, epochs=epochs), sizes, total)) is None:
    return
  assert sum(rates.values()) == 1
  for name, size in sizes.items():
    assert rates[name] * total <= epochs * size + Fraction(total, 1_000_000)  # at most one part above
  if share < 0.99:  # where some are below their limit, those keep the proportions of the power
    free = [name for name in sizes if rates[name] * total < epochs * sizes[name] - Fraction(total, 10**5)]
    for one in free:
      for other in free:
        want = (sizes[one] / sizes[other]) ** (1 / temperature)
        low, high = ((rates[one] - 1e-6) / (rates[other] + 1e-6), (rates[one] + 1e-6) / max(1e-9, rates[other] - 1e-6))
        assert low * (1 - 1e-9) <= want <= high * (1 + 1e-9)


def test_what_a_small_source_may_not_give_the_others_give():
  rates = Balance(1e9, epochs=2).rates({'en': 10_000, 'de': 10_000, 'zh': 100}, total=10_000)
  assert rates['zh'] == Fraction(200, 10_000)
  assert rates['en'] == rates['de'] == Fraction(49, 100)
  assert Balance(5, epochs=3).rates({'a': 100, 'b': 100}, total=600) == {'a': Fraction(1, 2), 'b': Fraction(1, 2)}


@pytest.mark.parametrize(('make', 'match'), [
    (lambda: Balance(0), 'temperature=0'), (lambda: Balance(float('inf')), 'temperature=inf'),
    (lambda: Balance(epochs=0), 'epochs=0'), (lambda: Balance(parts=0), 'parts=0'),
    (lambda: Balance().rates({}), 'hold something'), (lambda: Balance().rates({'a': 5, 'b': 0}), "'b': 0"),
    (lambda: Balance().rates({'a': 5}, total=3), 'total=3'), (lambda: Balance(epochs=2).rates({'a': 5}), 'total=None'),
    (lambda: Balance(epochs=2).rates({'a': 5}, total=11), r'epochs=2 of 5 .* the 11 '),
    (lambda: Balance(parts=2).rates(dict.fromkeys('abc', 1)), 'parts=2 for 3'),
    (lambda: Balance().rates({'a': 10**12, 'b': 1}), 'b would get less than one part')])
def test_settings_are_checked(make, match):
  with pytest.raises(ValueError, match=match):
    make()
