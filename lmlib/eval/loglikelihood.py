"""How likely a model finds continuations of contexts: what multiple choice and the harness are scored by.

Contexts that several continuations share are read once, and their continuations go on from the cache; of those of
one token, all are read off the same logits. Requests of about the same length go together, and lengths are rounded
up to a ladder, so that few shapes compile.
"""
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmlib import sharding
from lmlib.data.tokenizer import Tokenizer
from lmlib.kernels.cross_entropy import facts
from lmlib.models import protocol

FIRST = 16  # the first rung


@dataclasses.dataclass(frozen=True)
class Request:
  """Tokens to read and tokens to score."""
  context: tuple[int, ...]
  continuation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """What a model makes of one request."""
  logp: float  # nats, of the continuation
  greedy: bool  # whether it is what greedy decoding writes
  tokens: int  # of the continuation
  cut: int = 0  # tokens at the front of the context that did not fit in the model's length, and were left out


def request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
  """The tokens of a context, with what begins a prompt, and of what follows it.

  Spaces at the end of the context belong to the continuation, and where the two are cut, the tokens of the whole
  text are: as the harness does, so that ' A' is one token. An empty context is what begins or ends a document.
  """
  bare = context.rstrip()
  context, continuation = bare, context[len(bare):] + continuation
  if not continuation:
    raise ValueError(f'there is nothing to score behind {context[-60:]!r}: the continuation is empty')
  before = tokenizer.prompt(context) if context else []
  whole = tokenizer.prompt(context + continuation)
  after = whole[len(before):]
  if not context:
    before, after = (whole[:1], whole[1:]) if tokenizer.starts else ([tokenizer.eos], whole)
  if not after:  # tokens of the context reach over the cut
    before, after = whole[:-1], whole[-1:]
  return Request(tuple(before), tuple(after))


def score(config: protocol.Config, params, requests: Iterable[Request], *, batch: int = 16) -> list[Likelihood]:
  """The likelihood of every request, in their order; `batch` continuations at once. ValueError as each()."""
  given = list(requests)
  found = dict(pair for done in each(config, params, given, batch=batch) for pair in done)
  return [found[one] for one in given]


def each(config: protocol.Config, params, requests: Iterable[Request], *,
         batch: int = 16) -> Iterator[list[tuple[Request, Likelihood]]]:
  """Requests with their likelihoods as their batches are done, the longest first, equal ones once.

  Of a context that does not fit, the end is read, so that the continuation fits. ValueError for an encoder, for an
  empty part, a token outside the vocabulary or a continuation longer than the model's length.
  """
  if protocol.encodes(config) or not protocol.decodes(config):
    raise ValueError(f'{type(config).__module__} is no decoder alone: it has no likelihood of continuations')
  if batch < 1:
    raise ValueError(f'batch={batch} must be at least 1 continuation')
  fitted: dict[Request, list[tuple[Request, int]]] = {}
  for one in dict.fromkeys(requests):
    kept, cut = fit(config, one)
    fitted.setdefault(kept, []).append((one, cut))
  for rows in batches(config, sorted(fitted, key=_order), batch):
    logp_R, greedy_R = _scored(config, params, rows, batch)
    yield [(one, Likelihood(float(p), bool(greedy), len(row.continuation), cut))
           for row, p, greedy in zip(rows, logp_R, greedy_R) for one, cut in fitted[row]]


def fit(config: protocol.Config, one: Request) -> tuple[Request, int]:
  """A request as the model can read it, and how many tokens of its context that leaves out."""
  context, continuation = one.context, one.continuation
  if not context or not continuation:
    raise ValueError(f'a request of {len(context)} tokens to read and {len(continuation)} to score: both need one')
  low, high = min(*context, *continuation), max(*context, *continuation)
  if low < 0 or high >= config.vocab:
    raise ValueError(f'a request holds tokens from {low} to {high}, outside of vocab={config.vocab}')
  if len(continuation) > config.length:
    raise ValueError(f"a continuation of {len(continuation)} tokens exceeds the model's length={config.length}")
  cut = max(0, len(context) + len(continuation) - 1 - config.length)
  return Request(context[cut:], continuation), cut


def batches(config: protocol.Config, ordered: Sequence[Request], batch: int) -> Iterable[list[Request]]:
  """Up to `batch` requests that follow each other and fit into one cache."""
  rows: list[Request] = []
  for one in ordered:
    longest = [max(len(getattr(row, part)) for row in [*rows, one]) for part in ('context', 'continuation')]
    apart = rows and (len(one.continuation) == 1) != (len(rows[0].continuation) == 1)
    if len(rows) == batch or apart or sum(longest) - 1 > config.length:
      yield rows
      rows = []
    rows.append(one)
  if rows:
    yield rows


