"""Prompts of different lengths side by side, and a model that has read them.

An encoder-decoder reads them with its encoder; its decoder has then read the token that it begins with.
"""
import jax
import jax.numpy as jnp
import numpy as np

from lmlib.models import protocol
from lmlib.nn.prompts import room

ROUND = 64  # prompts and caches are padded to a multiple of this at least, so that few lengths compile


def check(config: protocol.Config, params, prompts, most: int, start: int | None):
  """ValueError for prompts that a model cannot read, or behind which `most` tokens have no room."""
  if not protocol.decodes(config):
    raise ValueError(f'{type(config).__module__} is an encoder: it scores hidden tokens and generates none')
  if (start is None) == (answers := protocol.encodes(config)):
    raise ValueError(f'start={start}: the decoder of an encoder-decoder begins with a token, say which' if answers else
                     f'start={start} is of encoder-decoders; {type(config).__module__} goes on from its prompts')
  if answers and not 0 <= start < config.vocab:
    raise ValueError(f'start={start} lies outside of vocab={config.vocab}')
  lengths = [len(prompt) for prompt in prompts]
  if not lengths or not min(lengths):
    raise ValueError('a prompt is empty: give at least the token that begins a document')
  low, high = min(map(min, prompts)), max(map(max, prompts))
  if low < 0 or high >= config.vocab:
    raise ValueError(f'prompts hold tokens from {low} to {high}, outside of vocab={config.vocab}')
  length = room(config, params)
  if (max(lengths) + most > length if not answers else max(*lengths, 1 + most) > length):
    virtual = f', of which {config.length - length} are for virtual tokens' if length < config.length else ''
    raise ValueError(f'a prompt of {max(lengths)} tokens and new={most} exceed the '
                     f"model's length={config.length}{virtual}")


def padded(config: protocol.Config, params, prompts, most: int) -> tuple[int, jax.Array, jax.Array]:
  """(places that a cache needs for prompts and `most` tokens, tokens_BT with zeros behind, lengths_B)."""
  lengths, length = [len(prompt) for prompt in prompts], room(config, params)
  tokens_BT = np.zeros((len(prompts), min(rounded(max(lengths)), length)), np.int32)
  for row_T, prompt in zip(tokens_BT, prompts):
    row_T[:len(prompt)] = prompt
  places = (1 if protocol.encodes(config) else max(lengths)) + most
  return min(rounded(places), length), jnp.asarray(tokens_BT), jnp.asarray(lengths, jnp.int32)


def rounded(length: int) -> int:
  """The next multiple of ROUND, or of a quarter of the next power of two where that is more."""
  step = max(ROUND, 1 << max((length - 1).bit_length() - 2, 0))
  return -(-length // step) * step


def read(config: protocol.Config, length: int, params, tokens_BT, lengths_B, start: int | None):
  """(x_BTD of what the decoder has read, how many of its places are no padding, B, and a cache of `length` places)."""
  model, (B, T) = config.model(), tokens_BT.shape
  real_BT = (jnp.arange(T)[None] < lengths_B[:, None]).astype(jnp.int32)
  given = (tokens_BT, real_BT, config.cache(B, length))
  if start is not None:
    given = (jnp.full((B, 1), start), None, config.cache(B, length), None, tokens_BT, real_BT)
  x_BTD, cache, _ = model.apply({'params': params}, *given, method='hidden')
  return x_BTD, lengths_B if start is None else jnp.ones_like(lengths_B), cache


def last(x_BTD, lengths_B):
  """The state of each row's last place, BD."""
  return jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]


def scored(config: protocol.Config, params, x_BD):
  """The logits of states that the model's `hidden` gave, BV in float32."""
  output_DV = config.model().apply({'params': params}, method='unembed')
  logits_BV = (x_BD @ output_DV.astype(x_BD.dtype)).astype(jnp.float32)
  return logits_BV if config.softcap is None else config.softcap * jnp.tanh(logits_BV / config.softcap)
