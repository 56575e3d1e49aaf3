"""A conversation in a terminal: answers are written as they come, and what was said stays.

A conversation that no longer fits loses its oldest turns, a question and what followed it at a time, never its system
turn or its last question, and says so. A question that does not fit by itself is refused, and the rest goes on.
"""
from collections.abc import Callable, Iterator
import sys

from lmlib.data.chat import Chat
from lmlib.data.tokenizer import Tokenizer
from lmlib.serve.generate import Continuation, settled
from lmlib.serve.texts import opening

Answers = Callable[[list[int]], Iterator[list[Continuation]]]  # to a prompt, as far as they go


def talk(answers: Answers, tokenizer: Tokenizer, chat: Chat, *, room: int, system: str | None = None,
         stop: tuple[str, ...] = ()) -> list[dict]:
  """Answers questions until the input ends (Ctrl-D), and returns what was said.

  Ctrl-C leaves an answer, of which stays what was written, or a question. room: tokens that a prompt may have. stop:
  of the Sampling behind `answers`.
  """
  said = opening(system)
  while (question := asked()) is not None:
    asking = [*said, {'role': 'user', 'content': question}]
    ids, kept = fitted(asking, tokenizer, chat, room)
    if kept is None:
      print(f'(a question of {len(ids)} tokens does not fit: there is room for {room}; it is left out)', flush=True)
      continue
    if len(kept) < len(asking):
      print(f'({len(asking) - len(kept)} of the oldest messages are forgotten)', flush=True)
    said = kept
    if answer := shown(answers(ids), stop):
      said.append({'role': 'assistant', 'content': answer})
    else:
      said.pop()  # a question that nothing answers is none
  return said


def asked() -> str | None:
  """The next question that is not empty; None at the end of the input."""
  while True:
    try:
      print('\n> ', end='', flush=True)
      if not (line := sys.stdin.readline()):
        print(flush=True)
        return None
      if line.strip():
        return line.strip()
    except KeyboardInterrupt:
      print('\n(Ctrl-D ends)', flush=True)


def fitted(said: list[dict], tokenizer: Tokenizer, chat: Chat, room: int) -> tuple[list[int], list[dict] | None]:
  """(ids of a conversation without its oldest turns, what stays of it); None if its last question has no room."""
  first = int(said[0]['role'] == 'system')
  starts = [i for i in range(first, len(said)) if said[i]['role'] == 'user']
  for start in starts:
    kept = [*said[:first], *said[start:]]
    if len(ids := chat.prompt(kept, tokenizer).tolist()) <= room:
      return ids, kept
  return ids, None


def shown(answers: Iterator[list[Continuation]], stop: tuple[str, ...]) -> str:
  """Writes an answer while it comes; what of it was written when it ended, or Ctrl-C did."""
  text = ''
  try:
    for row, in answers:
      more = settled(row, stop)[len(text):]
      print(more, end='', flush=True)
      text += more
  except KeyboardInterrupt:
    pass
  print(flush=True)
  return text.strip()
