import re

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from lmlib.data import words
from lmlib.data.blocklist import Blocklist, folded
from lmlib.data.cleaning import Rejected, fingerprint
from tests.data.prose import CHINESE, ENGLISH

quick = settings(max_examples=100, derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize(('text', 'term'), [
    ('He sat on his ass.', 'ass'), ('class and passage', None), ('ASS', 'ass'), ('ass-backwards', 'ass'),
    ('ass_', 'ass'), ('网络赌博平台', '赌博'), ('赌\n博', None), ('Bad\n  Thing here', 'bad thing'),
    ('bad things', None), ('很bad thing了', 'bad thing'),
    ('玩a片吧', 'a片'), ('sea片', None), ('a片x', 'a片'), ('badthing', None),
    ('', None), ('C++', 'c++'), ('c++11', 'c++')])
def test_borders_are_those_of_the_script(text, term):
  stage = Blocklist(('ass', '赌博', 'bad  Thing', 'A片', 'c++'))
  assert stage(text) == (Rejected('blocked term', term) if term else text)


def by_search(terms, text):
  """The same by a search for each term."""
  kind = lambda at: words.kinds()[ord(text[at])] in (words.LETTER, words.DIGIT) if 0 <= at < len(text) else False
  found = []
  for term in terms:
    at = text.find(term)
    while at >= 0:
      stop = at + len(term)
      if not (kind(at - 1) and kind(at)) and not (kind(stop - 1) and kind(stop)):
        found.append((at, term))
      at = text.find(term, at + 1)
  return sorted(found)


@quick
@given(st.text(st.sampled_from('ab 中文.'), min_size=40, max_size=80),
       st.sets(st.text(st.sampled_from('ab 中文.'), min_size=1, max_size=4), min_size=1, max_size=6),
       st.sampled_from([7, 8, 16, 1 << 18]))
def test_it_finds_what_a_search_finds_in_any_blocks(text, terms, block):
  terms = {*filter(None, map(folded, terms))}
  if not terms:
    return
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(words, 'BLOCK', block)
    assert Blocklist(tuple(terms)).found(folded(text)) == by_search(terms, folded(text))


def test_a_share_of_the_words():
  stage = Blocklist(('bad', '坏'), share=0.1)
  for prose, term in ((ENGLISH, ' bad'), (CHINESE, '坏')):
    number = words.counts(prose).words
    weight = words.number_of_words(term)
    few, many = (prose + term * round(number * share / weight) for share in (0.09, 0.13))  # of the longer text, 0.115
    assert stage(few) == few
    assert stage(many) == Rejected('over 0.1 of words blocked', term.strip())
    assert Blocklist(('bad', '坏'))(few) == Rejected('blocked term', term.strip())


def test_terms_come_from_a_file(tmp_path):
  path = tmp_path / 'terms.txt'
  path.write_text('\ufeff# a comment\nfoo bar\n\n  赌博 \nFOO BAR\n', encoding='utf-8')
  stage = Blocklist(('more',), file=str(path))
  assert stage.all_terms == ('foo bar', 'more', '赌博')
  assert stage('foo bar') == Rejected('blocked term', 'foo bar')
  path.rename(tmp_path / 'other.txt')
  moved = Blocklist(('more',), file=str(tmp_path / 'other.txt'))
  assert fingerprint(moved) == fingerprint(stage)  # the terms count, not where they come from
  assert fingerprint(moved) != fingerprint(Blocklist(('more',)))
  with pytest.raises(ValueError, match=r"terms.txt': No such file"):
    Blocklist(file=str(path))
  path.write_bytes(b'ok\n\xff')
  with pytest.raises(ValueError, match=r"terms.txt': not UTF-8 at byte 3"):
    Blocklist(file=str(path))
  path.write_text('# nothing\n')
  with pytest.raises(ValueError, match='no term'):
    Blocklist(file=str(path))
  with pytest.raises(ValueError, match='share=1'):
    Blocklist(('a',), share=1)


def test_thousands_of_terms_cost_little_more_than_one():
  many = Blocklist(tuple(f'term{i}' for i in range(5000)) + tuple(f'词{chr(0x4e00 + i)}' for i in range(5000)))
  text = ENGLISH * 20 + ' term4321'
  assert many(text) == Rejected('blocked term', 'term4321')
  assert len(many._index[1]) <= 6  # one pass over the candidates a length of term, not a term
  assert not re.search('term4321', ENGLISH)