def rung(size: int) -> int:
  """The least of 16, 24, 32, 48, 64, 96, ... that is at least `size`."""
  low = FIRST
  while low < size:
    if low * 3 // 2 >= size:
      return low * 3 // 2
    low *= 2
  return low


def _order(one: Request):
  """The longest first, so that memory runs out at once or not at all; of one context together."""
  return len(one.continuation) == 1, -len(one.context), one.context, -len(one.continuation), one.continuation


def _scored(config, params, rows: list[Request], batch: int):
  """logp_R and greedy_R of a batch; rows beyond the last repeat it."""
  contexts = list(dict.fromkeys(row.context for row in rows))
  number = {context: i for i, context in enumerate(contexts)}
  most = max(len(row.continuation) for row in rows)
  after = 0 if most == 1 else min(rung(most - 1), config.length - max(map(len, contexts)))
  before = min(rung(max(map(len, contexts))), config.length - after)
  G = 1
  while len(contexts) > G:
    G *= 2
  tokens_GT, lengths_G = np.zeros((min(G, batch), before), np.int32), np.ones(min(G, batch), np.int32)
  for i, context in enumerate(contexts):
    tokens_GT[i, :len(context)], lengths_G[i] = context, len(context)
  targets_RT = np.full((batch, after + 1), -1, np.int32)
  context_R = np.zeros(batch, np.int32)
  for i, row in enumerate(rows):
    targets_RT[i, :len(row.continuation)], context_R[i] = row.continuation, number[row.context]
  logp_R, greedy_R = _likelihoods(config, params, tokens_GT, lengths_G, context_R, targets_RT)
  logp_R, greedy_R = sharding.fetched((logp_R, greedy_R))
  return logp_R[:len(rows)], greedy_R[:len(rows)]


@functools.partial(jax.jit, static_argnums=0)
def _likelihoods(config, params, tokens_GT, lengths_G, context_R, targets_RT):
  """Sums of log-probabilities of the targets of R rows (-1: none), and whether each was the highest."""
  model, (G, before), after = config.model(), tokens_GT.shape, targets_RT.shape[1] - 1
  hidden = lambda tokens, real, cache: model.apply({'params': params}, tokens, real, cache, method='hidden')[:2]
  w_DV = model.apply({'params': params}, method='unembed')
  real_GT = (jnp.arange(before)[None] < lengths_G[:, None]).astype(jnp.int32)
  x_GTD, cache = hidden(tokens_GT, real_GT, config.cache(G, before + after) if after else None)
  x_GD = jnp.take_along_axis(x_GTD, (lengths_G - 1)[:, None, None], axis=1)[:, 0]
  x_RTD = x_GD[context_R][:, None]
  if after:
    cache = _rows(config, cache, G, before + after, context_R)
    given_RT = targets_RT[:, :-1]
    real_RT = (targets_RT[:, 1:] >= 0).astype(jnp.int32)
    x_RTD = jnp.concatenate([x_RTD, hidden(jnp.maximum(given_RT, 0), real_RT, cache)[0]], axis=1)
  logp_RT, first_RT = of_targets(config, w_DV, x_RTD, jnp.maximum(targets_RT, 0))
  scored_RT = targets_RT >= 0
  return jnp.where(scored_RT, logp_RT, 0.0).sum(1), (first_RT | ~scored_RT).all(1)


def of_targets(config, w_DV, x_BTD, targets_BT):
  """BT: of hidden states the log-probability of each target, and whether no token has a higher one."""
  lse_BT, target_BT, most_BT, _ = facts(x_BTD, w_DV, targets_BT, protocol.logits(config))
  return target_BT - lse_BT, target_BT == most_BT


def _rows(config, cache, G: int, length: int, context_R):
  """A cache with, for each row, that of its context. The axis to take from is where a cache of more rows is longer."""
  one, two = (jax.eval_shape(lambda n=n: config.cache(n, length)) for n in (G, G + 1))
  axes = jax.tree.leaves(jax.tree.map(
      lambda a, b: next(i for i, (n, m) in enumerate(zip(a.shape, b.shape)) if n != m), one, two))
  leaves, tree = jax.tree.flatten(cache)
  return jax.tree.unflatten(tree, [jnp.take(leaf, context_R, axis=axis) for leaf, axis in zip(leaves, axes)])
