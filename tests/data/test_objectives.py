"""Laws of every objective: nothing visible that must be predicted, everything recoverable, rates, no leaks."""
import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lmlib.data import objectives, order
from lmlib.data.best_fit import BestFit
from lmlib.data.denoising import UL2, Denoiser, Glm, SpanCorruption, Ul2
from lmlib.data.objectives import CAUSAL, FillInTheMiddle, MaskedLm, MultiToken, PrefixLm, Specials, specials_after
from lmlib.data.packing import Batches, Raw, Split

quick = settings(derandomize=True, max_examples=25, deadline=None)
BOS, EOS, FIRST, VOCAB = 1, 2, 100, 1000  # ids of rows under test: bos, eos, then all different from FIRST on
SPECIALS = specials_after(VOCAB, 60)


class Tokens:
  """A tokeniser of nothing but ids: enough for objectives that do not look at text."""
  bos, eos, vocab = BOS, EOS, VOCAB

  def decode(self, ids):
    return ''.join(f' {i}' for i in ids if i > EOS)

  def encode(self, text):
    return [int(i) for i in text.split()]


def packed(documents: list[list[int]], length: int, ahead: int = 1) -> Raw:
  """A row of documents of these sizes, as a packing makes it, bos and eos included; every other id is new.

  A negative size is a document that goes on beyond the row.
  """
  tokens, segments, following, alive, fresh = [], [], [], [], iter(range(FIRST, VOCAB))
  for number, size in enumerate(documents, 1):
    whole, size = size > 0, min(abs(size), length - len(tokens))
    more = 0 if whole else ahead
    ids = [BOS, *(next(fresh) for _ in range(size + more - 1))]
    if whole and size > 1:
      ids[-1] = EOS
    tokens, segments = tokens + ids[:size], segments + [number] * size
    after = [[*ids[j:j + size], *[0] * (size - len(ids[j:j + size]))] for j in range(1, ahead + 1)]
    following.append(after)
    alive.append([[i + j < len(ids) for i in range(size)] for j in range(1, ahead + 1)])
  pad = lambda x: np.array([x + [0] * (length - len(x))], np.int32)
  column = lambda parts, j: pad([x for part in parts for x in part[j]])
  return Raw(pad(tokens), tuple(column(following, j) for j in range(ahead)),
             tuple(column(alive, j) > 0 for j in range(ahead)), pad(segments), True, np.array([7]))


def made(objective, sizes, length: int, key: int):
  """The raw row and the batch of one row, without the axis B."""
  raw = packed(sizes, objective.raw(length), objective.ahead)
  batch = objective.of(Tokens(), objectives.vocabulary(objective, VOCAB), length)(raw, np.array([key], np.uint64))
  return raw, {name: values[0] for name, values in batch.items()}


ALL = {
    'causal': CAUSAL, 'prefix': PrefixLm(), 'prefix given': PrefixLm(0.3), 'masked': MaskedLm(SPECIALS, 0.3, 1.0, 0.0),
    'multi': MultiToken(3), 'middle': FillInTheMiddle(SPECIALS, rate=0.8), 'spans': SpanCorruption(SPECIALS),
    'dense spans': SpanCorruption(SPECIALS, 0.5, 2.0), 'encoder': SpanCorruption(SPECIALS, layout='encoder_decoder'),
    'ul2': Ul2(SPECIALS), 'ul2 encoder': Ul2(SPECIALS, layout='encoder_decoder'), 'glm': Glm(SPECIALS, 0.3)}
every = pytest.mark.parametrize('objective', ALL.values(), ids=ALL.keys())
rows = given(st.lists(st.integers(1, 60).flatmap(lambda n: st.sampled_from([n, n, -n])), min_size=1, max_size=8),
             st.integers(48, 100), st.integers(0, 2**64 - 1))


def visible(batch, t: int) -> list[int]:
  """The places of a decoder's row that the query t sees."""
  prefix = batch.get('prefix_BT', np.zeros(len(batch['tokens_BT'])))
  return [s for s in range(len(batch['tokens_BT'])) if batch['segments_BT'][s] == batch['segments_BT'][t]
          and (s <= t or prefix[s])]


