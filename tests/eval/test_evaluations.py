"""Evaluations: each gives the figures of the part it stands on, and says before any work what cannot be."""
import dataclasses
import json

import jax
import numpy as np
import pytest

from lmlib import sharding
from lmlib.data import prepare, sources, tokenizer
from lmlib.data.tokenizer import Bytes
from lmlib.eval import evaluation, evaluations, multiple_choice, perplexity, sandbox, written
from lmlib.eval.answers import Answers
from lmlib.eval.candidate import Candidate
from lmlib.eval.evaluations import HumanEval, MultipleChoice, Perplexity, Written
from lmlib.eval.multiple_choice import Style
from lmlib.eval.prompting import Template
from lmlib.models import protocol
from lmlib.train.step import placed
from tests.laws.models import CONFIGS, made

TOKENIZER = Bytes().train()
CONFIG = dataclasses.replace(CONFIGS['dense'], vocab=TOKENIZER.vocab, layers=1, length=256)


@pytest.fixture(scope='module')
def candidate():
  return Candidate('tiny', CONFIG, made(CONFIG), TOKENIZER)


@pytest.fixture
def said(monkeypatch):
  """What a model would write, by the prompt; the settings it was asked with."""
  texts, asked = {}, []

  def write(self, *, chat=False, **settings):
    asked.append({'chat': chat, **settings})
    return lambda prompts: [texts[prompt] if isinstance(texts[prompt], str) else texts[prompt].pop(0)
                            for prompt in prompts]

  monkeypatch.setattr(Candidate, 'writer', write)
  return texts, asked


@pytest.fixture
def mmlu(tmp_path):
  for split, row in (('dev', 'One?,a,b,A\nTwo?,a,b,B\n'), ('test', 'Three?,a,b,A\nFour?,a,b,B\nFive?,a,b,B\n')):
    (tmp_path / split).mkdir()
    for subject in ('art', 'law'):
      (tmp_path / split / f'{subject}_{split}.csv').write_text(row)
  return str(tmp_path)


def test_perplexity_is_that_of_the_documents_by_folder(candidate, tmp_path):
  for name, text in (('a/1.txt', 'hello'), ('a/2.txt', 'wörld'), ('b/3.txt', 'x' * 40)):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  one = Perplexity(sources.TextFiles(f'{tmp_path}/*/*.txt'), length=16, batch=4)
  one.check()
  of_bytes, of_characters = one.run(candidate)
  documents = [([TOKENIZER.bos, *TOKENIZER.encode(text).tolist(), TOKENIZER.eos], len(text.encode()), len(text))
               for text in ('hello', 'wörld', 'x' * 40)]
  score = perplexity.score(CONFIG, candidate.params, documents, length=16, stride=8, batch=4)
  assert of_bytes.score == pytest.approx(score.bits_per_byte)
  assert of_characters.score == pytest.approx(score.bits_per_character)
  assert of_bytes.facts['perplexity'] == pytest.approx(score.perplexity)
  assert of_bytes.facts['compressors_bits_per_byte'].keys() == {'gzip', 'bzip2', 'xz', 'xz, all as one'}
  assert list(of_bytes.by_group()) == [f'{tmp_path}/a', f'{tmp_path}/b']
  assert not of_bytes.higher_is_better


def test_perplexity_of_a_store_is_of_what_it_holds_out(candidate, tmp_path, monkeypatch):
  monkeypatch.setenv('LMLIB_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'x.jsonl').write_text(''.join(json.dumps({'text': f'text {n} ' * 3}) + '\n' for n in range(40)))
  files = sources.TextFiles(f'{tmp_path}/x.jsonl', field='text')
  prepared = prepare.prepare(prepare.Corpus(files, tokenizer.Bytes(), held_out=0.2), say=lambda _: None)
  one = Perplexity(prepare.Stored(str(prepared.train.path.parent)), length=16, batch=4, compressors=False)
  one.check()
  of_bytes, _ = one.run(candidate)
  assert len(of_bytes.values) == prepared.held_out.documents
  assert sum(of_bytes.weights) == prepared.held_out.text_bytes


def test_multiple_choice_is_by_subject_with_confidence(candidate, mmlu):
  one = MultipleChoice(mmlu, Style(shots=1), limit=2, batch=4)
  one.check()
  result, = one.run(candidate)
  questions = [each for each in multiple_choice.read(mmlu, 'test') if each.text != 'Five?']
  found = multiple_choice.score(CONFIG, candidate.params, TOKENIZER, questions, multiple_choice.read(mmlu, 'dev'),
                                style=Style(shots=1), batch=4)
  np.testing.assert_allclose(result.values, found.right_N)
  np.testing.assert_allclose(result.confidence, [max(each) for each in found.probabilities], rtol=1e-4)  # float32
  assert result.by_group() == found.subjects()
  assert result.facts['fewest_shots'] == 1


def test_scores_do_not_depend_on_the_mesh(candidate, mmlu):
  """As inside training: weights lie on eight devices."""
  one = MultipleChoice(mmlu, Style(shots=1), limit=1, batch=4)
  with sharding.use(sharding.Layout(data=2, fsdp=2, tensor=2)):
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), candidate.params,
                          placed(protocol.boxed(CONFIG)))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    there = dataclasses.replace(candidate, params=params, answers=Answers())
    found = one.run(there)[0], there.writer(new=3, batch=2)(['ab', 'c'])
  here = dataclasses.replace(candidate, answers=Answers())
  expected = one.run(here)[0], here.writer(new=3, batch=2)(['ab', 'c'])
  np.testing.assert_allclose(found[0].confidence, expected[0].confidence, rtol=1e-4)  # float32 sums in another order
  assert found[1] == expected[1]


