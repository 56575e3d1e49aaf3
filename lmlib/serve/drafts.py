"""Guesses of the next tokens, to be verified together by serve/speculative.py.

Whatever a draft guesses, what is written stays the same; only how often the model is run depends on it. So a draft
draws as the sampler would, with the row's own settings and key: it guesses what its own distribution would have
written in the model's place.

  Lookup       what followed when the last tokens stood there before (prompt lookup: Saxena 2023)
  Model        a smaller model of the same vocabulary (Leviathan et al. 2023; Chen et al. 2023)
  EarlyLayers  the model's own first layers, its norm and its head (Elhoushi et al. 2024)
  Heads        the modules for further tokens that a model was trained with (DeepSeek-V3, 2024)

J counts drafted tokens. A draft has a `width`, the most tokens it drafts, and is a tree of arrays, so that a jitted
function takes it as an argument. Its state between two steps is made by begin(), read by tokens(), moved by after().
"""
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from lmlib.models import protocol
from lmlib.nn.cache import Cache
from lmlib.serve.prompts import scored
from lmlib.serve.sampling import Seen, choose

static = lambda **default: struct.field(pytree_node=False, **default)


@struct.dataclass
class Text:
  """What a draft may look at: rows of different lengths, of which the model has read all but the last token."""
  cache: Cache
  last_B: jax.Array
  seen: Seen
  step_B: jax.Array  # tokens written
  room_B: jax.Array  # tokens that may be written beside the one that the model's next run is sure to give

  def drawn(self, logits_BV, shared, i, seen: Seen):
    """B: the token that comes after i further ones, which `seen` counts, if these are the logits there."""
    settings, keys_B = shared
    return choose(logits_BV, seen, settings, jax.vmap(jax.random.fold_in)(keys_B, self.step_B + i),
                  self.step_B + i)[0]

  def tokens_BS(self) -> jax.Array:
    """The text, the last token in it."""
    row_B = jnp.arange(len(self.last_B))
    return self.cache.tokens_BS.at[row_B, self.cache.used_B].set(self.last_B, mode='drop')


@struct.dataclass
class Lookup:
  """The tokens after the last place before where the text stood as it does now; a repetition goes on repeating."""
  width: int = static(default=4)
  longest: int = static(default=4)  # of places, those where most of so many last tokens agree, then the last one
  shortest: int = static(default=1)  # tokens that must agree; where they do not nothing is drafted

  def __post_init__(self):
    _positive(self, 'width', 'longest', 'shortest')
    if self.shortest > self.longest:
      raise ValueError(f'Lookup.shortest={self.shortest} is above longest={self.longest}')

  def check(self, config: protocol.Config, length: int):
    """Any model will do."""

  def begin(self, config, length: int, x_BTD, tokens_BT, real_BT):
    return ()

  def tokens(self, config, params, own, text: Text, shared):
    """(tokens_BJ, how many of them there are in each row, the state)."""
    tokens_BS, (B, S) = text.tokens_BS(), text.cache.tokens_BS.shape
    last_B1, place_1S = text.cache.used_B[:, None], jnp.arange(S)[None]
    agree_BS, run_BS = jnp.ones((B, S), bool), jnp.zeros((B, S), jnp.int32)
    for i in range(self.longest):
      ending_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(last_B1 - i, 0), axis=1)
      agree_BS &= (jnp.roll(tokens_BS, i, axis=1) == ending_B1) & (place_1S >= i)
      run_BS += agree_BS
    score_BS = jnp.where(place_1S < last_B1, run_BS * S + place_1S, -1)
    found_B1 = score_BS.argmax(1)[:, None]
    ahead_BJ = jnp.arange(self.width)[None] % jnp.maximum(last_B1 - found_B1, 1)
    tokens_BJ = jnp.take_along_axis(tokens_BS, found_B1 + 1 + ahead_BJ, axis=1)
    there_B = score_BS.max(1) >= self.shortest * S
    return tokens_BJ, jnp.where(there_B, jnp.minimum(self.width, text.room_B), 0), own

  def after(self, own, x_BTD, kept_B, used_B):
    return own