@every
@quick
@rows
def test_nothing_visible_must_be_predicted(objective, sizes, length, key):
  """All ids but special ones differ, so a target is its id; of special ids only what follows can be one."""
  _, batch = made(objective, sizes, length, key)
  assert batch['segments_BT'][batch['weight_BT'] > 0].all()
  encoded = set() if 'inputs_BS' not in batch else set(batch['inputs_BS'].tolist())
  for t in np.flatnonzero(batch['weight_BT']).tolist():
    target = int(batch['targets_BT'][t])
    seen = {int(batch['tokens_BT'][s]) for s in visible(batch, t)} | encoded
    assert not FIRST <= target < VOCAB or target not in seen
    if 'targets_BTJ' in batch:
      ahead = batch['targets_BTJ'][t][batch['weight_BTJ'][t] > 0].tolist()
      assert not {i for i in ahead if i >= FIRST} & seen


def documents(tokens_T, segments_T) -> list[list[int]]:
  return [tokens_T[segments_T == n].tolist() for n in range(1, segments_T.max(initial=0) + 1)]


def filled(shown, missing) -> list[int]:
  """A document from what is shown with sentinels and what is missing after them."""
  spans, at = {}, None
  for i in missing:
    at = i if i in SPECIALS.sentinels else at
    spans.setdefault(at, [])
    if i not in SPECIALS.sentinels:
      spans[at].append(i)
  modes = SPECIALS.mode_r, SPECIALS.mode_s, SPECIALS.mode_x
  return [j for i in shown if i not in modes for j in (spans[i] if i in SPECIALS.sentinels else [i])]


def recovered(objective, batch) -> list[list[int]]:
  """The documents of a row, from inputs and targets alone."""
  split = lambda name, axes='BT', segments='segments_BT': documents(batch[f'{name}_{axes}'], batch[segments])
  tokens = split('tokens')
  if isinstance(objective, MaskedLm):
    known = np.where(batch['weight_BT'] > 0, batch['targets_BT'], batch['tokens_BT'])
    return documents(known, batch['segments_BT'])
  if isinstance(objective, FillInTheMiddle):
    return [unmoved(ids) for ids in tokens]
  if isinstance(objective, Glm):
    names = 'targets', 'prefix', 'positions', 'weight'
    return [unblanked(*parts) for parts in zip(tokens, *map(split, names))]
  if isinstance(objective, (SpanCorruption, Ul2)):
    if objective.layout == 'encoder_decoder':
      answers = {n: batch['targets_BT'][batch['segments_BT'] == n].tolist() for n in range(1, 99)}
      shown = split('inputs', 'BS', 'input_segments_BS')
      return [filled(ids, answers[n]) for n, ids in enumerate(shown, 1)]
    parts = zip(tokens, split('targets'), split('prefix'), split('weight'))
    return [filled([i for i, p in zip(ids, prefix) if p], [i for i, w in zip(targets, weight) if w])
            for ids, targets, prefix, weight in parts]
  return tokens


def unmoved(ids) -> list[int]:
  if SPECIALS.prefix not in ids:
    return ids
  head, rest = ids[:ids.index(SPECIALS.prefix)], ids[ids.index(SPECIALS.prefix) + 1:]
  tail, rest = (rest[-1:], rest[:-1]) if rest[-1] == EOS else ([], rest)
  before, rest = rest[:rest.index(SPECIALS.suffix)], rest[rest.index(SPECIALS.suffix) + 1:]
  after, middle = rest[:rest.index(SPECIALS.middle)], rest[rest.index(SPECIALS.middle) + 1:]
  return head + before + middle + after + tail  # in SPM `before` is empty and `middle` holds both


def unblanked(ids, targets, prefix, positions, weight) -> list[int]:
  spans = {}
  for target, p, position, w in zip(targets, prefix, positions, weight):
    if not p and w and target != SPECIALS.end:
      spans.setdefault(position, []).append(target)
  return [j for i, p, position in zip(ids, prefix, positions) if p
          for j in (spans[position] if i == SPECIALS.mask else [i])]


@every
@quick
@rows
def test_everything_is_recoverable(objective, sizes, length, key):
  """Nothing of a packed row is lost, and documents stay in order and apart."""
  raw, batch = made(objective, sizes, length, key)
  assert recovered(objective, batch) == documents(raw.tokens_BT[0], raw.segments_BT[0])


