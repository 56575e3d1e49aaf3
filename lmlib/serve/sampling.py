"""Choosing the next token of every row, each by settings of its own; settings are arrays, so that none compiles anew.

In this order:

  penalties    repetition (Keskar et al. 2019), presence and frequency (as OpenAI defines them)
  bias         added to logits; banned tokens and, of a text that is too short, its end cannot come; forced ones must
  temperature  divides; 0 takes the highest
  truncation   top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024), typical (Meister et al. 2023)
  a draw       from what is left, by the row's own key

A token as likely as the last one that is kept is kept too.
"""
import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

FORCED = 16  # forced tokens are padded to a multiple of this, so that few numbers of them compile


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one text is continued; every default leaves the model's distribution as it is."""
  temperature: float = 1.0  # 0: greedy
  top_k: int | None = None  # only the k most likely tokens
  top_p: float = 1.0  # only the most likely tokens that reach this share together
  min_p: float = 0.0  # only tokens at least this share as likely as the most likely one
  typical: float = 1.0  # only the tokens of most usual surprise that reach this share together
  repetition: float = 1.0  # logits of tokens that are there, prompt included, over this if positive, else times
  presence: float = 0.0  # taken from the logits of tokens that were written
  frequency: float = 0.0  # and that as often as they were
  bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit); -inf bans it
  forced: tuple[int, ...] = ()  # the first tokens, which are taken whatever the model says
  least: int = 0  # tokens before the end of the text may come
  most: int = 128  # tokens
  stop: tuple[str, ...] = ()  # the text ends before any of these, also where tokens do not
  seed: int = 0  # the same seed draws the same, whatever else is in the batch

  def __post_init__(self):
    real = lambda value: isinstance(value, (int, float)) and np.isfinite(value)
    for name in ('temperature', 'presence', 'frequency', 'repetition'):
      if not real(getattr(self, name)):
        raise ValueError(f'Sampling.{name}={getattr(self, name)!r} must be a finite number')
    if self.temperature < 0:
      raise ValueError(f'Sampling.temperature={self.temperature} must be at least 0, which is greedy')
    if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
      raise ValueError(f'Sampling.top_k={self.top_k!r} must be at least 1; None: all')
    for name in ('top_p', 'typical'):
      if not (real(getattr(self, name)) and 0 < getattr(self, name) <= 1):
        raise ValueError(f'Sampling.{name}={getattr(self, name)!r} must lie above 0 and at most at 1, which is all')
    if not (real(self.min_p) and 0 <= self.min_p <= 1):
      raise ValueError(f'Sampling.min_p={self.min_p!r} must lie between 0, which is all, and 1')
    if self.repetition <= 0:
      raise ValueError(f'Sampling.repetition={self.repetition} must be above 0; 1 changes nothing')
    if self.most < 1 or not 0 <= self.least <= self.most:
      raise ValueError(f'Sampling.least={self.least} and most={self.most}: 0 <= least <= most, and most at least 1')
    if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
      raise ValueError(f'Sampling.stop={self.stop!r} must be a tuple of texts that are not empty')


def undrawn(how: Sampling, search: str, *more: str):
  """ValueError if something of `how` is set that only drawing heeds, or one of the fields that `search` names."""
  if how.temperature != 0:
    raise ValueError(f'Sampling.temperature={how.temperature} must be 0: {search} draws nothing')
  plain = Sampling()
  for name in ('top_k', 'top_p', 'min_p', 'typical', 'seed', *more):
    if getattr(how, name) != getattr(plain, name):
      raise ValueError(f'Sampling.{name}={getattr(how, name)!r} has no effect on {search}: leave it out')


@struct.dataclass
class Settings:
  """What Sampling says of each row, as arrays."""
  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  min_p_B: jax.Array
  typical_B: jax.Array
  repetition_B: jax.Array
  presence_B: jax.Array
  frequency_B: jax.Array
  bias_BV: jax.Array
  forced_BN: jax.Array  # -1 where none is
  least_B: jax.Array
  eos: jax.Array  # the token that ends a text, -1 for none


