"""Continuing prompts of different lengths together: one prefill, then one token a row and step.

An encoder-decoder reads the prompts and answers them: its decoder begins with a token of its own.
"""
from collections.abc import Iterator
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lmlib import sharding
from lmlib.models import protocol
from lmlib.serve import sampling, speculative
from lmlib.serve.prompts import check, last, padded, read, scored
from lmlib.serve.sampling import Sampling, Seen, choose

CHUNK = 16  # tokens a row between two looks at what was written


@dataclasses.dataclass(frozen=True)
class Continuation:
  """What was written after a prompt."""
  tokens: list[int] = dataclasses.field(default_factory=list)  # without the one that ends the text
  logp: list[float] = dataclasses.field(default_factory=list)  # of each token to the model, in nats
  truncated_logp: list[float] = dataclasses.field(default_factory=list)  # and among what could be drawn
  text: str | None = None  # without what stopped it; None without a tokeniser
  ended: str | None = None  # by 'eos', 'length' or 'stop'; None while it goes on
  score: float | None = None  # by which it was chosen among others; None where there were none
  drafted: speculative.Drafted | None = None  # how drafting went; None without a draft


def generate(config: protocol.Config, params, prompts, *, new: int, eos: int | None = None,
             temperature: float = 1.0, top_k: int | None = None, seed: int = 0,
             start: int | None = None, draft=None) -> list[list[int]]:
  """Up to `new` tokens after each prompt (lists of token ids), without the prompt; ends before `eos`.

  Row i draws from fold_in(key(seed), i). What continued() takes and refuses, for equal settings of all rows.
  """
  one = Sampling(temperature, top_k, most=new, seed=seed)
  found = continued(config, params, prompts, one, eos=eos, start=start, draws=range(len(prompts)), draft=draft)
  return [row.tokens for row in found]


def continued(config: protocol.Config, params, prompts, how: Sampling | list[Sampling] = Sampling(),
              **settings) -> list[Continuation]:
  """A continuation of each prompt; settings: as of stream()."""
  *_, found = stream(config, params, prompts, how, **settings)
  return found


def stream(config: protocol.Config, params, prompts, how: Sampling | list[Sampling] = Sampling(), *,
           eos: int | None = None, start: int | None = None, tokenizer=None, draws=None, against=None,
           guidance: float = 1.0, chunk: int = CHUNK, draft=None) -> Iterator[list[Continuation]]:
  """Yields all continuations so far, every `chunk` tokens and at the end.

  how: Sampling of all rows, or of each. A row draws from fold_in(key(its seed), its entry of draws, 0 without them),
  whatever else is in the batch. eos: the token that ends a text. tokenizer: gives text, and finds Sampling.stop.
  start: what the decoder of an encoder-decoder begins with (bos, in training on objectives; T5: 0); None for others.
  against: a prompt to each, from whose continuation the model is led away (classifier-free guidance, Sanchez et al.
  2023): log p = guidance * log p(. | prompt) + (1 - guidance) * log p(. | against).
  draft: one of serve/drafts.py, with which a run writes several tokens, the same as without; `chunk` counts runs then.
  Raises ValueError for an empty prompt, for a token outside the vocabulary, where prompt and continuation exceed
  config.length (an encoder-decoder's each by itself), and for an encoder, which writes nothing.
  """
  rows = list(how) if isinstance(how, (list, tuple)) else [how] * len(prompts)
  _check(config, params, prompts, rows, start, tokenizer, against, guidance)
  length, tokens_BT, lengths_B = padded(config, params, [*prompts, *(against or ())], max(row.most for row in rows))
  keys_B = _keys(np.array([row.seed for row in rows]), np.array(draws or [0] * len(prompts)))
  shared = (sampling.settings(rows, config.vocab, eos), keys_B, jnp.asarray([row.most for row in rows], jnp.int32),
            jnp.float32(guidance) if against else None)
  if draft is None:
    begun = _begin(config, length, params, tokens_BT, lengths_B, start, shared)
    more = lambda state: _more(config, chunk, params, state, shared)
  else:
    begun = speculative.begun(config, draft, length, params, tokens_BT, lengths_B, shared)
    more = lambda state: speculative.followed(config, draft, chunk, params, state, shared)
  yield from followed(begun, more, rows, eos, tokenizer)


