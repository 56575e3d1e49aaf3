"""Continuing prompts of different lengths together: one prefill, then one token a row and step.

An encoder-decoder reads the prompts and answers them: its decoder begins with a token of its own.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmlib.models import protocol
from lmlib.serve.sampling import sample

ROUND = 64  # prompts are padded to a multiple of this, so that few lengths compile


def generate(config: protocol.Config, params, prompts, *, new: int, eos: int | None = None,
             temperature: float = 1.0, top_k: int | None = None, seed: int = 0,
             start: int | None = None) -> list[list[int]]:
  """Up to `new` tokens after each prompt (lists of token ids), without the prompt; ends before `eos`.

  start: what the decoder of an encoder-decoder begins with (bos, in training on objectives; T5: 0); None for others.
  Row i draws from fold_in(key(seed), i) whatever else is in the batch. temperature 0 is greedy.
  Raises ValueError for an empty prompt, for a token outside the vocabulary, where prompt and continuation exceed
  config.length (an encoder-decoder's each by itself), and for an encoder, which writes nothing.
  """
  if not protocol.decodes(config):
    raise ValueError(f'{type(config).__module__} is an encoder: it scores hidden tokens and generates none')
  if (start is None) == (answers := protocol.encodes(config)):
    raise ValueError(f'start={start}: the decoder of an encoder-decoder begins with a token, say which' if answers else
                     f'start={start} is of encoder-decoders; {type(config).__module__} goes on from its prompts')
  lengths = [len(prompt) for prompt in prompts]
  if not lengths or not min(lengths):
    raise ValueError('a prompt is empty: give at least the token that begins a document')
  low, high = min(map(min, prompts)), max(map(max, prompts))
  if low < 0 or high >= config.vocab:
    raise ValueError(f'prompts hold tokens from {low} to {high}, outside of vocab={config.vocab}')
  if new < 1:
    raise ValueError(f'new={new} must be at least 1 token')
  if (max(lengths) + new > config.length if not answers else max(*lengths, 1 + new) > config.length):
    raise ValueError(f"a prompt of {max(lengths)} tokens and new={new} exceed the model's "
                     f'length={config.length}')
  if temperature < 0 or (top_k is not None and top_k < 1):
    raise ValueError(f'temperature={temperature} must be at least 0 and top_k={top_k} at least 1 (None: all)')
  padded = min(-(-max(lengths) // ROUND) * ROUND, config.length - (0 if answers else new))
  tokens_BT = np.zeros((len(prompts), padded), np.int32)
  for row_T, prompt in zip(tokens_BT, prompts):
    row_T[:len(prompt)] = prompt
  B = len(prompts)
  settings = (jnp.full(B, temperature, jnp.float32), jnp.full(B, top_k or config.vocab, jnp.int32))
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(B))
  out_BT = _continue(config, new, params, jnp.asarray(tokens_BT), jnp.asarray(lengths, jnp.int32), keys_B,
                     settings, (jnp.int32(-1 if eos is None else eos), start))
  out = np.asarray(out_BT).tolist()
  return [row[:row.index(eos)] if eos in row else row for row in out]


def _scores(config, w_DV, x_BD):
  """Logits, BV in float32, of hidden states."""
  logits_BV = (x_BD @ w_DV.astype(x_BD.dtype)).astype(jnp.float32)
  return logits_BV if config.softcap is None else config.softcap * jnp.tanh(logits_BV / config.softcap)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(config, new: int, params, tokens_BT, lengths_B, keys_B, settings, marks):
  model, (B, T), (eos, start) = config.model(), tokens_BT.shape, marks
  apply = lambda tokens_BT, cache, real_BT=None, *inputs: model.apply(
      {'params': params}, tokens_BT, real_BT, cache, *inputs)
  real_BT = (jnp.arange(T)[None] < lengths_B[:, None]).astype(jnp.int32)
  if start is None:
    x_BTD, cache, _ = model.apply({'params': params}, tokens_BT, real_BT, config.cache(B, T + new), method='hidden')
    x_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
    logits_BV = _scores(config, model.apply({'params': params}, method='unembed'), x_B1D[:, 0])
  else:
    logits_BTV, cache = apply(jnp.full((B, 1), start), config.cache(B, 1 + new), None, None, tokens_BT, real_BT)
    logits_BV = logits_BTV[:, 0]
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
