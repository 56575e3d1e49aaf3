import re

import hypothesis
from hypothesis import strategies
import numpy as np
import pytest

from lmlib.data import chat
from lmlib.data.chat import Chat, messages_of, pair_of
from lmlib.data.tokenizer import ByteLevelBpe, Bytes, Loaded
from tests.data import templates
from tests.data.test_tokenizer_formats import sentencepiece_file

SYSTEM, USER, ANSWER = ({'role': role, 'content': said} for role, said in (
    ('system', 'Be brief.'), ('user', 'Two and two?'), ('assistant', 'Four.')))
AGAIN = {'role': 'user', 'content': '\u4e09\u52a0\u4e09\u5462\uff1f'}
SECOND = {'role': 'assistant', 'content': '\u516d\u3002 \U0001f600'}
LONG = [SYSTEM, USER, ANSWER, AGAIN, SECOND]


@pytest.fixture(scope='module')
def tokenizer():
  return Bytes(templates.SPECIALS).train()


@pytest.fixture(scope='module')
def tokenizers(tokenizer, tmp_path_factory):
  """Bytes; byte-level pieces that reach over line ends; and one that puts a space before every text."""
  texts = ['\n\nFour.\n\n Four \n Two and two\n'] * 9
  config = ByteLevelBpe(pieces=280, specials=(*templates.SPECIALS, '<eos>', '<bos>'), pattern='gpt2')
  path = tmp_path_factory.mktemp('chat') / 'x'
  config.train(texts, 999).save(path)
  pieces = Loaded(str(path), bos='<bos>', eos='<eos>').train()
  return {'bytes': tokenizer, 'pieces': pieces}


every = pytest.mark.parametrize('name', sorted(templates.ALL))


def learned(example, tokenizer) -> list[str]:
  """The stretches that are learned, with specials written out."""
  found = []
  for start, stop in chat.runs(example.weight_T > 0):
    if example.weight_T[start]:
      found.append(''.join(tokenizer.spelling(i) or tokenizer.decode([i], continues=True) if len(
          tokenizer.decode_bytes([i])) != 1 else bytes(tokenizer.decode_bytes([i])).decode('latin1')
          for i in example.tokens_T[start:stop]).encode('latin1').decode())
  return found


def refused(config, conversation, tokenizer, *words):
  with pytest.raises(ValueError, match=re.escape(words[0])) as error:
    config.example(conversation, tokenizer)
  for word in words:
    assert word in str(error.value)


@every
@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
def test_the_loss_covers_answers_and_their_ends_and_nothing_else(tokenizers, name, kind):
  example = Chat(templates.ALL[name]).example(LONG, tokenizers[kind])
  assert (example.tokens_T.dtype, example.weight_T.dtype) == (np.int32, np.float32)
  space = ' ' * (name == 'mistral')
  assert learned(example, tokenizers[kind]) == [f'{space}{said["content"]}{templates.END[name]}'
                                                for said in (ANSWER, SECOND)]
  assert set(example.weight_T.tolist()) == {0, 1}


@every
def test_the_tokens_are_the_template_s_text(tokenizer, name):
  config = Chat(templates.ALL[name])
  text = config.render(LONG, tokenizer)
  assert config.example(LONG, tokenizer).tokens_T.tolist() == tokenizer.encode_with_specials(text).tolist()
  assert text.count('<bos>') == (name in ('llama3', 'mistral'))  # what the template says, never a second one


@every
@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
@pytest.mark.parametrize('answer', ['Four.', '\n\nFour.', ' Four', 'Four.\n'])
def test_a_model_is_asked_as_it_was_trained(tokenizers, name, kind, answer):
  """The tokens before an answer are those of the prompt for it, also where a piece would reach over the cut."""
  config, tokenizer = Chat(templates.ALL[name]), tokenizers[kind]
  if name == 'llama3':
    answer = answer.strip()  # its template does
  conversation = [USER, {'role': 'assistant', 'content': answer}, AGAIN, SECOND]
  example = config.example(conversation, tokenizer)
  starts = [start for start, _ in chat.runs(example.weight_T > 0) if example.weight_T[start]]
  for start, before in zip(starts, (1, 3), strict=True):
    assert example.tokens_T[:start].tolist() == config.prompt(conversation[:before], tokenizer).tolist()


@every
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(said=strategies.lists(strategies.lists(strategies.one_of(
    strategies.text(strategies.characters(exclude_categories=['Cs']), max_size=9),
    strategies.sampled_from(['<eos>', '<bos>', *templates.SPECIALS, '[INST]', '\ufdd0', '\n', ' ', '\u4e2d'])),
    min_size=1, max_size=5).map(lambda parts: ''.join(parts).strip()).filter(bool), min_size=2, max_size=6))
