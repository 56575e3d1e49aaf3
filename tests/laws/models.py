"""The models that every law is tried on: every decoder of lmlib/models, and the dense one with each of its parts."""
import dataclasses
import functools
import importlib
import pkgutil

import jax
import numpy as np

from lmlib import models
from lmlib.kernels.attention import Pattern
from lmlib.models import protocol
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import DecoderConfig, Ends
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.positions import Alibi, Learned, Llama3, Rope, Sinusoidal

SIZES = dict(vocab=61, layers=2, width=32, hidden=48, heads=4, kv_heads=2, head_width=8, length=32)


def decoders() -> dict:
  """By name, a small model of every file of lmlib/models whose Config is a DecoderConfig."""
  found = {}
  for info in pkgutil.iter_modules(models.__path__):
    config = getattr(importlib.import_module(f'lmlib.models.{info.name}'), 'Config', None)
    if isinstance(config, type) and issubclass(config, DecoderConfig):
      fields = {field.name for field in dataclasses.fields(config)}
      found[info.name] = config(**{name: size for name, size in SIZES.items() if name in fields})
  return found


DECODERS = decoders()
small = functools.partial(dataclasses.replace, DECODERS['dense'])
CONFIGS = {
    **DECODERS,
    'dense untied': small(layers=3, heads=2, ends=Ends(tied=False)),
    'dense bigrams': small(heads=2, ends=Ends(tied=False, bigrams=97)),
    'gpt': small(kv_heads=4, positions=Learned(), attention=AttentionStyle(bias='qkvo'), norms=Norms('layer'),
                 mlp=MlpStyle('gelu_tanh', gated=False, bias=True)),
    'alibi': small(heads=3, kv_heads=1, positions=Alibi(), norms=Norms('layer'), ends=Ends(norm=True)),
    'parallel': small(kv_heads=1, positions=Rope(share=0.5, neighbours=True), norms=Norms(parallel='one norm')),
    'two norms': small(positions=Rope(share=0.25), norms=Norms('layer', parallel='two norms')),
    'window': small(attention=AttentionStyle(bias='qkv', patterns=(Pattern(window=4),))),
    'sandwich': small(layers=3, positions=Rope(local_base=100.0, scaling=Llama3(8.0, 16)),
                      attention=AttentionStyle(qk_norm='head', sinks=True, patterns=(
                          Pattern(window=3, softcap=5.0, scale=0.2), Pattern(softcap=5.0, scale=0.2))),
                      norms=Norms(place='both'), mlp=MlpStyle('gelu_tanh'), ends=Ends(scale=32**0.5, softcap=9.0)),
    'output norms': small(attention=AttentionStyle(qk_norm='all'), norms=Norms(place='output'),
                          ends=Ends(tied=False)),
    'post norms': small(positions=Sinusoidal(), norms=Norms('layer', place='post'), ends=Ends(final_norm=False),
                        mlp=MlpStyle('relu', gated=False)),
}

# Of every architecture: those that keep all laws, in time that a test run has. What the others have of their own
# touches what a token sees and where it stands, so they keep the laws of that: tests marked `every`.
MAIN = {name: CONFIGS[name] for name in ('dense', 'sandwich', 'moe')}


def executed(config, **changes):
  """The same model, run another way."""
  return dataclasses.replace(config, execution=dataclasses.replace(config.execution, **changes))


def smooth(config):
  """The same model with every expert for every token: of experts that score alike, rounding chooses others."""
  if (experts := getattr(config, 'experts', None)) is None:
    return config
  router = dataclasses.replace(experts.router, chosen=experts.count, groups=None, groups_chosen=None)
  return dataclasses.replace(config, experts=dataclasses.replace(experts, router=router))


@functools.cache
@functools.partial(jax.jit, static_argnums=(0, 1))
def made(config, seed: int = 0):
  """Weights with every norm's scale away from 1, so that no law holds by accident."""
  leaves, tree = jax.tree.flatten(protocol.new(config, jax.random.key(seed)))
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return jax.tree.unflatten(tree, [x * (1 + 0.2 * jax.random.normal(k, x.shape)) for x, k in zip(leaves, keys)])


def tokens(config, B: int, T: int, seed: int = 2):
  return jax.numpy.asarray(np.random.default_rng(seed).integers(0, config.vocab, (B, T), np.int32))
