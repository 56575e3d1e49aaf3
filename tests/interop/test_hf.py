"""Folders in Hugging Face's form: every tensor arrives where it belongs, or the folder is refused."""
import dataclasses
import json
import os
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmlib import sharding
from lmlib.interop import hf, safetensors
from lmlib.models import protocol
from lmlib.nn.decoder import Ends
from lmlib.train import checkpoint, checkpoint_arrays
from lmlib.train.step import placed
from tests.interop import published
from tests.interop.published import CONFIG, UNTIED, folder, same_tree, weights

NORM = 'model.layers.1.input_layernorm.weight'


@pytest.mark.parametrize('config', [CONFIG, UNTIED], ids=['tied', 'untied'])
@pytest.mark.parametrize('longest', [10**9, 2000], ids=['one file', 'many'])
def test_every_weight_arrives_where_it_belongs(tmp_path, config, longest):
  """Beside a mapping that was written without the table."""
  state = folder(tmp_path, config, longest=longest)
  found, params = hf.load(tmp_path)
  assert found == config
  same_tree(params, published.params(config, state))


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float8_e4m3fn', 'float64'])
def test_other_types_are_taken_as_they_are(tmp_path, dtype):
  assert ml_dtypes
  state = folder(tmp_path, dtype=dtype)
  same_tree(hf.load(tmp_path)[1], published.params(CONFIG, state))
  kept = hf.load(tmp_path, 'bfloat16')[1]
  assert kept['embedding'].dtype == jnp.bfloat16


def test_weights_go_where_the_layout_wants_them(tmp_path):
  state = folder(tmp_path)
  with sharding.use(sharding.Layout(fsdp=8)):
    params = hf.load(tmp_path)[1]
    wanted = placed(protocol.boxed(CONFIG))
  jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) or pytest.fail('elsewhere'), params, wanted)
  same_tree(jax.device_get(params), jax.device_get(published.params(CONFIG, state)))


@pytest.mark.parametrize(('stored', 'dtype', 'kept'), [
    ('float32', 'float32', 'float32'), ('bfloat16', None, 'bfloat16'), ('float16', 'float32', 'float32'),
    ('float32', 'bfloat16', 'bfloat16'), ('float64', None, 'float32')])
def test_a_checkpoint_holds_what_the_folder_does(tmp_path, stored, dtype, kept):
  folder(tmp_path / 'a', dtype=stored)
  path = tmp_path / 'checkpoints' / '0'
  path.mkdir(parents=True)
  hf.to_checkpoint(hf.read(tmp_path / 'a'), path, dtype)
  assert {said['dtype'] for said in checkpoint.record_of(path)['arrays'].values()} == {kept}
  params, step, _ = checkpoint.restore_params(path.parent, placed(protocol.boxed(CONFIG)))
  assert step == 0
  same_tree(params, hf.load(tmp_path / 'a', rounded=dtype)[1])


@pytest.mark.parametrize('longest', [10**9, 2000], ids=['one file', 'many'])
def test_there_and_back_every_tensor_is_as_it_was(tmp_path, longest):
  state = folder(tmp_path / 'a', UNTIED)
  path = tmp_path / 'checkpoints' / '0'
  path.mkdir(parents=True)
  (tmp_path / 'b').mkdir()
  hf.to_checkpoint(hf.read(tmp_path / 'a'), path)
  reader = checkpoint_arrays.Reader(path.parent)
  hf.from_checkpoint(reader, UNTIED, hf.writers(UNTIED)[0], tmp_path / 'b', longest=longest)
  back = {stored.name: stored.read() for stored in safetensors.in_folder(tmp_path / 'b')}
  assert back.keys() == state.keys()
  for name, x in state.items():
    np.testing.assert_array_equal(back[name], x, err_msg=name)
  with pytest.raises(ValueError, match=r"params/blocks_0/attention_norm/scale is \(16,\) there and \(24,\) here"):
    hf.from_checkpoint(reader, dataclasses.replace(UNTIED, width=24), hf.writers(UNTIED)[0], tmp_path / 'b')


@pytest.mark.parametrize('layers', [1, 4])
def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch, layers):
  """Beyond some chunks, three times the largest tensor, in both directions; tensorstore's own is not seen."""
  monkeypatch.setattr(checkpoint_arrays, 'CHUNK', 1 << 17)
  config = dataclasses.replace(CONFIG, layers=layers, width=256, hidden=1024)
  folder(tmp_path / 'a', config)
  path = tmp_path / 'checkpoints' / '0'
  path.mkdir(parents=True)
  found = hf.read(tmp_path / 'a')
  largest = max(stored.nbytes for stored in found.stored.values())
  assert 3 * layers * largest <= sum(stored.nbytes for stored in found.stored.values())
  for run in (lambda: hf.to_checkpoint(found, path),
              lambda: hf.from_checkpoint(checkpoint_arrays.Reader(path.parent), config, found.family, path)):
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * largest + (1 << 19)


FAULTS = {
    'unknown': ({'model.layers.1.extra': np.zeros(3, np.float32)}, 'tensors unknown: model.layers.1.extra'),
    'missing': ({NORM: None}, f'tensors missing: {NORM}'),
    'shape': ({NORM: np.zeros(17, np.float32)},
              rf'tensors of another shape: {NORM} is \(17,\) there and \(16,\) by config.json'),
    'type': ({NORM: np.zeros(16, np.int32)}, f'tensors of another type: {NORM} is int32'),
    'twice': ({NORM.removeprefix('model.'): np.zeros(16, np.float32)},
              f'tensors there twice: {NORM.removeprefix("model.")}'),
}