def test_messages_cannot_inject_specials_and_answers_are_learned_to_the_byte(tokenizer, name, said):
  conversation = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(said)]
  plain = [message | {'content': 'x'} for message in conversation]
  config = Chat(templates.ALL[name])
  example, other = (config.example(one, tokenizer) for one in (conversation, plain))
  specials = [one.tokens_T[tokenizer.is_special(one.tokens_T)].tolist() for one in (example, other)]
  assert specials[0] == specials[1]
  answers = tokenizer.decode(example.tokens_T[example.weight_T > 0])
  assert answers.replace(' ', '') == ''.join(said[1::2]).replace(' ', '')  # Mistral's puts a space before each


def test_a_space_before_a_text_is_put_there_once(tmp_path):
  """By models that want one: before the whole and behind specials, not where it is cut at an answer."""
  (tmp_path / 'x').write_bytes(sentencepiece_file())
  spaced = Loaded(str(tmp_path / 'x'), specials=templates.SPECIALS).train()
  config = Chat('{% for m in messages %}{{ m.content + eos_token }}{% endfor %}', last_only=True)
  ids = config.example([USER, ANSWER], spaced).tokens_T
  assert ids.tolist() == [*spaced.encode('Two and two?'), 2, *spaced.encode('Four.'), 2]
  assert ids[0] != spaced.encode('Two and two?', continues=True)[0]
  config = Chat("{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
                "{% if add_generation_prompt %}assistant:{% endif %}")
  ids = config.example([USER, ANSWER], spaced).tokens_T.tolist()
  assert ids[-len(spaced.encode('Four.', continues=True)) - 1:] == [*spaced.encode('Four.', continues=True), 2]


def test_trusted_specials_are_meant(tokenizer):
  conversation = [USER, {'role': 'assistant', 'content': '<eos>Four.<|eot_id|>'}]
  count = lambda config: int(tokenizer.is_special(config.example(conversation, tokenizer).tokens_T).sum())
  one, other = Chat(templates.CHATML), Chat(templates.CHATML, trusted=('<|eot_id|>',))
  assert count(other) == count(one) + 1
  refused(Chat(templates.CHATML, trusted=('<x>',)), conversation, tokenizer, "'<x>' is no special")


@pytest.mark.parametrize(('template', 'words'), [
    # Earlier answers lose their thoughts: the text of a prefix is no prefix.
    ("{% for m in messages %}<|im_start|>{{ m.content if loop.last or m.role != 'assistant' else m.content[:2] }}"
     '<|im_end|>{% endfor %}',
     ['not prefix-stable', 'up to message 2', 'Four.<|im_end|>', 'Fo<|im_end|>']),
    # The end of all is written once, behind the last.
    ('{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}<|im_end|>', ['not prefix-stable', 'message 2']),
    # A generation prompt that is not what stands before answers.
    ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<think>"
     '{% endif %}', ['not prefix-stable', 'with the generation prompt', '<think>']),
])
def test_templates_that_are_not_prefix_stable(tokenizer, template, words):
  refused(Chat(template), LONG, tokenizer, *words)


@pytest.mark.parametrize(('template', 'words'), [
    ("{% for m in messages %}{{ m.content if m.role != 'assistant' else '' }}<|im_end|>{% endfor %}",
     ['leaves out or changes message 2', 'Four.']),
    ("{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
     ['the mask is empty: the template writes nothing for message 2', 'Four.']),
    ("{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
     ['leaves out or changes message 0', 'Be brief.']),
    ('{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}', ['leaves out or changes message 0']),
    ('{% for m in messages %}{{ m.role + m.content }}\n{% endfor %}', ['no end-of-turn: message 2', 'a special token',
                                                                      'Four.']),
    ('{% for m in messages %}{{ m.content }}<|im_end|>bye{% endfor %}', ['text follows the last special', 'bye']),
    ('{% for m in messages %}<|im_end|>{{ m.content }}{% endfor %}', ['no end-of-turn: text follows', 'Four.']),
    ('{% for m in messages %}{{ m.con', ['no Jinja template']), ('{{ messages[0].foo.bar }}', ['template fails']),
    ("{{ raise_exception('no, ' + messages[0].role) }}", ['template fails: no, system', 'Be brief.']),
    ("{{ ''.__class__.__mro__ }}", ['template fails', 'unsafe']),
    ("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", ['Chat.date']),
])
def test_templates_that_go_wrong(tokenizer, template, words):
  with pytest.raises(ValueError, match=re.escape(words[0])) as error:
    Chat(template).example(LONG, tokenizer)
  for word in words:
    assert word in str(error.value)


