"""Tasks in seqio, with TensorFlow in this process: their own warnings are not ours to answer for."""
import dataclasses
import json
import pickle
import sys

import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from lmlib.data import tasks
from lmlib.data.chat import Chat
from lmlib.data.sources import DataFolder, StandardLibrary, TextFiles
from lmlib.data.tokenizer import Bytes, Loaded
from lmlib.data.vocabulary import vocabulary
from tests.data import templates

pytestmark = [pytest.mark.filterwarnings('ignore'),
              pytest.mark.skipif(sys.platform != 'linux', reason='seqio needs TensorFlow Text: Linux only')]
AWKWARD = ['', ' ', 'a\0b', '\u2581 \u2581', '\u4e2d\u6587\uff0c', '\U0001f600 </s><bos>', '\r\n\t']
TURNS = [{'role': 'user', 'content': '\u4e8c\u52a0\u4e8c\uff1f'}, {'role': 'assistant', 'content': 'Four.'}]


@pytest.fixture(scope='module')
def seqio():
  import seqio
  return seqio


@pytest.fixture(scope='module')
def tf(seqio):
  import tensorflow
  return tensorflow


@pytest.fixture(autouse=True)
def registries(seqio):
  """What a test registers is gone when it ends."""
  yield
  seqio.TaskRegistry.reset()
  seqio.MixtureRegistry.reset()


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture(scope='module')
def tokenizer():
  return Bytes(templates.SPECIALS).train()


def examples(task, split='train', **settings):
  return list(task.get_dataset(None, split, shuffle=False, **settings).as_numpy_iterator())


@pytest.mark.parametrize('text', AWKWARD)
def test_a_vocabulary_gives_the_tokenizer_s_ids_and_text(tf, tokenizer, text):
  made = vocabulary(tokenizer)
  ids = tokenizer.encode(text).tolist()
  assert made.encode(text) == ids
  assert made.encode_tf(tf.constant(text)).numpy().tolist() == ids
  assert made.decode([*ids, made.eos_id, 70]) == text
  assert made.decode_tf(tf.constant([*ids, 0, 0], tf.int32)).numpy().decode() == text
  row, = tf.data.Dataset.from_tensor_slices([text]).map(made.encode_tf).as_numpy_iterator()
  assert row.tolist() == ids


def test_a_vocabulary_works_on_batches_and_is_a_value(tf, tokenizer):
  made = vocabulary(tokenizer)
  assert made.encode_tf(tf.constant(['ab', '\u4e2d'])).to_list() == [made.encode('ab'), made.encode('\u4e2d')]
  rows = np.array([[*made.encode('ab'), made.eos_id, 99], [*made.encode('c'), 0, 0, 0]], np.int32)
  assert [text.decode() for text in made.decode_tf(tf.constant(rows)).numpy()] == ['ab', 'c']
  assert pickle.loads(pickle.dumps(made)) == made != vocabulary(Bytes().train())
  assert (made.bos_id, made.eos_id, made.pad_id, made.unk_id, made.vocab_size) == (1, 2, 0, None, tokenizer.vocab)


def test_text_at_id_0_is_not_taken_for_padding(tmp_path, tokenizer):
  """A shift by one, that must be asked for."""
  import base64
  (tmp_path / 'x').write_text(''.join(f'{base64.b64encode(bytes([i])).decode()} {i}\n' for i in range(256)))
  ranks = Loaded(str(tmp_path / 'x'), pattern='gpt2', specials=('<s>', '</s>'), bos='<s>', eos='</s>').train()
  with pytest.raises(ValueError, match=r"text '\\x00', which seqio takes for padding"):
    vocabulary(ranks)
  made = vocabulary(ranks, shift=1)
  assert made.encode('a\0') == [98, 1]
  assert made.decode([98, 1, made.eos_id]) == 'a\0'
  assert (made.eos_id, made.vocab_size) == (258, 259)
  with pytest.raises(ValueError, match='shift=1 has no use'):
    vocabulary(tokenizer, shift=1)
  with pytest.raises(ValueError, match='shift=2'):
    vocabulary(tokenizer, shift=2)


