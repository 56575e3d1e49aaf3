import numpy as np
import pytest

from lmlib.data.packing import Batches


def equal(a, b):
  return a.keys() == b.keys() and all((a[key] == b[key]).all() and a[key].dtype == b[key].dtype for key in a)


def joined(parts):
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


@pytest.mark.parametrize(('length', 'seed'), [(7, 0), (7, 3), (64, 0), (1, 0)])
def test_an_epoch_visits_every_row_once(small_store, length, seed):
  """The targets of an epoch are a stretch of the circle, each place once; the rest is under one row."""
  N = small_store.tokens
  n = N // length
  batches = Batches(small_store, batch=n, length=length, seed=seed)
  assert batches.rows_per_epoch == n
  stream = small_store.read(0, N)
  shifts = set()
  for epoch in range(2):
    epoch_batch = batches.batch_at(epoch)
    rows = epoch_batch['row_B'].argsort()
    assert epoch_batch['row_B'][rows].tolist() == list(range(epoch * n, (epoch + 1) * n))
    cut = epoch_batch['tokens_BT'][rows].ravel()
    fits = [shift for shift in range(N) if (np.roll(stream, -shift)[:len(cut)] == cut).all()]
    assert len(fits) == 1 or length == 1
    assert N - len(cut) < length
    shifts.update(fits)
  assert len(shifts) > 1  # the cuts lie elsewhere in each epoch


def test_targets_segments_and_weights_by_hand(small_store, tokenizer):
  """Against a walk over the tokens: a bos opens a segment, and is no target worth learning."""
  batches = Batches(small_store, batch=16, length=50, seed=1)
  for step in range(4):
    batch = batches.batch_at(step)
    assert (batch['targets_BT'][:, :-1] == batch['tokens_BT'][:, 1:]).all()
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        'tokens_BT': ((16, 50), 'int32'), 'targets_BT': ((16, 50), 'int32'),
        'segments_BT': ((16, 50), 'int32'), 'weight_BT': ((16, 50), 'float32'), 'row_B': ((16,), 'uint32')}
    assert (batch['weight_BT'] == (batch['targets_BT'] != tokenizer.bos)).all()
    opens_BT = batch['tokens_BT'] == tokenizer.bos
    opens_BT[:, 0] = True
    assert (batch['segments_BT'] == opens_BT.cumsum(1)).all()
  assert batch['segments_BT'].max() > 1
  assert batch['weight_BT'].min() == 0


def test_any_step_at_once_equals_getting_there(small_store):
  """No state: a step far away, asked first or last or twice, is the same batch."""
  one, other = (Batches(small_store, batch=3, length=16, seed=2) for _ in range(2))
  far = one.batch_at(10**6)
  for step in range(10**6 - 3, 10**6 + 1):
    walked = other.batch_at(step)
  assert equal(far, walked)
  assert not equal(far, one.batch_at(10**6 - 1))
  rows = [one.batch_at(step)['row_B'].tolist() for step in range(5)]
  assert rows == [other.batch_at(step)['row_B'].tolist() for step in range(5)]


@pytest.mark.parametrize('batch', [8, 200])
def test_processes_together_make_the_global_batch(small_store, batch):
  batches = Batches(small_store, batch=batch, length=32, seed=0)
  whole = batches.batch_at(5)
  for processes in (1, 2, 4):
    size = batch // processes
    parts = [batches.batch_at(5, slice(i * size, (i + 1) * size)) for i in range(processes)]
    assert equal(joined(parts), whole)


def test_the_cut_into_batches_does_not_change_the_order(small_store):
  four, one = (Batches(small_store, batch=batch, length=16, seed=4) for batch in (4, 1))
  assert equal(joined([four.batch_at(i) for i in range(30)]), joined([one.batch_at(i) for i in range(120)]))


def test_a_batch_larger_than_the_store_goes_round(small_store):
  batches = Batches(small_store, batch=10, length=small_store.tokens - 1, seed=0)
  batch = batches.batch_at(0)
  assert batch['row_B'].tolist() == list(range(10))
  assert len({tuple(row) for row in batch['tokens_BT'].tolist()}) == 10


def test_seeds_give_different_orders(small_store):
  one, other = (Batches(small_store, batch=8, length=16, seed=seed) for seed in (0, 1))
  assert one.batch_at(0)['row_B'].tolist() != other.batch_at(0)['row_B'].tolist()


def test_describe_names_the_tokens_of_each_row(small_store):
  """Following the description by hand gives the batch, also where the circle closes."""
  batches = Batches(small_store, batch=4, length=90, seed=0)
  wrapped = 0
  for step in range(20):
    batch = batches.batch_at(step)
    for line, tokens, number in zip(batches.describe(step), batch['tokens_BT'], batch['row_B']):
      head, parts = line.split(': ', 1)
      assert head == f'row {number}'
      followed, names = [], []
      for part in parts.split('; '):
        name, span = part.split(': tokens ')
        document, (first, last) = small_store.names.index(name), map(int, span.split('..'))
        begin, end = small_store.offsets[document:document + 2]
        assert 0 <= first <= last < end - begin
        followed += small_store.read(begin + first, begin + last + 1).tolist()
        names.append(document)
      assert followed == tokens.tolist()
      wrapped += names != sorted(names)
    assert batches.describe(step, slice(1, 3)) == batches.describe(step)[1:3]
  assert wrapped


def test_errors_show_both_numbers(small_store):
  N = small_store.tokens
  Batches(small_store, batch=1, length=N - 1)
  with pytest.raises(ValueError, match=rf'Batches.length={N} .*{N + 1} tokens.*holds {N}:'):
    Batches(small_store, batch=1, length=N)
  for bad in ({'batch': 0}, {'length': 0}, {'batch': 2.5}):
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=f'Batches.{name}={value}'):
      Batches(small_store, **{'batch': 1, 'length': 4, **bad})
  with pytest.raises(ValueError, match='step=-1'):
    Batches(small_store, batch=1, length=4).batch_at(-1)
