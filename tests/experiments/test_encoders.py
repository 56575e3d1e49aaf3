"""Encoders and encoder-decoders are pretrained by the same command, and say what they have learned to fill in."""
import json
import math

import pytest

from experiments import pretrain
from lmlib import sharding
from lmlib.data import prepare
from lmlib.data.denoising import SpanCorruption
from lmlib.data.objectives import CAUSAL, MaskedLm, PrefixLm, Specials
from lmlib.data.sources import TextFiles
from lmlib.data.tokenizer import Bytes
from lmlib.models import encoder, encoder_decoder
from lmlib.optim.adamw import AdamW
from lmlib.optim.schedules import Cosine
from lmlib.train import metrics
from lmlib.train.encoder_losses import MaskedToken, SequenceToSequence
from lmlib.train.losses import NextToken

BYTES = Bytes().pieces
SIZES = dict(layers=1, width=32, hidden=64, heads=2, head_width=16, length=64)
MASKED = dict(model=encoder.Config(vocab=BYTES + 1, **SIZES), loss=MaskedToken(),
              objective=MaskedLm(Specials(mask=BYTES), rate=0.3))
SPANS = dict(model=encoder_decoder.Config(vocab=BYTES + 8, encoder_layers=1, **SIZES), loss=SequenceToSequence(),
             objective=SpanCorruption(Specials(sentinels=tuple(range(BYTES, BYTES + 8))), layout='encoder_decoder'))


@pytest.fixture(autouse=True)
def here(texts, monkeypatch):
  """Documents by names that no temporary folder is part of: names decide what is held out and what comes first."""
  monkeypatch.chdir(texts)


def run(workdir, **changes):
  data = prepare.Corpus(source=TextFiles('*.txt'), tokenizer=Bytes(), held_out=0.2)
  settings = dict(data=data, optimizer=AdamW(schedule=Cosine(peak=0.01, warmup=5)), layout=sharding.Layout(data=-1),
                  steps=25, batch=8, workdir=str(workdir), save_every=20)
  pretrain.main(**settings | changes)


@pytest.mark.parametrize(('name', 'kind'), [('masked', MASKED), ('spans', SPANS)])
def test_it_learns_to_fill_in_and_says_how_well(name, kind, tmp_path, capsys):
  run(tmp_path / name, **kind)
  lines = metrics.read(tmp_path / name / 'metrics.jsonl')
  assert -0.2 < lines[0]['loss'] - math.log(kind['model'].vocab) < 0.8  # a new model knows nothing
  assert lines[-1]['loss'] < lines[0]['loss'] - 1
  assert lines[-1]['tokens'] > 2 * 25 * 8 * 64 / 3  # read, though few of them count
  found = json.loads((tmp_path / name / 'report' / 'summary.json').read_text())
  assert found['hidden_nats'] < lines[0]['loss'] - 1
  assert found['hidden_tokens'] < found['read_tokens'] / 2
  assert 'bits_per_byte' not in found
  out = capsys.readouterr().out
  assert f'that {type(kind["objective"]).__name__} hides in documents not seen' in out
  assert 'generate.py' not in out
  run(tmp_path / name, **kind)  # which is finished, and says the same
  assert f'{found["hidden_nats"]:.3f}' in capsys.readouterr().out


@pytest.mark.parametrize(('changes', 'message'), [
    (MASKED | dict(loss=NextToken()), 'NextToken is of a decoder alone'),
    (MASKED | dict(objective=CAUSAL), 'loss=MaskedToken.*objective=Causal'),
    (MASKED | dict(objective=PrefixLm()), 'loss=MaskedToken.*objective=PrefixLm'),
    (SPANS | dict(loss=NextToken()), "NextToken and objective=SpanCorruption with layout='encoder_decoder'"),
    (SPANS | dict(loss=MaskedToken(), objective=MASKED['objective']), 'MaskedToken is of an encoder')])
def test_what_does_not_go_together_is_refused_before_any_work(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    run(tmp_path / 'run', **changes)
  assert not (tmp_path / 'run').exists()
