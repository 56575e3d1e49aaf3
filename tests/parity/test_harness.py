"""The harness on lmlib's model and on its own Hugging Face backend: the same scores of tasks of each output type."""
import json

import numpy as np
import pytest

from lmlib.data.tokenizer import Loaded
from lmlib.eval import evaluations, harness
from lmlib.eval.candidate import Candidate
from lmlib.interop import hf

pytest.importorskip('lm_eval')
pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
# The harness asks git for a version, in a process of its own that forks; jax warns of that.
pytestmark = pytest.mark.filterwarnings('ignore:os.fork')
WORDS = ['the', 'a', 'cat', 'dog', 'sat', 'ran', 'on', 'under', 'mat', 'big', 'red', 'it', 'was', 'Question', 'Answer',
         'yes', 'no', ':', '.', '?', '\n']
TASKS = {
    'local_choice': 'output_type: multiple_choice\ndoc_to_text: "{{question}}\\nAnswer:"\ndoc_to_target: "{{answer}}"\n'
                    'doc_to_choice: "{{choices}}"\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
                    'num_fewshot: 1\nfewshot_split: test\n',
    'local_likelihood': 'output_type: loglikelihood\ndoc_to_text: "{{question}}"\ndoc_to_target: " {{choices[0]}}"\n'
                        'metric_list:\n  - metric: perplexity\n  - metric: acc\n',
    'local_rolling': 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
                     'metric_list:\n  - metric: bits_per_byte\n  - metric: word_perplexity\n',
    'local_writing': 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{choices[0]}}"\n'
                     'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n'}
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}" \
           "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """A tiny LLaMA with byte-level BPE, in Hugging Face's form."""
  import tokenizers
  import torch
  folder = tmp_path_factory.mktemp('published')
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=320, special_tokens=['<|bos|>', '<|end|>', '<|turn|>'],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
  bpe.train_from_iterator([text(n, 40) for n in range(40)], trainer)
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<|bos|>', eos_token='<|end|>',
                                              pad_token='<|end|>')
  fast.chat_template = TEMPLATE
  fast.save_pretrained(folder)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
                                    bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_range=0.4)
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  return folder


def text(seed, words):
  return ' '.join(np.random.default_rng(seed).choice(WORDS, words).tolist())


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  """A folder with a task of each output type, on one local file."""
  folder = tmp_path_factory.mktemp('tasks')
  rows = [{'question': f'Question: {text(n, 3 + n % 2)}', 'choices': [text(n + 50 * i, i + 1) for i in range(1, 4)],
           'answer': n % 3, 'text': text(n, 10 + 70 * (n % 2))} for n in range(4)]
  (folder / 'test.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  for name, said in TASKS.items():
    (folder / f'{name}.yaml').write_text(
        f'task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/test.jsonl\n'
        f'test_split: test\n{said}')
  return folder


@pytest.fixture(scope='module')
def ours(published):
  found = hf.read(published)
  return harness.model(Candidate('ours', found.config, hf.load(found)[1], Loaded(str(published)).load()), batch=16)


@pytest.fixture(scope='module')
def theirs(published):
  from lm_eval.models.huggingface import HFLM
  return HFLM(str(published), device='cpu', batch_size=16, dtype='float32', max_length=96)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
  for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
    monkeypatch.setenv(name, '1')


def scores(found, task):
  return {name: value for name, value in found['results'][task].items()
          if isinstance(value, float) and not name.startswith('sample')}


@pytest.mark.parametrize('chat', [False, True])
def test_scores_are_those_of_the_hugging_face_backend(ours, theirs, tasks, chat):
  names = list(TASKS) if not chat else ['local_choice', 'local_writing']
  ours.templated = False
  mine, other = (harness.evaluate(one, names, folder=str(tasks), chat=chat) for one in (ours, theirs))
  ours.candidate.answers.count()
  assert harness.evaluate(ours, names, folder=str(tasks), chat=chat)['results'] == mine['results']
  assert ours.candidate.answers.count()[1] == 0, 'everything was known'
  assert sum(map(len, mine['samples'].values())) == 4 * len(names)
  for name in names:
    expected = scores(other, name)
    assert expected
    assert scores(mine, name) == pytest.approx(expected, rel=1e-4), name  # float32
    for a, b in zip(mine['samples'][name], other['samples'][name], strict=True):
      assert a['arguments'] == b['arguments']
      for x, y in zip(np.ravel(a['resps']).tolist(), np.ravel(b['resps']).tolist(), strict=True):
        assert x == (y if isinstance(x, str) else pytest.approx(y, rel=1e-3))


def test_an_unknown_task_is_named_with_the_nearest(tasks):
  with pytest.raises(ValueError, match=r"no task 'local_choise' \(did you mean \"local_choice\"\?\)"):
    evaluations.Harness(('local_choise',), folder=str(tasks)).check()
  with pytest.raises(ValueError, match=r"Harness.folder='/nowhere' is no folder"):
    evaluations.Harness(('a',), folder='/nowhere').check()


def test_more_examples_than_there_are_is_said(ours, tasks):
  with pytest.raises(ValueError, match='shots=50 are more examples than local_choice'):
    harness.evaluate(ours, ['local_choice'], folder=str(tasks), shots=50)


def test_results_are_the_harness_own_with_the_values_of_each_question(ours, tasks):
  one = evaluations.Harness(tuple(TASKS), folder=str(tasks))
  one.check()
  found = {(result.task, result.metric): result for result in one.run(ours.candidate)}
  assert {key for key, result in found.items() if result.values} == {
      ('local_choice', 'acc'), ('local_choice', 'acc_norm'), ('local_likelihood', 'acc'),
      ('local_rolling', 'bits_per_byte'), ('local_writing', 'exact_match')}
  said = harness.evaluate(ours, list(TASKS), folder=str(tasks))['results']
  for (task, metric), result in found.items():
    assert result.score == pytest.approx(said[task][f'{metric},none'], rel=1e-6)


def test_data_that_is_not_here_is_an_error_that_says_so(ours, tmp_path):
  (tmp_path / 'far.yaml').write_text('task: far\ndataset_path: nobody/nothing\noutput_type: loglikelihood\n'
                                     'test_split: test\ndoc_to_text: "{{a}}"\ndoc_to_target: "{{b}}"\n')
  with pytest.raises(ValueError, match=r'data of far is not on this machine'):
    harness.evaluate(ours, ['far'], folder=str(tmp_path))


def test_settings_of_sampling_that_are_not_here_are_refused():
  with pytest.raises(ValueError, match='num_beams'):
    harness.sampling({'until': ['.'], 'num_beams': 4})


def test_specials_are_read_only_where_a_template_wrote_them(ours):
  ours.templated = False
  assert not ours.tokenizer.is_special(ours.tok_encode('a <|end|>')[-1])
  said = ours.apply_chat_template([{'role': 'user', 'content': 'the cat'}])
  assert said == '<|turn|>user: the cat<|end|><|turn|>assistant: '
  assert ours.tok_encode(said).count(1) == 1
  ours.templated = False
