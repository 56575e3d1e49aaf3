"""A model taken over is a WORKDIR that works, one written a folder that works, and nothing half is left of either."""
import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import convert, evaluate, generate, pretrain
from lmlib import cli, gin_text
from lmlib.data.sources import TextFiles
from lmlib.data.tokenizer import ByteLevelBpe, Bytes, Loaded, SentencePiece
from lmlib.eval.evaluations import Perplexity
from lmlib.interop import check, hf, safetensors
from lmlib.models import protocol
from lmlib.nn.stack import Execution
from lmlib.serve.sampling import Sampling
from lmlib.train.checkpoint import Checkpoints
from lmlib.train.health import RunFault
from tests.experiments.conftest import LIMITED, ROOT
from tests.interop import published
from tests.interop.published import CONFIG, TEXTS, UNTIED, folder, same_tree


@pytest.fixture(autouse=True)
def without_transformers(monkeypatch):
  """As where torch is not installed; tests/parity has it."""
  monkeypatch.setattr(check, 'has_transformers', lambda: False)


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('published')
  folder(path, pieces=290)
  return path


@pytest.fixture(scope='module')
def taken(source, tmp_path_factory) -> pathlib.Path:
  """The WORKDIR of `source`."""
  path = tmp_path_factory.mktemp('taken') / 'run'
  convert.main(source=str(source), target=str(path), check=False)
  return path


def contents(path: pathlib.Path) -> list[str]:
  return sorted(file.name for file in path.iterdir())


def test_logits_of_both_sides_are_compared_and_said(source, tmp_path, capsys):
  convert.main(source=str(source), target=str(tmp_path / 'run'))
  out = capsys.readouterr().out
  assert f'checked     {tmp_path}/run beside its source: logits differ by 0.0e+00 of the largest' in out
  assert 'not compared with transformers, which is not installed' in out
  assert contents(tmp_path) == ['run']
  convert.main(source=str(tmp_path / 'run'), target=str(tmp_path / 'back'), dtype='bfloat16')
  assert f'checked     {tmp_path}/back beside its source: logits differ by 0.0e+00' in capsys.readouterr().out
  assert contents(tmp_path) == ['back', 'run']


def test_a_workdir_says_which_model_it_holds(taken):
  assert cli.saved_model(str(taken)) == CONFIG
  manifest = json.loads((taken / 'manifest.json').read_text())
  assert manifest['identity']['model.width'] == 16
  assert manifest['parameters'] == sum(x.size for x in jax.tree.leaves(jax.eval_shape(
      lambda: protocol.new(CONFIG, jax.random.key(0)))))


def test_its_config_is_a_file_like_those_of_models(taken):
  """For training to go on from: given after a leaf, it replaces the leaf's model."""
  found = cli.arguments(pretrain.main, ['quickstart.gin', str(taken / 'config.gin')])
  assert found['model'] == CONFIG


def test_it_generates_and_is_evaluated(taken, source, tmp_path, capsys):
  generate.main(workdir=str(taken), prompts=('the quick', 'x'), how=Sampling(most=4))
  out = capsys.readouterr().out
  assert out.startswith(f'{taken}\n')
  assert "---- 'the quick' is continued\nthe quick" in out
  (tmp_path / 'a.txt').write_text(TEXTS[0])
  evaluate.main(workdir=str(taken), evaluations=(Perplexity(TextFiles(str(tmp_path / '*.txt'))),),
                out=str(tmp_path / 'report'))
  assert json.loads(capsys.readouterr().out.splitlines()[-1])['perplexity']['bits_per_byte'][taken.name] > 1


