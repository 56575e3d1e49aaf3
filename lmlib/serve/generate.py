"""Continuing prompts of different lengths together: one prefill, then one token a row and step."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmlib.models import protocol
from lmlib.serve.sampling import sample

ROUND = 64  # prompts are padded to a multiple of this, so that few lengths compile


def generate(config: protocol.Config, params, prompts, *, new: int, eos: int | None = None,
             temperature: float = 1.0, top_k: int | None = None, seed: int = 0) -> list[list[int]]:
  """Up to `new` tokens after each prompt (lists of token ids), without the prompt; ends before `eos`.

  Row i draws from fold_in(key(seed), i) whatever else is in the batch. temperature 0 is greedy.
  Raises ValueError for an empty prompt, for a token outside the vocabulary and where prompt and
  continuation exceed config.length.
  """
  lengths = [len(prompt) for prompt in prompts]
  if not lengths or not min(lengths):
    raise ValueError('a prompt is empty: give at least the token that begins a document')
  low, high = min(map(min, prompts)), max(map(max, prompts))
  if low < 0 or high >= config.vocab:
    raise ValueError(f'prompts hold tokens from {low} to {high}, outside of vocab={config.vocab}')
  if new < 1:
    raise ValueError(f'new={new} must be at least 1 token')
  if max(lengths) + new > config.length:
    raise ValueError(f"a prompt of {max(lengths)} tokens and new={new} exceed the model's "
                     f'length={config.length}')
  if temperature < 0 or (top_k is not None and top_k < 1):
    raise ValueError(f'temperature={temperature} must be at least 0 and top_k={top_k} at least 1 (None: all)')
  padded = min(-(-max(lengths) // ROUND) * ROUND, config.length - new)
  tokens_BT = np.zeros((len(prompts), padded), np.int32)
  for row_T, prompt in zip(tokens_BT, prompts):
    row_T[:len(prompt)] = prompt
  B = len(prompts)
  settings = (jnp.full(B, temperature, jnp.float32), jnp.full(B, top_k or config.vocab, jnp.int32))
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(B))
  out_BT = _continue(config, new, params, jnp.asarray(tokens_BT), jnp.asarray(lengths, jnp.int32), keys_B,
                     settings, jnp.int32(-1 if eos is None else eos))
  out = np.asarray(out_BT).tolist()
  return [row[:row.index(eos)] if eos in row else row for row in out]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(config, new: int, params, tokens_BT, lengths_B, keys_B, settings, eos):
  model, (B, T) = config.model(), tokens_BT.shape
  apply = lambda tokens, cache: model.apply({'params': params}, tokens, None, cache)
  logits_BTV, cache = apply(tokens_BT, config.cache(B, T + new))
  logits_BV = jnp.take_along_axis(logits_BTV, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
  cache = cache.replace(used_B=lengths_B)  # what padding wrote is overwritten before it is seen
  fold_in = jax.vmap(jax.random.fold_in, (0, None))
  choose = lambda logits_BV, i: sample(logits_BV, fold_in(keys_B, i), *settings)

  def more(carry):
    i, _, out_BT, _ = carry
    return (i < new) & ~(out_BT == eos).any(-1).all()

  def one(carry):
    i, last_B, out_BT, cache = carry
    logits_BTV, cache = apply(last_B[:, None], cache)
    next_B = choose(logits_BTV[:, 0], i)
    return i + 1, next_B, out_BT.at[:, i].set(next_B), cache

  first_B = choose(logits_BV, 0)
  out_BT = jnp.full((B, new), -2, jnp.int32).at[:, 0].set(first_B)  # -2 is no token and not eos
  return jax.lax.while_loop(more, one, (1, first_B, out_BT, cache))[2]