@every
@quick
@rows
def test_documents_do_not_depend_on_their_neighbours(objective, sizes, length, key):
  """A document's ids stay in its segment; the batch knows no id of another's."""
  raw, batch = made(objective, sizes, length, key)
  for n, ids in enumerate(documents(raw.tokens_BT[0], raw.segments_BT[0]), 1):
    own = set(ids) | set(raw.following[0][0][raw.segments_BT[0] == n].tolist()) | set(SPECIALS.ids.values()) | {BOS}
    here, learned = batch['segments_BT'] == n, (batch['segments_BT'] == n) & (batch['weight_BT'] > 0)
    allowed = own | set(range(FIRST)) if isinstance(objective, MaskedLm) else own
    assert set(batch['tokens_BT'][here].tolist()) <= allowed
    assert set(batch['targets_BT'][learned].tolist()) <= own


@every
def test_rows_are_alike_however_the_batch_is_cut(objective, small_store):
  specials = specials_after(small_store.tokenizer.vocab, 60)
  if hasattr(objective, 'specials'):
    objective = dataclasses.replace(objective, specials=specials)
  vocab = objectives.vocabulary(objective, small_store.tokenizer.vocab)
  for packing in (Split(), BestFit(fragment=4, fragments=3)):
    whole = Batches(small_store, 8, 64, 1, packing, objective, vocab).batch_at(10**6)
    parts = [Batches(small_store, 8, 64, 1, packing, objective, vocab).batch_at(10**6, slice(i, i + 2))
             for i in (0, 2, 4, 6)]
    ones = [Batches(small_store, 1, 64, 1, packing, objective, vocab).batch_at(8 * 10**6 + i) for i in range(8)]
    for name, values in whole.items():
      assert (np.concatenate([part[name] for part in parts]) == values).all(), name
      assert (np.concatenate([one[name] for one in ones]) == values).all(), name
    other = Batches(small_store, 8, 64, 2, packing, objective, vocab).batch_at(10**6)
    assert any((other[name] != whole[name]).any() for name in whole)
    assert {name: v.dtype.name for name, v in whole.items()} == {
        name: 'uint32' if name == 'row_B' else 'float32' if name.startswith('weight') else 'int32' for name in whole}


def share(objective, size: int, of=lambda batch: batch['weight_BT'].sum(), rows: int = 200) -> float:
  return np.mean([of(made(objective, [size], size + 40, key)[1]) for key in range(rows)]) / size


def test_rates():
  size = 200
  learned = lambda batch: batch['targets_BT'][batch['weight_BT'] > 0]
  hidden = lambda batch: ((learned(batch) >= FIRST) & (learned(batch) < VOCAB)).sum()
  ended = lambda batch: hidden(batch) + (learned(batch) == EOS).sum()
  # 200 rows of 200 tokens: chances of single tokens deviate by 0.36/200 = 0.002; spans are counted exactly.
  assert share(MaskedLm(SPECIALS), size, hidden) == pytest.approx(0.15 * 0.99, abs=0.008)
  assert share(SpanCorruption(SPECIALS), size, ended) == pytest.approx(0.15)
  assert share(SpanCorruption(SPECIALS, layout='encoder_decoder'), size, ended) == pytest.approx(0.15)
  assert share(Glm(SPECIALS), size, ended) == pytest.approx(0.15)
  mean = np.mean([d.density for d in UL2])  # one of seven is drawn: its deviation over 200 rows is 0.012
  assert share(Ul2(SPECIALS), size, ended) == pytest.approx(mean, abs=0.05)
  assert share(PrefixLm(0.25), size) == pytest.approx(0.75, abs=0.001)
  assert share(PrefixLm(), size) == pytest.approx(0.5, abs=0.1)  # uniform: its mean deviates by 0.29/14
  fim = FillInTheMiddle(SPECIALS, 0.7)
  moved = np.mean([SPECIALS.prefix in made(fim, [50], 100, key)[1]['tokens_BT'] for key in range(400)])
  assert moved == pytest.approx(0.7, abs=0.1)  # four deviations of 400 draws


