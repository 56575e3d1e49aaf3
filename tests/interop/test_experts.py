"""What llama's table does not use: experts kept apart, parts joined by +, scales less 1, layers in one tensor."""
import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.interop import family, hf, safetensors
from lmlib.interop.family import Entry, Family
from lmlib.nn.stack import Execution
from lmlib.sharding import Lettered
from lmlib.train import checkpoint, checkpoint_arrays
from lmlib.train.step import placed

SIZES = dict(L=2, E=3, D=6, F=4, K=2, G=3, H=5, V=7)
LETTERS = {'blocks/mlp/gate': 'LEDF', 'blocks/mlp/up': 'LEDF', 'blocks/mlp/down': 'LEFD', 'blocks/mlp/router': 'LDE',
           'blocks/attention/q': 'LDKGH', 'blocks/attention/k': 'LDKH', 'blocks/attention/v': 'LDKH',
           'blocks/norm/scale': 'LD', 'blocks/sinks': 'LKG', 'embedding': 'VD'}


class Model(nn.Module):

  @nn.compact
  def __call__(self, tokens_BT):
    for path, letters in LETTERS.items():
      shape = tuple(SIZES[letter] for letter in letters)
      self.param(path, lambda _, shape=shape, letters=letters: Lettered(jnp.zeros(shape), letters))
    return tokens_BT


@dataclasses.dataclass(frozen=True)
class Config:
  vocab: int = SIZES['V']
  length: int = 8
  execution: Execution = Execution()

  def model(self):
    return Nested()


class Nested:
  """Model with its weights in a tree, as modules in modules would give them."""

  def init(self, key, tokens_BT):
    flat = Model().init(key, tokens_BT)['params']
    return {'params': checkpoint._nested(flat)}


TABLE = {
    'embed': Entry('V D', {'embedding': ''}),
    'layers.{L}.experts.{E}.w1': Entry('F D', {'blocks/mlp/gate': ''}, start=1),
    'layers.{L}.experts.{E}.w3': Entry('F D', {'blocks/mlp/up': ''}, start=1),
    'layers.{L}.down': Entry('E F D', {'blocks/mlp/down': ''}, start=1),
    'layers.{L}.gate': Entry('E D', {'blocks/mlp/router': ''}, start=1),
    'layers.{L}.qkv': Entry('K+ D', {'blocks/attention/q': 'GH', 'blocks/attention/k': 'H',
                                     'blocks/attention/v': 'H'}, start=1),
    'layers.{L}.norm': Entry('D', {'blocks/norm/scale': ''}, plus=1.0, start=1),
    'sinks': Entry('L KG', {'blocks/sinks': ''}),
}
FAMILY = Family(('test',), ('Test',), lambda said: Config(), lambda config: {}, lambda config: TABLE)


@pytest.fixture
def source(tmp_path, monkeypatch):
  """A folder in bfloat16, with its weights by name."""
  monkeypatch.setattr(family, 'families', lambda: (FAMILY,))
  tensors = family.tensors(FAMILY, Config())
  draw = np.random.default_rng(0)
  state = {name: draw.normal(size=tensor.shape).astype('bfloat16') for name, tensor in tensors.items()}
  path = tmp_path / 'published'
  path.mkdir()
  (path / 'config.json').write_text('{"model_type": "test"}')
  with safetensors.Writer(path, {name: (x.shape, x.dtype) for name, x in state.items()}, longest=400) as writer:
    for name, x in state.items():
      writer.write(name, x)
    writer.close()
  return path, {name: x.astype(np.float32) for name, x in state.items()}


def check(params, state):
  blocks = params['blocks']
  for layer in range(2):
    theirs = f'layers.{layer + 1}'
    for expert in range(3):
      np.testing.assert_array_equal(blocks['mlp']['gate'][layer, expert], state[f'{theirs}.experts.{expert}.w1'].T)
      np.testing.assert_array_equal(blocks['mlp']['up'][layer, expert], state[f'{theirs}.experts.{expert}.w3'].T)
    np.testing.assert_array_equal(blocks['mlp']['down'][layer], state[f'{theirs}.down'])
    np.testing.assert_array_equal(blocks['mlp']['router'][layer], state[f'{theirs}.gate'].T)
    heads = state[f'{theirs}.qkv'].reshape(2, 25, 6)  # of every key head: 3 queries, a key, a value
    np.testing.assert_array_equal(blocks['attention']['q'][layer, :, 1].reshape(6, 15), heads[1, :15].T)
    np.testing.assert_array_equal(blocks['attention']['k'][layer, :, 0], heads[0, 15:20].T)
    np.testing.assert_array_equal(blocks['attention']['v'][layer, :, 1], heads[1, 20:].T)
    np.testing.assert_array_equal(blocks['norm']['scale'][layer], state[f'{theirs}.norm'] + 1)
    np.testing.assert_array_equal(blocks['sinks'][layer].reshape(6), state['sinks'][layer])


def test_in_memory(source):
  path, state = source
  check(hf.load(path)[1], state)


@pytest.mark.parametrize('others', [False, True], ids=['of a conversion', 'of a run'])
def test_there_and_back(source, tmp_path, others):
  path, state = source
  step = tmp_path / 'checkpoints' / '0'
  if others:
    made = checkpoint.Checkpoints(step.parent)
    made.save(0, {'params': hf.load(path)[1]})
    made.close()
  else:
    step.mkdir(parents=True)
    hf.to_checkpoint(hf.read(path), step, None)
    kinds = {name: said['dtype'] for name, said in checkpoint.record_of(step)['arrays'].items()}
    assert {name for name, kind in kinds.items() if kind == 'float32'} == {
        f'params/blocks_{layer}/norm/scale' for layer in range(2)}, 'only what is not as it was stored'
  params = checkpoint.restore_params(step.parent, placed(family.shapes(Config())))[0]
  check(jax.device_get(params), state)
  out = tmp_path / 'out'
  out.mkdir()
  hf.from_checkpoint(checkpoint_arrays.Reader(step.parent), Config(), FAMILY, out, longest=500)
  back = {stored.name: stored.read() for stored in safetensors.in_folder(out)}
  assert back.keys() == state.keys()
  for name, x in state.items():
    # A scale is rounded to float32 with 1 added, and again with it taken off.
    np.testing.assert_allclose(back[name], x, rtol=0, atol=2**-23 if name.endswith('norm') else 0, err_msg=name)
  rounded = hf.rounded(FAMILY, Config(), params, 'bfloat16')
  check(jax.device_get(rounded), state)
