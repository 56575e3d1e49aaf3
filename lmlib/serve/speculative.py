"""Speculative decoding (Leviathan et al. 2023; Chen et al. 2023): several drafted tokens are verified by one run.

The model reads the last token and the drafts after it together, which takes hardly longer than the last one alone
where reading the weights takes the time. Then the sampler draws place after place, as it would without a draft and
with the same key, for as long as it draws what was drafted. The papers accept a draft by a random number and draw
again from what is left of the distribution. Here draft and model share the noise of the draw (Daliri et al. 2025),
which accepts a certain guess as often as theirs, an uncertain one somewhat less often, and writes the same text with
every draft and with none: the seed alone decides.
"""
import functools
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lmlib.models import protocol
from lmlib.nn.cache import Cache
from lmlib.serve import drafts
from lmlib.serve.drafts import Text
from lmlib.serve.prompts import last, scored
from lmlib.serve.sampling import Seen, choose


class Drafted(NamedTuple):
  """How drafting went for one text, or for several together."""
  steps: int = 0  # runs of the model after the one that read the prompt
  drafted: int = 0  # tokens
  accepted: int = 0  # of them
  written: int = 0  # tokens in these steps, the one that no draft gives included

  @property
  def acceptance(self) -> float:
    """Share of drafted tokens that were written; 0 if none was drafted."""
    return self.accepted / max(self.drafted, 1)

  @property
  def tokens_a_step(self) -> float:
    """1 without a draft."""
    return self.written / max(self.steps, 1)

  def plus(self, other: 'Drafted') -> 'Drafted':
    return Drafted(*(a + b for a, b in zip(self, other)))


@struct.dataclass
class State:
  """Between two steps. The cache holds all of a row's text but its last token."""
  cache: Cache
  own: object  # of the draft
  last_B: jax.Array
  seen: Seen
  step_B: jax.Array  # tokens written
  done_B: jax.Array
  counts_B: Drafted


def begun(config: protocol.Config, draft, length: int, params, tokens_BT, lengths_B, shared):
  """A state and what is written, as generate.followed() takes them. ValueError for a draft that does not fit."""
  *shared, guidance = shared
  if guidance is not None:
    raise ValueError('a draft guesses what follows one prompt, and guidance goes by two: leave out one of them')
  if not isinstance(draft, drafts.KINDS):
    raise ValueError(f'draft={draft!r} is none of {", ".join(kind.__name__ for kind in drafts.KINDS)}')
  drafts.can_go_back(config)
  draft.check(config, length)
  return _in_order(*begin(config, draft, length, params, tokens_BT, lengths_B, shared))


def followed(config: protocol.Config, draft, steps: int, params, state: State, shared):
  """The same after up to `steps` further runs of the model."""
  return _in_order(*more(config, draft, steps, params, state, shared[:-1]))


def _in_order(state: State, out):
  """The arrays on the host, with the tokens of a row next to each other, and how drafting went as a further one."""
  out, counts_B = jax.device_get((out, state.counts_B))
  order_BN = np.argsort(out[0] < 0, axis=1, kind='stable')
  return state, (*(np.take_along_axis(x_BN, order_BN, axis=1) for x_BN in out), np.stack(counts_B, axis=1))


@functools.partial(jax.jit, static_argnums=(0, 2))
def begin(config, draft, length: int, params, tokens_BT, lengths_B, shared):
  """(state, (tokens_BN, logp_BN, truncated_logp_BN)) after the prompts were read and one token of each chosen."""
  B, T = tokens_BT.shape
  real_BT = (jnp.arange(T)[None] < lengths_B[:, None]).astype(jnp.int32)
  cache = config.cache(B, length).spared(draft.width + 1)
  x_BTD, cache, _ = config.model().apply({'params': params}, tokens_BT, real_BT, cache, method='hidden')
  zero_B, no_B = jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
  state = State(cache, draft.begin(config, length, x_BTD, tokens_BT, real_BT), zero_B,
                Seen.of(tokens_BT, real_BT, config.vocab), zero_B, no_B, Drafted(zero_B, zero_B, zero_B, zero_B))
  state, _, *out = _chosen(state, scored(config, params, last(x_BTD, lengths_B)), ~no_B, shared)
  return state, jax.tree.map(lambda x_B: x_B[:, None], tuple(out))