def test_text_comes_through_a_task_to_a_source_unchanged(folder, seqio, tokenizer):
  texts = {'a.txt': 'one\r\n', 'b.txt': '\u4e2d\u6587 \u2581', 'c.txt': '  <bos>'}
  for name, text in texts.items():
    (folder / name).write_text(text, newline='')
  task = tasks.add_text('text', {'train': TextFiles('*.txt')}, tokenizer)
  found = examples(task)
  assert [one['targets'].tolist() for one in found] == [[*tokenizer.encode(t), tokenizer.eos] for t in texts.values()]
  assert [one['name'].decode() for one in found] == list(texts)
  source = tasks.Seqio('text')
  assert source.parts() == ('text/train/1 of 3', 'text/train/2 of 3', 'text/train/3 of 3')
  whole = list(source.documents())
  assert [document.text for document in whole] == list(texts.values())
  assert [document.name for document in whole] == ['text/train/1:1', 'text/train/2:1', 'text/train/3:1']
  assert [d for part in source.parts() for d in source.documents((part,))] == whole
  shuffled = list(task.get_dataset(None, 'train', shuffle=True, seed=1).as_numpy_iterator())
  assert sorted(one['name'].decode() for one in shuffled) == list(texts)
  assert hash(source) == hash(tasks.Seqio('text'))


def test_the_standard_library_is_a_task(seqio, tokenizer):
  task = tasks.add_text('library', {'train': StandardLibrary()}, tokenizer)
  one = next(task.get_dataset(None, 'train', shuffle=False).as_numpy_iterator())
  first = next(StandardLibrary().documents())
  assert (one['name'].decode(), one['targets_pretokenized'].decode()) == (first.name, first.text)


def test_records_of_parallel_text(folder, tokenizer):
  rows = [{'en': 'one', 'zh': '\u4e00'}, {'en': 'two', 'zh': '\u4e8c'}]
  parquet.write_table(pyarrow.table({'translation': rows}), folder / 'train.parquet')
  (folder / 'test.jsonl').write_text(json.dumps(rows[0]))
  both = {'train': DataFolder('.'), 'test': DataFolder('.', 'test')}
  task = tasks.add_parallel('nested', {'train': both['train']}, tokenizer, inputs='translation.en',
                            targets='translation.zh')
  found = examples(task)
  assert [(one['inputs_pretokenized'].decode(), one['targets_pretokenized'].decode()) for one in found] == [
      ('one', '\u4e00'), ('two', '\u4e8c')]
  assert found[0]['inputs'].tolist() == [*tokenizer.encode('one'), tokenizer.eos]
  flat = tasks.add_parallel('flat', {'test': both['test']}, tokenizer, inputs='zh', targets='en')
  assert examples(flat, 'test')[0]['targets_pretokenized'] == b'one'
  tasks.add_parallel('wrong', {'test': both['test']}, tokenizer, inputs='de', targets='en')
  with pytest.raises(ValueError, match=r"wrong/test/1, after 0 examples: test.jsonl, line 1: no field 'de'"):
    list(tasks.Seqio('wrong', 'test').documents())


def test_conversations_are_tokens_and_weights(folder, seqio, tf, tokenizer):
  (folder / 'train.jsonl').write_text('\n'.join([json.dumps({'messages': TURNS}), json.dumps(
      {'instruction': 'q', 'output': 'a'})]))
  chat = Chat(templates.CHATML)
  task = tasks.add_conversations('talk', {'train': DataFolder('.')}, tokenizer, chat=chat)
  first, second = examples(task)
  want = chat.example(TURNS, tokenizer)
  assert first['targets'].tolist() == want.tokens_T.tolist()
  assert first['weights'].tolist() == want.weight_T.tolist()
  assert tokenizer.decode(second['targets'][second['weights'] > 0]) == 'a'
  (folder / 'train.jsonl').write_text(json.dumps({'messages': TURNS[:1]}))
  with pytest.raises(tf.errors.InvalidArgumentError, match=r'train\.jsonl:1: no turn of the assistant'):
    examples(task)
  with pytest.raises(ValueError, match='talk gives no text of that name, but name, targets, weights'):
    list(tasks.Seqio('talk').documents())


def test_preferences_have_weight_on_the_last_answer_alone(folder, tokenizer):
  record = {'prompt': [*TURNS, TURNS[0]], 'chosen': [TURNS[1]], 'rejected': [TURNS[1] | {'content': 'Five.'}]}
  parquet.write_table(pyarrow.Table.from_pylist([record]), folder / 'train.parquet')
  task = tasks.add_preferences('pairs', {'train': DataFolder('.')}, tokenizer, chat=Chat(templates.CHATML))
  one, = examples(task)
  for key, said in (('chosen', 'Four.'), ('rejected', 'Five.')):
    assert tokenizer.decode(one[key][one[f'{key}_weights'] > 0]) == said
  start = int(one['chosen_weights'].argmax())
  assert (one['chosen'][:start] == one['rejected'][:start]).all()


