"""A conversation keeps what was said, forgets the oldest turns when it must, and outlives interruptions."""
import io

import pytest

from lmlib.data.chat import Chat
from lmlib.data.tokenizer import Bytes
from lmlib.serve.conversation import fitted, talk
from lmlib.serve.generate import Continuation, settled

TOKENIZER = Bytes().train()
CHAT = Chat(template="{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
                     "{% if add_generation_prompt %}a:{% endif %}")


class Questions(io.StringIO):
  """Lines as of a terminal, in which ^C is an interruption."""

  def readline(self):
    if (line := super().readline()).startswith('^C'):
      raise KeyboardInterrupt
    return line


class Answers:
  """Writes `texts`, one after the other, in two parts; where one ends in ^C, that is an interruption."""

  def __init__(self, *texts: str):
    self.texts, self.prompts = list(texts), []

  def __call__(self, ids):
    self.prompts.append(TOKENIZER.decode(ids))
    text = self.texts.pop(0)
    yield [Continuation(text=text[:2])]
    if text.endswith('^C'):
      raise KeyboardInterrupt
    yield [Continuation(text=text, ended='eos')]


def conversation(monkeypatch, lines: str, answers, **settings):
  monkeypatch.setattr('sys.stdin', Questions(lines))
  return [(one['role'][0], one['content']) for one in talk(answers, TOKENIZER, CHAT, **{'room': 1000} | settings)]


def test_what_was_said_stays(monkeypatch, capsys):
  answers = Answers('one', 'two')
  said = conversation(monkeypatch, 'first\n\n  \nsecond\n', answers, system='be brief')
  assert said == [('s', 'be brief'), ('u', 'first'), ('a', 'one'), ('u', 'second'), ('a', 'two')]
  assert answers.prompts == ['s:be brief\nu:first\na:', 's:be brief\nu:first\na:one\nu:second\na:']
  assert capsys.readouterr().out == '\n> one\n\n> \n> \n> two\n\n> \n'


def test_an_interruption_leaves_the_answer_and_keeps_what_was_written(monkeypatch, capsys):
  answers = Answers('abcd^C', 'yes', '^C')
  said = conversation(monkeypatch, 'first\n^C\nsecond\nthird\n', answers)
  assert said == [('u', 'first'), ('a', 'ab'), ('u', 'second'), ('a', 'yes'), ('u', 'third'), ('a', '^C')]
  assert '(Ctrl-D ends)' in capsys.readouterr().out
  nothing = lambda ids: iter([[Continuation(text='')]])
  assert conversation(monkeypatch, 'first\n', nothing) == [], 'a question without an answer is none'


def test_the_oldest_turns_go_first_and_the_system_turn_stays(monkeypatch, capsys):
  answers = Answers('one', 'two', 'three')
  said = conversation(monkeypatch, 'first\nsecond\nthird\n', answers, system='brief', room=36)
  assert answers.prompts[1] == 's:brief\nu:first\na:one\nu:second\na:'
  assert answers.prompts[2] == 's:brief\nu:second\na:two\nu:third\na:'
  assert said[0] == ('s', 'brief')
  assert '(2 of the oldest messages are forgotten)' in capsys.readouterr().out


def test_a_question_that_does_not_fit_is_left_out_and_the_talk_goes_on(monkeypatch, capsys):
  answers = Answers('one', 'two')
  said = conversation(monkeypatch, f'first\n{"x" * 50}\nsecond\n', answers, room=40)
  assert said == [('u', 'first'), ('a', 'one'), ('u', 'second'), ('a', 'two')]
  assert '(a question of 55 tokens does not fit: there is room for 40; it is left out)' in capsys.readouterr().out


@pytest.mark.parametrize('room', range(8, 60))
def test_as_many_turns_stay_as_fit(room):
  turn = lambda role, text: {'role': role, 'content': text}
  said = [turn('system', 's')] + [turn(role, f'{role}{i}') for i in range(3) for role in ('user', 'assistant')][:-1]
  ids, kept = fitted(said, TOKENIZER, CHAT, room)
  sizes = [len(CHAT.prompt([said[0], *said[start:]], TOKENIZER)) for start in (1, 3, 5)]
  fits = [start for start, size in zip((1, 3, 5), sizes) if size <= room]
  assert kept == ([said[0], *said[fits[0]:]] if fits else None)
  assert len(ids) == (sizes[(1, 3, 5).index(fits[0])] if fits else sizes[-1])


@pytest.mark.parametrize(('text', 'stop', 'shown'), [
    ('so far', (), 'so far'), ('a stop: E', ('END',), 'a stop: '), ('EN', ('END', 'Never'), ''),
    ('END', ('Never',), 'END'), ('half \ufffd', (), 'half '), ('aab', ('aabaab',), ''), ('xaab', ('abc',), 'xa')])
def test_only_what_no_token_takes_back_is_shown(text, stop, shown):
  assert settled(Continuation(text=text), stop) == shown
  assert settled(Continuation(text=text, ended='length'), stop) == text
