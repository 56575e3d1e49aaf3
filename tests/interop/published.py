"""Small folders in Hugging Face's form, made without torch."""
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lmlib.data.tokenizer import ByteLevelBpe
from lmlib.interop import family, hf, safetensors
from lmlib.models import dense
from lmlib.nn.decoder import Ends
from lmlib.nn.positions import Rope

CONFIG = dense.Config(vocab=300, layers=3, width=16, hidden=24, heads=4, kv_heads=2, head_width=4, length=32,
                      positions=Rope(500.0))
UNTIED = dataclasses.replace(CONFIG, ends=Ends(tied=False))
TEXTS = ['the quick brown fox jumps over 12 lazy dogs\n' * 4, 'café naïve ' * 3]


def weights(config, kind: str = 'llama', seed: int = 0) -> dict[str, np.ndarray]:
  """Random weights by the names of a family, in float32."""
  draw = np.random.default_rng(seed)
  return {name: (1.0 + 0.2 * draw.normal(size=tensor.shape) if len(tensor.shape) == 1 else
                 draw.normal(size=tensor.shape) * tensor.shape[-1] ** -0.5).astype(np.float32)
          for name, tensor in family.tensors(family.find(kind), config).items()}


def params(config: dense.Config, state: dict) -> dict:
  """Our weights from LLaMA's by name, written without the table; a matrix there is (out, in), heads in front."""
  K, G, H, D = config.kv_heads, config.heads // config.kv_heads, config.head_width, config.width

  def layer(i: int) -> dict:
    w = lambda name: np.asarray(state[f'model.layers.{i}.{name}.weight'], np.float32)
    heads = lambda name, *shape: np.moveaxis(w(f'self_attn.{name}_proj').reshape(*shape, D), -1, 0)
    return {'attention_norm': {'scale': w('input_layernorm')},
            'mlp_norm': {'scale': w('post_attention_layernorm')},
            'attention': {'q': heads('q', K, G, H), 'k': heads('k', K, H), 'v': heads('v', K, H),
                          'out': w('self_attn.o_proj').T.reshape(K, G, H, D)},
            'mlp': {name: w(f'mlp.{name}_proj').T for name in ('gate', 'up', 'down')}}

  blocks = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *map(layer, range(config.layers)))
  top = {'embedding': state['model.embed_tokens.weight'], 'norm': {'scale': state['model.norm.weight']}}
  if not config.ends.tied:
    top['output'] = np.asarray(state['lm_head.weight']).T
  return {'blocks': blocks, **jax.tree.map(jnp.asarray, top)}


def said(config, kind: str = 'llama') -> dict:
  return hf.as_said(family.find(kind), config)


def folder(path: pathlib.Path, config=CONFIG, *, dtype='float32', longest=10**9, change=None, more=None,
           pieces: int | None = None) -> dict[str, np.ndarray]:
  """Writes a folder, and returns its weights in float32. change: of the weights, more: of config.json."""
  path.mkdir(parents=True, exist_ok=True)
  (path / 'config.json').write_text(json.dumps(said(config) | (more or {})))
  made = {name: x.astype(dtype) for name, x in weights(config).items()} | {
      name: x for name, x in (change or {}).items() if x is not None}
  made = {name: x for name, x in made.items() if (change or {}).get(name, x) is not None}
  with safetensors.Writer(path, {name: (x.shape, x.dtype) for name, x in made.items()}, longest=longest) as writer:
    for name, x in made.items():
      writer.write(name, x)
    writer.close()
  if pieces is not None:
    tokenizer(path, pieces)
  return {name: x.astype(np.float32) for name, x in made.items()}


def tokenizer(path: pathlib.Path, pieces: int = 290):
  """A tokenizer.json of at most so many pieces, as another project would publish it."""
  content = json.loads(ByteLevelBpe(pieces=pieces).train(TEXTS, 500).model)['content']
  (path / 'tokenizer.json').write_text(content)
  (path / 'tokenizer_config.json').write_text(json.dumps(
      {'bos_token': '<|bos|>', 'eos_token': '<|eos|>', 'chat_template': '{{ messages }}', 'add_bos_token': False}))
  (path / 'generation_config.json').write_text('{"eos_token_id": 2}')


def same_tree(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)
