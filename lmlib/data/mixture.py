"""Mixtures of stores: which store each row of training comes from, in exact proportion, at any step at once.

Rows come in blocks. After every block, and at the end of every stage, each store has given its rate times the
rows so far, rounded up or down: within one row for ever, where drawing stores at random would drift by
the root of the number. Who is rounded up is decided as a scheduler would, by the earliest deadline (fair
schedules: Tijdeman 1980; Baruah et al. 1996). A key permutes the rows of a block.
"""
import dataclasses
import fractions
import functools
import itertools
import math
from typing import Any

import numpy as np

from lmlib.data import order
from lmlib.data.balancing import Balance
from lmlib.data.store import Store, digest

PERIOD = 1 << 12  # blocks after which counts repeat, at most; rates are exact where that suffices


@dataclasses.dataclass(frozen=True)
class Stage:
  """From step `start` on, other rates."""
  start: int
  rates: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Data of several corpora, as `data` of a run: corpora are what prepare() takes, and share one tokeniser.

  rates are shares of the rows, in any unit; stages change them from their step on. Or `balance` sets them by the
  tokens of each, of which the run draws `total` (needed for Balance.epochs alone).
  """
  corpora: tuple = ()
  rates: tuple[float, ...] = ()
  names: tuple[str, ...] = ()  # none: 0, 1, ...
  stages: tuple[Stage, ...] = ()
  block: int = 1024  # rows
  balance: Balance | None = None
  total: int | None = None

  def __post_init__(self):
    if self.balance is None and self.total is not None:
      raise ValueError(f'Mixture.total={self.total} has no effect without Mixture.balance')
    if self.balance is not None and (self.rates or self.stages):
      raise ValueError(f'Mixture.balance sets the rates: rates={self.rates!r} and stages={self.stages!r} must be ()')
    rates = self.rates if self.balance is None else (1.0,) * len(self.corpora)
    names = check(len(self.corpora), rates, self.names, self.stages, self.block)
    for name, corpus in zip(names, self.corpora):
      if corpus.vocab != self.corpora[0].vocab:
        raise ValueError(f'Mixture.corpora: {name} has a vocabulary of {corpus.vocab}, {names[0]} one of '
                         f'{self.corpora[0].vocab}: give them one tokenizer')

  @property
  def vocab(self) -> int:
    return self.corpora[0].vocab

  def stores(self, stores) -> 'Stores':
    """The mixture of these stores, one a corpus."""
    stores, rates = tuple(stores), self.rates
    if self.balance is not None:
      names = self.names or tuple(map(str, range(len(stores))))
      shares = self.balance.rates({name: store.tokens for name, store in zip(names, stores)}, self.total)
      rates = tuple(float(shares[name]) for name in names)
    return Stores(stores, rates, self.names, self.stages, self.block)

  def prepared(self, prepare):
    """What prepare() gives for one corpus, of all: prepare(corpus) is called for each in turn."""
    parts = [prepare(corpus) for corpus in self.corpora]
    names = self.names or tuple(map(str, range(len(parts))))
    if lacking := [name for name, part in zip(names, parts) if part.held_out is None]:
      raise ValueError(f'Mixture.corpora: {lacking[0]} was prepared with held_out=None: there is nothing to score on')
    train = self.stores(part.train for part in parts)
    return dataclasses.replace(
        parts[0], train=train, held_out=dataclasses.replace(train, stores=tuple(part.held_out for part in parts)),
        skipped=tuple((f'{name}: {file}', reason) for name, part in zip(names, parts) for file, reason in part.skipped))


@dataclasses.dataclass(frozen=True)
class Stores:
  """Open stores and their rates. One store alone needs no rate."""
  stores: tuple[Store, ...]
  rates: tuple[float, ...] = ()
  names: tuple[str, ...] = ()
  stages: tuple[Stage, ...] = ()
  block: int = 1024

  def __post_init__(self):
    if len(self.stores) == 1 and not self.rates:
      object.__setattr__(self, 'rates', (1.0,))
    names = check(len(self.stores), self.rates, self.names, self.stages, self.block)
    object.__setattr__(self, 'names', names)
    for name, store in zip(names, self.stores):
      if store.tokens == 0:
        raise ValueError(f'Mixture.stores: {name} ({store.path}) is empty')
      if store.tokenizer.fingerprint != self.tokenizer.fingerprint:
        raise ValueError(f'Mixture.stores: {name} ({store.path}) was made with another tokenizer than {names[0]} '
                         f'({self.stores[0].path})')

  @property
  def tokenizer(self):
    return self.stores[0].tokenizer

  documents = property(lambda self: sum(store.documents for store in self.stores))
  tokens = property(lambda self: sum(store.tokens for store in self.stores))
  text_bytes = property(lambda self: sum(store.text_bytes for store in self.stores))

  @property
  def fingerprint(self) -> str:
    """SHA-256 of contents, rates and stages."""
    return digest([[store.fingerprint for store in self.stores], self.rates, self.block,
                   [[stage.start, stage.rates] for stage in self.stages]])

  def text(self, document: int) -> str:
    """The text of a document, counted through all stores."""
    for store in self.stores:
      if document < store.documents:
        return store.text(document)
      document -= store.documents
    raise ValueError('there is no such document')

  def scored(self):
    """Pairs (tokens with bos and eos, bytes of the text) of all documents of all stores."""
    for store in self.stores:
      yield from store.scored()

  def places(self, visit_B, *, batch: int, seed: int):
    """Of each row, counted since training began: the index of its store, and how many that gave before."""
    visit_B = np.asarray(visit_B)
    if len(self.stores) == 1:
      return np.zeros_like(visit_B), visit_B
    store_B, given_B = np.empty_like(visit_B), np.empty_like(visit_B)
    plans = self._stages(batch)
    for i, (first, stop, before_K, shares) in enumerate(plans):
      here = np.flatnonzero((visit_B >= first) & ((visit_B < stop) if stop is not None else True))
      for block in np.unique((visit_B[here] - first) // self.block).tolist():
        rows = here[(visit_B[here] - first) // self.block == block]
        start_K = shares.counts(block * self.block)
        end = (block + 1) * self.block if stop is None else min((block + 1) * self.block, stop - first)
        bound_K = (shares.counts(end) - start_K).cumsum()
        # Rows of one store are neighbours before they are permuted, so each knows its place among them.
        place = order.permute(visit_B[rows] - first - block * self.block, end - block * self.block,
                              seed=seed, epoch=f'stage {i} block {block}')
        store_B[rows] = k = np.searchsorted(bound_K, place, side='right')
        given_B[rows] = before_K[k] + start_K[k] + place - np.concatenate([[0], bound_K])[k]
    return store_B, given_B

  def rate(self, step: int, store: int) -> float:
    """The share of a store in the rows of a step, as it is in effect."""
    shares = [shares_of(rates, self.block) for start, rates in self._rates if start <= step][-1]
    return float(shares.rates[store])

  @property
  def _rates(self):
    return [(0, self.rates), *((stage.start, stage.rates) for stage in self.stages)]

  def _stages(self, batch: int):
    """Of each stage: first row, the first after it, the rows of each store before it, its Shares."""
    return _stages(tuple(self._rates), self.block, batch)


@functools.lru_cache(maxsize=64)
def _stages(rates, block: int, batch: int):
  plans, before_K = [], np.zeros(len(rates[0][1]), np.int64)
  for i, (start, shares) in enumerate(rates):
    shares = shares_of(shares, block)
    stop = rates[i + 1][0] * batch if i + 1 < len(rates) else None
    plans.append((start * batch, stop, before_K, shares))
    before_K = before_K if stop is None else before_K + shares.counts(stop - start * batch)
  return plans


class Shares:
  """How many of the first n rows each store gives: within one of rate * n, never fewer as n grows by blocks."""

  def __init__(self, rates: tuple[float, ...], block: int):
    self._block = block
    self.rates, self.period = periodic(rates, block)
    weight_K = [int(rate * self.period * block) for rate in self.rates]
    self._weight_K = np.array(weight_K, np.int64)  # rows of each store in a period
    count_K, table = np.zeros(len(rates), np.int64), []
    for i in range(self.period):
      table.append(count_K)
      count_K = self._next(count_K, (i + 1) * block)
    self._table = np.stack(table)
    assert (count_K == self._weight_K).all()

  def counts(self, n: int) -> np.ndarray:
    """Rows of each store among the first n, int64. Between blocks, as if the last were cut there."""
    block, rest = divmod(n, self._block)
    turn, i = divmod(block, self.period)
    count_K = self._table[i]
    return turn * self._weight_K + (self._next(count_K, i * self._block + rest) if rest else count_K)

  def _next(self, count_K, n: int):
    """Counts of n rows that follow count_K: the exact share rounded down, or up where a deadline is near."""
    rows = self.period * self._block
    least_K = np.maximum(self._weight_K * n // rows, count_K)
    open_K = least_K * rows < self._weight_K * n  # may be rounded up
    due = np.where(open_K, (least_K + 1) * (rows / np.maximum(self._weight_K, 1)), np.inf)
    more = due.argsort(kind='stable')[:n - int(least_K.sum())]
    assert open_K[more].all()
    least_K[more] += 1
    return least_K


shares_of = functools.lru_cache(maxsize=64)(Shares)  # a long period takes a moment to lay out


def periodic(rates: tuple[float, ...], block: int) -> tuple[tuple[fractions.Fraction, ...], int]:
  """Rates that sum to one, and the blocks after which each store has given a whole number of rows.

  Exact as written in decimals where at most PERIOD blocks do; else multiples of 1 / (PERIOD * block).
  """
  written = [fractions.Fraction(str(rate)) for rate in rates]
  exact = [rate / sum(written) for rate in written]
  whole = math.lcm(*(rate.denominator for rate in exact))
  period = whole // math.gcd(whole, block)
  if period <= PERIOD:
    return tuple(exact), period
  rows = PERIOD * block
  parts = [max(math.floor(rate * rows), int(rate > 0)) for rate in exact]
  by_need = sorted(range(len(parts)), key=lambda k: parts[k] - exact[k] * rows)
  for k in by_need[:max(rows - sum(parts), 0)]:
    parts[k] += 1
  parts[parts.index(max(parts))] -= sum(parts) - rows  # what tiny rates, rounded up to one row, have taken
  return tuple(fractions.Fraction(part, rows) for part in parts), PERIOD


def check(count: int, rates, names, stages, block: Any) -> tuple[str, ...]:
  """The names of a mixture's stores. ValueError, naming what is wrong, if its settings do not fit."""
  if count == 0:
    raise ValueError('Mixture: there is no store to mix')
  names = names or tuple(map(str, range(count)))
  if len(names) != count or len(set(names)) != count:
    raise ValueError(f'Mixture.names={names!r} must name each of the {count} stores, each differently')
  if not isinstance(block, int) or not 1 <= block <= 1 << 16:
    raise ValueError(f'Mixture.block={block!r} must be a whole number of rows, from 1 to {1 << 16}')
  starts = [stage.start for stage in stages]
  if any(b <= a for a, b in itertools.pairwise([0, *starts])):
    raise ValueError(f'Mixture.stages start at steps {starts}: each must come after the one before, and after 0')
  for where, given in [('rates', rates), *((f'stages: rates from step {s.start}', s.rates) for s in stages)]:
    if len(given) != count:
      raise ValueError(f'Mixture.{where} = {given!r} are {len(given)} for {count} stores')
    for name, rate in zip(names, given):
      if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f'Mixture.{where}: {name} has {rate}, which is no share')
    if not sum(given) > 0:
      raise ValueError(f'Mixture.{where} = {given!r} give no row to any store')
  for k, name in enumerate(names):
    if not rates[k] and not any(stage.rates[k] for stage in stages):
      raise ValueError(f'Mixture.rates: {name} has rate 0 in every stage, so it has no effect: leave it out')
  return names
