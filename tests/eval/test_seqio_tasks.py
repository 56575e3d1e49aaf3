"""seqio's tasks: their metrics get what the model writes and how likely it finds the targets."""
import dataclasses
import sys

import jax
import numpy as np
import pytest

from lmlib.data import tasks
from lmlib.data.tokenizer import Bytes
from lmlib.data.vocabulary import vocabulary
from lmlib.eval.candidate import Candidate
from lmlib.eval.loglikelihood import Likelihood
from lmlib.eval.seqio_tasks import SeqioTask
from tests.laws.encoders import made
from tests.laws.models import CONFIGS

pytestmark = [pytest.mark.filterwarnings('ignore'),
              pytest.mark.skipif(sys.platform != 'linux', reason='seqio needs TensorFlow Text: Linux only')]
TOKENIZER = Bytes().train()
SUMS = [('2+2=', '4'), ('三+一=', '四'), ('1+1=', '3')]


@pytest.fixture(scope='module')
def seqio():
  import seqio
  return seqio


@pytest.fixture(autouse=True)
def registries(seqio):
  """What a test registers is gone when it ends."""
  yield
  seqio.TaskRegistry.reset()
  seqio.MixtureRegistry.reset()


def right(targets, predictions):
  return {'right': sum(a == b for a, b in zip(targets, predictions)) / len(targets)}


def nats(targets, scores):
  return {'nats': -sum(scores), 'first': scores[0]}


def add(seqio, name='sums', examples=SUMS, metrics=(right,), features=('inputs', 'targets'), tokenizer=TOKENIZER):
  import tensorflow as tf

  def read(split, shuffle_files, seed=None):
    columns = {name: [pair[i] for pair in examples] for i, name in enumerate(('inputs', 'targets')) if name in features}
    return tf.data.Dataset.from_tensor_slices(columns)

  made_of = vocabulary(tokenizer)
  return seqio.TaskRegistry.add(
      name, source=seqio.FunctionDataSource(read, splits=['validation']), metric_fns=list(metrics),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features={name: seqio.Feature(made_of) for name in features})


def never(rows):
  raise AssertionError('not to be asked')


def test_predictions_are_what_is_written_behind_the_inputs(seqio):
  add(seqio)
  asked = []
  written = {'2+2=': '4', '三+一=': '四', '1+1=': '2'}

  def write(rows):
    asked.extend(rows)
    return [written[TOKENIZER.decode(row)] for row in rows]

  score = SeqioTask('sums').score(TOKENIZER, write, never)
  assert score.metrics == {'sums': {'right': pytest.approx(2 / 3)}}
  assert score.examples == {'sums': 3}
  assert asked == [TOKENIZER.prompt(text) for text, _ in SUMS], 'as prompts are elsewhere, without eos'
  assert SeqioTask('sums', limit=2).score(TOKENIZER, write, never).figures() == {
      'tasks': {'sums': {'right': 1.0}}, 'examples': {'sums': 2}, 'cut': 0}


def test_a_mixture_of_both_kinds_in_one_go(seqio):
  add(seqio, 'written', metrics=(right, nats))
  add(seqio, 'read', SUMS[:1], metrics=(nats,))
  add(seqio, 'plain', metrics=())
  tasks.add_mixture('all', {'written': 1, 'read': 1, 'plain': 1})
  likelihoods = lambda requests: [Likelihood(-float(len(one.continuation)), False, 1, cut=2) for one in requests]
  score = SeqioTask('all').score(TOKENIZER, lambda rows: ['4'] * len(rows), likelihoods)
  assert score.metrics == {'written': {'right': pytest.approx(1 / 3), 'nats': 2 + 4 + 2, 'first': -2},
                           'read': {'nats': 2, 'first': -2}}
  assert score.examples == {'written': 3, 'read': 1}
  assert score.cut == 4


