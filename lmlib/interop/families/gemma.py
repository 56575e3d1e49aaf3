"""Gemma 1 to 3 (Gemma Team 2024, 2025), text alone: scaled embeddings, GeGLU, norms stored less 1.

Gemma 2 has norms on both sides and caps of scores and logits; it and Gemma 3 look through a window in most
layers, which in Gemma 3 turn by a base of their own.
"""
import functools
import math

from lmlib.interop.decoders import (
  INV_FREQ,
  THEIRS,
  TIED,
  activation,
  llama_names,
  patterns,
  rope,
  said_patterns,
  said_rope,
  said_sizes,
  sizes,
)
from lmlib.interop.family import Family, Said
from lmlib.kernels.attention import Pattern
from lmlib.models import dense
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.positions import Rope


def _sizes(said: Said) -> dict:
  return sizes(said if 'head_dim' in said else Said({**said, 'head_dim': 256}))


def _rest(said: Said, act: str, *, place: str) -> dict:
  """Fields of dense.Config that all have."""
  said.only('attention_bias', False, default=False)
  said.only('use_bidirectional_attention', None, False, default=None)
  width = said['hidden_size']
  return dict(
      mlp=MlpStyle(activation(said, act, 'gelu_pytorch_tanh')),
      norms=Norms(epsilon=said.get('rms_norm_eps', 1e-6), place=place),
      ends=Ends(tied=said.get('tie_word_embeddings', True), scale=math.sqrt(width), softcap=said.given(
          'final_logit_softcapping', 30.0 if said.get('model_type') == 'gemma2' else None)))


def read_gemma(said: Said) -> dense.Config:
  """Our config of Gemma 1's config.json."""
  said.get('hidden_activation')
  found = _sizes(said)
  return dense.Config(**found, positions=rope(said, found['length']), **_rest(said, 'hidden_act', place='pre'))


def _pattern(said: Said, cap: float | None) -> Pattern:
  return Pattern(softcap=said.given('attn_logit_softcapping', cap),
                 scale=said.get('query_pre_attn_scalar', 256) ** -0.5)


def read_gemma2(said: Said) -> dense.Config:
  """Our config of Gemma 2's config.json."""
  found = _sizes(said)
  kinds = patterns(said, found['layers'], _pattern(said, 50.0), window=said.get('sliding_window', 4096),
                   default=lambda i: i % 2 == 0)
  return dense.Config(**found, positions=rope(said, found['length']), attention=AttentionStyle(patterns=kinds),
                      **_rest(said, 'hidden_activation', place='both'))


def read_gemma3(said: Said) -> dense.Config:
  """Our config of the text part's config.json of Gemma 3."""
  found, every = _sizes(said), said.get('sliding_window_pattern', said.get('_sliding_window_pattern', 6))
  kinds = patterns(said, found['layers'], _pattern(said, None), window=said.get('sliding_window', 4096),
                   default=lambda i: (i + 1) % every != 0)
  return dense.Config(
      **found, positions=_rope3(said, found['length']), attention=AttentionStyle(qk_norm='head', patterns=kinds),
      **_rest(said, 'hidden_activation', place='both'))


def _rope3(said: Said, length: int) -> Rope:
  """The turns of both kinds of layers, in the form of transformers 4 or 5."""
  both = said.get('rope_parameters', {})
  if 'full_attention' not in both:
    return rope(said, length, base=1e6, local_base=float(said.get('rope_local_base_freq', 10_000.0)))
  local = both.get('sliding_attention', {})
  if local.get('rope_type', 'default') != 'default':
    raise ValueError(f'config.json says rope_parameters.sliding_attention={local!r}; known is rope_type default')
  full = Said({'rope_parameters': both['full_attention']})
  return rope(full, length, base=1e6, local_base=float(local.get('rope_theta', 10_000.0)))


def write_gemma(config: dense.Config) -> dict:
  """A config.json of Gemma 1."""
  return {**said_sizes(config), **said_rope(config.positions), 'rms_norm_eps': config.norms.epsilon,
          'hidden_act': THEIRS[config.mlp.activation], 'hidden_activation': THEIRS[config.mlp.activation],
          'tie_word_embeddings': config.ends.tied}


def write_gemma2(config: dense.Config) -> dict:
  """A config.json of Gemma 2."""
  pattern = config.attention.patterns[0]
  scalar = (pattern.scale or config.head_width ** -0.5) ** -2
  return write_gemma(config) | said_patterns(config) | {
      'attn_logit_softcapping': pattern.softcap, 'final_logit_softcapping': config.ends.softcap,
      'query_pre_attn_scalar': round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar}


def write_gemma3(config: dense.Config) -> dict:
  """A config.json of the text part of Gemma 3."""
  return write_gemma2(config) | {'rope_local_base_freq': config.positions.local_base}


COMMON = dict(prefixes=('model.',), ignored=INV_FREQ, copies=TIED)
GEMMA = Family(('gemma',), ('GemmaForCausalLM',), read_gemma, write_gemma,
               functools.partial(llama_names, plus=1.0), **COMMON)
GEMMA2 = Family(('gemma2',), ('Gemma2ForCausalLM',), read_gemma2, write_gemma2,
                functools.partial(llama_names, plus=1.0, style='gemma'), **COMMON)
GEMMA3 = Family(('gemma3_text',), ('Gemma3ForCausalLM',), read_gemma3, write_gemma3,
                functools.partial(llama_names, plus=1.0, style='gemma'), **COMMON)