@struct.dataclass
class Model:
  """A smaller model with the same tokens."""
  config: Any = static()
  params: Any
  width: int = static(default=4)

  def __post_init__(self):
    _positive(self, 'width')

  def check(self, config: protocol.Config, length: int):
    """ValueError for a draft model whose vocabulary, length or kind does not fit."""
    if self.config.vocab != config.vocab:
      raise ValueError(f"the draft model's vocab={self.config.vocab} is not the model's vocab={config.vocab}")
    if self.config.length < length:
      raise ValueError(f"the draft model's length={self.config.length} is less than the text's {length}")
    can_go_back(self.config)

  def begin(self, config, length: int, x_BTD, tokens_BT, real_BT):
    """The draft model's cache with the prompts in it."""
    cache = self.config.cache(tokens_BT.shape[0], length).spared(self.width + 1)
    return self.config.model().apply({'params': self.params}, tokens_BT, real_BT, cache, method='hidden')[1]

  def tokens(self, config, params, own: Cache, text: Text, shared):
    """(tokens_BJ, how many of them there are in each row, the state)."""
    before_B1 = text.cache.last()[:, None]  # which is new to the draft model where all that it drafted was right
    real_BT = jnp.stack([own.used_B < text.cache.used_B, text.room_B > 0], axis=1)
    first_BT = jnp.concatenate([before_B1, text.last_B[:, None]], axis=1)
    tokens_BJ, own = written(self.config, self.params, own, first_BT, real_BT, text, shared, self.width)
    return tokens_BJ, jnp.minimum(self.width, text.room_B), own

  def after(self, own: Cache, x_BTD, kept_B, used_B):
    return own.back(jnp.minimum(own.used_B, used_B))


@struct.dataclass
class EarlyLayers:
  """The model's first layers; they read what the model keeps of these layers, and keep nothing themselves."""
  layers: int = static()
  width: int = static(default=3)

  def __post_init__(self):
    _positive(self, 'width', 'layers')

  def check(self, config: protocol.Config, length: int):
    """ValueError for more layers than a part of the model's."""
    first = getattr(config, 'dense_layers', 0)
    if not first < self.layers < config.layers:
      raise ValueError(f"EarlyLayers.layers={self.layers} must be above {first} and below the model's "
                       f'layers={config.layers}')

  def begin(self, config, length: int, x_BTD, tokens_BT, real_BT):
    return ()

  def tokens(self, config, params, own, text: Text, shared):
    """(tokens_BJ, how many of them there are in each row, the state)."""
    first = getattr(config, 'dense_layers', 0)
    early = {'layers': self.layers} | ({'future': 0} if hasattr(config, 'future') else {})
    params = params | {'blocks': _cut(params['blocks'], self.layers - first)}
    kept = text.cache.layers
    kept = (kept[0], _cut(kept[1], self.layers - first)) if hasattr(config, 'dense_layers') else _cut(kept, self.layers)
    tokens_BJ, _ = written(dataclasses.replace(config, **early), params, text.cache.replace(layers=kept),
                           text.last_B[:, None], text.room_B[:, None] > 0, text, shared, self.width)
    return tokens_BJ, jnp.minimum(self.width, text.room_B), own

  def after(self, own, x_BTD, kept_B, used_B):
    return own


