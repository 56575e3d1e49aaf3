"""Multiple choice: the published forms are read, prompts are the papers', and the likeliest answer is chosen."""
import dataclasses
import math

import pytest

from lmlib.data.tokenizer import Bytes
from lmlib.eval import loglikelihood, multiple_choice
from lmlib.eval.loglikelihood import Likelihood
from lmlib.eval.multiple_choice import Question, Score, Style, read, score
from lmlib.eval.prompting import Template
from tests.laws.models import CONFIGS, made

CONFIG = dataclasses.replace(CONFIGS['dense'], vocab=300, length=512)
TOKENIZER = Bytes().train()
EXAMPLE = Question('high_school_physics', 'What falls?', ('a stone', 'a thought'), 0)
QUESTION = Question('high_school_physics', 'What flies?', ('a cat', 'a bird', 'a fish'), 1)


def test_the_prompt_is_that_of_the_paper():
  assert Template('mmlu').prompt(QUESTION, [EXAMPLE], subject=QUESTION.subject) == (
      'The following are multiple choice questions (with answers) about high school physics.\n\n'
      'What falls?\nA. a stone\nB. a thought\nAnswer: A\n\nWhat flies?\nA. a cat\nB. a bird\nC. a fish\nAnswer:')
  assert Template('ceval').prompt(QUESTION, [EXAMPLE], subject='物理') == (
      '以下是中国关于物理考试的单项选择题，请选出其中的正确答案。\n\nWhat falls?\nA. a stone\nB. a thought\n答案：A\n\n'
      'What flies?\nA. a cat\nB. a bird\nC. a fish\n答案：')
  assert Template('cmmlu').prompt(QUESTION, subject='物理') == (
      '以下是关于物理的单项选择题，请直接给出正确答案的选项。\n\n题目：What flies?\n'
      'A. a cat\nB. a bird\nC. a fish\n答案是：')


@pytest.fixture
def said(monkeypatch):
  """Likelihoods by the text of what is scored; what was asked."""
  asked, logp = [], {}

  def scores(config, params, requests, *, batch):
    texts = [TOKENIZER.decode(one.continuation) for one in requests]
    asked.extend(zip([TOKENIZER.decode(one.context) for one in requests], texts))
    return [Likelihood(logp[text], False, len(one.continuation)) for one, text in zip(requests, texts)]

  monkeypatch.setattr(loglikelihood, 'score', scores)
  return asked, logp


def test_the_likeliest_letter_is_chosen(said):
  asked, logp = said
  logp |= {' A': -1.0, ' B': -0.5, ' C': -3.0}
  other = dataclasses.replace(QUESTION, subject='law', answer=0)
  found = score(CONFIG, None, TOKENIZER, [QUESTION, other], [EXAMPLE, dataclasses.replace(EXAMPLE, subject='law')],
                style=Style(shots=1))
  assert found.chosen == [1, 1]
  assert found.subjects() == {'high_school_physics': 1, 'law': 0}
  total = sum(map(math.exp, logp.values()))
  assert found.probabilities[0] == pytest.approx([math.exp(x) / total for x in logp.values()])
  assert [text for _, text in asked] == [' A', ' B', ' C'] * 2
  assert 'about law.' in asked[3][0]
  figures = found.figures()
  assert (figures['accuracy'], figures['macro'], figures['questions']) == (0.5, 0.5, 2)
  assert figures['accuracy_interval'] == [0, 1]


def test_texts_are_normalised_by_their_length(said):
  """-6 for 5 bytes, -6.5 for 6, -5.9 for 4: raw the last, by byte the second."""
  _, logp = said
  logp |= {' seven': -6.0, ' eleven': -6.5, ' ten!': -5.9}
  question = dataclasses.replace(QUESTION, choices=('seven', 'eleven', 'ten!'))
  chosen = lambda norm: score(CONFIG, None, TOKENIZER, [question], [],
                              style=Style(shots=0, answers='texts', norm=norm)).chosen
  assert chosen(None) == [2]
  assert chosen('bytes') == chosen('characters') == [1]
  logp |= {' 七七': -6.0, ' eight': -5.5, ' ten!': -5.9}  # 6 bytes, 2 characters
  question = dataclasses.replace(QUESTION, choices=('七七', 'eight', 'ten!'))
  assert chosen('bytes') == [0]
  assert chosen('characters') == [1]


def test_chinese_answers_follow_without_a_space(said):
  asked, logp = said
  logp |= {'A': -1.0, 'B': -2.0, 'C': -3.0}
  score(CONFIG, None, TOKENIZER, [QUESTION], [], style=Style(Template('ceval'), shots=0))
  assert asked[0][0].endswith('答案：')


