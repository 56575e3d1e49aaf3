"""generate.py with models of all kinds: prompts, files, searches and talk."""
import dataclasses
import io
import json
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from experiments import convert, generate
from lmlib import cli
from lmlib.data.chat import Chat
from lmlib.data.tokenizer import Loaded
from lmlib.serve.beams import Beams
from lmlib.serve.best_of import BestOf
from lmlib.serve.contrastive import Contrastive
from lmlib.serve.drafts import Lookup
from lmlib.serve.sampling import Sampling
from tests.experiments.conftest import ROOT
from tests.interop.published import CONFIG, folder

TEMPLATE = ('{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
            '{% if add_generation_prompt %}assistant: {% endif %}')
GREEDY = Sampling(0.0, most=6)


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> pathlib.Path:
  """A folder of Hugging Face's form with a chat template."""
  path = tmp_path_factory.mktemp('published') / 'model'
  folder(path, dataclasses.replace(CONFIG, layers=1, length=512), pieces=290)
  said = json.loads((path / 'tokenizer_config.json').read_text())
  (path / 'tokenizer_config.json').write_text(json.dumps(said | {'chat_template': TEMPLATE}))
  return path


@pytest.fixture
def continued(source, capsys):
  """What main() prints with a model, and without it the one of `source`."""
  def run(**settings) -> str:
    generate.main(**{'workdir': str(source), 'how': GREEDY} | settings)
    return capsys.readouterr().out
  return run


def test_models_of_all_kinds_write_the_same(source, tmp_path, continued, capsys):
  convert.main(source=str(source), target=str(tmp_path / 'run'), check=False)
  convert.main(source=str(tmp_path / 'run'), target=str(tmp_path / 'a.gguf'), kind='F32', check=False)
  capsys.readouterr()
  first, *outs = (continued(workdir=str(path), prompts=('the quick', 'x'))
                  for path in (source, tmp_path / 'run', tmp_path / 'a.gguf'))
  assert "---- 'the quick' is continued\nthe quick" in first
  for out in outs:
    assert out.splitlines()[1:] == first.splitlines()[1:]


def test_a_file_is_answered_line_by_line_whatever_the_batch(continued, tmp_path):
  path, how = tmp_path / 'a.jsonl', Sampling(1.0, most=6, seed=3)
  messages = [{'role': 'user', 'content': 'the fox'}]
  rows = [{'prompt': 'the quick', 'id': 1}, {'messages': messages}, {'prompt': 'the quick'}]
  path.write_text('\n'.join(map(json.dumps, rows)))
  outs = [continued(file=str(path), how=how, batch=batch) for batch in (1, 3)]
  found = [[json.loads(line) for line in out.splitlines()] for out in outs]
  assert found[0] == [row | {'logp': pytest.approx(row['logp'], rel=1e-4)} for row in found[1]]
  assert [{key: row[key] for key in row.keys() & {'prompt', 'messages', 'id'}} for row in found[0]] == rows
  assert all(row['ended'] in ('length', 'eos') and row['logp'] < 0 for row in found[0])
  assert found[0][0]['text'] != found[0][2]['text'], 'a row has a seed of its own'
  (tmp_path / 'a.txt').write_text('the quick\n')
  assert json.loads(continued(file=str(tmp_path / 'a.txt'), how=how))['text'] == found[0][0]['text']
  asked = continued(prompts=('the fox',), chat=Chat(), how=dataclasses.replace(how, seed=4))
  assert asked.endswith(f"---- 'the fox' is answered\n{found[0][1]['text']}\n\n")


def test_drafts_write_the_same_and_are_counted(source, continued, tmp_path):
  plain = continued(prompts=('the quick', 'x'))
  for draft, share in ((Lookup(), r'\d+%'), (str(source), '100%')):
    out = continued(prompts=('the quick', 'x'), draft=draft)
    assert out.startswith(plain)
    assert re.fullmatch(rf'drafts +{share} of \d+ tokens accepted, \d\.\d\d tokens a run of the model; .*\n',
                        out.removeprefix(plain))
  (tmp_path / 'a.txt').write_text('the quick\n')
  row = json.loads(continued(file=str(tmp_path / 'a.txt'), draft=str(source)))
  assert row['acceptance'] == 1
  assert row['tokens_a_step'] > 2
  with pytest.raises(ValueError, match=r'draft=Lookup.* not with search=Beams'):
    continued(prompts=('x',), draft=Lookup(), search=Beams())


