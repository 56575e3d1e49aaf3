"""Adapters in PEFT's form: there and back, what stands in the files, and what is refused."""
import dataclasses
import json

import numpy as np
import pytest

from lmlib import trees
from lmlib.interop import family as families
from lmlib.interop import peft, safetensors
from lmlib.models import dense
from lmlib.nn.adapters import Adapter
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.bottleneck import Bottleneck
from lmlib.nn.decoder import Ends
from lmlib.nn.ia3 import Ia3
from lmlib.nn.lora import Lora
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.positions import Learned
from lmlib.nn.prompts import Prefix, Prompt, PTuning
from tests.interop.adapters import small
from tests.interop.published import CONFIG
from tests.laws.encoders import T5

LLAMA, GPT2 = families.find('llama'), families.find('gpt2')
GPT = dense.Config(vocab=61, layers=2, width=16, hidden=24, heads=4, kv_heads=4, head_width=4, length=32,
                   positions=Learned(), attention=AttentionStyle('qkvo'), norms=Norms('layer', 1e-5),
                   mlp=MlpStyle('gelu_tanh', gated=False, bias=True))
LAYER = 'base_model.model.model.layers.1.'


def written(path, method, config=CONFIG, family=LLAMA) -> tuple[dict, dict]:
  """The adapter_config and the tensors of a folder."""
  peft.write(path, Adapter(small(config, method), method), family, config)
  return (json.loads((path / peft.CONFIG).read_text()),
          {one.name: one.read() for one in safetensors.header(path / peft.FILE)})


@pytest.mark.parametrize('method', [Lora(3, 6.0, ('blocks/attention/q', 'blocks/mlp/down')),
                                    Lora(2, 5.0, ('blocks/attention/out',), stable=True, magnitude=True),
                                    Ia3(('blocks/attention/k', 'blocks/attention/v'), ('blocks/mlp/down',)),
                                    Prompt(3), Prefix(3)], ids=['lora', 'dora', 'ia3', 'prompt', 'prefix'])
def test_what_is_written_comes_back(method, tmp_path):
  written(tmp_path / 'adapter', method)
  back = peft.read(tmp_path / 'adapter', LLAMA, CONFIG)
  assert back.method == method
  expected = trees.flat(small(CONFIG, method))
  assert trees.flat(back.tree).keys() == expected.keys()
  for path, x in trees.flat(back.tree).items():
    np.testing.assert_array_equal(x, expected[path], err_msg=path)


def test_the_files_are_those_of_peft(tmp_path):
  """By hand: lora_A is rank x in and lora_B out x rank, with key heads before the query heads that share them."""
  method = Lora(3, 6.0, ('q', 'out'), magnitude=True)
  tree = small(CONFIG, method)['blocks']['attention']
  said, tensors = written(tmp_path / 'adapter', method)
  assert said | {'peft_type': 'LORA', 'r': 3, 'lora_alpha': 6.0, 'use_dora': True, 'use_rslora': False, 'bias': 'none',
                 'target_modules': ['o_proj', 'q_proj'], 'task_type': 'CAUSAL_LM', 'fan_in_fan_out': False} == said
  assert len(tensors) == 3 * 2 * CONFIG.layers
  np.testing.assert_array_equal(tensors[f'{LAYER}self_attn.q_proj.lora_A.weight'], tree['q']['a'][1].T)
  np.testing.assert_array_equal(tensors[f'{LAYER}self_attn.q_proj.lora_B.weight'], tree['q']['b'][1].reshape(3, -1).T)
  np.testing.assert_array_equal(tensors[f'{LAYER}self_attn.o_proj.lora_A.weight'], tree['out']['a'][1].reshape(-1, 3).T)
  np.testing.assert_array_equal(tensors[f'{LAYER}self_attn.o_proj.lora_magnitude_vector'], tree['out']['scale'][1])