def settings(rows: list[Sampling], vocab: int, eos: int | None) -> Settings:
  """The settings of some rows. ValueError for a token outside the vocabulary."""
  bias_BV = np.zeros((len(rows), vocab), np.float32)
  longest = max(len(row.forced) for row in rows)
  forced_BN = np.full((len(rows), max(-(-longest // FORCED), 1) * FORCED), -1, np.int32)
  for i, row in enumerate(rows):
    if outside := [token for token in (*row.forced, *(token for token, _ in row.bias)) if not 0 <= token < vocab]:
      raise ValueError(f'Sampling.bias and forced name the tokens {outside[:5]}, outside of vocab={vocab}')
    for token, added in row.bias:
      bias_BV[i, token] += added
    left_V = bias_BV[i] > -np.inf
    if row.least and eos is not None:
      left_V[eos] = False
    if not left_V.any() or np.isnan(bias_BV[i]).any():
      raise ValueError('Sampling.bias bans every token, or is not a number')
    forced_BN[i, :len(row.forced)] = row.forced
  column = lambda name, dtype: jnp.asarray([getattr(row, name) for row in rows], dtype)
  return Settings(
      *(column(name, jnp.float32) for name in ('temperature',)), jnp.asarray([row.top_k or vocab for row in rows]),
      *(column(name, jnp.float32) for name in ('top_p', 'min_p', 'typical', 'repetition', 'presence', 'frequency')),
      jnp.asarray(bias_BV), jnp.asarray(forced_BN), column('least', jnp.int32), jnp.int32(-1 if eos is None else eos))


@struct.dataclass
class Seen:
  """Which tokens the prompt of each row holds, and how often each was written since."""
  prompt_BV: jax.Array
  written_BV: jax.Array

  @classmethod
  def of(cls, tokens_BT, real_BT, vocab: int) -> 'Seen':
    row_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    prompt_BV = jnp.zeros((tokens_BT.shape[0], vocab), bool).at[row_B1, tokens_BT].max(real_BT > 0)
    return cls(prompt_BV, jnp.zeros(prompt_BV.shape, jnp.int32))

  def plus(self, token_B) -> 'Seen':
    return self.replace(written_BV=self.written_BV.at[jnp.arange(len(token_B)), token_B].add(1))


def scores(logits_BV, seen: Seen, settings: Settings, step):
  """Logits, BV in float32, after penalties, bias and what must or must not come at this step (from 0 on; one, or B)."""
  logits_BV, column = logits_BV.astype(jnp.float32), lambda x_B: x_B[:, None]
  there_BV, repetition_B1 = seen.prompt_BV | (seen.written_BV > 0), column(settings.repetition_B)
  repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
  logits_BV = jnp.where(there_BV, repeated_BV, logits_BV)
  logits_BV -= column(settings.presence_B) * (seen.written_BV > 0) + column(settings.frequency_B) * seen.written_BV
  logits_BV += settings.bias_BV
  token_1V = jnp.arange(logits_BV.shape[-1])[None]
  logits_BV = jnp.where((token_1V == settings.eos) & column(step < settings.least_B), -jnp.inf, logits_BV)
  N = settings.forced_BN.shape[1]
  step_B1 = column(jnp.broadcast_to(step, settings.least_B.shape))
  forced_B1 = jnp.where(step_B1 < N, jnp.take_along_axis(settings.forced_BN, jnp.minimum(step_B1, N - 1), 1), -1)
  return jnp.where(forced_B1 < 0, logits_BV, jnp.where(token_1V == forced_B1, 0.0, -jnp.inf))


def truncated(scores_BV, settings: Settings):
  """scores / temperature where a token may be drawn, else -inf; of a greedy row only the highest is left."""
  draws_B1 = (settings.temperature_B > 0)[:, None]
  scaled_BV = scores_BV / jnp.where(draws_B1, settings.temperature_B[:, None], 1.0)
  V = scores_BV.shape[-1]
  ranks = (settings.top_k_B < V) | (settings.top_p_B < 1) | (settings.typical_B < 1)
  left_BV = jax.lax.cond((ranks & draws_B1[:, 0]).any(), _ranked, lambda scaled_BV, _: scaled_BV, scaled_BV, settings)
  least_B1 = left_BV.max(-1, keepdims=True) + jnp.log(settings.min_p_B)[:, None]
  left_BV = jnp.where(left_BV >= least_B1, left_BV, -jnp.inf)
  highest_B1 = scores_BV.argmax(-1)[:, None]
  return jnp.where(draws_B1, left_BV, jnp.where(jnp.arange(V)[None] == highest_B1, 0.0, -jnp.inf))


def _ranked(scaled_BV, settings: Settings):
  """What top-k, top-p and typical sampling leave."""
  V, left_BV = scaled_BV.shape[-1], scaled_BV
  least_B1 = _least(left_BV, jnp.ones_like(left_BV), settings.top_k_B, settings.top_k_B < V)
  left_BV = jnp.where(left_BV >= least_B1, left_BV, -jnp.inf)
  least_B1 = _least(left_BV, jax.nn.softmax(left_BV, axis=-1), settings.top_p_B, settings.top_p_B < 1)
  left_BV = jnp.where(left_BV >= least_B1, left_BV, -jnp.inf)
  # Typical: by the distance of a token's surprise from the expected one.
  logp_BV = jax.nn.log_softmax(left_BV, axis=-1)
  p_BV = jnp.exp(logp_BV)
  expected_B1 = -jnp.where(p_BV > 0, p_BV * logp_BV, 0).sum(-1, keepdims=True)
  near_BV = jnp.where(p_BV > 0, -jnp.abs(-logp_BV - expected_B1), -jnp.inf)
  return jnp.where(near_BV >= _least(near_BV, p_BV, settings.typical_B, settings.typical_B < 1), left_BV, -jnp.inf)


def _least(x_BV, weight_BV, enough_B, asked_B):
  """B1: the highest of a row's x such that those from it upwards weigh enough; -inf where it is not asked for.

  Found by halving what lies between the lowest and the highest, which are as many steps as a float has bits: sorting
  takes longer than a small model does.
  """
  B, V = x_BV.shape
  turned = lambda bits: jnp.where(bits < 0, bits ^ jnp.int32(0x7fffffff), bits)  # integers in the order of floats
  number = lambda x: turned(jax.lax.bitcast_convert_type(x, jnp.int32))
  float_of = lambda number: jax.lax.bitcast_convert_type(turned(number), jnp.float32)
  blocks = lambda x_BV, fill: jnp.pad(x_BV, [(0, 0), (0, -V % 128)], constant_values=fill).reshape(B, -1, 128)

  def found():
    x_BMC, weight_BMC = blocks(x_BV, -jnp.inf), blocks(weight_BV, 0)

    def halved(_, between):
      low_B, high_B = between
      middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
      above_BMC = jnp.where(x_BMC >= float_of(middle_B)[:, None, None], weight_BMC, 0)
      reached_B = above_BMC.sum(1).sum(-1) >= enough_B  # in two steps, of which XLA makes vector instructions
      return jnp.where(reached_B, middle_B, low_B), jnp.where(reached_B, high_B, middle_B)

    between = number(x_BV.min(-1)), number(x_BV.max(-1)) + 1
    return jnp.where(asked_B, float_of(jax.lax.fori_loop(0, 32, halved, between)[0]), -jnp.inf)[:, None]

  return jax.lax.cond(asked_B.any(), found, lambda: jnp.full((B, 1), -jnp.inf))


def choose(logits_BV, seen: Seen, settings: Settings, keys_B, step):
  """(token, its log-probability to the model, its log-probability among what could be drawn), each B.

  keys_B: a random key a row. step: how many tokens were written before.
  """
  left_BV = truncated(scores(logits_BV, seen, settings, step), settings)
  drawn = lambda: jax.vmap(jax.random.categorical)(keys_B, left_BV).astype(jnp.int32)
  token_B = jax.lax.cond((settings.temperature_B > 0).any(), drawn, lambda: left_BV.argmax(-1).astype(jnp.int32))
  logp_BV = lambda x_BV: jax.nn.log_softmax(x_BV.astype(jnp.float32), axis=-1)
  of = lambda x_BV: jnp.take_along_axis(logp_BV(x_BV), token_B[:, None], 1)[:, 0]
  return token_B, of(logits_BV), of(left_BV)