def test_searches_and_guidance_are_settings(continued, tmp_path):
  (tmp_path / 'a.txt').write_text('the quick\n')
  ask = lambda **settings: json.loads(continued(file=str(tmp_path / 'a.txt'), **settings))
  greedy = ask()
  assert 'score' not in greedy
  searched = ask(search=Beams(3))
  assert searched['score'] <= searched['logp'] + 1e-4, 'the end of a text counts in its score'
  assert ask(search=Contrastive(2, 0.0))['text'] == greedy['text']
  assert ask(search=BestOf(4), how=Sampling(most=6))['score'] < 0
  assert ask(against='lazy dogs', guidance=3.0)['text'] != greedy['text']


def test_a_chat_streams_and_keeps_its_history(source, continued, monkeypatch):
  prompts, stream = [], generate.stream

  def heard(model, params, ids, *more, **settings):
    prompts.extend(ids)
    yield from stream(model, params, ids, *more, **settings)

  monkeypatch.setattr(generate, 'stream', heard)
  monkeypatch.setattr('sys.stdin', io.StringIO('the quick\nfox\n'))
  out = continued(chat=Chat(), system='be brief')
  first, second = map(Loaded(str(source)).load().decode, prompts)
  assert out.startswith(f'{source}: Ctrl-C leaves an answer, Ctrl-D ends\n\n> ')
  assert first == 'system: be brief\nuser: the quick\nassistant: '
  answer = out.split('\n> ')[1].strip()
  assert second == f'{first}{answer}\nuser: fox\nassistant: '


def test_ctrl_c_leaves_the_answer_and_ctrl_d_ends(source, environment):
  given = [f'--gin_bindings={binding}' for binding in (f'WORKDIR = "{source}"', 'NEW = 440',
                                                       'sampling.Sampling.bias = ((2, -1e9),)')]
  process = subprocess.Popen([sys.executable, '-u', ROOT / 'experiments/generate.py', '--gin_file=chat.gin', *given],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
  process.stdin.write(b'the quick\n')
  process.stdin.flush()
  out = b''
  while len(out.partition(b'> ')[2].strip()) < 3 and process.poll() is None:
    out += process.stdout.read1()
  process.send_signal(signal.SIGINT)
  while out.count(b'\n> ') < 2 and process.poll() is None:
    out += process.stdout.read1()
  rest, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (0, b''), out + rest


@pytest.mark.parametrize(('settings', 'said'), [
    ({}, 'prompts=.. and file=None: give one of them, or a chat'),
    (dict(prompts=('a',), file='a.txt'), r"prompts=\('a',\) and file='a.txt'"),
    (dict(prompts=('a',), system='s'), "system='s' has no effect without a chat"),
    (dict(chat=Chat(), search=Beams()), 'leave them out to talk'),
    (dict(prompts=('a',), search=Beams(), against='b', guidance=2.0), "against='b' guides draws"),
    (dict(prompts=('a',), batch=0), 'batch=0'), (dict(prompts=('a',), workdir='/nowhere'), "WORKDIR '/nowhere' is no"),
    (dict(prompts=('a',), workdir='package:nowhere'), 'the package is not installed: pip install'),
    (dict(prompts=('a',), how=Sampling(most=512)), r"Sampling.most=512 leaves no room .* length=512"),
    (dict(prompts=('a', 'a' * 300), how=Sampling(most=400)), r'prompt 2 of 2 has \d+ tokens; .* room for 112'),
    (dict(prompts=('a',), start=3), 'start=3 is of encoder-decoders'),
    (dict(prompts=('a',), search=Beams(), how=Sampling()), r'temperature=1\.0 must be 0'),
    (dict(prompts=('a',), guidance=2.0), r'guidance=2\.0 has no effect without against')])
def test_what_does_not_go_together_is_refused(continued, settings, said):
  with pytest.raises(ValueError, match=said):
    continued(**settings)


@pytest.mark.parametrize('leaf', ['generate.gin', 'generate_file.gin'])
def test_searches_are_named_in_a_binding(leaf):
  searches = {'beams.Beams': Beams(), 'contrastive.Contrastive': Contrastive(), 'best_of.BestOf': BestOf()}
  for text, search in searches.items():
    given = [f'generate.main.search = @{text}()', *["PATH = 'a.txt'"] * (leaf == 'generate_file.gin')]
    assert cli.arguments(generate.main, [leaf], given)['search'] == search


def test_a_setting_out_of_range_is_named():
  for binding, said in (('top_p = 3.0', r'Sampling\.top_p=3\.0'), ('temperature = -1.0', r'temperature=-1\.0')):
    with pytest.raises(ValueError, match=said):
      cli.arguments(generate.main, ['generate.gin'], [f'sampling.Sampling.{binding}'])


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
  folder(tmp_path / 'model')
  with pytest.raises(ValueError, match='a folder without'):
    generate.main(workdir=str(tmp_path / 'model'), prompts=('a',))
