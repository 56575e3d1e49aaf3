"""Beam search: of all that could be written, what is the most likely as a whole, as far as a few beams see.

At every step each group keeps its best unfinished texts; texts that end among twice as many are finished. A score is
the sum of a text's log-probabilities, its end included, over ((5 + tokens) / 6)^length_penalty (Wu et al. 2016). A
prompt is done when nothing that is unfinished can come to score higher than what its groups have found, so the outcome
is that of searching to the last step. Groups choose one after the other, each token at `diversity` less for every
beam of an earlier group that took it at this step (Vijayakumar et al. 2016); scores are without that.
"""
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lmlib.models import protocol
from lmlib.serve import sampling
from lmlib.serve.generate import Continuation
from lmlib.serve.prompts import check, last, padded, read, rounded, scored
from lmlib.serve.sampling import Sampling, Seen, undrawn


@dataclasses.dataclass(frozen=True)
class Beams:
  """Another number of beams or groups compiles anew, as another number of prompts does; nothing else does."""
  count: int = 4  # of all groups together
  groups: int = 1
  length_penalty: float = 0.0  # 0: sums, which favour short texts; 1: about means
  diversity: float = 0.0  # nats

  def __post_init__(self):
    if not isinstance(self.count, int) or not isinstance(self.groups, int) or min(self.count, self.groups) < 1:
      raise ValueError(f'Beams.count={self.count!r} and groups={self.groups!r} must be positive integers')
    if self.count % self.groups:
      raise ValueError(f'Beams.count={self.count} is not a multiple of groups={self.groups}')
    for name in ('length_penalty', 'diversity'):
      if not isinstance(value := getattr(self, name), (int, float)) or not np.isfinite(value):
        raise ValueError(f'Beams.{name}={value!r} must be a finite number')
    if self.diversity < 0 or (self.diversity > 0) != (self.groups > 1):
      raise ValueError(f'Beams.diversity={self.diversity} keeps groups={self.groups} apart: above 0 for several, '
                       '0 for one')

  def best(self, config, params, prompts, how: Sampling, **settings) -> list[Continuation]:
    """Of each prompt the continuation with the highest score; arguments are those of search()."""
    return [found[0] for found in search(config, params, prompts, self, how, **settings)]