@pytest.mark.parametrize(('change', 'what'), FAULTS.values(), ids=FAULTS)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, what):
  folder(tmp_path, change=change)
  with pytest.raises(ValueError, match=what):
    hf.read(tmp_path)


def test_all_that_is_wrong_is_named_together(tmp_path):
  folder(tmp_path, change={f'extra.{i}': np.zeros(1) for i in range(9)} | {
      NORM: np.zeros((4, 4), np.float32), 'model.norm.weight': None})
  with pytest.raises(ValueError, match=r'tensors unknown: extra.0, .*extra.5 and 3 more; tensors of another shape: '
                                       rf'{NORM} .*; tensors missing: model.norm.weight$'):
    hf.read(tmp_path)


def test_a_layer_more_or_less_than_config_json_says_is_refused(tmp_path):
  folder(tmp_path, more={'num_hidden_layers': 2})
  with pytest.raises(ValueError, match=r'tensors unknown: model.layers.2.\S+, .* and 3 more$'):
    hf.read(tmp_path)
  folder(tmp_path, more={'num_hidden_layers': 4})
  with pytest.raises(ValueError, match=r'tensors missing: model.layers.3.\S+, .* and 3 more$'):
    hf.read(tmp_path)


def test_names_may_lack_the_prefix_and_what_follows_from_the_config_may_be_there(tmp_path):
  state = weights(CONFIG)
  bare = dict.fromkeys(state) | {name.removeprefix('model.'): x for name, x in state.items()}
  folder(tmp_path, change=bare | {'layers.0.self_attn.rotary_emb.inv_freq': np.zeros(2, np.float32)})
  same_tree(hf.load(tmp_path)[1], published.params(CONFIG, state))


def test_a_tied_output_must_equal_the_embedding(tmp_path):
  table = weights(CONFIG)['model.embed_tokens.weight']
  folder(tmp_path, change={'lm_head.weight': table})
  hf.load(tmp_path)
  folder(tmp_path, change={'lm_head.weight': table, 'model.embed_tokens.weight': None})
  np.testing.assert_array_equal(hf.load(tmp_path)[1]['embedding'], table)
  other = table.copy()
  other[-1, -1] += 1e-3
  folder(tmp_path, change={'lm_head.weight': other})
  with pytest.raises(ValueError, match=r'lm_head.weight differs from model.embed_tokens.weight, which it must equal'):
    hf.load(tmp_path)


@pytest.mark.parametrize(('more', 'what'), [
    ({'model_type': 'lama'}, r"config.json: the family 'lama' is not known \(did you mean \"llama\"\?\)"),
    ({'model_type': None}, 'the family None is not known'),
    ({'hidden_act': 'relu6'}, r"config.json says hidden_act='relu6'; known here: .*'silu'"),
    ({'tie_word_embeddings': 'x'}, "tie_word_embeddings='x'; known here: True, False"),
    ({'hidden_size': 2**70}, 'hidden_size=1180591620717411303424; sizes lie below'),
    ({'hidden_size': None}, "config.json has no 'hidden_size'"),
    ({'hidden_size': 'wide'}, r'config.json: '), ({'num_attention_heads': 0, 'head_dim': None}, 'config.json: '),
    ({'num_hidden_layers': 10**9}, 'stands for 1,000,000,000 tensors'),
    ({'quantization_config': {'bits': 4}}, 'quantised weights')])
def test_a_config_that_is_not_known_is_named(tmp_path, more, what):
  folder(tmp_path, more=more)
  with pytest.raises(ValueError, match=what) as error:
    hf.read(tmp_path)
  assert str(tmp_path / 'config.json') in str(error.value)


def test_what_was_overlooked_in_a_config_is_known(tmp_path):
  folder(tmp_path, more={'use_cache': True, 'new_switch': 3, 'other': None})
  assert hf.read(tmp_path).overlooked == ('new_switch',)


@pytest.mark.parametrize(('path', 'what'), [
    ('nowhere', "there is no folder '.*nowhere'"), ('file', 'is a file; give the folder'),
    ('empty', 'holds no model: there is no config.json')])
def test_a_path_that_is_no_model_is_named(tmp_path, path, what):
  (tmp_path / 'file').touch()
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match=what):
    hf.read(tmp_path / path)


def test_a_name_of_the_hub_is_not_taken_for_a_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r'not downloaded here; `hf download org/model --local-dir model` does so'):
    hf.read('org/model')


def test_a_config_json_that_leads_out_is_refused(tmp_path):
  folder(tmp_path / 'a')
  os.rename(tmp_path / 'a' / 'config.json', tmp_path / 'config.json')
  (tmp_path / 'a' / 'config.json').symlink_to('../config.json')
  with pytest.raises(ValueError, match='a link that leads out of the folder'):
    hf.read(tmp_path / 'a')


def test_a_model_is_written_as_a_family_that_has_words_for_it():
  assert 'llama' in [family.model_types[0] for family in hf.writers(UNTIED)]
  assert hf.writer(UNTIED, None, 'llama').model_types == ('llama',)
  with pytest.raises(ValueError, match=r'can hold this model: .*bigrams=5'):
    hf.writers(dataclasses.replace(CONFIG, ends=Ends(bigrams=5)))
  json.dumps(hf.as_said(hf.writer(UNTIED, 'llama', None), UNTIED))