def followed(begun, more, rows: list[Sampling], eos: int | None, tokenizer) -> Iterator[list[Continuation]]:
  """Yields all continuations after every call, until all have ended.

  begun: a state with done_B and (tokens_BN, logp_BN, truncated_logp_BN), a token being -1 where none is; `more` makes
  the next of a state.
  """
  found = [Continuation(text=None if tokenizer is None else '') for _ in rows]
  state, out = begun
  while True:
    found = _take(found, sharding.fetched(out), rows, eos, tokenizer)
    yield found
    if all(row.ended for row in found):
      return
    if any(stopped_B := [row.ended == 'stop' for row in found]):
      state = state.replace(done_B=state.done_B | jnp.asarray(stopped_B))
    state, out = more(state)


def settled(row: Continuation, stop: tuple[str, ...]) -> str:
  """The text that no further token takes back: without half a character, or what may be the first half of a stop."""
  text = row.text if row.ended else row.text.rstrip('\ufffd')
  halves = [n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])]
  return text if row.ended else text[:len(text) - max(halves, default=0)]


def best_of(config: protocol.Config, params, prompts, how: Sampling, *, copies: int, against=None,
            **settings) -> list[Continuation]:
  """Of `copies` draws for each prompt the one whose tokens are the most likely to the model, on average (its score)."""
  if copies < 1 or (copies > 1 and how.temperature == 0):
    raise ValueError(f'copies={copies} at temperature={how.temperature}: give one at least, and draw if several')
  repeated = lambda prompts: prompts and [prompt for prompt in prompts for _ in range(copies)]
  found = continued(config, params, repeated(prompts), how, draws=[*range(copies)] * len(prompts),
                    against=repeated(against), **settings)
  found = [dataclasses.replace(row, score=float(np.mean(row.logp)) if row.logp else -np.inf) for row in found]
  return [max(found[i:i + copies], key=lambda row: row.score) for i in range(0, len(found), copies)]


def _check(config, params, prompts, rows, start, tokenizer, against, guidance: float):
  check(config, params, [*prompts, *(against or ())], max((row.most for row in rows), default=0), start)
  if len(rows) != len(prompts):
    raise ValueError(f'{len(prompts)} prompts and {len(rows)} times Sampling: give one, or one a prompt')
  if against is not None and len(against) != len(prompts):
    raise ValueError(f'{len(prompts)} prompts and {len(against)} in against: give one a prompt')
  if (against is None) != (guidance == 1.0):
    raise ValueError(f'guidance={guidance} needs prompts to lead away from, in against, and those a guidance')
  if tokenizer is None and any(row.stop for row in rows):
    raise ValueError('Sampling.stop is looked for in text: give the tokenizer')


@struct.dataclass
class State:
  """Between two steps."""
  cache: object
  last_B: jax.Array  # the token that the model has not read yet
  seen: Seen
  step: jax.Array
  done_B: jax.Array


