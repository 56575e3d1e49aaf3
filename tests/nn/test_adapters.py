"""Adapters: beside the weights or merged, several at once, on every kind of model, layout and program."""
import dataclasses
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding, trees
from lmlib.models import protocol
from lmlib.nn import adapters, layers
from lmlib.nn.adapters import Adapter
from lmlib.nn.bottleneck import Bottleneck
from lmlib.nn.ia3 import Ia3
from lmlib.nn.lora import Lora
from lmlib.nn.prompts import Prefix, Prompt, PTuning
from lmlib.optim.adamw import AdamW
from lmlib.optim.schedules import Constant
from lmlib.optim.state import state_bytes
from lmlib.serve.generate import generate
from lmlib.serve.weights import laid_out
from lmlib.train import losses
from lmlib.train import step as step_of
from tests.interop.adapters import drawn, small
from tests.laws import encoders
from tests.laws.models import CONFIGS, DECODERS, executed, tokens

# float32 sums of different order: 1e-5 of logits of size 1 is a hundred roundings.
CLOSE = dict(rtol=1e-5, atol=1e-5)
DENSE, GPT = DECODERS['dense'], CONFIGS['gpt']
METHODS = {
    'lora': Lora(3, 6.0), 'all, stable': Lora(2, 4.0, None, stable=True), 'dora': Lora(3, 6.0, None, magnitude=True),
    'ia3': Ia3(inputs=('out',)), 'bottleneck': Bottleneck(4), 'prefix': Prefix(3), 'network of a prefix': Prefix(3, 5),
    'prompt': Prompt(3), 'p-tuning': PTuning(3, 5)}


@functools.cache
def base(config):
  return drawn(nn.unbox(protocol.boxed(config)), 0, 0.3)


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, *args):
  return config.model().apply({'params': params}, *args)[0]


def logits(config, params):
  tokens_BT = tokens(config, 2, 6)
  inputs = (None, None, None, tokens(config, 2, 5, seed=3)) if hasattr(config, 'of_inputs') else ()
  return apply(config, params, tokens_BT, *inputs)


# Of every kind of model several adapters at once, each of other matrices, and one that is beside them.
SEVERAL = (Lora(3, 6.0, ('q', 'mlp/up')), Lora(2, 4.0, ('out', 'mlp/down'), stable=True, magnitude=True),
           Ia3(('k', 'v'), ('gate',)), Bottleneck(4))
MODELS = {
    'dense': (DENSE, SEVERAL),
    'biases and learned positions': (GPT, (*SEVERAL[:2], Ia3(('k', 'v', 'mlp/up'), ()), Bottleneck(4))),
    'moe': (DECODERS['moe'], (Lora(3, 6.0, None), Bottleneck(4))),
    'latent': (DECODERS['latent_moe'], (Lora(2, 4.0, None, magnitude=True), Ia3(('kv_down',), ()), Bottleneck(4))),
    'encoder-decoder': (encoders.T5, (Lora(3, 6.0, None), Ia3(('encoder/blocks/attention/k', 'cross_attention/v'), ()),
                                      Bottleneck(4, after=('attention', 'cross_attention', 'mlp'))))}


@pytest.mark.parametrize(('config', 'several'), MODELS.values(), ids=MODELS.keys())
def test_new_adapters_change_nothing_and_merged_ones_equal_themselves(config, several):
  params, boxed = base(config), protocol.boxed(config)
  before = logits(config, params)
  fresh = [Adapter(adapters.new(method, boxed, params, jax.random.key(0)), method) for method in several]
  size = np.abs(before).max()
  np.testing.assert_allclose(logits(config, adapters.attach(config, params, *fresh)) / size, before / size, **CLOSE)
  drawn_ones = [Adapter(small(config, method), method) for method in several[:-1]]
  after = logits(config, adapters.attach(config, params, *drawn_ones, fresh[-1]))  # where a bottleneck is still none
  assert np.abs(after - before).max() > 0.02
  merged, size = adapters.merge(config, params, *drawn_ones), max(1.0, np.abs(after).max())
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  np.testing.assert_allclose(logits(config, merged) / size, after / size, **CLOSE)
  with pytest.raises(ValueError, match=r'attention_bottleneck.*cannot be merged'):
    adapters.merge(config, params, fresh[-1])