def test_a_mask_that_covers_everything(tokenizer):
  template = '{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}'
  refused(Chat(template), [ANSWER, SECOND], tokenizer, 'the mask covers everything, all', 'Four.')


def test_an_end_of_turn_that_was_named(tokenizer):
  config = Chat(templates.CHATML, end_of_turn=('<|eot_id|>',))
  refused(config, LONG, tokenizer, "no end-of-turn: message 2 does not end in one of Chat.end_of_turn=('<|eot_id|>',)")
  named = Chat(templates.CHATML, end_of_turn=('<|im_end|>',)).example(LONG, tokenizer)
  assert (named.weight_T == Chat(templates.CHATML).example(LONG, tokenizer).weight_T).all()


@pytest.mark.parametrize(('conversation', 'words'), [
    ([], ['list of messages']), ('hello', ['list of messages']), ([USER], ['no turn of the assistant', 'Two and two?']),
    ([USER, {'role': 'bot', 'content': 'x'}], ["message 1 of 2 has the role 'bot'", 'Chat.roles']),
    ([USER, {'content': 'x'}], ['message 1 of 2 has no role']), ([{'role': 'user', 'content': ' \n'}, ANSWER],
                                                                 ['message 0 of 2 is an empty turn']),
    ([USER, {'role': 'assistant', 'content': ''}], ['message 1 of 2 is an empty turn']),
    ([USER, {'role': 'assistant'}], ['message 1 of 2 has no text as content']),
    ([USER, {'role': 'assistant', 'content': [{'text': 'x'}]}], ['message 1 of 2 has no text as content']),
    ([USER, {'role': 'assistant', 'content': '\ud800'}], ['surrogate']),
])
def test_conversations_that_are_none(tokenizer, conversation, words):
  refused(Chat(templates.CHATML), conversation, tokenizer, *words)


def test_a_tokenizer_without_a_template(tokenizer):
  refused(Chat(), LONG, tokenizer, 'no chat template', 'Loaded.chat_template')


def test_the_template_of_the_tokenizer_is_used(tmp_path, tokenizer):
  tokenizer.save(tmp_path / 'x')
  (tmp_path / 'y.jinja').write_text(templates.CHATML)
  own = Loaded(str(tmp_path / 'x'), chat_template=str(tmp_path / 'y.jinja')).train()
  assert own.specials == tokenizer.specials
  by_own, by_given = Chat().example(LONG, own), Chat(templates.CHATML).example(LONG, tokenizer)
  assert by_own.tokens_T.tolist() == by_given.tokens_T.tolist()


def test_only_the_last_answer_for_templates_that_change_those_before(tokenizer):
  template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last or m.role != 'assistant' "
              "else m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
              '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}')
  thought = [USER, {'role': 'assistant', 'content': '<think>2+2</think>4'}, AGAIN,
             {'role': 'assistant', 'content': '<think>3+3</think>6'}]
  refused(Chat(template), thought, tokenizer, 'not prefix-stable')
  example = Chat(template, last_only=True).example(thought, tokenizer)
  assert learned(example, tokenizer) == ['<think>3+3</think>6<|im_end|>']


def test_too_long_a_conversation_is_refused_or_loses_its_oldest_turns(tokenizer):
  config = Chat(templates.CHATML)
  whole = config.example(LONG, tokenizer)
  short = config.example([SYSTEM, AGAIN, SECOND], tokenizer)
  assert len(short) < len(whole)
  assert Chat(templates.CHATML, length=len(whole)).example(LONG, tokenizer).dropped == 0
  refused(Chat(templates.CHATML, length=len(whole) - 1), LONG, tokenizer, f'{len(whole)} tokens',
          f'Chat.length={len(whole) - 1}', "too_long='refuse'", 'Be brief.')
  for length in (len(whole) - 1, len(short)):
    cut = Chat(templates.CHATML, length=length, too_long='drop_oldest').example(LONG, tokenizer)
    assert cut.tokens_T.tolist() == short.tokens_T.tolist()
    assert cut.dropped == 2
    assert learned(cut, tokenizer) == [SECOND['content'] + '<|im_end|>']  # an answer is whole or not there
  refused(Chat(templates.CHATML, length=len(short) - 1, too_long='drop_oldest'), LONG, tokenizer,
          f'{len(short)} tokens in the last turns alone', f'Chat.length={len(short) - 1}')


