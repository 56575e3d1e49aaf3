import re

import pytest

from lmlib.data.best_fit import BestFit
from lmlib.data.denoising import Glm, SpanCorruption
from lmlib.data.explain import explain
from lmlib.data.mixture import Stores
from lmlib.data.objectives import CAUSAL, MaskedLm, PrefixLm, specials_after, vocabulary
from lmlib.data.packing import Batches, Split


def batches(store, objective=CAUSAL, packing=Split(), length=60):
  return Batches(store, 6, length, 0, packing, objective, vocabulary(objective, store.tokenizer.vocab))


@pytest.fixture(scope='module')
def specials(small_store):
  return specials_after(small_store.tokenizer.vocab, 30)


def test_a_step_may_have_read_a_later_batch(small_store):
  made = batches(small_store)
  of_step, *rest = explain(made, 1, 0, index=3, colours=False).splitlines()
  _, *expected = explain(made, 3, 0, colours=False).splitlines()
  assert of_step.startswith('row 0 of step 2 is')
  assert rest == expected != explain(made, 1, 0, colours=False).splitlines()[1:]


@pytest.mark.parametrize('packing', [Split(), BestFit()], ids=str)
def test_it_names_the_documents_and_shows_their_text(small_store, packing):
  for row in range(6):
    made = batches(small_store, packing=packing)
    said = explain(made, 3, row, colours=False)
    (_, number, pieces), = made.pieces(3, slice(row, row + 1))
    assert said.startswith(f'row {row} of step 4 is row {number} of {small_store.path}\n')
    for n, piece in enumerate(pieces, 1):
      size = small_store.offsets[piece.document + 1] - small_store.offsets[piece.document]
      line = f'  {n}. {small_store.names[piece.document]}: tokens {piece.first} to {piece.stop} of {size}\n'
      assert line in said
      start = int(small_store.offsets[piece.document])
      text = small_store.tokenizer.decode(small_store.read(start + piece.first, start + piece.stop))
      shown = said.split(f'-- {n} --\n')[1].split(f'-- {n + 1} --')[0]
      plain = re.sub(r'\u2192.*', '', shown, flags=re.DOTALL)
      assert re.sub(r'[{}]|<bos>|<eos>', '', plain).rstrip('\n') == text.rstrip('\n')


def test_what_is_not_learned_and_prefix_are_marked(small_store, specials):
  said = ''.join(explain(batches(small_store), step, 0, colours=False) for step in range(4))
  assert '<eos>' in said
  assert '{<bos>}' in said
  assert '[' not in said
  assert '[' in explain(batches(small_store, PrefixLm()), 0, 0, colours=False)
  masked = explain(batches(small_store, MaskedLm(specials)), 0, 0, colours=False)
  assert '[<mask>]\u2192' in masked
  spans = explain(batches(small_store, SpanCorruption(specials)), 0, 0, colours=False)
  assert '[{<sentinels[0]>}]' in spans
  assert '\u2192<sentinels[' in spans
  both = explain(batches(small_store, SpanCorruption(specials, layout='encoder_decoder')), 0, 0, colours=False)
  assert both.index('encoder\n') < both.index('decoder\n')
  assert '\u2192<end>' in explain(batches(small_store, Glm(specials)), 0, 0, colours=False)


def test_colours_say_the_same(small_store):
  made = batches(small_store, PrefixLm())
  said = explain(made, 0, 1)
  assert {'\x1b[1m', '\x1b[2m', '\x1b[4m', '\x1b[36m', '\x1b[0m'} <= set(re.findall('\x1b' + r'\[\d+m', said))
  plain = explain(made, 0, 1, colours=False)
  bare = lambda text: re.sub('\x1b' + r'\[\d+m|[][{}]', '', text)
  assert bare(said) == bare(plain)


def test_a_store_of_a_mixture_is_named_with_its_share(small_store):
  made = batches(Stores((small_store, small_store), (3, 1), ('web', 'books')))
  said = {explain(made, 0, row, colours=False).splitlines()[0].split(', ')[1] for row in range(6)}
  assert said <= {'web: 75 % of the rows of this step', 'books: 25 % of the rows of this step'}


def test_there_is_no_such_row(small_store):
  for row in (-1, 6):
    with pytest.raises(ValueError, match=f'row={row} is none of the 6'):
      explain(batches(small_store), 0, row)