def test_scanned_unrolled_and_recomputed_layers_are_equal():
  several = *SEVERAL, Prefix(3)
  params = adapters.attach(DENSE, base(DENSE), *(Adapter(small(DENSE, method), method) for method in several))
  expected = logits(DENSE, params)
  np.testing.assert_allclose(logits(executed(DENSE, scan=False), params), expected, **CLOSE)
  np.testing.assert_allclose(logits(executed(DENSE, remat='full'), params), expected, **CLOSE)


@pytest.mark.parametrize('several', [(*SEVERAL, Prefix(3, 5)), (PTuning(3, 5),)], ids=['several', 'p-tuning'])
def test_gradients_reach_all_of_the_small_trees(several):
  params, trees_of = base(DENSE), [small(DENSE, method) for method in several]

  def loss(small_trees):
    attached = adapters.attach(DENSE, params, *map(Adapter, small_trees, several))
    return (logits(DENSE, attached)**2).sum()

  for tree, gradients in zip(trees_of, jax.jit(jax.grad(loss))(trees_of)):
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, tree)
    for path, gradient in trees.flat(gradients).items():
      assert np.abs(gradient).max() > 0, path


def products(jaxpr, size: int) -> int:
  """How many products of matrices in a program make so many numbers."""
  inner = [value for eqn in jaxpr.eqns for value in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'))]
  here = sum(eqn.primitive.name == 'dot_general' and eqn.outvars[0].aval.size == size for eqn in jaxpr.eqns)
  return here + sum(products(getattr(x, 'jaxpr', x), size) for x in inner
                    if hasattr(x, 'eqns') or hasattr(x, 'jaxpr'))


def test_no_gradient_of_a_whole_matrix_is_computed():
  """No product of the program has the size of the up projection; with all weights trained, some have."""
  config, method = dataclasses.replace(DENSE, hidden=41), Lora(2, 4.0, None)
  params, one, size = base(config), small(config, method), config.width * 41
  loss = lambda params, _: (logits(config, params)**2).sum()
  full = jax.make_jaxpr(jax.grad(loss))(params, None)
  lora = jax.make_jaxpr(jax.grad(adapters.loss_of(config, method, loss)))(one, None, params)
  assert products(full.jaxpr, size) >= 3
  assert products(lora.jaxpr, size) == 0


def test_several_are_summed_by_weight_and_switched():
  params, one, two = base(DENSE), Lora(3, 6.0), Lora(2, 2.0, ('q', 'mlp/up'), stable=True)
  a, b = Adapter(small(DENSE, one), one, 0.5), Adapter(small(DENSE, two, 2), two, -1.0)
  both = adapters.attach(DENSE, params, a, b)
  w, qa, qb = (trees.at(tree, 'blocks/attention/q') for tree in (params, a.tree, b.tree))
  expected = w + 0.5 * 2.0 * jnp.einsum('LDA,LAKGH->LDKGH', qa['a'], qa['b']) \
      - 2**0.5 * jnp.einsum('LDA,LAKGH->LDKGH', qb['a'], qb['b'])
  np.testing.assert_allclose(layers.array(both['blocks']['attention']['q']), expected, **CLOSE)
  out = logits(DENSE, both)
  np.testing.assert_allclose(logits(DENSE, adapters.merge(DENSE, params, b, a)), out, rtol=1e-5, atol=1e-4)
  assert np.abs(logits(DENSE, adapters.attach(DENSE, params, a)) - out).max() > 0.1
  assert both['embedding'] is params['embedding'], 'the arrays of the base are shared'


def test_dora_follows_its_equation():
  method = Lora(3, 6.0, ('out',), magnitude=True)
  part = small(DENSE, method)['blocks']['attention']['out']
  w = base(DENSE)['blocks']['attention']['out'] + 2.0 * jnp.einsum('LKGHA,LAD->LKGHD', part['a'], part['b'])
  expected = part['scale'][:, None, None, None] * w / np.sqrt((np.square(w)).sum((1, 2, 3), keepdims=True))
  merged = adapters.merge(DENSE, base(DENSE), Adapter(small(DENSE, method), method))
  np.testing.assert_allclose(merged['blocks']['attention']['out'], expected, **CLOSE)


@pytest.mark.parametrize(('config', 'method'), [
    (GPT, Prompt(3)), (dataclasses.replace(DENSE, ends=CONFIGS['dense untied'].ends), PTuning(3, 5))],
                         ids=['learned positions', 'untied, p-tuning'])
def test_a_prompt_is_what_precedes_every_document(config, method):
  """Its vectors as rows of the embedding, tokens of their own, in front; packed documents each have it."""
  params, one = base(config), small(config, method)
  table_VD = jnp.concatenate([method.vectors(one), params['embedding']])
  wider = params | {'embedding': table_VD}
  if not config.ends.tied:
    wider |= {'output': jnp.pad(params['output'], [(0, 0), (3, 0)])}
  first_BT, second_BT = tokens(config, 2, 4), tokens(config, 2, 5, seed=4)
  attached = adapters.attach(config, params, Adapter(one, method))
  packed_BT = jnp.concatenate([first_BT, second_BT], 1)
  packed_BTV = apply(config, attached, packed_BT, jnp.array([[1] * 4 + [2] * 5] * 2))
  for document_BT, found_BTV in ((first_BT, packed_BTV[:, :4]), (second_BT, packed_BTV[:, 4:])):
    before_BT = jnp.concatenate([jnp.arange(3)[None].repeat(2, 0), document_BT + 3], 1)
    expected = apply(dataclasses.replace(config, vocab=config.vocab + 3), wider, before_BT)[:, 3:, 3:]
    np.testing.assert_allclose(found_BTV, expected, rtol=1e-5, atol=2e-5)


def test_decoding_equals_the_forward_pass():
  """Token by token, and as generate() does it, of weights that are laid out for it too."""
  lora, prompt = Lora(3, 6.0, None), Prompt(3)
  params, tokens_BT = base(DENSE), tokens(DENSE, 2, 7)
  params = adapters.attach(DENSE, params, *(Adapter(small(DENSE, method), method) for method in (lora, prompt)))
  cache, out = DENSE.cache(2, 12), []
  for part_BT in (tokens_BT[:, :5], tokens_BT[:, 5:6], tokens_BT[:, 6:]):
    out_BTV, cache = jax.jit(DENSE.model().apply)({'params': params}, part_BT, None, cache)
    out.append(out_BTV)
  np.testing.assert_allclose(jnp.concatenate(out, 1), apply(DENSE, params, tokens_BT), **CLOSE)
  prompts = [row.tolist() for row in np.asarray(tokens_BT)]
  found = generate(DENSE, params, prompts, new=2, temperature=0.0)
  assert [row[0] for row in found] == out_BTV[:, -1].argmax(-1).tolist()
  assert generate(*laid_out(DENSE, params), prompts, new=2, temperature=0.0) == found
  with pytest.raises(ValueError, match=r'27 tokens and new=3 .*length=32, of which 3 '):
    generate(DENSE, params, [[1] * 27], new=3)


def trained(layout, microbatches: int = 1):
  """The small tree after two steps."""
  method, transformation = Lora(4, 8.0, None), None
  with sharding.use(layout, None if math.prod(layout.sizes) != 1 else jax.devices()[:1]):
    boxed = adapters.boxed(method, protocol.boxed(DENSE))
    transformation = AdamW(Constant(1e-2)).transformation(sharding.letters(boxed), 10)
    shapes = step_of.shapes_of(boxed, transformation)
    frozen = jax.device_put(base(DENSE), sharding.shardings(protocol.boxed(DENSE)))
    state = step_of.begun(jax.device_put(small(DENSE, method)), transformation, shapes)
    loss = adapters.loss_of(DENSE, method, losses.NextToken().of(DENSE))
    step = step_of.compiled(loss, transformation, microbatches, shapes)
    tokens_BT = np.asarray(tokens(DENSE, 8, 9))
    batch = {'tokens_BT': tokens_BT[:, :-1], 'targets_BT': tokens_BT[:, 1:],
             'segments_BT': np.ones((8, 8), np.int32), 'weight_BT': np.ones((8, 8), np.float32)}
    for _ in range(2):
      state, metrics = step(state, sharding.placer()(batch), frozen)
    return jax.device_get((state.params, metrics['loss']))


def test_eight_devices_and_microbatches_equal_one():
  expected = trained(sharding.Layout(1, 1, 1))
  found = trained(sharding.Layout(data=2, fsdp=2, tensor=2), 2)
  np.testing.assert_allclose(found[1], expected[1], rtol=2e-5)
  for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0])):
    # Adam divides by sqrt of the second moment: where a gradient is near 0, rounding moves a weight by up to a
    # small share of the learning rate of 1e-2.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