def test_examples_that_do_not_fit_are_left_out_and_counted(said):
  _, logp = said
  logp |= {' A': -1.0, ' B': -2.0, ' C': -3.0}
  long = dataclasses.replace(EXAMPLE, text='What falls? ' * 25)
  found = score(CONFIG, None, TOKENIZER, [QUESTION], [EXAMPLE, long], style=Style(shots=2))
  assert found.shots == (1,)
  assert found.figures()['fewest_shots'] == 1
  with pytest.raises(ValueError, match='length=16'):
    score(dataclasses.replace(CONFIG, length=16), None, TOKENIZER, [QUESTION], [], style=Style(shots=0))
  with pytest.raises(ValueError, match=r'shots=5.*high_school_physics has 2'):
    score(CONFIG, None, TOKENIZER, [QUESTION], [EXAMPLE, long])


def test_a_real_model_chooses_what_it_finds_likeliest():
  params = made(CONFIG)
  question = dataclasses.replace(QUESTION, subject='x')
  found = score(CONFIG, params, TOKENIZER, [question], [], style=Style(shots=0), batch=4)
  prompt = Template('mmlu').prompt(question, subject='x')
  asked = [loglikelihood.request(TOKENIZER, prompt, text) for text in (' A', ' B', ' C')]
  logp = [one.logp for one in loglikelihood.score(CONFIG, params, asked, batch=4)]
  assert found.chosen == [logp.index(max(logp))]


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding='utf-8')


def test_the_published_forms_are_read(tmp_path):
  write(tmp_path / 'mmlu/test/law_test.csv', '"Is ""it""?\nSay",yes,no,maybe,never,C\n')
  write(tmp_path / 'mmlu/dev/law_dev.csv', 'x,a,b,c,d,A\n')
  write(tmp_path / 'ceval/val/law_val.csv', 'id,question,A,B,C,D,answer\n0,问,甲,乙,丙,丁,D\n')
  write(tmp_path / 'cmmlu/test/law.csv', ',Question,A,B,C,D,Answer\n0,问,甲,乙,丙,丁,B\n')
  assert read(tmp_path / 'mmlu', 'test') == [Question('law', 'Is "it"?\nSay', ('yes', 'no', 'maybe', 'never'), 2)]
  assert read(tmp_path / 'mmlu', 'dev')[0].answer == 0
  assert read(tmp_path / 'ceval', 'val') == [Question('law', '问', ('甲', '乙', '丙', '丁'), 3)]
  assert read(tmp_path / 'cmmlu', 'test', ['law']) == [Question('law', '问', ('甲', '乙', '丙', '丁'), 1)]


def test_parquet_is_read(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet
  for name, columns in (('mmlu', {'question': ['q'], 'subject': ['law'], 'choices': [['a', 'b']], 'answer': [1]}),
                        ('ceval', {'id': [0], 'question': ['q'], 'A': ['a'], 'B': ['b'], 'answer': ['B']})):
    path = tmp_path / name / 'law' / 'test-00000-of-00001.parquet'
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table(columns), path)
    assert read(tmp_path / name, 'test') == [Question('law', 'q', ('a', 'b'), 1)]


def test_faults_of_a_folder_are_named(tmp_path):
  write(tmp_path / 'test/law_test.csv', 'x,a,b,c,d,A\ny,a,b,c,d,\n')
  with pytest.raises(ValueError, match=r'law_test.csv, question 1 has no question.*answer'):
    read(tmp_path, 'test')
  with pytest.raises(ValueError, match="split='val'"):
    read(tmp_path, 'val')
  with pytest.raises(ValueError, match='of physics; it has law'):
    read(tmp_path, 'test', ['physics'])


@pytest.mark.parametrize(('settings', 'said'), [
    ({'shots': -1}, 'shots=-1'), ({'answers': 'numbers'}, "answers='numbers'"), ({'norm': 'words'}, "norm='words'"),
    ({'norm': 'bytes'}, "norm='bytes' has no effect")])
def test_styles_that_cannot_be_are_refused(settings, said):
  with pytest.raises(ValueError, match=said):
    Style(**settings)


def test_calibration_is_of_the_chosen():
  found = Score((QUESTION, QUESTION), ((0.1, 0.8, 0.1), (0.6, 0.4, 0.0)), (0, 0)).figures()
  assert found['calibration_error'] == pytest.approx((0.2 + 0.6) / 2)
  assert found['brier'] == pytest.approx(((0.01 + 0.04 + 0.01) + (0.36 + 0.36)) / 2)


def test_no_questions_are_refused():
  with pytest.raises(ValueError, match='no questions'):
    multiple_choice.score(CONFIG, None, TOKENIZER, [], [])
