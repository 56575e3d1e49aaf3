"""What stands before and behind the tokens that a model reads and writes: prompts in files, and text."""
import dataclasses
import json
import pathlib

from lmlib.data.chat import Chat
from lmlib.data.tokenizer import Tokenizer

SUFFIXES = ('.jsonl', '.txt')


@dataclasses.dataclass(frozen=True)
class Meaning:
  """A tokeniser that passes over the ids that mean nothing: a model may embed more than it has."""
  tokenizer: Tokenizer

  def decode(self, ids, continues: bool = False) -> str:
    return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab], continues=continues)


def records(path) -> list[dict]:
  """The prompts of a file: of a .txt each line is one, of a .jsonl each line has a `prompt`, or `messages` of a chat.

  Lines of white space are passed over. ValueError, naming file and line, for what is neither.
  """
  path, found = pathlib.Path(path).expanduser(), []
  if path.suffix not in SUFFIXES or not path.is_file():
    raise ValueError(f'{str(path)!r} is no file named *.jsonl, with a prompt or messages a line, or *.txt')
  for number, line in enumerate(path.read_text(encoding='utf-8').split('\n'), 1):
    if line.strip():
      found.append({'prompt': line.rstrip('\r')} if path.suffix == '.txt' else _record(line, f'{path}:{number}'))
  if not found:
    raise ValueError(f'{path}: no prompt is in it')
  return found


def _record(line: str, where: str) -> dict:
  try:
    record = json.loads(line)
  except ValueError as error:
    raise ValueError(f'{where}: not JSON: {error}') from error
  kinds = {'prompt': str, 'messages': list}
  if not isinstance(record, dict) or len(there := kinds.keys() & record.keys()) != 1:
    raise ValueError(f'{where}: an object with a prompt or with messages is needed, one of them')
  name, = there
  if not isinstance(record[name], kinds[name]) or not record[name]:
    raise ValueError(f'{where}: {name} must be {"a text" if name == "prompt" else "a list of messages"}, not empty')
  return record


def tokens(record: dict, tokenizer: Tokenizer, chat: Chat | None = None, system: str | None = None) -> list[int]:
  """The ids that a record stands for: of messages, what `chat` (None: the tokeniser's own template) makes of them.

  With a `chat` a prompt is a question, behind the turn `system` if there is one. ValueError for roles, turns or text
  that cannot be so.
  """
  messages = record.get('messages')
  if messages is None and chat is None:
    return tokenizer.prompt(record['prompt'])
  if messages is None:
    messages = [*opening(system), {'role': 'user', 'content': record['prompt']}]
  if not all(isinstance(one, dict) for one in messages) or messages[-1].get('role') == 'assistant':
    raise ValueError('messages must be objects with role and content, and the last of them is no answer')
  chat = chat or Chat()
  chat.check([*messages, {'role': 'assistant', 'content': '.'}], tokenizer)
  return chat.prompt(messages, tokenizer).tolist()


def opening(system: str | None) -> list[dict]:
  """What a conversation begins with."""
  return [] if system is None else [{'role': 'system', 'content': system}]