def search(config: protocol.Config, params, prompts, beams: Beams, how: Sampling, *, eos: int | None = None,
           start: int | None = None, tokenizer=None) -> list[list[Continuation]]:
  """Of each prompt (a list of token ids) up to beams.count continuations, the highest score first.

  how: penalties, bias, forced tokens and lengths; what they leave of the model's distribution is what is summed, as
  truncated_logp. eos, start, tokenizer: as of generate.stream(). ValueError for what that refuses, and where `how`
  draws or has a `stop`: a search goes by tokens.
  """
  undrawn(how, 'a beam search', 'stop')
  check(config, params, prompts, how.most, start)
  length, tokens_BT, lengths_B = padded(config, params, prompts, how.most)
  rows = len(prompts) * beams.count
  shared = (sampling.settings([how] * rows, config.vocab, eos), jnp.int32(how.most), jnp.float32(beams.length_penalty),
            jnp.float32(beams.diversity))
  sizes = (beams.groups, beams.count // beams.groups, rounded(how.most))
  ends = jax.device_get(_found(config, length, sizes, params, tokens_BT, lengths_B, start, shared))
  return [_continuations(jax.tree.map(lambda x: x[i], ends), tokenizer) for i in range(len(prompts))]  # noqa: B023


def _continuations(ends: 'Texts', tokenizer) -> list[Continuation]:
  """What was found for a prompt, the highest score first."""
  found = []
  for place in sorted(np.ndindex(ends.score.shape), key=lambda place: -ends.score[place]):
    if ends.score[place] > -np.inf:
      n = int(ends.tokens[place]) - int(ends.ended[place])
      tokens, logp, left = (x[place][:n].tolist() for x in (ends.token, ends.logp, ends.left_logp))
      text = None if tokenizer is None else tokenizer.decode(tokens, continues=True)
      ended = 'eos' if ends.ended[place] else 'length'
      found.append(Continuation(tokens, logp, left, text, ended, float(ends.score[place])))
  return found


@struct.dataclass
class Texts:
  """Texts of B prompts and a group's C beams, all BC...; T tokens have room."""
  score: jax.Array  # of finished ones as above, of others the sum; -inf: there is none
  tokens: jax.Array  # how many, with the end
  ended: jax.Array  # whether by its end
  token: jax.Array  # BCT
  logp: jax.Array  # BCT, to the model
  left_logp: jax.Array  # BCT, of what `how` leaves of it

  @classmethod
  def none(cls, *shape: int) -> 'Texts':
    zeros = functools.partial(jnp.zeros, shape)
    few = zeros(dtype=jnp.float32)
    return cls(few[..., 0] - jnp.inf, jnp.zeros(shape[:-1], jnp.int32), jnp.zeros(shape[:-1], bool),
               zeros(dtype=jnp.int32), few, few)

  def take(self, at_BC) -> 'Texts':
    """The texts at these places among those of their prompt."""
    return jax.tree.map(lambda x: jax.vmap(lambda x, at: x[at])(x, at_BC), self)

  def best(self, other: 'Texts') -> 'Texts':
    """As many of both as there are here, the highest scores first."""
    both = jax.tree.map(lambda *each: jnp.concatenate(each, 1), self, other)
    return both.take(jax.lax.top_k(both.score, self.score.shape[1])[1])


@struct.dataclass
class State:
  """Between two steps. Rows of the cache: prompt by prompt, in a prompt group by group."""
  cache: object
  seen: Seen
  last_B: jax.Array  # the token that the model has not read yet
  live: list[Texts]  # of every group
  found: list[Texts]
  step: jax.Array
  done_B: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _found(config, length: int, sizes, params, tokens_BT, lengths_B, start, shared) -> Texts:
  """The finished texts of all groups."""
  (groups, beams, most), B = sizes, len(tokens_BT)
  x_BTD, real_B, cache = read(config, length, params, tokens_BT, lengths_B, start)
  row_B = jnp.repeat(jnp.arange(B), groups * beams)
  real_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
  seen = jax.tree.map(lambda x: x[row_B], Seen.of(tokens_BT, real_BT, config.vocab))
  none = Texts.none(B, beams, most)
  one = none.replace(score=none.score.at[:, 0].set(0.0))  # all beams are equal at first, so one goes on
  state = State(cache.take(row_B), seen, None, [one] * groups, [none] * groups, jnp.int32(0), jnp.zeros(B, bool))
  state = _chosen(state, scored(config, params, last(x_BTD, real_B))[row_B], shared)

  def further(state):
    logits_BTV, cache = config.model().apply({'params': params}, state.last_B[:, None], None, state.cache)
    return _chosen(state.replace(cache=cache), logits_BTV[:, 0], shared)

  found = jax.lax.while_loop(lambda state: ~state.done_B.all(), further, state).found
  return jax.tree.map(lambda *each: jnp.concatenate(each, 1), *found)


def _chosen(state: State, logits_BV, shared) -> State:
  """A further token for every beam."""
  settings, most, power, diversity = shared
  B, C = state.live[0].score.shape
  groups, V = len(state.live), logits_BV.shape[-1]
  apart = lambda x_BV: jax.nn.log_softmax(x_BV, axis=-1).reshape(B, groups, C, V)
  left, logp = apart(sampling.scores(logits_BV, state.seen, settings, state.step)), apart(logits_BV)
  penalty = lambda tokens: ((5.0 + tokens) / 6.0) ** power
  ceiling = jnp.maximum(penalty(state.step + 2), penalty(most))  # the most that a sum below 0 can be divided by
  taken_BV, out = jnp.zeros((B, V)), []
  for group in range(groups):
    lost_BV = diversity * taken_BV
    live, finished, from_BC = _of_group(state.live[group], left[:, group], logp[:, group], lost_BV, settings,
                                        state.step)
    there_BC = (live.score > -jnp.inf).astype(jnp.float32)
    taken_BV = taken_BV.at[jnp.arange(B)[:, None], live.token[:, :, state.step]].add(there_BC)
    ends = finished.replace(score=finished.score / penalty(state.step + 1))
    over = live.replace(score=jnp.where(state.step + 1 >= most, live.score / penalty(state.step + 1), -jnp.inf))
    found = state.found[group].best(ends).best(over)
    out.append((live, found, from_BC + C * group, found.score.min(1) >= live.score.max(1) / ceiling))
  live, found, from_BC, settled_B = map(list, zip(*out))
  row_B = (jnp.concatenate(from_BC, 1) + jnp.arange(B)[:, None] * groups * C).reshape(-1)
  token_B = jnp.stack([texts.token[:, :, state.step] for texts in live], 1).reshape(-1)
  seen = jax.tree.map(lambda x: x[row_B], state.seen).plus(token_B)
  kept = lambda old, new: jax.tree.map(
      lambda a, b: jnp.where(state.done_B.reshape(-1, *[1] * (a.ndim - 1)), a, b), old, new)
  done_B = state.done_B | jnp.stack(settled_B).all(0) | (state.step + 1 >= most)
  return State(state.cache.take(row_B), seen, token_B, live, [kept(*pair) for pair in zip(state.found, found)],
               state.step + 1, done_B)


def _of_group(live: Texts, left_BCV, logp_BCV, lost_BV, settings, step):
  """(its unfinished texts with a token more, those that end now, from which beam each of the first came, BC)."""
  B, C, V = left_BCV.shape
  sums_BCV = live.score[:, :, None] + left_BCV
  ranked = (sums_BCV - lost_BV[:, None]).reshape(B, C * V)
  best = jax.lax.top_k(ranked, min(2 * C, C * V))[1]  # a beam ends in one way only: C others are among them
  of_best = lambda x_BCV: jnp.take_along_axis(x_BCV.reshape(B, C * V), best, 1)
  texts, token, sums = live.take(best // V), best % V, of_best(sums_BCV)
  put = lambda x_BCT, new_BC: x_BCT.at[:, :, step].set(new_BC)
  texts = texts.replace(tokens=texts.tokens + 1, token=put(texts.token, token),
                        logp=put(texts.logp, of_best(logp_BCV)), left_logp=put(texts.left_logp, of_best(left_BCV)))
  ends = token == settings.eos
  finished = texts.replace(score=jnp.where(ends, sums, -jnp.inf), ended=ends)
  order_BC = jnp.argsort(ends, axis=1, stable=True)[:, :C]
  unfinished = texts.replace(score=jnp.where(ends, -jnp.inf, sums))
  return unfinished.take(order_BC), finished, jnp.take_along_axis(best // V, order_BC, 1)