def test_vectors_and_keys_are_laid_out_as_peft_has_them(tmp_path):
  _, tensors = written(tmp_path / 'p', method := PTuning(3, 5))
  expected = method.vectors(small(CONFIG, method))
  np.testing.assert_array_equal(tensors['prompt_embeddings'], expected)
  back = peft.read(tmp_path / 'p', LLAMA, CONFIG)
  assert back.method == Prompt(3), 'its network stays behind'
  said, tensors = written(tmp_path / 'prefix', Prefix(3))
  x = tensors['prompt_embeddings'].reshape(3, CONFIG.layers, 2, CONFIG.kv_heads, CONFIG.head_width)
  tree = small(CONFIG, Prefix(3))['blocks']['attention']['prefix']
  np.testing.assert_array_equal(x[:, 1, 0], tree['k'][1])
  np.testing.assert_array_equal(x[:, 2, 1], tree['v'][2])
  assert (said['token_dim'], said['num_attention_heads']) == (8, 2)  # of keys, which here are fewer than queries


def test_several_matrices_in_one_of_theirs(tmp_path):
  """GPT-2 has queries, keys and values in one: their ranks stand side by side, and the sum is the same."""
  method = Lora(2, 4.0, ('q', 'v', 'mlp/up'))
  said, tensors = written(tmp_path / 'adapter', method, GPT, GPT2)
  assert tensors['base_model.model.transformer.h.0.attn.c_attn.lora_A.weight'].shape == (4, 16)
  assert said['fan_in_fan_out']
  back = peft.read(tmp_path / 'adapter', GPT2, GPT)
  assert back.method.rank == 4
  assert back.method.targets == tuple(f'blocks/{name}' for name in (
      'attention/k', 'attention/q', 'attention/v', 'mlp/up'))
  for path in back.method.targets:
    theirs = trees.at(back.tree, path)
    sum_of = lambda part, scale: scale * part['a'] @ part['b'].reshape(*part['b'].shape[:2], -1)
    ours = trees.at(small(GPT, method), path)
    expected = 0.0 if ours is None else sum_of(ours, method.scale)
    np.testing.assert_allclose(sum_of(theirs, back.method.scale), expected, rtol=1e-5, atol=1e-6)  # float32 sums
  with pytest.raises(ValueError, match=r'c_attn is .*attention/k.* DoRA'):
    written(tmp_path / 'dora', Lora(2, 4.0, ('q',), magnitude=True), GPT, GPT2)


def test_both_sides_of_an_encoder_decoder(tmp_path):
  method = Lora(2, 4.0, ('encoder/blocks/attention/q', 'decoder/blocks/cross_attention/q'))
  said, tensors = written(tmp_path / 'adapter', method, T5, families.find('t5'))
  assert said['task_type'] == 'SEQ_2_SEQ_LM'
  assert said['target_modules'][0] == 'encoder.block.0.layer.0.SelfAttention.q'  # for the decoder's own q has none
  assert len(tensors) == 2 * (T5.encoder_layers + T5.layers)
  back = peft.read(tmp_path / 'adapter', families.find('t5'), T5)
  assert set(back.method.targets) == set(method.targets)


CHANGES = {
    'another type': (dict(peft_type='LOHA'), None, "peft_type='LOHA'; known are LORA"),
    'a bias': (dict(bias='all'), None, "bias='all'"),
    'a changed base': (dict(init_lora_weights='pissa'), None, "init_lora_weights='pissa'"),
    'whole modules': (dict(modules_to_save=['lm_head']), None, "modules_to_save=\\['lm_head'\\]"),
    'an unknown setting': (dict(use_new_thing=True), None, 'use_new_thing=True'),
    'an expression': (dict(rank_pattern={'(a+)+': 2}), None, 'no end of a name'),
    'no rank': (dict(r=0, rank_pattern={}), None, 'Lora.rank=0'),
    'another name': ({}, lambda x: {name.replace('q_proj', 'w_proj'): a for name, a in x.items()},
                     r'w_proj\.lora_A.*adapted are down_proj.*q_proj'),
    'half a pair': ({}, lambda x: {name: a for name, a in x.items() if '2.self_attn.q_proj.lora_B' not in name},
                    'missing.*2.self_attn.q_proj.lora_B'),
    'a layer less': ({}, lambda x: {name: a for name, a in x.items() if 'layers.2.' not in name}, 'layer 2 of'),
    'another shape': ({}, lambda x: {name: a[:, :-1] if 'lora_A' in name else a for name, a in x.items()},
                      r'lora_A.weight has the shape \(3, 15\), and must have \(3, 16\)'),
    'integers': ({}, lambda x: {name: a.astype(np.int32) for name, a in x.items()}, 'int32'),
    'nothing': ({}, lambda x: {}, 'no tensors')}


