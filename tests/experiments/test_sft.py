"""Fine-tuning as a user has it: a command that resumes, saves what was trained, and refuses what is wrong in a line."""
import dataclasses
import json
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import merge, replay, sft
from lmlib import cli
from lmlib.interop import opened
from lmlib.nn import adapters
from lmlib.train import checkpoint
from tests.experiments.conftest import ROOT, until
from tests.post import small
from tests.post.small import turns

GIN = '''
from __gin__ import dynamic_registration
from experiments import sft
from lmlib.data import conversations
from lmlib.nn import lora
from lmlib.optim import adamw
from lmlib.optim import schedules

include 'runs/sft.gin'
include 'meshes/data.gin'
include 'data/conversations.gin'

SOURCE = '{source}'
GLOB = '{chats}'
STEPS = 6
BATCH = 8
WORKDIR = '{workdir}'
OPTIMIZER = @adamw.AdamW()
adamw.AdamW:
  schedule = @schedules.Constant()
  decay = None
schedules.Constant.peak = 0.02
conversations.Conversations.held_out = 0.2
sft.main:
  length = 128
  save_every = 3
'''
LORA = ('sft.main.adapter = @lora.Lora()', 'lora.Lora.rank = 2', 'lora.Lora.targets = None')
COMPUTED = ('step', 'loss', 'nats', 'accuracy', 'grad_norm', 'update_norm', 'param_norm', 'weight', 'tokens')


class Run:
  """One configuration in a folder of its own."""

  def __init__(self, folder, source, chats):
    self.workdir, self.gin = folder / 'run', folder / 'tiny.gin'
    self.gin.write_text(GIN.format(source=source, chats=chats, workdir=self.workdir))

  def __call__(self, *bindings: str):
    sft.main(**cli.arguments(sft.main, [str(self.gin)], bindings))
    return self

  @property
  def numbers(self) -> list[dict]:
    lines = [json.loads(line) for line in (self.workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{name: line[name] for name in COMPUTED if name in line} for line in lines]

  @property
  def summary(self) -> dict:
    return json.loads((self.workdir / 'report' / 'summary.json').read_text())

  def stored(self, step: int) -> dict:
    return checkpoint.record_of(checkpoint.epath.Path(self.workdir / 'checkpoints' / str(step)))['arrays']


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return small.workdir(tmp_path_factory.mktemp('source') / 'model')


@pytest.fixture(scope='module')
def chats(tmp_path_factory):
  return small.chats(tmp_path_factory.mktemp('chats') / 'all.jsonl', 60)


@pytest.fixture
def run(tmp_path, source, chats):
  return Run(tmp_path, source, chats)


@pytest.fixture(scope='module')
def tuned(tmp_path_factory, source, chats):
  return Run(tmp_path_factory.mktemp('tuned'), source, chats)(*LORA)


def test_tuning_raises_the_held_out_score_and_says_so(tuned):
  nats, = tuned.summary['held_out']
  assert nats['measure'] == 'nats a token'
  assert nats['after'] < nats['before'] - 0.5
  assert nats['low'] <= nats['difference'] <= nats['high'] < 0
  assert tuned.summary['trained'] < tuned.summary['parameters'] / 4


def test_a_step_is_done_once_more_bit_for_bit(tuned, capsys):
  replay.main(workdir=str(tuned.workdir), step=5)
  out = capsys.readouterr().out
  assert 'step 5, with batch 4, after the checkpoint of step 3' in out
  assert '2 steps were compared with metrics.jsonl: the same bit for bit' in out


def test_only_the_adapter_is_saved(tuned):
  names = {name for name in tuned.stored(6) if name.startswith('params/')}
  assert names
  assert {name.rpartition('/')[2] for name in names} == {'a', 'b'}
  numbers = sum(int(np.prod(array['shape'])) for name, array in tuned.stored(6).items() if name in names)
  assert numbers == tuned.summary['trained']


def test_more_steps_go_on_as_if_nothing_had_been_between(tuned, run, capsys):
  run(*LORA, 'STEPS = 3')
  capsys.readouterr()
  run(*LORA)
  assert 'going on after step 3 of 6' in capsys.readouterr().out
  assert run.numbers == tuned.numbers
  assert run.summary['held_out'] == tuned.summary['held_out']


def test_a_finished_run_says_so_and_its_own_config_is_enough(tuned, capsys):
  sft.main(**cli.arguments(sft.main, [str(tuned.workdir / 'config.gin')]))
  out = capsys.readouterr().out
  assert f'finished    {tuned.workdir}: 6 of 6 steps are done' in out
  assert 'nats a token' in out


def test_all_weights_are_a_model_to_go_on_with(run, source):
  run('STEPS = 2')
  assert run.summary['trained'] == run.summary['parameters']
  assert cli.saved_model(str(run.workdir)) == small.CONFIG
  tuned = opened.opened(str(run.workdir), cli.saved_model).params(small.CONFIG)
  given = opened.opened(str(source), cli.saved_model).params(small.CONFIG)
  assert all((x != y).any() for x, y in zip(jax.tree.leaves(tuned), jax.tree.leaves(given)))


def test_the_adapter_is_a_folder_that_is_trained_on_and_merged(tuned, run, source, tmp_path):
  folder = tuned.workdir / 'adapter'
  assert sorted(path.name for path in folder.iterdir()) == ['adapter_config.json', 'adapter_model.safetensors']
  run(f"sft.main.begin = '{folder}'", 'STEPS = 1')
  assert run.summary['held_out'][0]['before'] == pytest.approx(tuned.summary['held_out'][0]['after'], rel=1e-4)
  merge.main(source=str(source), path=str(folder), target=str(tmp_path / 'merged'))
  adapter = opened.adapter_of(str(folder), small.CONFIG)
  base, merged = (opened.opened(str(path), cli.saved_model).params(small.CONFIG)
                  for path in (source, tmp_path / 'merged'))
  for one, other in zip(jax.tree.leaves(adapters.merge(small.CONFIG, base, adapter)), jax.tree.leaves(merged)):
    np.testing.assert_array_equal(one, other)
  assert refused(run, f"sft.main.begin = '{folder}'", *LORA).startswith(f"begin='{folder}' says which adapter it is")


def test_an_adapter_of_another_model_is_refused_with_both_shapes(tuned, run, tmp_path):
  wide = dataclasses.replace(small.CONFIG, hidden=48)
  small.workdir(tmp_path / 'wide', wide)
  said = refused(run, f"SOURCE = '{tmp_path}/wide'", f"sft.main.begin = '{tuned.workdir}/adapter'")
  assert '32' in said
  assert '48' in said
  assert not run.workdir.exists()


def test_ctrl_c_saves_and_the_same_command_goes_on(tuned, run, environment):
  words = [sys.executable, '-u', str(ROOT / 'experiments/sft.py'), f'--gin_file={run.gin}',
           *(f'--gin_bindings={binding}' for binding in (*LORA, 'STEPS = 200'))]
  process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
  metrics = run.workdir / 'metrics.jsonl'
  until(lambda: metrics.exists() and metrics.read_bytes().count(b'\n') >= 2, process)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=300)
  step = len(run.numbers)
  assert (process.returncode, err) == (
      75, f'stopped by SIGINT after step {step} of 200, saved; run the same command to go on\n')
  total = max(step + 1, 6)
  run(*LORA, f'STEPS = {total}')  # on eight devices, the same numbers but for the order of sums
  assert [line['step'] for line in run.numbers] == list(range(1, total + 1))
  assert [line['loss'] for line in run.numbers[:6]] == pytest.approx([line['loss'] for line in tuned.numbers], abs=1e-3)


