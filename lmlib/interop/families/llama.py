"""LLaMA 1 to 3 (Touvron et al. 2023, Dubey et al. 2024) and those that differ from it by a switch.

SmolLM2 is published as LLaMA. Mistral (Jiang et al. 2023) looks through a window; Qwen 2 and 2.5 (2024) have
biases in attention, Qwen 3 (2025) normalises queries and keys.
"""
import dataclasses

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


def read_llama(said: Said) -> dense.Config:
  """Our config of a config.json."""
  found = sizes(said)
  said.only('rope_interleaved', False, default=False)
  return dense.Config(
      **found, positions=rope(said, found['length']),
      attention=AttentionStyle(bias='qkvo' if said.get('attention_bias', False) else ''),
      mlp=MlpStyle(activation(said), bias=said.get('mlp_bias', False)),
      norms=Norms(epsilon=said.get('rms_norm_eps', 1e-6)),
      ends=Ends(tied=said.only('tie_word_embeddings', True, False, default=False)))


def write_llama(config: dense.Config) -> dict:
  """A config.json of our config."""
  if config.width % config.heads:
    raise ValueError(f'width={config.width} is not a multiple of heads={config.heads}, as transformers asks')
  return {**said_sizes(config), **said_rope(config.positions), 'rms_norm_eps': config.norms.epsilon,
          'hidden_act': THEIRS[config.mlp.activation], 'tie_word_embeddings': config.ends.tied,
          'attention_bias': bool(config.attention.bias), 'mlp_bias': config.mlp.bias}


def read_mistral(said: Said) -> dense.Config:
  """LLaMA with the window of config.json, 4096 if it says nothing of one."""
  config, window = read_llama(said), said.given('sliding_window', 4096)
  style = dataclasses.replace(config.attention, patterns=(Pattern(window=window),))
  return dataclasses.replace(config, attention=style)


def write_mistral(config: dense.Config) -> dict:
  """A config.json of our config."""
  said = write_llama(config) | {'sliding_window': config.attention.patterns[0].window}
  return {key: value for key, value in said.items() if key not in ('attention_bias', 'mlp_bias')}


def read_qwen2(said: Said) -> dense.Config:
  """LLaMA with biases of queries, keys and values, and a window in the layers from max_window_layers on."""
  return _qwen(said, AttentionStyle(bias='qkv'))


def read_qwen3(said: Said) -> dense.Config:
  """LLaMA with queries and keys normalised, a head at a time."""
  said.only('attention_bias', False, default=False)
  if 'head_dim' not in said:
    said = Said({**said, 'head_dim': 128})
  return _qwen(said, AttentionStyle(qk_norm='head'))


def _qwen(said: Said, style: AttentionStyle) -> dense.Config:
  config = read_llama(said)
  windowed, first = said.get('use_sliding_window', False), said.get('max_window_layers', 28)
  window = said.get('sliding_window', 4096) if windowed else None
  found = patterns(said, config.layers, Pattern(), window=window, default=lambda i: windowed and i >= first)
  return dataclasses.replace(config, attention=dataclasses.replace(style, patterns=found))


def write_qwen(config: dense.Config) -> dict:
  """A config.json of our config."""
  found = said_patterns(config)
  said = write_llama(config) | found | {'use_sliding_window': found['sliding_window'] is not None}
  return {key: value for key, value in said.items() if key not in ('mlp_bias', 'attention_bias')}


COMMON = dict(tensors=llama_names, prefixes=('model.',), ignored=INV_FREQ, copies=TIED)
LLAMA = Family(('llama',), ('LlamaForCausalLM',), read_llama, write_llama, **COMMON)
MISTRAL = Family(('mistral',), ('MistralForCausalLM',), read_mistral, write_mistral, **COMMON)
QWEN2 = Family(('qwen2',), ('Qwen2ForCausalLM',), read_qwen2, write_qwen, **COMMON)
QWEN3 = Family(('qwen3',), ('Qwen3ForCausalLM',), read_qwen3, write_qwen, **COMMON)
