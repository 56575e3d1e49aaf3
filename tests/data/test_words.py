import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lmlib.data import words

quick = settings(max_examples=60, derandomize=True, deadline=None, database=None)
mixed_text = st.text(st.sampled_from('ab Z9\n_,.。，中文字かナ·é\u0301😀'), max_size=60)


def plain(text):
  """The words of a text by a loop over its characters."""
  found, last = [], None
  for character in text.lower():
    kind = words.kinds()[ord(character)]
    if kind == words.ALONES:
      found.append(character)
    elif kind in (words.LETTER, words.DIGIT):
      if last in (words.LETTER, words.DIGIT):
        found[-1] += character
      else:
        found.append(character)
    last = kind
  return found


def grams(found, number):
  """By a loop: for each word the shortest run from it that weighs enough."""
  weigh = lambda word: 5 if words.ALONE_PATTERN.fullmatch(word) else 8
  result = []
  for i in range(len(found)):
    for j in range(i + 1, len(found) + 1):
      if sum(map(weigh, found[i:j])) >= 8 * number:
        result.append(tuple(found[i:j]))
        break
  return result


@quick
@given(mixed_text, st.integers(1, 6))
def test_words_and_ngrams_equal_plain_loops(text, number):
  want, found = plain(text), words.words(text)
  assert found.lengths.tolist() == list(map(len, want))
  assert found.alone.tolist() == [bool(words.ALONE_PATTERN.fullmatch(word)) for word in want]
  hashes, stops = words.ngrams(found, number)
  loops = grams(want, number)
  assert [stop - i for i, stop in enumerate(stops)] == list(map(len, loops))
  for values, things in ((found.hashes.tolist(), want), (hashes.tolist(), loops)):
    assert len({*zip(values, things)}) == len({*values}) == len({*things})  # equal hashes, equal things


def test_mixed_text_by_hand():
  assert plain("Don't panic_now, 你好，world2！") == ['don', 't', 'panic', 'now', '你', '好', 'world2']
  found = words.words('深度学习 deep learning')
  assert found.number == 4 * 5 / 8 + 2
  assert len(words.ngrams(words.words('一二三四五六七八九'), 5)[0]) == 2  # 5 words are 8 characters
  assert len(words.ngrams(words.words('a b c d e f'), 5)[0]) == 2


@pytest.mark.parametrize('text', ['ab ' * 40, '中' * 100, 'a' * 100, 'ab 中文 ' * 30, ' ' * 70])
def test_blocks_change_nothing(text, monkeypatch):
  whole, counts = words.words(text), words.counts(text)
  grams = words.ngrams(whole, 3)
  monkeypatch.setattr(words, 'BLOCK', 16)
  if 'a' * 17 not in text:  # a word longer than a block is cut
    cut = words.words(text)
    assert all(np.array_equal(*pair) for pair in zip((whole.hashes, whole.lengths, whole.alone),
                                                     (cut.hashes, cut.lengths, cut.alone)))
    assert words.counts(text) == counts
  assert all(map(np.array_equal, words.ngrams(whole, 3), grams))


def test_an_ngram_longer_than_a_block_is_refused(monkeypatch):
  found = words.words('ab ' * 100)
  monkeypatch.setattr(words, 'BLOCK', 16)
  with pytest.raises(ValueError, match='more than 16 words'):
    words.ngrams(found, 50)


@quick
@given(mixed_text)
def test_counts_are_those_of_splitting(text):
  counts = words.counts(text)
  tokens = words.SPLIT_PATTERN.sub(' ', text).split()
  assert (counts.tokens, counts.characters) == (len(tokens), sum(map(len, tokens)))
  assert counts.lettered == sum(any(map(str.isalpha, token)) for token in tokens)
  assert counts.alone == len(words.ALONE_PATTERN.findall(text))
  assert counts.words == words.number_of_words(text)


def test_hashes_are_the_polynomial_they_are_said_to_be():
  """In Python's own integers. They stand in signatures that are kept: a change must raise words.VERSION."""
  def mixed(value):
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31

  def polynomial(values):
    return mixed(sum(value * pow(0x9E3779B97F4A7C15, k, 2**64) for k, value in enumerate(values)) % 2**64)

  hello, world = (polynomial([mixed(ord(letter)) for letter in word]) for word in ('hello', '世'))
  found = words.words('Hello, 世')
  assert found.hashes.tolist() == [hello, world]
  assert words.ngrams(found, 1)[0].tolist() == [polynomial([hello])]
  assert words.spans(found.hashes, np.array([2])).tolist() == [polynomial([hello, world])]
  assert words.hash_of('hello') == hello


def test_hashes_are_spread():
  """Of 20,000 different short words no two collide, and each of 64 bits is set in half of them."""
  made = [''.join(letters) for letters in itertools.islice(itertools.product('abcdefghij', repeat=5), 20_000)]
  hashes = words.words(' '.join(made)).hashes
  assert len(np.unique(hashes)) == 20_000
  share = np.unpackbits(hashes.view(np.uint8)).reshape(20_000, 64).mean(0)
  assert abs(share - 0.5).max() < 0.5 * 5 / 20_000 ** 0.5  # five standard deviations


def test_kinds_of_characters():
  kinds = words.kinds()
  assert {kinds[ord(c)] for c in ' \n\t\u3000，。、「」！？（）'} == {words.SPACE}
  assert {kinds[ord(c)] for c in '中々〇𠮷かナー'} == {words.ALONES}
  assert {kinds[ord(c)] for c in 'aZéßжאＡ한'} == {words.LETTER}
  assert {kinds[ord(c)] for c in '09３'} == {words.DIGIT}
  assert {kinds[ord(c)] for c in '_-+.,;$😀'} == {words.SYMBOL}