def test_the_state_of_the_optimizer_is_of_the_small_tree_alone():
  letters = lambda boxed: AdamW(Constant(1e-2)).transformation(sharding.letters(boxed), 10)
  full, lora = protocol.boxed(DENSE), adapters.boxed(Lora(2), protocol.boxed(DENSE))
  numbers = trees.count(nn.unbox(lora))
  assert numbers == 2 * 2 * (32 + 32) + 2 * 2 * (32 + 16)  # layers, rank, ins and outs of q and of v
  assert 2 * 4 * numbers <= state_bytes(letters(lora), nn.unbox(lora)) <= 2 * 4 * numbers + 64  # and counts
  assert state_bytes(letters(full), nn.unbox(full)) > 20 * state_bytes(letters(lora), nn.unbox(lora))


def attach(method, tree=None, config=DENSE, weight: float = 1.0):
  tree = small(config, method) if tree is None else tree
  return adapters.attach(config, base(config), Adapter(tree, method, weight))


@pytest.mark.parametrize(('method', 'message'), [
    (lambda: Lora(targets=('upp',)), "Lora.targets.*'upp'.*did you mean \"up\".*blocks/mlp/up"),
    (lambda: Ia3(inputs=('mlp/out',)), 'Ia3.inputs.*mlp/out.*blocks/attention/out'),
    (lambda: Bottleneck(after=('cross_attention',)), 'cross_attention.*attention.*mlp')],
                         ids=['lora', 'ia3', 'bottleneck'])