def test_a_prompt_begins_as_the_makers_own_do(source, tmp_path):
  """add_bos_token, or else what the tokeniser's own file puts before a text."""
  assert Loaded(str(source)).load().prompt('the').count(1) == 0
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    (tmp_path / name).write_bytes((source / name).read_bytes())
  said = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(said | {'add_bos_token': True}))
  assert Loaded(str(tmp_path)).load().prompt('the')[0] == 1
  del said['add_bos_token']
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(said))
  assert not Loaded(str(tmp_path)).load().starts
  spec = json.loads((tmp_path / 'tokenizer.json').read_text())
  spec['post_processor'] = {'type': 'Sequence', 'processors': [
      {'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': '<|bos|>', 'type_id': 0}},
                                                {'Sequence': {'id': 'A', 'type_id': 0}}], 'pair': [],
       'special_tokens': {'<|bos|>': {'id': '<|bos|>', 'ids': [1], 'tokens': ['<|bos|>']}}}]}
  (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
  assert Loaded(str(tmp_path)).load().starts
  assert Bytes().train().prompt('a') == [1, 100]


def test_there_and_back_files_beside_the_weights_are_carried(taken, source, tmp_path):
  convert.main(source=str(taken), target=str(tmp_path / 'back'), check=False)
  names = {'tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'model.safetensors', 'config.json'}
  assert set(contents(tmp_path / 'back')) == names
  for name in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json'):
    assert (tmp_path / 'back' / name).read_bytes() == (source / name).read_bytes()
  same_tree(hf.load(tmp_path / 'back')[1], hf.load(source)[1])


TOKENIZERS = {'SentencePiece': (SentencePiece(pieces=300), 'tokenizer.model'),
              'byte level': (ByteLevelBpe(pieces=290, specials=('<mark>',)), 'tokenizer.json'),
              'bytes': (Bytes(), None)}


@pytest.mark.parametrize(('kind', 'file'), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_model_that_lmlib_trained_is_written_with_its_tokenizer(tmp_path, kind, file, capsys):
  config, run = dataclasses.replace(UNTIED, execution=Execution(dtype='bfloat16', dropout=0.1)), tmp_path / 'run'
  made = Checkpoints(run / 'checkpoints')
  params = protocol.init(config, jax.random.key(0))
  made.save(3, {'params': params})
  made.close()
  tokenizer = kind.train(TEXTS, 500)
  tokenizer.save(run / 'tokenizer.model')
  (run / 'config.gin').write_text(gin_text.gin_text('experiments.pretrain.main', {'model': config, 'steps': 9}))
  convert.main(source=str(run), target=str(tmp_path / 'out'), shard=3000.0)
  assert 'after step 3, written as llama' in (out := capsys.readouterr().out)
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 1
  same_tree(hf.load(tmp_path / 'out')[1], params)
  said = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert (said['model_type'], said['bos_token_id'], said['eos_token_id']) == ('llama', tokenizer.bos, tokenizer.eos)
  if file is None:
    assert 'tokenizer   not written: a tokenizer of PlainBytes has no form that others read' in out
  else:
    back = Loaded(str(tmp_path / 'out')).load()
    assert (tmp_path / 'out' / file).is_file()
    for text in (*TEXTS, 'never seen: 猫'):
      assert back.prompt(text) == tokenizer.prompt(text)
    assert (back.specials, back.eos) == (tokenizer.specials, tokenizer.eos)


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(tmp_path):
  folder(tmp_path / 'a', pieces=300)
  folder(tmp_path / 'a', dataclasses.replace(CONFIG, vocab=299))
  with pytest.raises(ValueError, match='the tokenizer has 300 ids, the model embeds vocab=299'):
    convert.main(source=str(tmp_path / 'a'), target=str(tmp_path / 'run'))
  assert contents(tmp_path) == ['a']


def test_what_was_overlooked_and_a_missing_tokenizer_are_said(tmp_path, capsys):
  folder(tmp_path / 'a', more={'new_switch': 3})
  convert.main(source=str(tmp_path / 'a'), target=str(tmp_path / 'run'), check=False)
  out = capsys.readouterr().out
  assert 'left aside  in config.json, of unknown meaning: new_switch' in out
  assert 'tokenizer   none for lmlib: ' in out
  assert 'NOT checked' in out


@pytest.mark.parametrize('direction', ['in', 'out'])
def test_weights_that_went_astray_end_it_and_nothing_is_left(taken, source, tmp_path, monkeypatch, direction):
  """Two tensors of one shape change places on their way."""
  gate, up = (f'model.layers.1.mlp.{name}_proj.weight' for name in ('gate', 'up'))
  write = safetensors.Writer.write
  if direction == 'in':
    to_checkpoint = hf.to_checkpoint

    def swapped(published, *more):
      stored = dict(published.stored)
      stored[gate], stored[up] = stored[up], stored[gate]
      return to_checkpoint(dataclasses.replace(published, stored=stored), *more)

    monkeypatch.setattr(hf, 'to_checkpoint', swapped)
  else:
    monkeypatch.setattr(safetensors.Writer, 'write', lambda self, name, x: write(
        self, {gate: up, up: gate}.get(name, name), x))
  with pytest.raises(RunFault, match=r'beside its source: logits differ by .*: nothing is kept'):
    convert.main(source=str(source if direction == 'in' else taken), target=str(tmp_path / 'new'))
  assert contents(tmp_path) == []


def test_a_model_that_computes_something_else_than_transformers_ends_it(source, tmp_path, monkeypatch):
  monkeypatch.setattr(check, 'has_transformers', lambda: True)
  params = published.params(CONFIG, {stored.name: stored.read() for stored in safetensors.in_folder(source)})
  theirs = check.logits(hf.read(source).family, CONFIG, params)
  for change, fine in ((0, True), (1e-3 * np.abs(theirs).max(), False), (np.nan, False)):
    other = theirs.copy()
    other[-1, -1, -1] += change
    monkeypatch.setattr(check, 'their_logits', lambda *_, other=other: other)
    if fine:
      convert.main(source=str(source), target=str(tmp_path / 'fine'))
    else:
      with pytest.raises(RunFault, match=r'lmlib beside transformers: logits differ by .*: nothing is kept'):
        convert.main(source=str(source), target=str(tmp_path / 'new'))
  assert contents(tmp_path) == ['fine']


def test_a_model_larger_than_memory_is_written_and_said_to_be_unchecked(source, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(check, '_available', lambda: 1000)
  convert.main(source=str(source), target=str(tmp_path / 'run'))
  out = capsys.readouterr().out
  assert 'NOT checked the logits were not compared: it needs 0.0 GB of memory' in out
  assert "--gin_bindings='convert.main.check = True'" in out
  convert.main(source=str(source), target=str(tmp_path / 'again'), check=True)
  assert 'checked     ' in capsys.readouterr().out


def test_an_interruption_leaves_nothing(taken, source, tmp_path, monkeypatch):
  from lmlib.terminal import Terminal

  def interrupted(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(Terminal, 'progress', interrupted)
  for path in (source, taken):
    with pytest.raises(KeyboardInterrupt):
      convert.main(source=str(path), target=str(tmp_path / 'new'))
    assert contents(tmp_path) == []


def test_what_is_there_is_left_alone(source, taken, tmp_path):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'precious').touch()
  (tmp_path / 'file').touch()
  for path in (source, taken):
    for name in ('full', 'file'):
      with pytest.raises(ValueError, match=f"TARGET '.*{name}' exists already; give another, or remove it"):
        convert.main(source=str(path), target=str(tmp_path / name))
  assert contents(tmp_path / 'full') == ['precious']


def test_an_empty_folder_and_what_a_killed_one_left_are_taken(source, tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run.partial').mkdir()
  (tmp_path / 'run.partial' / 'junk').touch()
  convert.main(source=str(source), target=str(tmp_path / 'run'), check=False)
  assert contents(tmp_path) == ['run']
  assert 'junk' not in contents(tmp_path / 'run')


def test_two_writers_of_one_target(source, tmp_path):
  import fcntl
  with open(tmp_path / 'run.lock', 'a') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"TARGET '.*run' is being written by another process"):
      convert.main(source=str(source), target=str(tmp_path / 'run'), check=False)
  assert contents(tmp_path) == ['run.lock']


@pytest.mark.parametrize(('settings', 'what'), [
    ({'target': '/proc/run'}, "TARGET '/proc/run' cannot be written"),
    ({'target': 'gs://bucket/run'}, "TARGET 'gs:/bucket/run' is a URL"),
    ({'source': '/nowhere'}, "there is no folder '/nowhere'"),
    ({'dtype': 'float31'}, "dtype='float31' must be one of None, 'float32'")])
def test_settings_that_cannot_be_are_named(source, tmp_path, settings, what):
  with pytest.raises(ValueError, match=what):
    convert.main(**{'source': str(source), 'target': str(tmp_path / 'run')} | settings)
  assert contents(tmp_path) == []


def test_too_little_room_is_known_before_work(source, taken, tmp_path, monkeypatch):
  monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), {'free': 40_000}))
  for path, target in ((source, 'run'), (taken, 'out')):
    with pytest.raises(ValueError, match=rf"TARGET '.*{target}' has 0\.0 MB free, but 0\.0 MB are needed"):
      convert.main(source=str(path), target=str(tmp_path / target))
  convert.main(source=str(source), target=str(tmp_path / 'run'), dtype='bfloat16', check=False)
  assert contents(tmp_path) == ['run']


def test_a_model_type_that_cannot_hold_the_model(taken, tmp_path):
  with pytest.raises(ValueError, match="the family 'lama' is not known"):
    convert.main(source=str(taken), target=str(tmp_path / 'out'), model_type='lama')


def test_a_source_of_both_forms_is_asked_about(tmp_path):
  for name in ('config.json', 'config.gin'):
    (tmp_path / name).touch()
  with pytest.raises(ValueError, match=r'holds a config\.json and a config\.gin'):
    convert.main(source=str(tmp_path), target=str(tmp_path / 'new'))


@pytest.mark.parametrize('direction', ['in', 'out'])
def test_a_full_disk_is_said_and_nothing_is_left(taken, source, environment, tmp_path, direction):
  here = source if direction == 'in' else taken
  command = [sys.executable, '-c', LIMITED, '20000', sys.executable, str(ROOT / 'experiments/convert.py'),
             '--gin_file=convert.gin', f'--gin_bindings=SOURCE = "{here}"', f'--gin_bindings=TARGET = "{tmp_path}/new"',
             '--gin_bindings=convert.main.check = False']
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert done.returncode == 1, done.stderr
  assert 'File too large' in done.stderr
  assert f'{tmp_path}/new' in done.stderr
  assert done.stderr.count('\n') == 1
  assert contents(tmp_path) == []
