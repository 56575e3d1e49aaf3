"""Contrastive search (Su et al. 2022): a likely token whose hidden state is unlike all that came before.

  of the tokens v with the highest p(v):   (1 - penalty) p(v) - penalty max_s cos(h_v, h_s)

h_v is the state that the model has once it has read v; s runs over prompt and continuation, for an encoder-decoder over
what its decoder has read. States are those after the last norm. Penalty 0 is greedy.
"""
from collections.abc import Iterator
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp

from lmlib.models import protocol
from lmlib.serve import sampling
from lmlib.serve.generate import CHUNK, Continuation, followed
from lmlib.serve.prompts import check, last, padded, read, scored
from lmlib.serve.sampling import Sampling, Seen, undrawn


@dataclasses.dataclass(frozen=True)
class Contrastive:
  """Another number of candidates compiles anew."""
  candidates: int = 4  # tokens that the model reads before it takes one of them
  penalty: float = 0.6  # of being like what was there

  def __post_init__(self):
    if not isinstance(self.candidates, int) or self.candidates < 2:
      raise ValueError(f'Contrastive.candidates={self.candidates!r} must be at least 2: one alone is greedy')
    if not isinstance(self.penalty, (int, float)) or not 0 <= self.penalty <= 1:
      raise ValueError(f'Contrastive.penalty={self.penalty!r} must lie between 0 and 1')

  def best(self, config, params, prompts, how: Sampling, **settings) -> list[Continuation]:
    """A continuation of each prompt; arguments are those of stream()."""
    *_, found = stream(config, params, prompts, self, how, **settings)
    return found


def stream(config: protocol.Config, params, prompts, contrastive: Contrastive, how: Sampling, *,
           eos: int | None = None, start: int | None = None, tokenizer=None,
           chunk: int = CHUNK) -> Iterator[list[Continuation]]:
  """Yields all continuations so far, every `chunk` tokens and at the end.

  how: penalties, bias, forced tokens, lengths and stops of all rows. eos, start, tokenizer and what is refused: as of
  generate.stream(); ValueError too where `how` draws, or for more candidates than tokens.
  """
  undrawn(how, 'contrastive search')
  check(config, params, prompts, how.most, start)
  if contrastive.candidates > config.vocab:
    raise ValueError(f'Contrastive.candidates={contrastive.candidates} are more than vocab={config.vocab}')
  if how.stop and tokenizer is None:
    raise ValueError('Sampling.stop is looked for in text: give the tokenizer')
  length, tokens_BT, lengths_B = padded(config, params, prompts, how.most)
  rows, N = [how] * len(prompts), contrastive.candidates
  shared = sampling.settings(rows, config.vocab, eos), jnp.int32(how.most), jnp.float32(contrastive.penalty)
  begun = _begin(config, length, N, params, tokens_BT, lengths_B, start, shared)
  yield from followed(begun, lambda state: _more(config, chunk, N, params, state, shared), rows, eos, tokenizer)


@struct.dataclass
class State:
  """Between two steps; all that was written has been read."""
  cache: object
  logits_BV: jax.Array  # of the next token
  h_BSD: jax.Array  # states of what was read, of length 1; what lies at later places counts for nothing
  seen: Seen
  step: jax.Array
  done_B: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(config, length: int, candidates: int, params, tokens_BT, lengths_B, start, shared):
  """Reads the prompts, and chooses a first token."""
  x_BTD, real_B, cache = read(config, length, params, tokens_BT, lengths_B, start)
  B, T, D = x_BTD.shape
  h_BSD = jnp.zeros((B, max(T, length), D)).at[:, :T].set(unit(x_BTD))
  there_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
  state = State(cache, scored(config, params, last(x_BTD, real_B)), h_BSD, Seen.of(tokens_BT, there_BT, config.vocab),
                jnp.int32(0), jnp.zeros(B, bool))
  state, *found = _chosen(config, candidates, params, state, shared)
  return state, jax.tree.map(lambda x_B: x_B[:, None], tuple(found))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _more(config, chunk: int, candidates: int, params, state: State, shared):
  """As generate's: up to `chunk` further tokens a row."""
  B = len(state.done_B)
  out = (jnp.full((B, chunk), -1, jnp.int32), jnp.zeros((B, chunk)), jnp.zeros((B, chunk)))

  def one(carry):
    i, state, out = carry
    state, *found = _chosen(config, candidates, params, state, shared)
    return i + 1, state, jax.tree.map(lambda x_BT, x_B: x_BT.at[:, i].set(x_B), out, tuple(found))

  go_on = lambda carry: (carry[0] < chunk) & ~carry[1].done_B.all()
  return jax.lax.while_loop(go_on, one, (0, state, out))[1:]


def _chosen(config, candidates: int, params, state: State, shared):
  """(state after a further token, the token or -1, its log-probability to the model, and 0: it could be no other)."""
  (settings, most, penalty), B = shared, len(state.done_B)
  p_BV = jax.nn.softmax(sampling.scores(state.logits_BV, state.seen, settings, state.step), axis=-1)
  p_BC, token_BC = jax.lax.top_k(p_BV, candidates)
  copies = state.cache.take(jnp.repeat(jnp.arange(B), candidates))
  x_BTD, copies, _ = config.model().apply({'params': params}, token_BC.reshape(-1, 1), None, copies, method='hidden')
  h_BCD = unit(x_BTD).reshape(B, candidates, -1)
  alike_BCS = jnp.einsum('BCD,BSD->BCS', h_BCD, state.h_BSD)
  read_BS = jnp.arange(alike_BCS.shape[-1])[None] < state.cache.used_B[:, None]
  alike_BC = jnp.where(read_BS[:, None], alike_BCS, -1).max(-1)
  value_BC = jnp.where(p_BC > 0, (1 - penalty) * p_BC - penalty * alike_BC, -jnp.inf)
  choice_B = value_BC.argmax(-1)
  of_choice = lambda x_BC: jnp.take_along_axis(x_BC, choice_B[:, None], 1)[:, 0]
  token_B, row_B = of_choice(token_BC), jnp.arange(B) * candidates + choice_B
  logp_B = jnp.take_along_axis(jax.nn.log_softmax(state.logits_BV, axis=-1), token_B[:, None], 1)[:, 0]
  h_BSD = state.h_BSD.at[jnp.arange(B), state.cache.used_B].set(unit(x_BTD)[row_B, 0])
  done_B = state.done_B | (token_B == settings.eos) | (state.step + 1 >= most)
  after = State(copies.take(row_B), scored(config, params, x_BTD[row_B, 0]), h_BSD, state.seen.plus(token_B),
                state.step + 1, done_B)
  return after, jnp.where(state.done_B, -1, token_B), logp_B, jnp.zeros(B)


def unit(x_D):
  """Vectors of length 1 in these directions, in float32."""
  x_D = x_D.astype(jnp.float32)
  return x_D / jnp.maximum(jnp.linalg.norm(x_D, axis=-1, keepdims=True), 1e-12)
