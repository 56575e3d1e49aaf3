"""From conversations to tokens and loss weights, through the chat template that comes with a tokeniser.

The only place that knows roles. A template is a program (Jinja, run in a sandbox) that writes a conversation as
one text, so where a turn lies in it cannot be read off the template: it is rendered for growing prefixes of the
conversation. What the text of the turns before an answer, with the generation prompt, lacks of the text with the
answer is the answer, up to its end-of-turn token. That works for any template whose text only grows, and what
does not is refused, with the place shown. The text is tokenised piece by piece, cut where answers begin and end,
so that the tokens before an answer are those that the model is given when it has to write one.

Specials in the text become control tokens where the template wrote them. Where a message spells one it stays text.
"""
from collections.abc import Iterator
import dataclasses
import datetime
import functools
import json
import re

import numpy as np

from lmlib.data.tokenizer import Tokenizer

ROLES = ('system', 'user', 'assistant', 'tool')
ANSWERS = 'assistant'
SHOWN = 60  # characters of a text around a fault
NONCHARACTERS = tuple(map(chr, range(0xfdd0, 0xfdf0)))  # Unicode keeps them free for internal use
SHAREGPT = {'system': 'system', 'human': 'user', 'user': 'user', 'gpt': ANSWERS, 'assistant': ANSWERS, 'tool': 'tool'}
POLICIES = ('refuse', 'drop_oldest', 'shorten')
GAP = '\n[...]\n'  # what stands where the text of a question was shortened
LEAST = 40  # characters that a shortened text keeps, at least


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """A conversation as a model is trained on it."""
  tokens_T: np.ndarray  # int32
  weight_T: np.ndarray  # float32: 1 where the token belongs to an answer and is learned, 0 elsewhere
  dropped: int = 0  # messages left out at the front because the whole was too long
  cut: int = 0  # characters taken out of texts that are no answers, for the same reason

  def __len__(self) -> int:
    return len(self.tokens_T)

  def shown(self, tokenizer: Tokenizer, *, color: bool = True) -> str:
    """The text for a terminal: what is learned in green, or between brackets, specials in reverse video."""
    parts, learned = [], None
    for start, stop in runs(self.weight_T > 0, tokenizer.is_special(self.tokens_T)):
      ids, learns = self.tokens_T[start:stop], bool(self.weight_T[start] > 0)
      special = tokenizer.spelling(ids[0])
      text = ''.join(map(tokenizer.spelling, ids)) if special else tokenizer.decode(ids, continues=True)
      text = ''.join(c if c.isprintable() or c == '\n' else c.encode('unicode_escape').decode() for c in text)
      if color:
        parts.append(f'\x1b[{"32" if learns else "2"}{";7" if special else ""}m{text}\x1b[0m')
      else:
        parts.append(('\u27e6' if learns and not learned else '\u27e7' if learned and not learns else '') + text)
      learned = learns
    return ''.join(parts) + ('\u27e7' if learned and not color else '')


