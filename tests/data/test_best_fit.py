"""Best-fit rows: nothing lost, nothing twice, whole where possible, full, and known step by step."""
import types

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lmlib.data import best_fit, mixture
from lmlib.data.best_fit import BestFit, packed
from lmlib.data.packing import Batches, OneEach

quick = settings(derandomize=True, max_examples=60, deadline=None)


@quick
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(4, 40), st.integers(0, 3))
def test_packed_pieces_cover_everything_and_never_overlap(sizes, length, spare):
  sizes, rows = np.array(sizes), -(-sum(sizes) // length) + spare
  piece, offset, size, row, slot = packed(sizes, length, rows)
  taken = np.zeros((rows, length), int)
  given_back = [np.zeros(n, int) for n in sizes]
  for p, o, n, r, s in zip(piece, offset, size, row, slot):
    assert n > 0
    assert s + n <= length
    taken[r, s:s + n] += 1
    given_back[p][o:o + n] += 1
  assert taken.max() <= 1
  assert all((counts == 1).all() for counts in given_back)
  assert (np.diff(row) >= 0).all()
  assert len(set(row)) == min(rows, len(piece))  # no row is all padding while another holds two pieces


def test_documents_stay_whole_while_they_fit():
  sizes = np.array([6, 5, 5, 4, 3, 3, 2, 2])  # 30 tokens
  piece, _, size, _, _ = packed(sizes, 10, 3)
  assert sorted(piece) == list(range(8))
  assert (size == sizes[piece]).all()


def epoch(store, packing, length=32, seed=0, number=0):
  """All rows of an epoch, with their pieces."""
  rows = Batches(store, 1, length, seed, packing).rows_per_epoch
  batches = Batches(store, rows, length, seed, packing)
  return batches.batch_at(number), batches.pieces(number)


PACKINGS = [BestFit(), BestFit(fragment=2, fragments=3), BestFit(fragment=4, fragments=2), OneEach()]


@pytest.mark.parametrize('packing', PACKINGS, ids=str)
@pytest.mark.parametrize('length', [8, 64])
def test_an_epoch_holds_every_token_once(small_store, packing, length):
  for number in range(2):
    batch, pieces = epoch(small_store, packing, length, number=number)
    seen = np.zeros(small_store.tokens, int)
    for b, (_, _, row) in enumerate(pieces):
      at = 0
      for n, piece in enumerate(row, 1):
        start = small_store.offsets[piece.document] + piece.first
        stop = small_store.offsets[piece.document] + piece.stop
        here = slice(at, at + stop - start)
        seen[start:stop] += 1
        assert (batch['tokens_BT'][b, here] == small_store.read(start, stop)).all()
        assert (batch['segments_BT'][b, here] == n).all()
        assert (batch['positions_BT'][b, here] == np.arange(stop - start)).all()
        ends = stop == small_store.offsets[piece.document + 1]
        assert (batch['weight_BT'][b, here] == np.append(np.ones(stop - start - 1), not ends)).all()
        learned = batch['weight_BT'][b, here] > 0
        assert (batch['targets_BT'][b, here][learned] == small_store.read(start + 1, stop + (not ends))).all()
        at = here.stop
      assert (batch['segments_BT'][b, at:] == 0).all()
      assert (batch['weight_BT'][b, at:] == 0).all()
    assert (seen == 1).all()


@pytest.mark.parametrize('packing', [BestFit(fragment=8, fragments=4)], ids=str)
def test_rows_are_full_and_documents_whole(small_store, packing):
  batch, pieces = epoch(small_store, packing, 256)
  assert (batch['segments_BT'] > 0).mean() > 8 / 9 - 1 / 50  # a fragment and one document more, rows rounded up
  spans = [piece for _, _, row in pieces for piece in row]
  sizes = np.diff(small_store.offsets)
  whole = [piece for piece in spans if piece.stop - piece.first == sizes[piece.document]]
  assert len(whole) >= 0.9 * small_store.documents


@pytest.mark.parametrize('packing', PACKINGS, ids=str)
def test_epochs_and_seeds_pack_differently(small_store, packing):
  rows = lambda **which: [tuple((p.document, p.first) for p in row)
                          for _, _, row in epoch(small_store, packing, **which)[1]]
  assert rows() != rows(number=1)
  assert rows() != rows(seed=1)
  assert rows() == rows()


@pytest.mark.parametrize('packing', PACKINGS, ids=str)
@pytest.mark.parametrize('step', [0, 7, 10**6, 10**9])
def test_processes_and_jumps_give_the_same_rows(small_store, packing, step):
  whole = Batches(small_store, 8, 32, 3, packing).batch_at(step)
  for processes in (1, 2, 4):
    size = 8 // processes
    parts = [Batches(small_store, 8, 32, 3, packing).batch_at(step, slice(i * size, (i + 1) * size))
             for i in range(processes)]
    for name, value in whole.items():
      assert (np.concatenate([part[name] for part in parts]) == value).all(), name


def test_a_batch_reads_its_block_and_no_more(small_store, monkeypatch):
  """Cost does not grow with the store: a step, near or far, reads the fragments of one or two blocks."""
  read, counts = type(small_store).read, []
  monkeypatch.setattr(type(small_store), 'read', lambda self, a, b: counts.append(b - a) or read(self, a, b))
  packing = BestFit(fragment=2, fragments=2)
  most = 2 * 2 * (2 * 16 + 16 + 2)  # two blocks of two fragments, each with a document over its end
  for step in (0, 5, 10**9):
    counts.clear()
    Batches(small_store, 2, 16, 0, packing).batch_at(step)
    assert sum(counts) <= most < small_store.tokens


def test_one_document_a_row_may_be_cut(small_store):
  sizes = np.diff(small_store.offsets)
  split, cut = (Batches(small_store, 4, 16, 0, OneEach(long)) for long in ('split', 'cut'))
  assert split.rows_per_epoch == (-(-sizes // 16)).sum()
  assert cut.rows_per_epoch == small_store.documents
  assert (split.left_out, cut.left_out) == (0, np.maximum(sizes - 16, 0).sum())
  assert all(len(row) == 1 and row[0].first == 0 for step in range(4) for _, _, row in cut.pieces(step))


def test_groups_of_documents_are_counted(small_store, monkeypatch):
  whole = epoch(small_store, OneEach(), 16)[0]
  monkeypatch.setattr('lmlib.data.packing.OneEachRows.GROUP', 3)
  grouped = epoch(small_store, OneEach(), 16)[0]
  assert all((whole[name] == grouped[name]).all() for name in whole)


def test_a_row_longer_than_the_store(small_store):
  for packing in PACKINGS:
    batch, _ = epoch(small_store, packing, small_store.tokens + 5)
    assert (batch['segments_BT'] > 0).sum() == small_store.tokens


def test_settings_are_checked():
  with pytest.raises(ValueError, match=r'BestFit.fragment=0'):
    BestFit(fragment=0)
  with pytest.raises(ValueError, match=r"OneEach.long='drop'"):
    OneEach('drop')
  assert best_fit.SLACK < 0.03


def test_a_mixture_plans_each_block_once(small_store, monkeypatch):
  """Rows of a store come a little out of turn in a mixture, so those at a border belong to either block."""
  planned, plan = [], best_fit.BestFitRows._planned

  def counted(self, *block):
    planned.append(block)
    return plan(self, *block)

  monkeypatch.setattr(best_fit.BestFitRows, '_planned', counted)
  packing = BestFit(fragment=2, fragments=3)
  rows = Batches(small_store, 1, 32, 0, packing).rows_per_epoch
  stores = mixture.Stores((small_store, small_store), (1.0, 1.0), ('a', 'b'), block=8)
  batches = Batches(stores, 2, 32, 0, packing)
  for step in range(rows):
    batches.batch_at(step)
  blocks = len(set(planned))
  assert blocks > 2
  assert len(planned) == 2 * blocks  # once for either store


def test_rows_are_full_at_the_size_of_the_standard_library():
  """How many rows an epoch has is known from the number of tokens alone; every token comes once."""
  tokens = 3_307_200  # of Python 3.12's library in 4096 pieces
  rows = best_fit.BestFitRows(types.SimpleNamespace(tokens=tokens), 1024, 0, BestFit()).rows_per_epoch
  assert 0.97 <= tokens / (rows * 1024) <= 1