def test_unknown_parts_are_refused_and_the_known_ones_listed(method, message):
  with pytest.raises(ValueError, match=message):
    adapters.boxed(method(), protocol.boxed(DENSE))


def test_settings_out_of_range_are_refused():
  for make, message in ((lambda: Lora(0), 'rank=0'), (lambda: Lora(alpha=0.0), 'alpha=0'),
                        (lambda: Lora(targets='q'), "targets='q'"), (lambda: Bottleneck(0), 'width=0'),
                        (lambda: Bottleneck(activation='tanh'), 'tanh.*silu'), (lambda: Prefix(0), 'length=0'),
                        (lambda: Prefix(3, 0), 'hidden=0'), (lambda: PTuning(3, -1), 'hidden=-1'),
                        (lambda: Ia3((), ()), 'nothing to scale')):
    with pytest.raises(ValueError, match=message):
      make()


@pytest.mark.parametrize('method', METHODS.values(), ids=METHODS.keys())
def test_an_adapter_of_another_model_is_refused_with_both_shapes(method):
  wider = dataclasses.replace(DENSE, width=40, head_width=10, hidden=56)
  with pytest.raises(ValueError, match=r'another model.*\d+.*\d+'):
    attach(method, small(wider, method))


def test_what_cannot_be_combined_is_refused():
  dora, lora = Lora(3, magnitude=True), Lora(2)
  for arguments, message in (((dora, None, DENSE, 0.5), 'weight=1, not 0.5'), ((Ia3(), None, DENSE, 2.0), 'weight=1'),
                             ((Lora(4), small(DENSE, lora)), 'rank=4'), ((lora, small(DENSE, dora)), 'needs a, b'),
                             ((Prompt(3), small(DENSE, Prompt(4))), 'another model or length'),
                             ((Prefix(30),), '6 tokens with 30 virtual ones.*length=32')):
    with pytest.raises(ValueError, match=message):
      logits(DENSE, attach(*arguments))
  prompt, prefix = (Adapter(small(DENSE, method), method) for method in (Prompt(3), Prefix(3)))
  with pytest.raises(ValueError, match='one prompt at a time'):
    adapters.attach(DENSE, base(DENSE), prompt, prefix)
  for name in ('window', 'alibi', 'dense bigrams'):
    with pytest.raises(ValueError, match=r'attention.patterns|ALiBi|ends.bigrams'):
      attach(Prefix(3), config=CONFIGS[name])
  with pytest.raises(ValueError, match='Prompt needs a decoder'):
    attach(Prompt(3), config=encoders.T5)