def test_data_sets_of_tfds(folder, tf, tokenizer):
  import tensorflow_datasets as tfds
  tfds.dataset_builders.store_as_tfds_dataset(
      name='tiny', version='1.0.0', data_dir=str(folder), disable_shuffling=True,
      features=tfds.features.FeaturesDict({'body': tfds.features.Text(), 'n': np.int64}),
      split_datasets={'train': tf.data.Dataset.from_tensor_slices(
          {'body': ['one', '\u4e8c', 'three'], 'n': np.arange(3)})})
  task = tasks.add_tfds('tiny', 'tiny:1.0.0', tokenizer, targets='body', data_dir=str(folder),
                        splits={'train': 'train[:2]', 'test': 'train[2:]'})
  assert [one['targets_pretokenized'].decode() for one in examples(task)] == ['one', '\u4e8c']
  assert [d.text for d in tasks.Seqio('tiny', 'test').documents()] == ['three']


def test_a_user_s_own_module_and_mixture(folder, seqio, tokenizer, monkeypatch):
  monkeypatch.syspath_prepend(str(folder))
  (folder / 'letters.txt').write_text('dear\n\n\u4f60\u597d\n')
  (folder / 'poem').write_text('rose')
  (folder / 'my_tasks_of_a_test.py').write_text('''
import seqio
from lmlib.data import sources, tasks, tokenizer, vocabulary
tokens = tokenizer.Bytes().train()
tasks.add_text('poems', {'train': sources.TextFiles('poem')}, tokens)
seqio.TaskRegistry.add(
    'letters', source=seqio.TextLineDataSource({'train': 'letters.txt'}),
    preprocessors=[lambda ds: ds.map(lambda line: {'targets': line}), seqio.preprocessors.tokenize],
    output_features={'targets': seqio.Feature(vocabulary.vocabulary(tokens))})
tasks.add_mixture('writing', {'poems': 1, 'letters': 3})
''')
  source = tasks.Seqio('writing', module='my_tasks_of_a_test', skip_empty=True)
  assert source.rates() == {'letters': 0.75, 'poems': 0.25}
  assert [(d.name, d.text) for d in source.documents()] == [
      ('letters/train/1:1', 'dear'), ('letters/train/1:3', '\u4f60\u597d'), ('poems/train/1:1', 'rose')]
  assert source.skipped() == (('letters/train/1:2', 'empty text'),)
  with pytest.raises(ValueError, match=r"letters/train/1:2: field 'targets' is '', not a text"):
    list(dataclasses.replace(source, skip_empty=False).documents())
  assert tasks.Seqio('poems').rates() == {'poems': 1}


@pytest.mark.parametrize(('change', 'said'), [
    ({'name': 'texts'}, "Seqio.name='texts' is no registered task.*did you mean text"),
    ({'split': 'dev'}, "Seqio.split='dev' is no split of text, which has train"),
    ({'module': 'not_there'}, "Seqio.module='not_there' cannot be imported"),
    ({'field': 'inputs'}, "Seqio.field='inputs': text gives no text of that name")])
def test_sources_that_name_what_is_not_there(folder, tokenizer, change, said):
  (folder / 'a.txt').write_text('a')
  tasks.add_text('text', {'train': TextFiles('a.txt')}, tokenizer)
  source = dataclasses.replace(tasks.Seqio('text'), **change)
  with pytest.raises(ValueError, match=said):
    list(source.documents())
  with pytest.raises(ValueError, match='no part'):
    list(tasks.Seqio('text').documents(('text/train/9 of 9',)))
  with pytest.raises(ValueError, match='must be positive'):
    tasks.add_mixture('m', {'text': 0})


def test_an_evaluator_scores_predictions(folder, seqio, tokenizer):
  """seqio.Evaluator with a model that knows one answer of two."""
  rows = [{'en': 'one', 'zh': '\u4e00'}, {'en': 'two', 'zh': '\u4e8c'}]
  (folder / 'test.jsonl').write_text('\n'.join(map(json.dumps, rows)))

  def exact(targets, predictions):
    return {'exact': float(np.mean([a == b for a, b in zip(targets, predictions, strict=True)])),
            'seen': ' '.join(targets)}

  tasks.add_parallel('translate', {'test': DataFolder('.', 'test')}, tokenizer, inputs='en', targets='zh',
                     metrics=[exact])
  evaluator = seqio.Evaluator('translate', seqio.EncDecFeatureConverter(pack=False), eval_split='test')

  def predict(made, model_feature_shapes=None):
    given = [one['encoder_input_tokens'] for _, one in made.as_numpy_iterator()]
    assert tokenizer.decode(given[0][:-1]) == 'one'
    return [(i, [*tokenizer.encode('\u4e00'), tokenizer.eos]) for i in range(len(given))]

  result, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
  scores = result.result()['translate']
  assert (scores['exact'], scores['seen']) == (0.5, '\u4e00 \u4e8c')
