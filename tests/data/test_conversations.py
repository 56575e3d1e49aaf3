"""Conversations become rows: whole, each once an epoch, known at any step; what cannot be learned from is named."""
import itertools
import json
import re

import numpy as np
import pytest

from lmlib.data import conversations
from lmlib.data.chat import Chat
from lmlib.data.conversations import Conversations, Examples, JsonFiles, Rows, packed
from tests.data import templates
from tests.post import small
from tests.post.small import turns

LENGTH = 128


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  return small.chats(tmp_path_factory.mktemp('chats') / 'all.jsonl')


def opened(path, tokenizer=None, *, said=None, length=LENGTH, seed=0, **settings):
  return Conversations(JsonFiles(str(path)), **{'held_out': 0.2} | settings).opened(
      tokenizer or small.tokenizer(), batch=2, length=length, seed=seed, say=[].append if said is None else said.append)


def written(path, *records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path


def stretches(batch):
  """The examples of a batch as (tokens, targets, weights, positions), by row and segment."""
  for b, segments in enumerate(batch['segments_BT']):
    for segment in range(1, segments.max() + 1):
      here = segments == segment
      yield tuple(batch[name][b, here].tolist() for name in ('tokens_BT', 'targets_BT', 'weight_BT', 'positions_BT'))


def test_every_example_is_there_whole_once_an_epoch(file):
  rows = opened(file).train
  rows = Rows(rows._examples, 1, LENGTH, 0)
  found = [stretch for step in range(rows.rows_per_epoch) for stretch in stretches(rows.batch_at(step))]
  examples = rows._examples
  want = []
  for start, stop in itertools.pairwise(examples.offsets.tolist()):
    ids, learned = examples.tokens[start:stop].tolist(), examples.learned[start:stop].tolist()
    want.append((ids[:-1], ids[1:], [float(x) for x in learned[1:]], list(range(stop - start - 1))))
  assert sorted(found) == sorted(want)
  again = [stretch for step in range(rows.rows_per_epoch)
           for stretch in stretches(rows.batch_at(rows.rows_per_epoch + step))]
  assert sorted(again) == sorted(want)
  assert again != found, 'each epoch has an order of its own'


def test_only_answers_and_their_ends_are_learned(file):
  tokenizer = small.tokenizer()
  words = {'sun', 'moon', 'tree', 'fox', 'owl'}
  for _, targets, weights, _ in stretches(opened(file).train.batch_at(0)):
    learned = [i for i, weight in zip(targets, weights) if weight]
    assert tokenizer.decode(learned, continues=True) in words
    assert tokenizer.spelling(learned[-1]) == '<|im_end|>'


def test_a_batch_is_a_function_of_its_step(file):
  ahead, fresh = opened(file).train, opened(file).train
  for step in range(9):
    ahead.batch_at(step)
  for name, array in fresh.batch_at(9).items():
    np.testing.assert_array_equal(ahead.batch_at(9)[name], array, err_msg=name)
  assert fresh.describe(9)[0].startswith('row ')
  assert str(file) in fresh.describe(9)[0]
  assert opened(file, seed=1).train.describe(0) != fresh.describe(0)


def test_more_conversations_move_none_and_no_question_is_on_both_sides(file, tmp_path):
  held = {json.dumps(question.messages) for question in opened(file).held_out}
  lines = file.read_text().splitlines()
  more = [{'messages': turns(f'{i} again: say sun', 'moon')} for i in range(30)]
  twice = [{'messages': turns(question['content'], 'another answer')}
           for question, _ in map(json.loads, held)]
  path = written(tmp_path / 'more.jsonl', *more, *map(json.loads, reversed(lines)), *twice)
  now = {json.dumps(question.messages) for question in opened(path).held_out}
  assert held < now
  assert {json.dumps(turns(json.loads(one)[0]['content'], 'another answer')) for one in held} < now


def test_packing_is_tight_and_whole():
  size_N = np.random.default_rng(0).integers(1, 100, 500)
  rows = packed(size_N, 100, np.arange(500))
  assert sorted(itertools.chain(*rows)) == list(range(500))
  assert all(size_N[row].sum() <= 100 for row in rows)
  least = max(size_N.sum() / 100, (size_N > 50).sum())
  assert len(rows) <= 11 / 9 * least + 1  # Johnson 1973
  room = [100 - size_N[row].sum() for row in rows]
  assert all(max(room[:j]) < size_N[rows[j][0]] for j in range(1, len(rows))), 'a row is opened where none has room'
  assert packed(np.array([100, 1, 100]), 100, np.arange(3)) == [[0], [2], [1]]


def test_an_example_longer_than_a_row_is_no_row():
  example = Chat(templates.CHATML).example(turns('a', 'b' * 40), small.tokenizer())
  with pytest.raises(ValueError, match=r'^x: \d+ tokens do not fit a row of 20$'):
    Rows(Examples.of([('x', example)]), 1, 20, 0)


BAD = {
    'role': ({'messages': [{'role': 'robot', 'content': 'x'}, *turns('a', 'b')]},
             "the role 'robot', none of Chat.roles"),
    'two systems': ({'messages': [{'role': 'system', 'content': 'x'}] * 2 + turns('a', 'b')},
                    'message 1 of 4 is a system turn, which stands first and alone'),
    'a late system': ({'messages': [*turns('a', 'b'), {'role': 'system', 'content': 'x'}]},
                      'message 2 of 3 is a system'),
    'an empty turn': ({'messages': turns('a', ' ')}, 'message 1 of 2 is an empty turn'),
    'no answer': ({'messages': turns('a')}, 'no turn of the assistant'),
    'no text': ({'messages': [{'role': 'user', 'content': 3}, *turns('a', 'b')[1:]]}, 'message 0 of 2 has no text'),
    'no form': ({'text': 'x'}, 'no conversation'),
    'sharegpt': ({'conversations': [{'from': 'robot', 'value': 'x'}]}, "'from', one of system, human"),
    'too long': ({'messages': turns('a ' * 200, 'b')}, "more than Chat.length=128, with Chat.too_long='refuse'"),
}


@pytest.mark.parametrize(('record', 'reason'), BAD.values(), ids=BAD)
def test_what_cannot_be_learned_from_is_named_with_file_and_line_or_counted(tmp_path, record, reason):
  good = [{'messages': turns(f'q{i}', 'a')} for i in range(4)]
  path = written(tmp_path / 'odd.jsonl', good[0], record, *good[1:])
  with pytest.raises(ValueError, match=f'^{re.escape(str(path))}, line 2: .*{re.escape(reason)}'):
    opened(path)
  said = []
  assert opened(path, said=said, on_error='skip').facts['left_out'] == 1
  assert f'left out    1 conversations: {path}, line 2: ' in said[0]
  assert reason in said[0]


@pytest.mark.parametrize(('content', 'reason'), [
    (b'{"messages": [\n', 'line 1: not JSON'), (b'[]\n', 'line 1: a JSON list, not an object'), (b'', 'two are needed'),
    (b'{"a": "\xff"}\n', 'line 1: not UTF-8')])
def test_what_is_no_record_is_named(tmp_path, content, reason):
  (tmp_path / 'x.jsonl').write_bytes(content)
  with pytest.raises(ValueError, match=reason):
    opened(tmp_path / 'x.jsonl', on_error='skip')


def test_a_list_in_a_json_file_is_read_too(tmp_path):
  records = [{'instruction': f'q{i}', 'input': 'it', 'output': 'a'} for i in range(4)]
  (tmp_path / 'x.json').write_text(json.dumps(records))
  found = opened(tmp_path / 'x.json')
  assert found.facts['conversations'] + found.facts['held_out'] == 4
  (tmp_path / 'x.json').write_text(json.dumps([{'instruction': 'q', 'output': 'a'}, 3]))
  with pytest.raises(ValueError, match=r'x\.json, record 2: a JSON int, not an object'):
    opened(tmp_path / 'x.json')


def test_a_template_that_the_tokenizer_lacks_is_asked_for(file):
  with pytest.raises(ValueError, match=r'^the tokenizer has no chat template: give Chat\.template'):
    opened(file, small.tokenizer(None))
  assert opened(file, small.tokenizer(None), chat=Chat(templates.CHATML)).train.batch_at(0)['weight_BT'].any()


def test_a_long_question_is_shortened_and_its_answer_is_not(tmp_path):
  long = turns('first ' * 60, 'one', 'begin ' + 'x' * 300 + ' end', 'two')
  path = written(tmp_path / 'x.jsonl', {'messages': long}, *({'messages': turns(f'q{i}', 'a')} for i in range(3)))
  with pytest.raises(ValueError, match=r"in the last turns alone, more than Chat.length=128.*'drop_oldest'"):
    opened(path, chat=Chat(length=128, too_long='drop_oldest'))
  example = Chat(length=128, too_long='shorten').example(long, small.tokenizer())
  text = small.tokenizer().decode(example.tokens_T, continues=True)
  assert len(example) <= 128
  assert example.dropped == 2
  assert 'begin x' in text
  assert 'x\n[...]\nx' in text
  assert 'x end' in text
  assert example.cut > 150
  assert small.tokenizer().decode(example.tokens_T[example.weight_T > 0], continues=True) == 'two'
  said = []
  assert opened(path, said=said, chat=Chat(length=128, too_long='shorten')).facts['cut'] == 1
  assert 'conversations lost text of questions to fit 128 tokens' in said[0]


def test_an_answer_that_is_too_long_is_never_cut():
  with pytest.raises(ValueError, match=r'more than Chat\.length=128'):
    Chat(length=128, too_long='shorten').example(turns('why? ' * 50, 'b' * 200), small.tokenizer())


@pytest.mark.parametrize(('settings', 'reason'), [
    ({'held_out': 0.0}, r'Conversations\.held_out=0\.0'), ({'on_error': 'ignore'}, r"on_error='ignore' must be one of"),
    ({'chat': Chat(length=999)}, r'Chat\.length=999 is longer than a row, length=128')])
def test_settings_out_of_range(file, settings, reason):
  with pytest.raises(ValueError, match=reason):
    opened(file, **settings)


def test_a_rank_is_of_what_stands_before_the_first_answer():
  assert conversations.rank(turns('a', 'b')) == conversations.rank(turns('a', 'c', 'd', 'e'))
  assert conversations.rank(turns('a', 'b')) != conversations.rank(turns('A', 'b'))