@dataclasses.dataclass(frozen=True)
class Chat:
  """How conversations become examples.

  Too long a conversation is refused, or with too_long='drop_oldest' loses its oldest turns, from one user turn to
  before the next, never its system message, its last question or any part of an answer that stays. 'shorten' does
  that, and where the last turns alone are too long, takes text out of the middle of the longest that is no answer.
  """
  template: str | None = None  # None: the tokeniser's own
  length: int | None = None  # most tokens of an example; None: any number
  too_long: str = 'refuse'
  roles: tuple[str, ...] = ROLES
  end_of_turn: tuple[str, ...] | None = None  # specials that may end an answer; None: any
  trusted: tuple[str, ...] = ()  # specials that messages may spell and mean
  last_only: bool = False  # only the last answer is learned, for templates that change those before it
  date: str | None = None  # what the day is, as 2026-01-31, for templates that ask: examples do not change overnight

  def __post_init__(self):
    if self.length is not None and self.length < 1:
      raise ValueError(f'Chat.length={self.length} must be positive, or None')
    if self.too_long not in POLICIES:
      raise ValueError(f'Chat.too_long={self.too_long!r} must be one of {", ".join(POLICIES)}')
    if self.too_long != 'refuse' and self.length is None:
      raise ValueError(f'Chat.too_long={self.too_long!r} has no effect: length={self.length}')
    if ANSWERS not in self.roles:
      raise ValueError(f'Chat.roles={self.roles} must have {ANSWERS!r}, whose turns are learned')
    if self.date is not None:
      try:
        datetime.date.fromisoformat(self.date)
      except ValueError as error:
        raise ValueError(f'Chat.date={self.date!r} is no date such as 2026-01-31: {error}') from error
    if self.template is not None:
      compiled(self.template)

  def example(self, conversation: list[dict], tokenizer: Tokenizer, **variables) -> Example:
    """The example of a conversation: a list of {'role': ..., 'content': ...}.

    `variables`, such as tools, are the template's. ValueError, with what is wrong shown, for a conversation or
    template that cannot give an example whose loss covers its answers, all of them and nothing else.
    """
    self.check(conversation, tokenizer)
    first = int(conversation[0]['role'] == 'system')
    starts = [i for i in range(first, len(conversation)) if conversation[i]['role'] == 'user'] or [first]
    for start in starts if self.too_long != 'refuse' else starts[:1]:
      turns = conversation[start if start != starts[0] else first:]
      if not any(message['role'] == ANSWERS for message in turns):
        break
      kept = conversation[:first] + turns
      tokens_T, weight_T = self._tokens(kept, tokenizer, variables)
      if self.length is None or len(tokens_T) <= self.length:
        return Example(tokens_T, weight_T, len(conversation) - len(kept))
    if self.too_long == 'shorten' and (found := self._shortened(kept, tokenizer, variables)) is not None:
      return dataclasses.replace(found, dropped=len(conversation) - len(kept))
    raise ValueError(f'{len(tokens_T)} tokens{" in the last turns alone" if self.too_long != "refuse" else ""}, '
                     f'more than Chat.length={self.length}, with Chat.too_long={self.too_long!r}: '
                     f'{excerpt(conversation)}')

  def _shortened(self, conversation, tokenizer, variables) -> Example | None:
    """The example of a conversation whose longest texts, but for answers, lost their middle; None if none is long."""
    kept, cut = list(conversation), 0
    while True:
      tokens_T, weight_T = self._tokens(kept, tokenizer, variables)
      if len(tokens_T) <= self.length:
        return Example(tokens_T, weight_T, cut=cut)
      i = max((i for i, message in enumerate(kept) if message['role'] != ANSWERS), default=None,
              key=lambda i: len(kept[i]['content']))
      said = '' if i is None else kept[i]['content']
      # As many characters as the tokens that are too many have in the mean, and a few more.
      over = 1 + len(said) * (len(tokens_T) - self.length) // len(tokens_T) + len(GAP)
      if len(said) - over < LEAST:
        return None
      head = (len(said) - over) // 2
      kept[i] = kept[i] | {'content': said[:head] + GAP + said[head + over:]}
      cut += over

  def check_tokenizer(self, tokenizer: Tokenizer):
    """ValueError if the tokeniser has no chat template and none is given, or lacks a special that is named here."""
    if self.template is None and tokenizer.chat_template is None:
      raise ValueError('the tokenizer has no chat template: give Chat.template, or Loaded.chat_template')
    for name in (*self.trusted, *(self.end_of_turn or ())):
      if name not in tokenizer.specials:
        raise ValueError(f'Chat: {name!r} is no special of the tokenizer, which has '
                         f'{", ".join(tokenizer.specials) or "none"}')

  def check(self, conversation, tokenizer: Tokenizer):
    """ValueError, with the message shown, for what is no conversation with answers."""
    if not isinstance(conversation, list) or not conversation:
      raise ValueError(f'a conversation is a list of messages, not {excerpt(conversation)}')
    for i, message in enumerate(conversation):
      where = f'message {i} of {len(conversation)}'
      if not isinstance(message, dict) or not isinstance(message.get('role'), str):
        raise ValueError(f'{where} has no role: {excerpt(message)}')
      if message['role'] not in self.roles:
        raise ValueError(f'{where} has the role {message["role"]!r}, none of Chat.roles={self.roles}: '
                         f'{excerpt(message)}')
      if message['role'] == 'system' and i:
        raise ValueError(f'{where} is a system turn, which stands first and alone: {excerpt(message)}')
      content = message.get('content')
      calls = message['role'] == ANSWERS and message.get('tool_calls')
      if not (isinstance(content, str) or (content is None and calls)):
        raise ValueError(f'{where} has no text as content: {excerpt(message)}')
      if not (content or '').strip() and not calls:
        raise ValueError(f'{where} is an empty turn: {excerpt(message)}')
    if not any(message['role'] == ANSWERS for message in conversation):
      raise ValueError(f'no turn of the {ANSWERS}, so nothing would be learned: {excerpt(conversation)}')
    self.check_tokenizer(tokenizer)

  def render(self, conversation: list[dict], tokenizer: Tokenizer, *, prompts: bool = False, **variables) -> str:
    """The text that the template writes, with the start of an answer behind it if it `prompts` for one."""
    self.check_tokenizer(tokenizer)
    template = self.template if self.template is not None else tokenizer.chat_template
    marks = {'bos_token': '', 'eos_token': ''} | {f'{name}_token': said for name, said in tokenizer.marks.items()}
    import jinja2
    try:
      return compiled(template).render(messages=conversation, add_generation_prompt=prompts, strftime_now=self._day,
                                       **{'tools': None, 'documents': None} | marks | variables)
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError, OverflowError) as error:
      raise ValueError(f'the chat template fails: {error}; for {excerpt(conversation)}') from error

  def _day(self, form: str) -> str:
    if self.date is None:
      raise ValueError("the chat template asks for the day: give Chat.date, such as '2026-01-31', so that what is "
                       'made of a conversation does not depend on when')
    return datetime.date.fromisoformat(self.date).strftime(form)

  def prompt(self, conversation: list[dict], tokenizer: Tokenizer, **variables) -> np.ndarray:
    """The tokens to give to a model so that it writes the next answer, int32: as they stand before it in training."""
    shield = shielded(conversation, tokenizer, self.trusted)
    text = self.render(shield.conversation, tokenizer, prompts=True, **variables)
    spans = [at for i in self._answers(conversation)[:None if not self.last_only else 0]
             for at in self._span(shield.conversation, i, text, tokenizer, variables)]
    return np.concatenate(shield.encode(cut(text, spans), tokenizer))

  def _tokens(self, conversation, tokenizer, variables):
    """Tokens and weights of a conversation, whatever its length."""
    shield = shielded(conversation, tokenizer, self.trusted)
    text = self.render(shield.conversation, tokenizer, **variables)
    answers = self._answers(conversation)
    spans = [self._span(shield.conversation, i, text, tokenizer, variables) for i in answers]
    self._nothing_is_missing(shield, text, answers)
    tokens, weights = [], []
    pieces = cut(text, [at for span in spans for at in span])
    for n, (piece, ids) in enumerate(zip(pieces, shield.encode(pieces, tokenizer), strict=True)):
      weight = np.zeros(len(ids), np.float32)
      if n % 2:  # an answer
        end = self._end(ids, answers[n // 2], piece, tokenizer)
        weight[:end] = 1
      tokens.append(ids)
      weights.append(weight)
    tokens_T, weight_T = np.concatenate(tokens), np.concatenate(weights)
    if weight_T.all():
      raise ValueError(f'the mask covers everything, all {len(weight_T)} tokens: the template writes nothing but '
                       f'answers; its text is {clipped(text)!r}')
    return tokens_T, weight_T

  def _span(self, conversation, i, text, tokenizer, variables) -> tuple[int, int]:
    """Where in the text answer `i` lies, with what the template writes behind it. ValueError if it is not clear."""
    before = self.render(conversation[:i], tokenizer, prompts=True, **variables)
    after = self.render(conversation[:i + 1], tokenizer, **variables)
    for part, what in ((before, f'before message {i}, with the generation prompt,'),
                       (after, f'up to message {i}')):
      if not text.startswith(part):
        at = next((k for k, (a, b) in enumerate(zip(part, text)) if a != b), min(len(part), len(text)))
        raise ValueError(f'the chat template is not prefix-stable: its text of the turns {what} ends in '
                         f'{around(part, at)!r} where that of the whole conversation has {around(text, at)!r}')
    if len(after) <= len(before):
      raise ValueError(f'the mask is empty: the template writes nothing for message {i}, '
                       f'{excerpt(conversation[i])}')
    return len(before), len(after)

  def _end(self, ids, i, piece, tokenizer) -> int:
    """How many of the ids of answer `i` are learned: up to its last special, which ends the turn."""
    known = None if self.end_of_turn is None else [tokenizer.specials[name].id for name in self.end_of_turn]
    ends = np.flatnonzero(tokenizer.is_special(ids) if known is None else np.isin(ids, known))
    if not ends.size:
      wanted = 'a special token' if known is None else f'one of Chat.end_of_turn={self.end_of_turn}'
      raise ValueError(f'the mask has no end-of-turn: message {i} does not end in {wanted}, so a model would not '
                       f'learn to stop; the template writes {clipped(piece)!r}')
    if tokenizer.decode(ids[ends[-1] + 1:], continues=True).strip():
      raise ValueError(f'the mask has no end-of-turn: text follows the last special token of message {i} in '
                       f'{clipped(piece)!r}')
    if not ends[-1]:
      raise ValueError(f'the mask is empty but for the end-of-turn: message {i} became {clipped(piece)!r}')
    return ends[-1] + 1

  def _answers(self, conversation) -> list[int]:
    """The indices of the messages to learn."""
    found = [i for i, message in enumerate(conversation) if message['role'] == ANSWERS]
    return found[-1:] if self.last_only else found

  def _nothing_is_missing(self, shield, text, answers):
    at = 0
    for i, message in enumerate(shield.conversation):
      content = (message.get('content') or '').strip()
      if message['role'] == ANSWERS and i not in answers:
        continue
      places = [(text.find(form, at), form) for form in (content, json.dumps(content, ensure_ascii=False)[1:-1])]
      found, form = max(places)
      if found < 0:
        raise ValueError(f'the chat template leaves out or changes message {i}, or its place: '
                         f'{excerpt(message)}')
      at = found + len(form)


@dataclasses.dataclass(frozen=True)
class Shield:
  """A conversation in whose texts a sign, that occurs nowhere, breaks up whatever spells a special."""
  conversation: list[dict]
  sign: str

  def encode(self, pieces: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of the pieces of a text made of it: specials only where they are not broken up, and no sign."""
    found, continues = [], False
    for piece in pieces:
      found.append(tokenizer.encode_with_specials(piece, continues=continues, without=self.sign))
      if found[-1].size:
        continues = not (tokenizer.is_special(found[-1][-1]) and tokenizer.spaces_after_specials)
    return found


def shielded(conversation: list[dict], tokenizer: Tokenizer, trusted: tuple[str, ...]) -> Shield:
  """The conversation with every special that it spells, but the trusted, broken up after its first character."""
  spelt = [name for name in tokenizer.specials if name and name not in trusted]
  pattern = re.compile('|'.join(map(re.escape, sorted(spelt, key=len, reverse=True))) or '(?!)')
  whole = json.dumps(conversation, ensure_ascii=False)
  sign = next((c for c in NONCHARACTERS if c not in whole), None)
  if sign is None:
    raise ValueError(f'the conversation holds all of the noncharacters U+FDD0 to U+FDEF: {excerpt(conversation)}')

  def broken(value):
    if isinstance(value, str):
      return pattern.sub(lambda found: found[0][0] + sign + found[0][1:], value)
    if isinstance(value, dict):
      return {key: one if key == 'role' else broken(one) for key, one in value.items()}
    return [broken(one) for one in value] if isinstance(value, list) else value

  return Shield(broken(conversation), sign)


@functools.lru_cache(16)
def compiled(template: str):
  """A Jinja template as transformers renders it: sandboxed, blocks trimmed. ValueError if it is none."""
  import jinja2
  from jinja2 import sandbox

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                      extensions=['jinja2.ext.loopcontrols'])
  environment.filters['tojson'] = tojson
  environment.globals['raise_exception'] = raise_exception
  try:
    return environment.from_string(template)
  except jinja2.TemplateError as error:
    raise ValueError(f'the chat template is no Jinja template: {error}: {clipped(template)!r}') from error


def messages_of(record: dict) -> list[dict]:
  """The conversation in a record: `messages` as they are, `conversations` of ShareGPT, or the fields of Alpaca.

  ShareGPT says {'from': 'human', 'value': ...}; Alpaca `instruction`, `input`, `output`, and maybe `system` and
  `history`, pairs of question and answer. ValueError, with the record shown, if it is none of these.
  """
  if isinstance(record.get('messages'), list):
    return record['messages']
  if isinstance(turns := record.get('conversations'), list):
    for turn in turns:
      if not isinstance(turn, dict) or turn.get('from') not in SHAREGPT or 'value' not in turn:
        raise ValueError(f"a turn needs 'value' and 'from', one of {', '.join(SHAREGPT)}: {excerpt(turn)}")
    return [{'role': SHAREGPT[turn['from']], 'content': turn['value']} for turn in turns]
  if isinstance(record.get('instruction'), str) and isinstance(record.get('output'), str):
    pairs = [*(record.get('history') or ()), (joined(record['instruction'], record.get('input')), record['output'])]
    found = [{'role': 'system', 'content': record['system']}] if record.get('system') else []
    return found + [{'role': role, 'content': said} for pair in pairs for role, said in zip(('user', ANSWERS), pair)]
  raise ValueError("no conversation: neither 'messages', nor 'conversations' (ShareGPT), nor 'instruction' and "
                   f"'output' (Alpaca), but {excerpt(record)}")


def pair_of(record: dict) -> tuple[list[dict], list[dict]]:
  """The chosen and the rejected conversation of a preference, equal but for the last answer.

  `chosen` and `rejected` are whole conversations, or answers to `prompt`; each a list of messages or one text.
  ValueError, with the record shown, if they are not that.
  """
  def turns(value, role):
    return [{'role': role, 'content': value}] if isinstance(value, str) else list(value)

  if not all(isinstance(record.get(name), (str, list)) for name in ('chosen', 'rejected')):
    raise ValueError(f"a preference needs 'chosen' and 'rejected': {excerpt(record)}")
  prompt = turns(record.get('prompt') or [], 'user')
  found = [turns(record[name], ANSWERS) for name in ('chosen', 'rejected')]
  found = [one if prompt and one[:len(prompt)] == prompt else prompt + one for one in found]
  chosen, rejected = found
  if len(chosen) < 2 or chosen[:-1] != rejected[:-1] or any(one[-1].get('role') != ANSWERS for one in found):
    raise ValueError(f'the two conversations must differ in the last answer alone: {excerpt(record)}')
  if chosen == rejected:
    raise ValueError(f'chosen and rejected are the same answer: {excerpt(record)}')
  return chosen, rejected


def joined(instruction: str, given: str | None) -> str:
  return f'{instruction}\n\n{given}' if given else instruction


def cut(text: str, places: list[int]) -> list[str]:
  """The text between ascending places, one piece more than there are places."""
  return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


def runs(*kinds: np.ndarray) -> Iterator[tuple[int, int]]:
  """Start and stop of each stretch over which none of the arrays changes."""
  code = np.stack(kinds).astype(np.int8)
  edges = np.flatnonzero((code[:, 1:] != code[:, :-1]).any(0)) + 1
  stops = [*edges.tolist(), code.shape[1]] if code.shape[1] else []
  return zip([0, *edges.tolist()], stops)


def clipped(text: str) -> str:
  return text if len(text) <= 2 * SHOWN else f'{text[:SHOWN]} ... {text[-SHOWN:]}'


def around(text: str, at: int) -> str:
  return text[max(0, at - SHOWN // 2):at + SHOWN // 2]


def excerpt(value) -> str:
  return clipped(json.dumps(value, ensure_ascii=False, default=repr))