@functools.partial(jax.jit, static_argnums=(0, 2), donate_argnums=4)
def more(config, draft, steps: int, params, state: State, shared):
  """(state, (tokens_BN, logp_BN, truncated_logp_BN)) of up to `steps` runs; a token is -1 where none is."""
  B, T = len(state.last_B), draft.width + 1
  out = (jnp.full((B, steps, T), -1, jnp.int32), jnp.zeros((B, steps, T)), jnp.zeros((B, steps, T)))

  def one(carry):
    i, state, out = carry
    state, found = verified(config, draft, params, state, shared)
    return i + 1, state, jax.tree.map(lambda x_BNT, x_BT: x_BNT.at[:, i].set(x_BT), out, found)

  go_on = lambda carry: (carry[0] < steps) & ~carry[1].done_B.all()
  _, state, out = jax.lax.while_loop(go_on, one, (0, state, out))
  return state, jax.tree.map(lambda x_BNT: x_BNT.reshape(B, -1), out)


def verified(config, draft, params, state: State, shared):
  """(state, (tokens_BT, logp_BT, truncated_logp_BT)) of one run: T is one more than the draft's width."""
  going_B, before_B, T = ~state.done_B, state.cache.used_B, draft.width + 1
  room_B = jnp.where(going_B, shared[2] - state.step_B - 1, 0)
  text = Text(state.cache, state.last_B, state.seen, state.step_B, room_B)
  tokens_BJ, count_B, own = draft.tokens(config, params, state.own, text, shared[:2])
  read_BT = jnp.concatenate([state.last_B[:, None], tokens_BJ], axis=1)
  real_BT = going_B[:, None] & (jnp.arange(T)[None] <= count_B[:, None])
  x_BTD, cache, _ = config.model().apply({'params': params}, read_BT, real_BT, state.cache, method='hidden')
  logits_BTV = scored(config, params, x_BTD)
  out = (jnp.full(read_BT.shape, -1, jnp.int32), jnp.zeros(read_BT.shape), jnp.zeros(read_BT.shape))

  def one(carry):
    t, on_B, state, kept_B, accepted_B, out = carry
    state, token_B, *found = _chosen(state, logits_BTV[:, t], on_B, shared)
    out = jax.tree.map(lambda x_BT, x_B: x_BT.at[:, t].set(x_B), out, tuple(found))
    right_B = on_B & (t < count_B) & (token_B == tokens_BJ[:, jnp.minimum(t, T - 2)])
    return t + 1, right_B & ~state.done_B, state, kept_B + on_B, accepted_B + right_B, out

  zero_B = jnp.zeros_like(before_B)
  start = (0, going_B, state.replace(own=(), cache=()), zero_B, zero_B, out)
  *_, state, kept_B, accepted_B, out = jax.lax.while_loop(lambda carry: carry[1].any(), one, start)
  counts_B = state.counts_B.plus(Drafted(going_B.astype(jnp.int32), count_B, accepted_B, kept_B))
  used_B = before_B + kept_B  # the last of what was written has not been read: the last token before was
  return state.replace(cache=cache.back(used_B), own=draft.after(own, x_BTD, kept_B, used_B), counts_B=counts_B), out


def _chosen(state: State, logits_BV, on_B, shared):
  """(state after a further token of the rows that are on, the token, and -1 where none is, both log-probabilities)."""
  settings, keys_B, most_B = shared
  keys_B = jax.vmap(jax.random.fold_in)(keys_B, state.step_B)
  token_B, logp_B, truncated_logp_B = choose(logits_BV, state.seen, settings, keys_B, state.step_B)
  written_BV = state.seen.written_BV.at[jnp.arange(len(token_B)), token_B].add(on_B.astype(jnp.int32))
  ends_B = (token_B == settings.eos) | (state.step_B + 1 >= most_B)
  state = state.replace(last_B=jnp.where(on_B, token_B, state.last_B),
                        seen=state.seen.replace(written_BV=written_BV), step_B=state.step_B + on_B,
                        done_B=state.done_B | (on_B & ends_B))
  return state, token_B, jnp.where(on_B, token_B, -1), logp_B, truncated_logp_B
