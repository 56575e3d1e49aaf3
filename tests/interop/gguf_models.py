"""Small models of every architecture that GGUF names, and a tokeniser for them."""
import functools
import json

from flax import linen as nn
import jax
import numpy as np

from lmlib import trees
from lmlib.data.tokenizer import ByteLevelBpe, Tokenizer
from lmlib.kernels.attention import Pattern
from lmlib.models import dense, protocol
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.positions import Alibi, Learned, Linear, Llama3, Rope, Yarn

PIECES = 288
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TINY = dict(vocab=PIECES, layers=2, width=32, hidden=64, heads=4, kv_heads=2, head_width=8, length=64)
LAYERED = dict(norms=Norms('layer', 1e-5), attention=AttentionStyle(bias='qkvo'),
               mlp=MlpStyle('gelu_tanh', gated=False, bias=True))
GEMMA = dict(mlp=MlpStyle('gelu_tanh'), norms=Norms(place='both'))
WINDOW, CAPPED = Pattern(window=8, softcap=5.0), Pattern(softcap=5.0)
MODELS = {
    'llama': dense.Config(**TINY, positions=Rope(5e4), norms=Norms(epsilon=1e-5), ends=Ends(tied=False)),
    'llama tied, biased, scaled': dense.Config(**TINY | dict(heads=3, kv_heads=1, head_width=16), positions=Rope(
        5e5, scaling=Llama3(8.0, 8192)), attention=AttentionStyle(bias='qkv')),
    'llama yarn': dense.Config(**TINY, positions=Rope(1e4, scaling=Yarn(4.0, 16)), ends=Ends(tied=False)),
    'qwen2': dense.Config(**TINY, positions=Rope(1e6), attention=AttentionStyle(bias='qkv')),
    'qwen3': dense.Config(**TINY | dict(head_width=128), positions=Rope(1e6), attention=AttentionStyle(qk_norm='head')),
    'phi3': dense.Config(**TINY | dict(kv_heads=4), attention=AttentionStyle(patterns=(Pattern(window=16),)),
                         ends=Ends(tied=False)),
    'gemma2': dense.Config(**TINY, **GEMMA, attention=AttentionStyle(patterns=(WINDOW, CAPPED)),
                           ends=Ends(scale=32**0.5, softcap=30.0)),
    'gemma3': dense.Config(
        **TINY | dict(layers=7), **GEMMA, positions=Rope(1e6, scaling=Linear(8.0), local_base=1e4),
        attention=AttentionStyle(qk_norm='head', patterns=(*[Pattern(window=8)] * 5, Pattern())),
        ends=Ends(scale=32**0.5)),
    'gpt2': dense.Config(**TINY | dict(kv_heads=4), **LAYERED, positions=Learned()),
    'gptneox': dense.Config(
        **TINY | dict(kv_heads=4), positions=Rope(share=0.25), attention=AttentionStyle(bias='qkvo'),
        norms=Norms('layer', 1e-5, parallel='two norms'), mlp=MlpStyle('gelu', gated=False, bias=True),
        ends=Ends(tied=False)),
    'bloom': dense.Config(**TINY | dict(kv_heads=4, hidden=128), **LAYERED, positions=Alibi(), ends=Ends(norm=True)),
}


@functools.cache
def params(config: dense.Config, seed: int = 0):
  """Weights of numpy's making, with no norm's scale at 1 and no bias at 0."""
  draw = np.random.default_rng(seed)
  shapes = nn.unbox(protocol.boxed(config))
  new = lambda name, leaf: ('scale' in name) + draw.normal(0, 0.2, leaf.shape).astype(np.float32)
  leaves = [new(name, leaf) for name, leaf in trees.flat(shapes).items()]
  return jax.tree.unflatten(jax.tree.structure(shapes), [np.asarray(x, np.float32) for x in leaves])


@functools.cache
def tokenizer():
  """Byte-level BPE of PIECES pieces, with a chat template."""
  made = ByteLevelBpe(PIECES, pattern='qwen2', specials=('<|im_start|>', '<|im_end|>')).train(
      ['the cat sat on the mat, and the quick brown fox saw the lazy dog jump over that hat. ' * 20] * 4, 7000)
  said = json.loads(made.model) | {'chat_template': TEMPLATE, 'eos': '<|im_end|>'}
  return Tokenizer(json.dumps(said).encode())
