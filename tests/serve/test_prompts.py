"""Lengths are rounded up to few, by less than half."""
from lmlib.serve.prompts import ROUND, rounded


def test_few_lengths_compile():
  found = [rounded(length) for length in range(1, 8193)]
  assert all(length <= place for length, place in enumerate(found, 1))
  assert all(place < length + max(ROUND, length / 2) for length, place in enumerate(found, 1))
  assert sorted(found) == found
  assert len(set(found)) == 14
  assert [rounded(length) for length in (1, 64, 65, 256, 257, 513, 8192)] == [64, 64, 128, 256, 384, 768, 8192]
