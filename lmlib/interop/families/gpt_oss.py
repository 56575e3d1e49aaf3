"""GPT-OSS (2025): sinks in attention, a window in every other block, biases everywhere, experts with clamped gates.

OpenAI publishes the experts as MXFP4, which a config.json calls a quantization_config: such a folder is refused.
"""
from lmlib.interop import decoders
from lmlib.interop.decoders import LAYER, names_but_mlp
from lmlib.interop.family import Entry, Family, Said
from lmlib.kernels.attention import Pattern
from lmlib.models import moe
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.moe import Experts
from lmlib.nn.router import TopK

STYLE = MlpStyle('gelu_sigmoid', bias=True)


def read(said: Said) -> moe.Config:
  """Our config of a config.json."""
  found = decoders.sizes(said)
  hidden = found.pop('hidden')
  said.only('hidden_act', 'silu', default='silu')
  said.only('swiglu_alpha', 1.702, default=1.702)
  said.only('attention_bias', True, default=True)
  said.get('initial_context_length'), said.get('experts_per_token')  # said again elsewhere
  found_patterns = decoders.patterns(said, found['layers'], Pattern(), window=said.get('sliding_window', 128),
                                     default=lambda i: i % 2 == 0)
  return moe.Config(
      **found, positions=decoders.rope(said, found['length'], base=150_000.0),
      attention=AttentionStyle(bias='qkvo', sinks=True, patterns=found_patterns),
      experts=Experts(said['num_local_experts'], hidden, TopK(said['num_experts_per_tok'], bias=True), style=STYLE,
                      limit=float(said.get('swiglu_limit', 7.0))),
      norms=Norms(epsilon=said.get('rms_norm_eps', 1e-5)), ends=Ends(tied=said.get('tie_word_embeddings', False)))


def write(config: moe.Config) -> dict:
  """A config.json of our config."""
  experts = config.experts
  return {**decoders.said_sizes(config), **decoders.said_rope(config.positions), **decoders.said_patterns(config),
          'num_local_experts': experts.count, 'num_experts_per_tok': experts.router.chosen,
          'swiglu_limit': experts.limit, 'rms_norm_eps': config.norms.epsilon, 'attention_bias': True,
          'hidden_act': 'silu', 'tie_word_embeddings': config.ends.tied}


def tensors(config: moe.Config) -> dict[str, Entry]:
  """The table of weights; gates and ups of the experts take turns."""
  table, place = names_but_mlp(config), f'{LAYER}mlp'
  ours = lambda *names: {f'blocks/experts/{name}': '' for name in names}
  return table | {
      f'{LAYER}self_attn.sinks': Entry('KG', {'blocks/attention/sink_bias': ''}),
      f'{place}.router.weight': Entry('E D', ours('router')), f'{place}.router.bias': Entry('E', ours('router_bias')),
      f'{place}.experts.gate_up_proj': Entry('E D F+', ours('gate', 'up')),
      f'{place}.experts.gate_up_proj_bias': Entry('E F+', ours('gate_bias', 'up_bias')),
      f'{place}.experts.down_proj': Entry('E F D', ours('down')),
      f'{place}.experts.down_proj_bias': Entry('E D', ours('down_bias'))}


GPT_OSS = Family(('gpt_oss',), ('GptOssForCausalLM',), read, write, tensors, prefixes=('model.',),
                 ignored=decoders.INV_FREQ, copies=decoders.TIED)
