"""Every store gives its rate of the rows, within one, wherever it is looked at."""
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lmlib.data import mixture, store
from lmlib.data.balancing import Balance
from lmlib.data.mixture import Shares, Stage, Stores, periodic
from lmlib.data.packing import Batches
from lmlib.data.sources import Document
from lmlib.data.tokenizer import SentencePiece

quick = settings(derandomize=True, max_examples=20, deadline=None)
rates_of = st.lists(st.floats(1e-4, 1).map(lambda x: round(x, 4)), min_size=2, max_size=9)


@pytest.fixture(scope='module')
def stores(texts, tokenizer, tmp_path_factory):
  """Three stores of one tokeniser, of different size."""
  folder = tmp_path_factory.mktemp('stores')
  parts = {'a': texts[:20], 'b': texts[20:28], 'c': texts[28:]}
  return tuple(store.write(folder / name, (Document(f'{name}{i}', t) for i, t in enumerate(part)), tokenizer)
               for name, part in parts.items())


@quick
@given(rates_of, st.integers(1, 64))
def test_counts_are_within_one_of_the_rate_and_never_fall(rates, block):
  shares = Shares(tuple(rates), block)
  assert sum(shares.rates) == 1
  before = np.zeros(len(rates), int)
  ends = [*range(0, 40 * block, block), *(shares.period * block * k for k in (1, 2)), 10**9 * block]
  for n in sorted(ends):
    count_K = shares.counts(n)
    assert count_K.sum() == n
    assert (count_K >= before).all()
    assert all(abs(count - rate * n) < 1 for count, rate in zip(count_K.tolist(), shares.rates))
    before = count_K