@pytest.mark.parametrize(('said', 'change', 'message'), CHANGES.values(), ids=CHANGES.keys())
def test_what_is_not_known_is_refused(said, change, message, tmp_path):
  before, tensors = written(tmp_path / 'adapter', Lora(3, 6.0))
  (tmp_path / 'adapter' / peft.CONFIG).write_text(json.dumps(before | said))
  if change is not None:
    tensors = change(tensors)
    announced = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    with safetensors.Writer(tmp_path / 'adapter', announced, single=peft.FILE) as writer:
      for name, x in tensors.items():
        writer.write(name, x)
  with pytest.raises(ValueError, match=message):
    peft.read(tmp_path / 'adapter', LLAMA, CONFIG)


def test_one_layer_alone_is_allowed_where_the_config_says_so(tmp_path):
  before, tensors = written(tmp_path / 'adapter', Lora(3, 6.0))
  (tmp_path / 'adapter' / peft.CONFIG).write_text(json.dumps(before | {'layers_to_transform': [1]}))
  kept = {name: x for name, x in tensors.items() if 'layers.1.' in name}
  with safetensors.Writer(tmp_path / 'adapter', {k: (x.shape, x.dtype) for k, x in kept.items()},
                          single=peft.FILE) as writer:
    for name, x in kept.items():
      writer.write(name, x)
  q = peft.read(tmp_path / 'adapter', LLAMA, CONFIG).tree['blocks']['attention']['q']
  assert not q['b'][0].any()
  np.testing.assert_array_equal(q['b'][1], small(CONFIG, Lora(3, 6.0))['blocks']['attention']['q']['b'][1])


def test_folders_that_hold_none_and_pickles_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r'no adapter: there is no adapter_config\.json'):
    peft.read(tmp_path, LLAMA, CONFIG)
  written(tmp_path / 'adapter', Lora(3))
  file = tmp_path / 'adapter' / peft.FILE
  whole = file.read_bytes()
  file.write_bytes(whole[:-5])
  with pytest.raises(ValueError, match='truncated'):
    peft.read(tmp_path / 'adapter', LLAMA, CONFIG)
  file.unlink()
  (tmp_path / 'adapter' / 'adapter_model.bin').write_bytes(b'\x80\x04.')
  with pytest.raises(ValueError, match='pickle file can run any program'):
    peft.read(tmp_path / 'adapter', LLAMA, CONFIG)


def test_what_has_no_form_there_is_refused(tmp_path):
  for method, weight, config, message in (
      (Bottleneck(4), 1.0, CONFIG, 'Bottleneck has no form in PEFT; Lora'), (Lora(3), 0.5, CONFIG, r'weight=0\.5'),
      (Prompt(3), 1.0, dataclasses.replace(CONFIG, ends=Ends(scale=4.0)), r'ends\.scale=4\.0')):
    with pytest.raises(ValueError, match=message):
      peft.write(tmp_path / 'adapter', Adapter(small(config, method), method, weight), LLAMA, config)
  assert not (tmp_path / 'adapter').exists()
  written(tmp_path / 'adapter', Lora(3))
  with pytest.raises(ValueError, match='exists already'):
    written(tmp_path / 'adapter', Lora(3))