def refused(run, *bindings) -> str:
  with pytest.raises(ValueError) as error:  # noqa: PT011, what it says is looked for by the caller
    run(*bindings)
  assert '\n' not in str(error.value)
  return str(error.value)


BAD = {
    'no source': (["SOURCE = '/nowhere'"], "SOURCE '/nowhere' is no model"),
    'no package': (["SOURCE = 'package:none_such'"], 'pip install --no-deps none-such'),
    'target': (['sft.main.adapter = @lora.Lora()', "lora.Lora.targets = ('query',)"], 'Lora.targets'),
    'rank': (['sft.main.adapter = @lora.Lora()', 'lora.Lora.rank = 0'], 'Lora.rank=0'),
    'length': (['sft.main.length = 512'], "length=512 is longer than the model's length=264"),
    'batch': (['BATCH = 4'], 'batch=4 is not a multiple'),
    'steps': (['STEPS = 0'], 'steps=0'),
    'held out': (['conversations.Conversations.held_out = 1.0'], 'held_out=1.0'),
    'files': (["GLOB = '/nowhere/*.jsonl'"], "JsonFiles.glob='/nowhere/*.jsonl' matches no file"),
    'policy': (["chat.Chat.too_long = 'cut'"], "Chat.too_long='cut' must be one of"),
    'another model': (['from lmlib.models import dense', 'sft.main.model = @dense.Config()'],
                      'model is another than SOURCE'),
}


@pytest.mark.parametrize(('bindings', 'reason'), BAD.values(), ids=BAD)
def test_what_the_configuration_gets_wrong(run, bindings, reason):
  assert reason in refused(run, *bindings)
  assert not run.workdir.exists()


def test_a_conversation_that_is_none_is_named_and_no_work_is_left(run, tmp_path):
  odd = tmp_path / 'odd.jsonl'
  odd.write_text(''.join(json.dumps({'messages': said}) + '\n' for said in (turns('a', 'b'), turns('a', ' '))))
  said = refused(run, f"GLOB = '{odd}'")
  assert said.startswith(f'{odd}, line 2: message 1 of 2 is an empty turn')
  assert not run.workdir.exists()


def test_a_template_that_the_tokenizer_lacks(run, tmp_path):
  small.workdir(tmp_path / 'plain', template=None)
  assert 'the tokenizer has no chat template: give Chat.template' in refused(run, f"SOURCE = '{tmp_path}/plain'")


def test_another_adapter_or_base_does_not_go_on_with_a_run(tuned, tmp_path):
  here = [f"WORKDIR = '{tuned.workdir}'"]
  again = lambda *bindings: refused(lambda *given: sft.main(**cli.arguments(sft.main, [str(tuned.gin)], given)),
                                    *here, *LORA, *bindings)
  assert 'adapter.rank: there 2, here 4' in again('lora.Lora.rank = 4')
  assert "loss.z_loss: there None, here 0.1" in again(
      'from lmlib.train import losses', 'sft.main.loss = @losses.NextToken()', 'losses.NextToken.z_loss = 0.1')
  other = small.workdir(tmp_path / 'other', small.LEARNED)
  assert re.search('holds another run .*source: there', again(f"SOURCE = '{other}'"))
