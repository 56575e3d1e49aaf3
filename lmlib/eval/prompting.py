"""Prompts from templates, answers out of what a model writes, and votes over several of its answers.

Templates are Jinja files, of templates/ beside this file or one's own: zero_shot, few_shot (Brown et al. 2020),
chain_of_thought (Wei et al. 2022; without examples Kojima et al. 2022), mmlu, ceval, cmmlu. An answer is what a
stated rule finds in the text; where it finds none there is none, which is counted and never guessed.
"""
from collections import Counter
from collections.abc import Sequence
import dataclasses
import pathlib
import re

from lmlib.data import chat
from lmlib.eval.writing import Writer

FOLDER = pathlib.Path(__file__).with_name('templates')
NUMBER = r'[-−]?\$?\d[\d,，]*(?:\.\d+)?|[-−]?\.\d+'
# What each rule takes: the last place where its pattern stands.
RULES = {
    'number': (rf'({NUMBER})', 'the last number of the text'),
    'marked': (rf'####\s*({NUMBER})', "the number behind the last '####' (GSM8K)"),
    'boxed': (r'\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}', r'what stands in the last \boxed{} (MATH)'),
    'said': (r'(?:[Tt]he (?:final )?answer is|答案(?:是|为)?)\s*[:：]?\s*(.+?)\s*[.。]?\s*(?:\n|$)',
             "what follows the last 'the answer is', or '答案是', on its line, without the full stop"),
    'letter': (r'(?:[Aa]nswer(?: is)?|答案(?:是|为)?|选项?)\s*[:：]?\s*\(?([A-J])(?![A-Za-z])',
               "the letter behind the last 'answer is', 'Answer:', '答案是' or '选'"),
    'only letter': (r'^\s*\(?([A-J])(?![A-Za-z])', 'the letter that the text begins with')}


@dataclasses.dataclass(frozen=True)
class Shot:
  """An example in a prompt."""
  question: str
  answer: str
  thought: str = ''  # the steps to the answer, for chain_of_thought


@dataclasses.dataclass(frozen=True)
class Template:
  """A Jinja file: a name of templates/, or a path that ends in .jinja."""
  name: str = 'few_shot'

  def __post_init__(self):
    if not self.path.is_file():
      known = ', '.join(sorted(path.stem for path in FOLDER.glob('*.jinja')))
      raise ValueError(f'Template.name={self.name!r} is no file; name one that ends in .jinja, or one of {known}')
    try:
      chat.compiled(self.text)
    except ValueError as error:
      raise ValueError(f'Template.name={self.name!r}: {error}') from error

  @property
  def path(self) -> pathlib.Path:
    return pathlib.Path(self.name).expanduser() if self.name.endswith('.jinja') else FOLDER / f'{self.name}.jinja'

  @property
  def text(self) -> str:
    """The file, without the end of its last line: a prompt ends where the answer begins."""
    return self.path.read_text(encoding='utf-8').removesuffix('\n')

  def prompt(self, question, shots: Sequence = (), **variables) -> str:
    """The prompt for a question. ValueError if the template fails, or writes nothing of the question."""
    import jinja2
    text = getattr(question, 'text', question)
    try:
      found = chat.compiled(self.text).render(question=question, shots=shots, **variables)
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(f'Template.name={self.name!r} fails: {error}') from error
    if text not in found:
      raise ValueError(f'Template.name={self.name!r} leaves out the question {text[:60]!r}')
    return found


@dataclasses.dataclass(frozen=True)
class Vote:
  """What most of several texts answer."""
  answer: str | None  # None: no text had an answer
  share: float  # of all texts, those that gave it
  counts: dict[str, int]  # by answer, in the order in which they came
  none: int  # texts without an answer


def answer(text: str, rules: Sequence[str]) -> str | None:
  """The answer in a text: of the first rule that finds one. None if none does.

  Numbers lose their currency sign, separators and trailing zeros, so that 1,000.00 is 1000.
  """
  for rule in rules:
    if rule not in RULES:
      raise ValueError(f'rules={tuple(rules)}: {rule!r} must be one of ' + '; '.join(
          f'{name!r}, {what}' for name, (_, what) in RULES.items()))
    found = re.findall(RULES[rule][0], text)
    if found:
      return number(found[-1]) or found[-1].strip()
  return None


def number(text: str) -> str | None:
  """A number in its plainest form; None of what is no number."""
  plain = text.strip().replace('−', '-').replace('$', '').replace(',', '').replace('，', '')
  if not re.fullmatch(r'-?(\d+(\.\d+)?|\.\d+)', plain):
    return None
  whole, _, part = plain.partition('.')
  sign, whole, part = '-' * whole.startswith('-'), whole.lstrip('-').lstrip('0') or '0', part.rstrip('0')
  found = f'{whole}.{part}' if part else whole
  return found if found == '0' else sign + found


def vote(answers: Sequence[str | None]) -> Vote:
  """The answer that comes most often, of equals the first (self-consistency, Wang et al. 2023)."""
  if not answers:
    raise ValueError('a vote needs at least one answer')
  counts = Counter(one for one in answers if one is not None)
  best = max(counts, key=counts.__getitem__, default=None)
  return Vote(best, counts[best] / len(answers) if best is not None else 0.0, dict(counts), answers.count(None))


def votes(writer: Writer, prompts: Sequence[str], rules: Sequence[str], *, samples: int) -> list[Vote]:
  """Of each prompt the vote over `samples` texts that the writer draws. ValueError if they would all be the same."""
  if samples < 1:
    raise ValueError(f'samples={samples} must be at least 1 text a prompt')
  if samples > 1 and not writer.temperature > 0:
    raise ValueError(f'samples={samples} has no effect with Writer.temperature={writer.temperature}: all would be the '
                     'same; Wang et al. draw 40 at 0.7')
  texts = writer([prompt for prompt in prompts for _ in range(samples)])
  found = [answer(text, rules) for text in texts]
  return [vote(found[i:i + samples]) for i in range(0, len(found), samples)]