def test_tools_and_the_day(tokenizer):
  template = ("{{ tools | tojson }} {{ strftime_now('%d %B %Y') }}{% for m in messages %}<|im_start|>{{ m.role }}:"
              "{{ m.content | tojson if m.role == 'tool' else m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
              '<|im_end|>{% endfor %}')
  calls = [{'name': 'sum', 'arguments': {'of': '<|im_end|>\u4e8c'}}]
  call = {'role': 'assistant', 'content': None, 'tool_calls': calls}
  template = template.replace('{{ m.content | tojson if', "{{ '' if m.content is none else m.content | tojson if")
  conversation = [USER, call, {'role': 'tool', 'content': 'a "4"\n'}, ANSWER]
  config = Chat(template, date='2026-01-31')
  example = config.example(conversation, tokenizer, tools=[{'name': 'sum'}])
  shown = example.shown(tokenizer, color=False)
  assert shown.startswith('[{"name": "sum"}] 31 January 2026')
  assert '"a \\"4\\"\\n"' in shown
  assert '"<|im_end|>\u4e8c"' in shown
  assert int(tokenizer.is_special(example.tokens_T).sum()) == 8
  with pytest.raises(ValueError, match='2026-13'):
    Chat(template, date='2026-13-01')


def test_what_is_shown_is_the_text_and_marks_what_is_learned(tokenizer):
  config = Chat(templates.CHATML)
  example = config.example(LONG, tokenizer)
  plain, color = (example.shown(tokenizer, color=color) for color in (False, True))
  assert plain.replace('\u27e6', '').replace('\u27e7', '') == config.render(LONG, tokenizer)
  assert re.findall('\u27e6(.*?)\u27e7', plain) == ['Four.<|im_end|>', '\u516d\u3002 \U0001f600<|im_end|>']
  assert re.sub('\x1b\\[[0-9;]*m', '', color) == config.render(LONG, tokenizer)
  assert '\x1b[32mFour.\x1b[0m\x1b[32;7m<|im_end|>\x1b[0m' in color
  spiteful = config.example([{'role': 'user', 'content': '\x1b[2J\x9b'}, ANSWER], tokenizer)
  assert '\x1b' not in spiteful.shown(tokenizer, color=False)


@pytest.mark.parametrize(('bad', 'said'), [
    ({'length': 0}, 'Chat.length=0'), ({'too_long': 'cut'}, "Chat.too_long='cut'"),
    ({'too_long': 'drop_oldest'}, 'no effect: length=None'), ({'roles': ('user',)}, 'Chat.roles='),
    ({'template': '{% if %}'}, 'no Jinja template')])
def test_bad_settings(bad, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    Chat(**bad)


def test_forms_of_conversations():
  turns = [{'from': role, 'value': said} for role, said in (('system', 's'), ('human', 'q'), ('gpt', 'a'))]
  want = [{'role': role, 'content': said} for role, said in (('system', 's'), ('user', 'q'), ('assistant', 'a'))]
  assert messages_of({'messages': want}) == want
  assert messages_of({'conversations': turns}) == want
  assert messages_of({'instruction': 'q', 'output': 'a', 'system': 's', 'input': ''}) == want
  alpaca = messages_of({'instruction': 'q', 'input': 'i', 'output': 'a', 'history': [['q0', 'a0']]})
  assert [message['content'] for message in alpaca] == ['q0', 'a0', 'q\n\ni', 'a']
  for bad in ({'text': 'x'}, {'conversations': [{'from': 'owl', 'value': 'x'}]}, {'conversations': [{'from': 'gpt'}]}):
    with pytest.raises(ValueError, match=r"'owl'|'value'|no conversation"):
      messages_of(bad)


def test_forms_of_preferences():
  prompt, other = [SYSTEM, USER], {'role': 'assistant', 'content': 'Five.'}
  want = ([*prompt, ANSWER], [*prompt, other])
  assert pair_of({'prompt': prompt, 'chosen': [ANSWER], 'rejected': [other]}) == want
  assert pair_of({'chosen': want[0], 'rejected': want[1]}) == want
  assert pair_of({'prompt': USER['content'], 'chosen': want[0][1:], 'rejected': want[1][1:]}) == (
      want[0][1:], want[1][1:])
  assert pair_of({'prompt': USER['content'], 'chosen': 'Four.', 'rejected': 'Five.'})[1] == want[1][1:]
  for bad, said in (({'chosen': 'x'}, "'rejected'"), ({'chosen': want[0], 'rejected': want[0]}, 'the same answer'),
                    ({'chosen': want[0], 'rejected': [USER, other]}, 'last answer alone'),
                    ({'chosen': 'x', 'rejected': 'y'}, 'last answer alone')):
    with pytest.raises(ValueError, match=said):
      pair_of(bad)