def test_masked_tokens_are_mask_other_or_same():
  """80 % mask, 10 % another token, 10 % the same (Devlin et al. 2019)."""
  tally = np.zeros(3)
  for key in range(300):
    raw, batch = made(MaskedLm(SPECIALS, 0.5), [100], 100, key)
    chosen = batch['weight_BT'] > 0
    assert (batch['tokens_BT'][~chosen] == raw.tokens_BT[0][~chosen]).all()
    assert not {BOS, EOS} & set(batch['targets_BT'][chosen].tolist())
    shown, truth = batch['tokens_BT'][chosen], batch['targets_BT'][chosen]
    tally += (shown == SPECIALS.mask).sum(), ((shown != SPECIALS.mask) & (shown != truth)).sum(), (shown == truth).sum()
  assert tally / tally.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.02)  # 15,000 draws: deviations below 0.004


class Words(Tokens):
  """Pieces as a tokeniser spells them; words go on without a space, ideographs begin anew, bytes join."""
  pieces = '', '', '', ' un', 'believ', 'able', ',', ' the', '\n', '中国', '人', 'x', '\ufffd', '\ufffd'
  vocab = len(pieces)

  def decode(self, ids):
    return ''.join(self.pieces[i] for i in ids)


def test_whole_words_are_hidden_whole():
  joins = objectives.word_joins(Words())
  pairs = {(3, 4): True, (4, 5): True, (5, 6): False, (5, 7): False, (6, 7): False, (9, 10): False, (10, 9): False,
           (10, 11): False, (12, 13): True, (11, 12): False, (1, 11): False}
  assert {pair: bool(joins(np.array([pair[0]]), np.array([pair[1]]))[0]) for pair in pairs} == pairs
  ids = np.array([[1, 3, 4, 5, 6, 9, 10, 7, 3, 4, 12, 13, 12, 2]], np.int32)
  words = [{1, 2, 3}, {4}, {5}, {6}, {7}, {8, 9}, {10, 11, 12}]
  raw = Raw(ids, (ids,), (ids > 0,), np.ones_like(ids), False, np.array([0]))
  apply = MaskedLm(Specials(mask=14), 0.4, whole_word=True).of(Words(), 15, ids.shape[1])
  seen = set()
  for key in range(60):
    chosen = set(np.flatnonzero(apply(raw, np.array([key], np.uint64))['weight_BT'][0]).tolist())
    assert all(word <= chosen or not word & chosen for word in words)
    seen |= chosen
  assert seen == set(range(1, 13))


def test_spans_are_as_long_as_asked():
  for denoiser in UL2:
    for size in (1, 2, 3, 10, 200, 500):
      u = order.uniform(np.array([size], np.uint64), 2 * size)[0].reshape(2, size)
      start, sizes = denoiser.spans(size, u)
      hidden, count = denoiser.count(size)
      assert (len(start), sizes.sum()) == (count, hidden)
      assert size < 2 or (start[0] > 0 and sizes.min() > 0 and (start[1:] > (start + sizes)[:-1]).all())
  assert Denoiser(0.15, 3.0).count(1000) == (150, 50)
  assert Denoiser(0.25, None).count(1000) == (250, 1)


def test_ul2_draws_every_denoiser_and_names_its_mode():
  modes = {SPECIALS.mode_r: 0, SPECIALS.mode_s: 0, SPECIALS.mode_x: 0}
  for key in range(350):
    modes[int(made(Ul2(SPECIALS), [60], 100, key)[1]['tokens_BT'][0])] += 1
  assert [n / 350 for n in modes.values()] == pytest.approx([2 / 7, 1 / 7, 4 / 7], abs=0.11)  # four deviations


