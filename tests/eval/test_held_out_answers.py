"""Scores of answers: nats are those of the logits, answers those of a model that knows them, intervals those of a
normal law."""
import types

import jax
import numpy as np
import pytest

from lmlib.data.chat import Chat
from lmlib.data.conversations import Question
from lmlib.eval import held_out_answers
from lmlib.eval.held_out_answers import Exact, Score, compared, paired
from lmlib.models import protocol
from tests.post import small
from tests.post.small import CONFIG, turns


def question(*said, kind=''):
  messages = turns(*said)
  return Question(f'{said[0]}', messages, Chat().example(messages, small.tokenizer()), kind)


QUESTIONS = [question('say sun', 'sun'), question('and a longer one', 'so it is'), question('a', 'b', 'c', 'the end')]


@pytest.fixture(scope='module')
def params():
  return protocol.init(CONFIG, jax.random.key(0))


def logits_of(params, ids):
  """TV, of one row."""
  padded = np.zeros((1, 96), np.int32)
  padded[0, :len(ids)] = ids
  return np.asarray(apply(params, padded)[0])


apply = jax.jit(lambda params, tokens_BT: CONFIG.model().apply({'params': params}, tokens_BT)[0])


def test_nats_are_those_of_the_logits(params):
  found = held_out_answers.score(CONFIG, params, QUESTIONS, small.tokenizer(), batch=3)
  for one, nats, tokens in zip(QUESTIONS, found.nats_N, found.tokens_N):
    ids, weight = one.example.tokens_T, one.example.weight_T
    logits_TV = logits_of(params, ids)
    logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    want = -sum(logp_TV[t, ids[t + 1]] for t in range(len(ids) - 1) if weight[t + 1])
    assert nats == pytest.approx(want, rel=1e-4)  # float32
    assert tokens == weight.sum()
  assert found.right_N is None


def test_what_the_model_is_asked_is_what_stands_before_the_last_answer():
  tokenizer = small.tokenizer()
  prompt, reference, end = held_out_answers.parts(QUESTIONS[2].example, tokenizer)
  assert prompt == Chat().prompt(QUESTIONS[2].messages[:3], tokenizer).tolist()
  assert (reference, tokenizer.spelling(end)) == ('the end', '<|im_end|>')


def test_answers_are_right_to_the_letter_but_for_white_space(params, monkeypatch):
  said = {tuple(held_out_answers.parts(one.example, small.tokenizer())[0]): text
          for one, text in zip(QUESTIONS, (' sun\n', 'So it is', 'the end'))}
  asked = []

  def generate(config, params, prompts, *, new, eos, temperature):
    asked.append((len(prompts), new, small.tokenizer().spelling(eos), temperature))
    return [small.tokenizer().encode(said[tuple(prompt)]).tolist() for prompt in prompts]

  monkeypatch.setattr(held_out_answers, 'generate', generate)
  found = held_out_answers.score(CONFIG, params, QUESTIONS, small.tokenizer(), Exact(new=9), batch=2)
  assert found.written == (' sun\n', 'So it is', 'the end')
  assert found.right_N.tolist() == [True, False, True]
  assert found.named_N.tolist() == [True, True, True]
  assert asked == [(2, 9, '<|im_end|>', 0.0)] * 2
  few = held_out_answers.score(CONFIG, params, QUESTIONS, small.tokenizer(), Exact(new=9, questions=1), batch=2)
  assert few.right_N.tolist() == [True]
  assert Score.from_json(few.to_json()).to_json() == few.to_json()


@pytest.mark.parametrize(('said', 'reference', 'there'), [
    ('37 + 48 = 85.', '85', True), ('1850', '85', False), ('it is `os.path.join`', 'join', True),
    ('Latin Small Letter a', 'LATIN SMALL LETTER A', True), ('joined', 'join', False), ('a+b', 'a+b', True)])
def test_a_reference_is_named_by_words_of_its_own(said, reference, there):
  assert held_out_answers.names(said, reference) == there


def test_a_model_writes_greedily(params):
  found = held_out_answers.score(CONFIG, params, QUESTIONS[:1], small.tokenizer(), Exact(new=3), batch=3)
  ids = held_out_answers.parts(QUESTIONS[0].example, small.tokenizer())[0]
  for _ in range(3):
    ids.append(int(logits_of(params, ids)[len(ids) - 1].argmax()))
  assert found.written == (small.tokenizer().decode(ids[-3:], continues=True),)


def test_the_interval_is_that_of_the_mean_of_differences():
  random = np.random.default_rng(0)
  before_N = random.normal(5, 3, 400)
  after_N = before_N - random.normal(1, 0.5, 400)  # a large spread of questions, a small one of differences
  difference, low, high = paired(before_N, after_N)
  assert difference == pytest.approx((after_N - before_N).mean())
  wide = 1.96 * (after_N - before_N).std() / 20
  assert (low, high) == pytest.approx((difference - wide, difference + wide), abs=0.15 * wide)
  weighted, _, _ = paired([1.0, 4.0], [2.0, 2.0], [1.0, 4.0])
  assert weighted == pytest.approx(-0.2)


def test_rows_of_a_comparison():
  before = Score(np.array([8.0, 4, 4]), np.array([4, 2, 2]), ('a', 'b', 'c'), np.array([False, True, False]),
                 np.array([True, True, False]))
  after = Score(np.array([4.0, 2, 2]), np.array([4, 2, 2]), ('a', 'b', 'c'), np.array([True, True, True]),
                np.array([True, True, True]))
  kinds = [types.SimpleNamespace(kind=kind, messages=turns('a')) for kind in ('x', 'y', 'x')]
  rows = {row['measure']: row for row in compared(before, after, kinds)}
  assert (rows['nats a token']['before'], rows['nats a token']['after'], rows['nats a token']['high']) == (2, 1, -1)
  assert rows['exact answers']['difference'] == pytest.approx(2 / 3)
  assert rows['named in it']['difference'] == pytest.approx(1 / 3)
  assert (rows['exact, x']['questions'], rows['exact, x']['low']) == (2, 1)
  assert rows['exact, y']['difference'] == 0


@pytest.mark.parametrize(('settings', 'reason'), [({'new': 0}, r'Exact\.new=0'), ({'questions': 0}, r'questions=0')])
def test_settings_out_of_range(settings, reason):
  with pytest.raises(ValueError, match=reason):
    Exact(**settings)


def test_a_kept_score_is_not_made_again(tmp_path):
  score, said = Score(np.array([1.0]), np.array([2])), []
  path = tmp_path / 'before.json'
  assert held_out_answers.kept(path, lambda: score, said.append).to_json() == score.to_json()
  assert held_out_answers.kept(path, None, said.append).to_json() == score.to_json()
  assert len(said) == 1
