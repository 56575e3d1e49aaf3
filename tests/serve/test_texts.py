"""Prompts in files are read whole or refused with their line."""
import json

import pytest

from lmlib.data.chat import Chat
from lmlib.data.tokenizer import Bytes
from lmlib.serve import texts

TOKENIZER = Bytes().train()
CHAT = Chat(template="{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")


def test_lines_are_prompts(tmp_path):
  (tmp_path / 'a.txt').write_text('one \n\n  two\r\n   \nthree')
  assert texts.records(tmp_path / 'a.txt') == [{'prompt': 'one '}, {'prompt': '  two'}, {'prompt': 'three'}]
  rows = [{'prompt': 'a\u2028b', 'id': 3}, {'messages': [{'role': 'user', 'content': 'hi'}]}]
  (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows))
  assert texts.records(tmp_path / 'a.jsonl') == rows


def test_what_a_record_becomes():
  shown = lambda record, *more: TOKENIZER.decode(texts.tokens(record, TOKENIZER, *more))
  assert shown({'prompt': 'hi'}) == 'hi'
  assert shown({'prompt': 'hi'}, CHAT) == '[user]hi'
  assert shown({'prompt': 'hi'}, CHAT, 'sys') == '[system]sys[user]hi'
  assert shown({'messages': [{'role': 'user', 'content': 'hi'}]}, CHAT, 'sys') == '[user]hi'


@pytest.mark.parametrize(('name', 'content', 'said'), [
    ('a.jsonl', '{"prompt": "a"}\n{', ':2: not JSON'), ('a.jsonl', '[1]', ':1: an object with a prompt'),
    ('a.jsonl', '{"text": "a"}', ':1: an object with a prompt or with messages is needed'),
    ('a.jsonl', '{"prompt": "a", "messages": []}', 'one of them'),
    ('a.jsonl', '{"prompt": ""}', 'prompt must be a text'),
    ('a.jsonl', '{"messages": {}}', 'messages must be a list'), ('a.txt', '\n \n', 'no prompt is in it'),
    ('a.md', 'x', r"a.md' is no file named \*\.jsonl")])
def test_files_that_hold_something_else_are_refused(tmp_path, name, content, said):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=said):
    texts.records(tmp_path / name)


@pytest.mark.parametrize(('messages', 'said'), [
    ([{'role': 'robot', 'content': 'hi'}], "the role 'robot'"), ([{'role': 'user', 'content': ' '}], 'an empty turn'),
    ([{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'x'}], 'the last of them is no answer'),
    ([3], 'must be objects')])
def test_messages_that_cannot_be_are_refused(messages, said):
  with pytest.raises(ValueError, match=said):
    texts.tokens({'messages': messages}, TOKENIZER, CHAT)


def test_ids_without_a_meaning_are_passed_over():
  ids = [*TOKENIZER.encode('ab').tolist(), TOKENIZER.vocab + 3, *TOKENIZER.encode('c').tolist()]
  assert texts.Meaning(TOKENIZER).decode(ids, continues=True) == 'abc'