@struct.dataclass
class Heads:
  """The modules for further tokens of models/latent_moe.py, one a token.

  They were trained on whole texts and here attend to the last `window` places, whose hidden states are the state.
  """
  width: int = static(default=1)
  window: int = static(default=64)

  def __post_init__(self):
    _positive(self, 'width', 'window')

  def check(self, config: protocol.Config, length: int):
    """ValueError for a model with fewer modules."""
    if getattr(config, 'future', 0) < self.width:
      raise ValueError(f'Heads.width={self.width} needs as many modules for further tokens; '
                       f'{type(config).__module__} has future={getattr(config, "future", 0)}')

  def begin(self, config, length: int, x_BTD, tokens_BT, real_BT):
    """What the last places hold, the last of them at the end."""
    x_BTD = jnp.pad(x_BTD, [(0, 0), (self.window, 0), (0, 0)])
    return _window(x_BTD, real_BT.sum(1), self.window)

  def tokens(self, config, params, own, text: Text, shared):
    """(tokens_BJ, how many of them there are in each row, the state)."""
    model, seen, drafts = config.model(), text.seen, []
    apply = lambda *args, **how: model.apply({'params': params}, *args, **how)
    place_BT = text.cache.used_B[:, None] - self.window + jnp.arange(self.window)[None]
    real_BT = (place_BT >= 0).astype(jnp.int32)
    known_BT = jnp.take_along_axis(text.tokens_BS(), jnp.maximum(place_BT + 1, 0), axis=1)  # the last one included
    for j in range(self.width):
      all_BT = jnp.pad(jnp.concatenate([known_BT, *drafts], axis=1), [(0, 0), (0, config.future)])
      tokens_BTL = jnp.stack([all_BT[:, i:i + self.window] for i in range(config.future)], axis=-1)
      x_LBTD, _ = apply(own, tokens_BTL, real_BT, None, jnp.maximum(place_BT, 0), method='future')
      token_B = text.drawn(scored(config, params, x_LBTD[j][:, -1]), shared, j, seen)
      seen, drafts = seen.plus(token_B), [*drafts, token_B[:, None]]
    return jnp.concatenate(drafts, axis=1), jnp.minimum(self.width, text.room_B), own

  def after(self, own, x_BTD, kept_B, used_B):
    return _window(jnp.concatenate([own, x_BTD.astype(own.dtype)], axis=1), kept_B, self.window)


KINDS = Lookup, Model, EarlyLayers, Heads


def written(config: protocol.Config, params, cache: Cache, first_BT, real_BT, text: Text, shared, width: int):
  """(tokens_BJ that a model writes after it has read first_BT, its cache with all but the last of them in it)."""
  def read(tokens_BT, real_BT, cache):
    x_BTD, cache, _ = config.model().apply({'params': params}, tokens_BT, real_BT, cache, method='hidden')
    return scored(config, params, x_BTD[:, -1]), cache

  def one(carry, j):
    cache, token_B, seen = carry
    seen = seen.plus(token_B)
    logits_BV, cache = read(token_B[:, None], text.room_B[:, None] > j, cache)
    token_B = text.drawn(logits_BV, shared, j, seen)
    return (cache, token_B, seen), token_B

  logits_BV, cache = read(first_BT, real_BT, cache)
  token_B = text.drawn(logits_BV, shared, 0, text.seen)
  (cache, *_), tokens_JB = jax.lax.scan(one, (cache, token_B, text.seen), jnp.arange(1, width))
  return jnp.concatenate([token_B[:, None], tokens_JB.T], axis=1), cache


def can_go_back(config: protocol.Config):
  """ValueError for a model whose cache cannot take tokens back, or that has none."""
  if not protocol.decodes(config):
    raise ValueError(f'{type(config).__module__} is an encoder: it writes nothing, so that nothing can be drafted')
  kind = type(jax.eval_shape(lambda: config.cache(1, 1)))
  if kind is not Cache:
    raise ValueError(f'{type(config).__module__} remembers in a {kind.__name__}, which takes no drafted tokens back: '
                     'decode without a draft')


def _cut(tree, layers: int):
  """Of weights or of what a cache keeps, stacked or apart, those of the first layers."""
  if isinstance(tree, list):
    return tree[:layers]
  if isinstance(tree, dict) and '0' in tree:
    return {str(i): tree[str(i)] for i in range(layers)}
  return jax.tree.map(lambda x: x[:layers], tree)


def _window(x_BTD, kept_B, window: int):
  """`window` places, BTD, of which those after the first kept_B follow others."""
  return jnp.take_along_axis(x_BTD, (kept_B[:, None] + jnp.arange(window)[None])[..., None], axis=1)


def _positive(draft, *names: str):
  for name in names:
    if not isinstance(getattr(draft, name), int) or getattr(draft, name) < 1:
      raise ValueError(f'{type(draft).__name__}.{name}={getattr(draft, name)!r} must be a positive integer')