def test_glm_positions_have_two_dimensions():
  """Part B stands at its mask's position and counts on within the span; the spans come in random order."""
  orders = set()
  for key in range(20):
    _, batch = made(Glm(SPECIALS), [60], 80, key)
    n = int((batch['segments_BT'] > 0).sum())
    ids, positions, inner, prefix = (batch[f'{name}_BT'][:n] for name in ('tokens', 'positions', 'inner', 'prefix'))
    masks = np.flatnonzero(ids == SPECIALS.mask)
    a = int(prefix.sum())
    assert (positions[:a] == np.arange(a)).all()
    assert (inner[:a] == 0).all()
    starts = np.flatnonzero(ids == SPECIALS.start)
    assert sorted(positions[starts]) == masks.tolist()
    for start, stop in zip(starts, [*starts[1:], n]):
      assert inner[start:stop].tolist() == list(range(1, stop - start + 1))
      assert set(positions[start:stop]) == {positions[start]}
      assert batch['targets_BT'][stop - 1] == SPECIALS.end
    orders.add(positions[starts].tolist() == masks.tolist())
  assert False in orders


def test_fill_in_the_middle_has_two_forms():
  forms = [made(FillInTheMiddle(SPECIALS, 1.0), [40], 60, key)[1]['tokens_BT'].tolist() for key in range(200)]
  spm = [ids[:3] == [BOS, SPECIALS.prefix, SPECIALS.suffix] for ids in forms]
  assert 0.35 < np.mean(spm) < 0.7  # half of them, and a few PSM with an empty prefix; four deviations
  for spm_share in (0.0, 1.0):
    found = [made(FillInTheMiddle(SPECIALS, 1.0, spm_share), [40], 60, k)[1]['tokens_BT'].tolist() for k in range(9)]
    assert (np.mean([ids[2] == SPECIALS.suffix for ids in found]) > 0.9) == bool(spm_share)
    assert {ids[42] for ids in found} == {EOS}  # 40 tokens and three ids, eos last


def test_future_tokens_stop_at_the_documents_end():
  raw, batch = made(MultiToken(3), [5, -6], 11, 0)
  assert batch['weight_BTJ'].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]] + [[1, 1, 1]] * 6
  assert (batch['targets_BTJ'][..., 0] == batch['targets_BT']).all()
  assert (batch['targets_BTJ'][5:9, 1] == raw.tokens_BT[0, 7:11]).all()


def test_what_is_wrong_is_named(small_store):
  ordinary = int(small_store.tokenizer.encode('the')[0])
  n = small_store.tokenizer.vocab
  wrong = [
      (MaskedLm(Specials()), 'MaskedLm needs Specials.mask'),
      (MaskedLm(Specials(mask=n + 1)), f'mask={n + 1} lies outside .*{n + 1}'),
      (MaskedLm(Specials(mask=ordinary)), f'mask={ordinary} is the piece'),
      (MaskedLm(Specials(mask=small_store.tokenizer.eos)), 'is the eos'),
      (SpanCorruption(Specials(sentinels=(n,))), '4 sentinels, but Specials.sentinels has 1'),
      (SpanCorruption(Specials()), 'needs Specials.sentinels'),
      (Ul2(Specials(sentinels=(n,))), 'needs Specials.mode_r'),
      (FillInTheMiddle(Specials(prefix=n)), 'needs Specials.suffix'), (Glm(Specials(mask=n)), 'needs Specials.start')]
  for objective, said in wrong:
    with pytest.raises(ValueError, match=said):
      Batches(small_store, 1, 64, objective=objective, vocab=n + 1)
  for build, said in [
      (lambda: Specials(mask=5, middle=5), 'middle=5 is also Specials.mask'), (lambda: Specials(mask=-1), 'mask=-1'),
      (lambda: Specials(sentinels=(4, 4)), r'sentinels\[1\]=4'), (lambda: PrefixLm(1.0), 'share=1.0'),
      (lambda: MaskedLm(SPECIALS, 0), 'rate=0'), (lambda: MaskedLm(SPECIALS, 0.1, 0.9, 0.2), 'random=0.2'),
      (lambda: MultiToken(1), 'tokens=1'), (lambda: FillInTheMiddle(SPECIALS, 2.0), 'rate=2.0'),
      (lambda: SpanCorruption(SPECIALS, 1.5), 'density=1.5'), (lambda: Ul2(SPECIALS, ()), 'denoisers'),
      (lambda: SpanCorruption(SPECIALS, layout='both'), "layout='both'"),
      (lambda: Glm(SPECIALS, mean=0.5), 'mean=0.5')]:
    with pytest.raises(ValueError, match=said):
      build()