def test_written_choices_think_and_vote(candidate, mmlu, said):
  texts, asked = said
  one = Written(written.Choices(mmlu), Template('chain_of_thought'), rules=('letter',), samples=3, temperature=0.7,
                chat=True)
  one.check()
  for text in ('Three?', 'Four?', 'Five?'):
    prompt = f"Question: {text}\nA. a\nB. b\nAnswer: Let's think step by step."
    texts[prompt] = ['So the answer is A.', 'The answer is B.', 'The answer is (A)'] * 2
  result, = one.run(candidate)
  assert result.values == (1, 0, 0) * 2
  assert result.by_group() == {'art': pytest.approx(1 / 3), 'law': pytest.approx(1 / 3)}
  assert asked == [{'chat': True, 'new': 256, 'stops': ('\n\nQuestion:',), 'temperature': 0.7, 'seed': 0}]


def test_written_answers_have_examples_and_metrics(candidate, tmp_path, said):
  texts, _ = said
  (tmp_path / 'q.jsonl').write_text('{"question": "2+2?", "answer": "4"}\n'
                                    '{"question": "3+3?", "answer": ["6", "six"]}\n')
  (tmp_path / 'shots.jsonl').write_text('{"question": "1+1?", "answer": "2"}\n')
  one = Written(written.QuestionFile(f'{tmp_path}/q.jsonl'), Template('few_shot'), examples=f'{tmp_path}/shots.jsonl',
                shots=1, metrics=('accuracy', 'exact_match', 'chrf'), rules=('number',))
  one.check()
  for text, written_answer in (('2+2?', 'It is 4.'), ('3+3?', 'six')):
    texts[f'Question: 1+1?\nAnswer: 2\n\nQuestion: {text}\nAnswer:'] = written_answer
  accuracy, exact, chrf = one.run(candidate)
  assert (accuracy.values, exact.values) == ((1, 0), (0, 1))
  assert accuracy.facts['without_answer'] == 1
  assert chrf.alone > 0


def test_humaneval_runs_what_the_model_writes(candidate, tmp_path, said):
  texts, asked = said
  prompt = 'def add(a, b):\n'
  (tmp_path / 'problems.jsonl').write_text(json.dumps({
      'task_id': 'x/0', 'prompt': prompt, 'entry_point': 'add', 'canonical_solution': '',
      'test': 'def check(add):\n  assert add(1, 2) == 3\n'}) + '\n')
  one = HumanEval(f'{tmp_path}/problems.jsonl', samples=2, ks=(1, 2), temperature=0.8,
                  limits=sandbox.Limits(make_do=True))
  one.check()
  texts[prompt] = ['  return a + b\n', '  return a - b\n']
  one_of, any_of = one.run(candidate)
  assert ((one_of.metric, one_of.values), (any_of.metric, any_of.values)) == (('pass@1', (0.5,)), ('pass@2', (1.0,)))
  assert one_of.facts['samples'] == 2
  assert asked[0]['temperature'] == 0.8


NO_FILE = written.QuestionFile('/nowhere.jsonl')


@pytest.mark.parametrize(('wrong', 'said'), [
    (Perplexity(sources.TextFiles('/nowhere/*.txt')), r'nowhere.*no file'),
    (Perplexity(None, stride=9, length=8), 'stride=9 must not exceed Perplexity.length=8'),
    (Perplexity(None, limit=0), 'Perplexity.limit=0'), (MultipleChoice('/nowhere'), "no questions of split='test'"),
    (Written(NO_FILE), 'no file'), (Written(NO_FILE, metrics=('bleu', 'bliss')), r"\['bliss'\] must be of accuracy"),
    (Written(NO_FILE, samples=3), r'samples=3 vote, which needs temperature=0.0 above 0'),
    (Written(NO_FILE, samples=3, temperature=1.0, metrics=('f1',)), "of 'accuracy' alone"),
    (Written(NO_FILE, shots=2), r'shots=2 and Written.examples=None: both'),
    (Written(NO_FILE, rules=('guess',)), "'guess' must be one of"), (Written(NO_FILE, language='fr'), "language='fr'"),
    (HumanEval(ks=(1, 5)), r'ks=\(1, 5\) must lie between 1 and HumanEval.samples=1'),
    (HumanEval(samples=2), 'samples=2 has no effect with temperature=0.0'),
    (evaluations.Harness(()), 'names no task'), (evaluations.Harness(('a',), shots=-1), 'shots=-1')])
def test_what_is_wrong_is_said_before_any_work(wrong, said):
  with pytest.raises(ValueError, match=said):
    wrong.check()


def test_more_examples_than_there_are_is_said_with_both_numbers(mmlu):
  with pytest.raises(ValueError, match=r"Style.shots=5, but art has 2 examples in the split 'dev'"):
    MultipleChoice(mmlu).check()


@pytest.mark.parametrize(('wrong', 'said'), [
    ((), r'evaluations=\(\) names none'),
    ((HumanEval(), HumanEval()), "two evaluations have name='humaneval'")])
def test_what_does_not_go_together_is_refused(wrong, said):
  with pytest.raises(ValueError, match=said):
    evaluation.check(wrong)
