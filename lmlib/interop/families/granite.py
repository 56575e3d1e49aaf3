"""Granite 3 (IBM 2024): LLaMA's names, and four numbers that multiply."""
from lmlib.interop.decoders import (
  INV_FREQ,
  THEIRS,
  TIED,
  activation,
  llama_names,
  rope,
  said_rope,
  sizes,
  without_head_dim,
)
from lmlib.interop.family import Family, Said
from lmlib.kernels.attention import Pattern
from lmlib.models import granite
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.mlp import MlpStyle


def read(said: Said) -> granite.Config:
  """Our config of a config.json."""
  found = sizes(said)
  return granite.Config(
      **found, residual_scale=float(said.get('residual_multiplier', 1.0)), positions=rope(said, found['length']),
      attention=AttentionStyle(bias='qkvo' if said.get('attention_bias', False) else '',
                               patterns=(Pattern(scale=float(said.get('attention_multiplier', 1.0))),)),
      mlp=MlpStyle(activation(said), bias=said.get('mlp_bias', False)),
      norms=Norms(epsilon=said.get('rms_norm_eps', 1e-6)),
      ends=Ends(tied=said.get('tie_word_embeddings', False), scale=float(said.get('embedding_multiplier', 1.0)),
                logit_scale=1 / said.get('logits_scaling', 1.0)))


def write(config: granite.Config) -> dict:
  """A config.json of our config."""
  said = without_head_dim(config, 'granite') | said_rope(config.positions)
  return said | {
      'residual_multiplier': config.residual_scale, 'attention_multiplier': config.attention.patterns[0].scale,
      'embedding_multiplier': config.ends.scale, 'logits_scaling': 1 / config.ends.logit_scale,
      'rms_norm_eps': config.norms.epsilon, 'hidden_act': THEIRS[config.mlp.activation],
      'attention_bias': bool(config.attention.bias), 'mlp_bias': config.mlp.bias,
      'tie_word_embeddings': config.ends.tied}


GRANITE = Family(('granite',), ('GraniteForCausalLM',), read, write, llama_names, prefixes=('model.',),
                 ignored=INV_FREQ, copies=TIED)