def test_a_model_is_evaluated(seqio):
  """Its scores against one forward pass over inputs, targets and eos."""
  add(seqio, metrics=(right, nats))
  config = dataclasses.replace(CONFIGS['dense'], vocab=300, layers=1)
  params = made(config)
  evaluation = SeqioTask('sums', limit=2, new=4, batch=4, lower_is_better=('nats',))
  evaluation.check()
  found = {one.metric: one for one in evaluation.run(Candidate('m', config, params, TOKENIZER))}
  assert found.keys() == {'right', 'nats', 'first'}
  assert found['right'].score in (0, 0.5, 1)
  assert [found['right'].higher_is_better, found['nats'].higher_is_better] == [True, False]
  assert found['right'].facts == {'examples': 2, 'cut': 0}
  row_BT, expected = np.zeros((2, 24), np.int32), []
  parts = [(TOKENIZER.prompt(a), [*TOKENIZER.encode(b).tolist(), TOKENIZER.eos]) for a, b in SUMS[:2]]
  for row_T, (before, after) in zip(row_BT, parts):
    row_T[:len(before + after)] = before + after
  logp_BTV = jax.nn.log_softmax(config.model().apply({'params': params}, row_BT)[0])
  for logp_TV, (before, after) in zip(logp_BTV, parts):
    expected.append(sum(float(logp_TV[len(before) + i - 1, token]) for i, token in enumerate(after)))
  assert found['nats'].score == pytest.approx(-sum(expected), rel=1e-4)  # float32, two programs
  assert found['first'].score == pytest.approx(expected[0], rel=1e-4)


def test_inputs_that_are_cut_are_counted(seqio, monkeypatch):
  add(seqio, examples=[('2+2=' * 10, '4'), *SUMS])
  monkeypatch.setattr(Candidate, 'texts', lambda self, rows, **settings: ['4'] * len(rows))
  config = dataclasses.replace(CONFIGS['dense'], vocab=300, layers=1)  # of length 32
  one, = SeqioTask('sums', new=8).run(Candidate('m', config, None, TOKENIZER))
  assert one.facts == {'examples': 4, 'cut': 1}


def test_targets_alone_follow_what_begins_a_document(seqio):
  add(seqio, metrics=(nats,), features=('targets',))
  asked = []

  def likelihoods(requests):
    asked.extend(requests)
    return [Likelihood(-1.0, False, 1)] * len(requests)

  SeqioTask('sums').score(TOKENIZER, never, likelihoods)
  assert {one.context for one in asked} == {tuple(TOKENIZER.prompt('')) or (TOKENIZER.eos,)}
  assert asked[0].continuation == (*TOKENIZER.encode('4').tolist(), TOKENIZER.eos)


def test_what_cannot_be_evaluated_is_refused(seqio):
  add(seqio)
  with pytest.raises(ValueError, match=r"^SeqioTask\.task='sum' is no registered task.*did you mean sums"):
    SeqioTask('sum').check()
  with pytest.raises(ValueError, match=r"^SeqioTask\.split='test' is no split of sums, which has validation"):
    SeqioTask('sums', 'test').check()
  with pytest.raises(ValueError, match=r"^SeqioTask\.module='no_such_module' cannot be imported"):
    SeqioTask('sums', module='no_such_module').check()
  add(seqio, 'plain', metrics=())
  with pytest.raises(ValueError, match="task='plain' has no metric_fns"):
    SeqioTask('plain').check()
  with pytest.raises(ValueError, match='limit=0'):
    SeqioTask('sums', limit=0).check()
  other = Bytes(('<|a|>',)).train()
  with pytest.raises(ValueError, match=r"sums: the vocabulary of '(inputs|targets)' is Vocabulary, and not that of"):
    SeqioTask('sums').score(other, never, never)
  add(seqio, 'odd', metrics=(lambda targets, predictions: {'x': float('nan')},))
  with pytest.raises(ValueError, match="odd: the metric 'x' is nan"):
    SeqioTask('odd').score(TOKENIZER, lambda rows: ['4'] * len(rows), never)
