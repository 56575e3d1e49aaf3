import random

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lmlib.data import words
from lmlib.data.deduplication import ExactDuplicates, NearDuplicates, joined
from tests.data.prose import CHINESE, ENGLISH

quick = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def run(stage, texts):
  return stage.duplicates(np.array([stage.signature(text) for text in texts]))


def test_exact_duplicates_keep_the_first():
  assert run(ExactDuplicates(), ['a', 'b', 'a', 'a ', 'b', 'a', '中', '中']) == {2: 0, 4: 1, 5: 0, 7: 6}
  assert run(ExactDuplicates(), ['x']) == {}
  assert ExactDuplicates().duplicates(np.zeros((0, 2), np.uint64)) == {}
  row = ExactDuplicates().signature('a')
  assert (row.dtype, row.shape) == (np.uint64, (2,))


def edited(text, share, draw):
  """The text with so many of its characters replaced by one that it does not hold."""
  letters = list(text)
  for at in draw.sample(range(len(letters)), int(share * len(letters))):
    letters[at] = '字' if letters[at] > '\u2e80' else 'q'
  return ''.join(letters)


@pytest.mark.parametrize('prose', [ENGLISH, CHINESE], ids=['English', 'Chinese'])
def test_near_duplicates_in_both_languages(prose):
  draw, stage = random.Random(0), NearDuplicates()
  half = len(prose) // 2
  texts = [prose, prose[:half], edited(prose, 0.003, draw), prose.upper() + '!!!', prose[half:],
           edited(prose, 0.3, draw)]
  assert run(stage, texts) == {2: 0, 3: 0}
  assert stage.signature(prose.replace(' ', '\n')).tolist() == stage.signature(prose).tolist()


def pair_of(similarity, size, draw):
  """Two texts of `size` different words in all that have exactly this Jaccard similarity of words."""
  made = [''.join(draw.choices('abcdefghijklmnop', k=12)) for _ in range(size)]
  shared = round(similarity * size)
  left, right = made[:shared] + made[shared::2], made[:shared] + made[shared + 1::2]
  return ' '.join(left), ' '.join(right)


@pytest.mark.parametrize(('bands', 'rows'), [(14, 8), (20, 5), (9, 13)])
def test_candidates_follow_the_s_curve(bands, rows):
  """1 - (1 - s^rows)^bands: a count of `pairs` independent draws lies within five standard deviations."""
  pairs, size, draw = 120, 60, random.Random(1)
  for similarity in (0.4, 0.6, 0.7, 0.8, 0.9):
    hits = 0
    for k in range(pairs):
      stage = NearDuplicates(ngram=1, bands=bands, rows=rows, seed=k)
      left, right = map(stage.signature, pair_of(similarity, size, draw))
      hits += bool((left == right).any())
    p = stage.probability(similarity)
    assert abs(hits - pairs * p) <= 5 * (pairs * p * (1 - p)) ** 0.5 + 1, (similarity, hits, pairs * p)


def test_the_s_curve_and_its_threshold():
  stage = NearDuplicates()
  assert stage.probability(0) == 0
  assert stage.probability(1) == 1
  curve = [stage.probability(s / 100) for s in range(101)]
  assert curve == sorted(curve)
  assert 0.71 < stage.threshold < 0.73  # (1/14)^(1/8) = 0.719
  assert abs(stage.probability(stage.threshold) - (1 - (1 - 1 / 14) ** 14)) < 1e-12
  assert 0.77 < stage.probability(0.75) < 0.78  # 1 - (1 - 0.1001)^14, as FineWeb states


def union_find(columns):
  """The plain algorithm: rows with an equal value in a column have one root, the smallest."""
  root = list(range(len(columns)))

  def find(i):
    while root[i] != i:
      i = root[i]
    return i

  for column in columns.T:
    first = {}
    for i, value in enumerate(column.tolist()):
      a, b = find(first.setdefault(value, i)), find(i)
      root[max(a, b)] = min(a, b)
  return [find(i) for i in range(len(columns))]


@quick
@given(st.integers(0, 25), st.integers(1, 4), st.integers(1, 30), st.integers(0, 999))
def test_joining_equals_a_plain_union_find(number, width, values, seed):
  columns = np.random.default_rng(seed).integers(0, values, (number, width)).astype(np.uint64)
  assert joined(columns).tolist() == union_find(columns)


def test_joining_is_transitive_over_a_long_chain():
  order = np.random.default_rng(0).permutation(2000)  # i is joined to i + 1 by one column or the other
  columns = np.stack([order // 2, (order + 1) // 2 + 5000], 1).astype(np.uint64)
  assert joined(columns).tolist() == [0] * 2000


def test_a_chain_of_near_duplicates_falls_to_its_first():
  draw = random.Random(2)
  made = [''.join(draw.choices('abcdefghijklmnop', k=8)) for _ in range(400)]
  chain = [' '.join(made[10 * i:10 * i + 200]) for i in range(15)]  # neighbours share 0.9, the ends a quarter
  found = run(NearDuplicates(ngram=1), chain)
  assert found == dict.fromkeys(range(1, 15), 0)


def test_rows_are_of_one_width_whatever_the_text():
  stage = NearDuplicates()
  rows = [stage.signature(text) for text in ('', '!', 'a', 'one two', '你好', ENGLISH)]
  assert {(row.dtype, row.shape) for row in rows} == {(np.dtype(np.uint64), (14,))}
  assert len({row.tobytes() for row in rows}) == len(rows)
  assert stage.signature('One, two!').tolist() == stage.signature('one two').tolist()


def test_signatures_depend_on_settings_and_chunks_do_not_matter(monkeypatch):
  import lmlib.data.deduplication as module
  row = NearDuplicates().signature(ENGLISH)
  monkeypatch.setattr(module, 'CHUNK', 7)
  assert NearDuplicates().signature(ENGLISH).tolist() == row.tolist()
  assert not (NearDuplicates(seed=2).signature(ENGLISH) == row).any()
  assert not (NearDuplicates(ngram=4).signature(ENGLISH) == row).all()


def test_ngrams_are_of_words_and_of_characters():
  grams = lambda text: set(words.ngrams(words.words(text), 5)[0].tolist())
  assert len(grams('a b c d e f g')) == 3
  assert len(grams('天地玄黄宇宙洪荒日月')) == 3


def test_settings_and_rows_are_checked():
  for bad in (dict(ngram=0), dict(bands=0), dict(rows=-1), dict(seed=-1)):
    (field, value), = bad.items()
    with pytest.raises(ValueError, match=f'NearDuplicates.{field}={value}'):
      NearDuplicates(**bad)
  with pytest.raises(ValueError, match='rows of 14 uint64'):
    NearDuplicates().duplicates(np.zeros((3, 13), np.uint64))
  with pytest.raises(ValueError, match='int64'):
    ExactDuplicates().duplicates(np.zeros((3, 2), np.int64))
