"""What fine-tuning learns, and from what: answers alone, each conversation as if it stood alone; an adapter alone."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import trees
from lmlib.data.chat import Chat
from lmlib.data.conversations import Examples, Rows
from lmlib.models import protocol
from lmlib.nn.lora import Lora
from lmlib.nn.prompts import Prompt
from lmlib.optim.adamw import AdamW
from lmlib.optim.schedules import Constant
from lmlib.post.sft import Tuning
from lmlib.train import losses, step
from tests.post import small
from tests.post.small import CONFIG, LEARNED, turns

SAID = [('say sun', 'sun'), ('say moon and more', 'moon it is'), ('one', 'two', 'three', 'four')]
LORA = Lora(rank=2, targets=None)


def examples(*said):
  return Examples.of([(str(i), Chat().example(turns(*one), small.tokenizer())) for i, one in enumerate(said)])


def rows(*said, length=256):
  """One row that holds all."""
  found = Rows(examples(*said), 1, length, 0)
  assert found.rows_per_epoch == 1
  return found.batch_at(0)


def moved(params):
  """The weights of a model that says something about every token."""
  keys = jax.random.split(jax.random.key(9), len(jax.tree.leaves(params)))
  return jax.tree.unflatten(jax.tree.structure(params), [
      x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(jax.tree.leaves(params), keys)])


@pytest.fixture(scope='module', params=[CONFIG, LEARNED], ids=['rotary', 'learned positions'])
def model(request):
  config = request.param if request.param is CONFIG else LEARNED
  return config, moved(protocol.init(config, jax.random.key(1)))


def test_packed_conversations_do_not_see_each_other(model):
  config, params = model
  gradient = jax.jit(jax.value_and_grad(lambda params, batch: losses.NextToken().of(config)(params, batch)[0]))
  packed = gradient(params, rows(*SAID))
  alone = [gradient(params, rows(one)) for one in SAID]
  # float32 sums in another order
  assert float(packed[0]) == pytest.approx(sum(float(loss) for loss, _ in alone), rel=1e-5)
  for name, g in trees.flat(packed[1]).items():
    want = sum(trees.flat(one)[name] for _, one in alone)
    np.testing.assert_allclose(g, want, atol=2e-5 * max(1, float(jnp.abs(want).max())), err_msg=name)


def test_the_loss_is_of_answers_alone_counted_by_hand(model):
  config, params = model
  batch = rows(SAID[0])
  total, weight, _ = jax.jit(losses.NextToken().of(config))(params, batch)
  ids = Chat().example(turns(*SAID[0]), small.tokenizer()).tokens_T
  tokenizer = small.tokenizer()
  answer = [*tokenizer.encode('sun', continues=True).tolist(), tokenizer.specials['<|im_end|>'].id]
  start = max(i for i in range(len(ids)) if ids[i:i + len(answer)].tolist() == answer)  # the question ends so too
  logits_BTV, _ = jax.jit(config.model().apply)({'params': params}, ids[None])
  logp_TV = np.asarray(jax.nn.log_softmax(logits_BTV[0]))
  assert weight == len(answer)
  assert float(total) == pytest.approx(-sum(logp_TV[start + k - 1, token] for k, token in enumerate(answer)), rel=1e-4)


def test_what_is_no_answer_has_no_gradient():
  """Of the logits at every place: zero wherever the next token is not one of an answer."""
  params = moved(protocol.init(CONFIG, jax.random.key(1)))
  batch, model = rows(*SAID), CONFIG.model()
  found = losses.NextToken().of(CONFIG)

  def shifted(more_BTD):
    """The loss with something added to what the model says at each place, through the matrix that scores."""
    x_BTD = model.apply({'params': params}, batch['tokens_BT'], batch['segments_BT'], method='hidden')[0] + more_BTD
    logits_BTV = x_BTD @ model.apply({'params': params}, method='unembed')
    logp_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), batch['targets_BT'][..., None], 2)[..., 0]
    return -(logp_BT * batch['weight_BT']).sum()

  zero_BTD = jnp.zeros((1, 256, CONFIG.width))
  value, g_BTD = jax.jit(jax.value_and_grad(shifted))(zero_BTD)
  assert float(value) == pytest.approx(float(jax.jit(found)(params, batch)[0]), rel=1e-5)
  learned_BT = jnp.abs(g_BTD).max(-1) > 0
  np.testing.assert_array_equal(learned_BT, batch['weight_BT'] > 0)


def trained(adapter, four_bits=False, steps=12):
  tuning = Tuning(CONFIG, adapter, four_bits)
  base = tuning.held(protocol.init(CONFIG, jax.random.key(1)))
  before = jax.tree.map(np.array, base)
  transformation = AdamW(Constant(peak=0.02), decay=None).transformation(tuning.letters(), steps)
  state = tuning.state(base, transformation, jax.random.key(0))
  run = step.compiled(tuning.loss(losses.NextToken()), transformation, 1, tuning.shapes(transformation))
  first = None
  for _ in range(steps):
    state, metrics = run(state, rows(*SAID), *tuning.frozen(base))
    first = first or float(metrics['loss'])
  return tuning, base, before, state, first, float(metrics['loss'])


@pytest.mark.parametrize(('adapter', 'four_bits', 'fall'), [  # four vectors move a model at random but a little
    (None, False, 0.5), (LORA, False, 0.5), (LORA, True, 0.5), (Prompt(length=4), False, 0.05)],
                         ids=['all', 'lora', 'qlora', 'prompt'])
def test_tuning_learns_and_leaves_the_base_as_it_was(adapter, four_bits, fall):
  tuning, base, before, state, first, last = trained(adapter, four_bits)
  assert last < first - fall
  for name, x in trees.flat(base).items():
    np.testing.assert_array_equal(x, trees.flat(before)[name], err_msg=name)
  params = tuning.params(state.params, *tuning.frozen(base))
  total, weight, _ = jax.jit(losses.NextToken().of(CONFIG))(params, rows(*SAID))
  assert float(total / weight) < first - fall, 'the model that comes out is the tuned one'


def test_only_the_adapter_has_a_state():
  adapter, whole = (Tuning(CONFIG, one).facts(AdamW(Constant(peak=0.1)), 9, 4) for one in (LORA, None))
  count = trees.count(protocol.boxed(CONFIG))
  assert (adapter['parameters'], whole['trained'], whole['parameters']) == (count, count, count)
  assert adapter['trained'] == sum(
      2 * 2 * (16 + out) for out in (16, 16, 16)) + 2 * 2 * (16 + 16) + 3 * 2 * 2 * (16 + 32)
  near = lambda size, numbers: 8 * numbers <= size <= 8 * numbers + 64  # two moments in float32, and counts
  assert near(adapter['optimizer_bytes'], adapter['trained'])
  assert near(whole['optimizer_bytes'], count)
  assert adapter['optimizer_bytes_of_all'] == whole['optimizer_bytes'] == whole['optimizer_bytes_of_all']


def test_an_adapter_of_parts_that_the_model_lacks_is_refused():
  with pytest.raises(ValueError, match=r'Lora\.targets'):
    Tuning(CONFIG, Lora(targets=('query',))).boxed()


def test_four_bits_are_of_what_is_not_trained():
  with pytest.raises(ValueError, match=r'four_bits=True .* adapter=None trains all of them'):
    Tuning(CONFIG, four_bits=True)