@jax.jit
def _keys(seed_B, draw_B):
  return jax.vmap(lambda seed, draw: jax.random.fold_in(jax.random.key(seed), draw))(seed_B, draw_B)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(config, length: int, params, tokens_BT, lengths_B, start, shared):
  """Reads the prompts, and chooses a first token."""
  x_BTD, real_B, cache = read(config, length, params, tokens_BT, lengths_B, start)
  logits_BV = scored(config, params, last(x_BTD, real_B))
  real_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
  rows = len(shared[1])
  seen = Seen.of(tokens_BT[:rows], real_BT[:rows], config.vocab)
  state, *found = _chosen(State(cache, None, seen, jnp.int32(0), jnp.zeros(rows, bool)), logits_BV, shared)
  return state, jax.tree.map(lambda x_B: x_B[:, None], tuple(found))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _more(config, chunk: int, params, state: State, shared):
  """(state, (tokens_BN, logp_BN, truncated_logp_BN)) of up to `chunk` further steps; a token is -1 where none is."""
  model, B = config.model(), len(state.last_B)
  out = (jnp.full((B, chunk), -1, jnp.int32), jnp.zeros((B, chunk)), jnp.zeros((B, chunk)))

  def one(carry):
    i, state, out = carry
    copies = 1 if shared[-1] is None else 2
    logits_BTV, cache = model.apply({'params': params}, jnp.tile(state.last_B, copies)[:, None], None, state.cache)
    state, *found = _chosen(state.replace(cache=cache), logits_BTV[:, 0], shared)
    return i + 1, state, jax.tree.map(lambda x_BN, x_B: x_BN.at[:, i].set(x_B), out, tuple(found))

  go_on = lambda carry: (carry[0] < chunk) & ~carry[1].done_B.all()
  return jax.lax.while_loop(go_on, one, (0, state, out))[1:]


def _chosen(state: State, logits_BV, shared):
  """(state after a further token, the token or -1, and both log-probabilities)."""
  settings, keys_B, most_B, guidance = shared
  if guidance is not None:
    towards_BV, against_BV = jnp.split(jax.nn.log_softmax(logits_BV, axis=-1), 2)
    logits_BV = against_BV + guidance * (towards_BV - against_BV)
  token_B, logp_B, truncated_logp_B = choose(
      logits_BV, state.seen, settings, jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.step), state.step)
  done_B = state.done_B | (token_B == settings.eos) | (state.step + 1 >= most_B)
  written_B = jnp.where(state.done_B, -1, token_B)
  state = state.replace(last_B=token_B, seen=state.seen.plus(token_B), step=state.step + 1, done_B=done_B)
  return state, written_B, logp_B, truncated_logp_B


def _take(found: list[Continuation], out, rows: list[Sampling], eos, tokenizer) -> list[Continuation]:
  """The continuations with a chunk behind them."""
  taken = []
  for row, how, *columns in zip(found, rows, *out):
    tokens, ended = list(row.tokens), row.ended
    for token in columns[0].tolist():
      if token < 0 or ended:
        break
      ended = 'eos' if token == eos else 'length' if len(tokens) + 1 == how.most else None
      tokens += [token] if token != eos else []
    new = len(tokens) - len(row.tokens)
    logp, truncated_logp = ([*old, *more[:new].tolist()] for old, more in zip((row.logp, row.truncated_logp),
                                                                              columns[1:3]))
    drafted = speculative.Drafted(*columns[3].tolist()) if columns[3:] else None
    row = Continuation(tokens, logp, truncated_logp, row.text, ended, drafted=drafted)
    if tokenizer is not None and new:
      row = _stopped(dataclasses.replace(row, text=tokenizer.decode(tokens, continues=True)), how.stop, tokenizer)
    taken.append(row)
  return taken


def _stopped(row: Continuation, stops: tuple[str, ...], tokenizer) -> Continuation:
  """A continuation up to the one of these texts that is complete first; its tokens to the one that completes it."""
  there = [(at + len(text), at) for text in stops if (at := row.text.find(text)) >= 0]
  if not there:
    return row
  end, at = min(there)
  keep = next(n for n in range(1, len(row.tokens) + 1)
              if len(tokenizer.decode(row.tokens[:n], continues=True)) >= end)
  return dataclasses.replace(row, tokens=row.tokens[:keep], logp=row.logp[:keep],
                             truncated_logp=row.truncated_logp[:keep], text=row.text[:at], ended='stop')