@quick
@given(rates_of, st.integers(1, 64), st.integers(0, 10**9))
def test_counts_at_the_end_of_a_stage_too(rates, block, n):
  shares = Shares(tuple(rates), block)
  assert all(abs(c - rate * n) < 1 for c, rate in zip(shares.counts(n).tolist(), shares.rates))
  assert (shares.counts(n) >= shares.counts(n // block * block)).all()


def test_rates_are_exact_as_written_or_close():
  assert periodic((0.7, 0.2, 0.1), 1024)[0] == (Fraction(7, 10), Fraction(1, 5), Fraction(1, 10))
  assert periodic((3, 1), 4) == ((Fraction(3, 4), Fraction(1, 4)), 1)
  given = (0.123456789, 1e-9, 0.5)
  rates, period = periodic(given, 1024)
  assert period == mixture.PERIOD
  assert sum(rates) == 1
  assert all(abs(float(a) - b / sum(given)) < 2 / (mixture.PERIOD * 1024) for a, b in zip(rates, given))
  assert min(rates) > 0


MIXED = dict(rates=(0.5, 0.3, 0.2), names=('a', 'b', 'c'), block=16,
             stages=(Stage(3, (0.1, 0.1, 0.8)), Stage(10, (0, 1, 1))))


@pytest.mark.parametrize('batch', [5, 16, 40])
def test_each_row_of_each_store_comes_once_and_in_turn(stores, batch):
  """The visits of a store, over all steps and stages, are 0, 1, 2, ... without a gap."""
  mixed = Stores(stores, **MIXED)
  last = 10 * batch + 10 * 16  # the last stage is seen up to the end of a block
  store_B, visit_B = mixed.places(np.arange(last), batch=batch, seed=4)
  for k in range(3):
    assert sorted(visit_B[store_B == k].tolist()) == list(range((store_B == k).sum()))
  stages = (0, 3 * batch, (0.5, 0.3, 0.2)), (3 * batch, 10 * batch, (0.1, 0.1, 0.8)), (10 * batch, last, (0, 0.5, 0.5))
  for first, stop, rates in stages:
    share = np.bincount(store_B[first:stop], minlength=3)
    assert (np.abs(share - np.array(rates) * (stop - first)) < 1).all()
  assert [round(mixed.rate(step, 2), 9) for step in (0, 2, 3, 9, 10)] == [0.2, 0.2, 0.8, 0.8, 0.5]


def test_stores_alternate_within_a_block_by_the_seed(stores):
  places = lambda seed: Stores(stores, **MIXED).places(np.arange(48), batch=16, seed=seed)[0].tolist()
  assert places(0) != places(1)
  assert len({tuple(places(0)[i:i + 16]) for i in (0, 16, 32)}) == 3


def test_any_row_costs_the_same_and_depends_on_no_other(stores):
  mixed = Stores(stores, **MIXED)
  for first in (0, 10**6, 10**9):
    rows = np.arange(first * 16, first * 16 + 64)
    store_B, visit_B = mixed.places(rows, batch=16, seed=1)
    alone = [mixed.places(rows[i:i + 1], batch=16, seed=1) for i in range(64)]
    assert [(int(k[0]), int(v[0])) for k, v in alone] == list(zip(store_B.tolist(), visit_B.tolist()))


def test_batches_of_a_mixture_hold_rows_of_its_stores(stores, tokenizer):
  """Each row is the row of that visit of its store alone; a small store begins again in another order."""
  mixed = Stores(stores, **MIXED)
  batches = Batches(mixed, batch=12, length=16, seed=2)
  alone = [Batches(s, batch=1, length=16, seed=2) for s in stores]
  for step in (0, 3, 11, 400):
    batch = batches.batch_at(step)
    assert batch['row_B'].tolist() == list(range(step * 12, step * 12 + 12))
    store_B, visit_B = mixed.places(np.arange(step * 12, step * 12 + 12), batch=12, seed=2)
    for i, (k, visit) in enumerate(zip(store_B.tolist(), visit_B.tolist())):
      assert (batch['tokens_BT'][i] == alone[k].batch_at(visit)['tokens_BT'][0]).all()
    lines = batches.describe(step)
    assert [line.split(':')[0].split(' of ')[1] for line in lines] == [mixed.names[k] for k in store_B]
  assert max(visit_B) > alone[1].rows_per_epoch  # by step 400 b and c have begun again


def test_what_does_not_fit_is_named(stores, texts):
  wrong = [
      (dict(rates=(1, 2)), r'rates = \(1, 2\) are 2 for 3 stores'), (dict(rates=(0, 0, 0)), 'give no row'),
      (dict(rates=(1, -1, 1), names=('a', 'b', 'c')), 'b has -1'),
      (dict(rates=(1, 0, 1), names=('a', 'b', 'c')), 'b has rate 0 in every stage'),
      (dict(rates=(1, 1, float('nan'))), '2 has nan'), (dict(rates=(1, 1, 1), names=('a', 'a', 'c')), 'names='),
      (dict(rates=(1, 1, 1), stages=(Stage(4, (1, 1, 1)), Stage(4, (1, 1, 2)))), r'steps \[4, 4\]'),
      (dict(rates=(1, 1, 1), stages=(Stage(0, (1, 1, 1)),)), r'steps \[0\]'),
      (dict(rates=(1, 1, 1), stages=(Stage(4, (1, 1)),)), 'rates from step 4'),
      (dict(rates=(1, 1, 1), stages=(Stage(4, ()),)), 'rates from step 4'), (dict(rates=(1, 1, 1), block=0), 'block=0')]
  for settings_, said in wrong:
    with pytest.raises(ValueError, match=said):
      Stores(stores, **settings_)
  with pytest.raises(ValueError, match='no store'):
    Stores((), rates=())


def test_stores_of_another_tokenizer_are_refused(stores, texts, tmp_path):
  other = SentencePiece(pieces=301).train(texts, sum(map(len, texts)))
  odd = store.write(tmp_path / 'odd', [Document('x', 'the quick brown fox\n' * 9)], other)
  with pytest.raises(ValueError, match=r'odd.* another tokenizer than first'):
    Stores((stores[0], odd), rates=(1, 1), names=('first', 'odd'))


def test_an_empty_store_is_named(stores):
  class Empty:
    tokens, path, tokenizer = 0, 'nowhere', stores[0].tokenizer
  with pytest.raises(ValueError, match=r'hollow \(nowhere\) is empty'):
    Stores((stores[0], Empty()), rates=(1, 1), names=('full', 'hollow'))


def test_a_mixture_reads_as_one_corpus(stores):
  mixed = Stores(stores, **MIXED)
  assert mixed.documents == 40
  assert mixed.tokens == sum(s.tokens for s in stores)
  assert mixed.text(21) == stores[1].text(1)
  assert sum(size for _, size in mixed.scored()) == mixed.text_bytes
  assert mixed.fingerprint != Stores(stores, **MIXED | {'rates': (0.5, 0.2, 0.3)}).fingerprint


def test_a_balance_sets_the_rates_by_size(stores):
  sizes = np.array([store.tokens for store in stores])
  mixed = lambda **given: mixture.Mixture(corpora=(Sized(),) * len(stores), **given).stores(stores)
  np.testing.assert_allclose(mixed(balance=Balance(1.0)).rates, sizes / sizes.sum(), atol=1e-6)  # of a million parts
  np.testing.assert_allclose(mixed(balance=Balance(2.0)).rates, sizes**0.5 / (sizes**0.5).sum(), atol=1e-6)
  capped = mixed(balance=Balance(1e9, epochs=1.0), total=int(sizes.sum()))  # all alike, but for what they hold
  np.testing.assert_allclose(capped.rates, sizes / sizes.sum(), atol=1e-6)
  for wrong, said in ((dict(balance=Balance(), rates=(1.0,) * len(stores)), 'balance sets the rates'),
                      (dict(rates=(1.0,) * len(stores), total=5), 'total=5 has no effect')):
    with pytest.raises(ValueError, match=said):
      mixed(**wrong)


class Sized:
  vocab = 300
