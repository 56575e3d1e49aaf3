"""Mixtures, packings and objectives in a training run, set by gin."""
import json

import pytest

from experiments import pretrain
from lmlib import cli
from lmlib.data import best_fit, denoising, mixture

MORE = '''
from lmlib.data import best_fit
from lmlib.data import denoising
from lmlib.data import mixture
from lmlib.data import objectives
from lmlib.data import prepare

DATA = @mixture.Mixture()
mixture.Mixture.corpora = (@prepare.Corpus(), @prepare.Corpus())
mixture.Mixture.rates = (1.0, 3.0)
mixture.Mixture.names = ('one', 'other')
mixture.Mixture.stages = (@mixture.Stage(),)
mixture.Stage.start = 2
mixture.Stage.rates = (1.0, 1.0)
pretrain.main.packing = @best_fit.BestFit()
best_fit.BestFit.fragment = 4
pretrain.main.objective = @denoising.SpanCorruption()
denoising.SpanCorruption.specials = @objectives.specials_after()
objectives.specials_after.vocab = 300
objectives.specials_after.sentinels = 12
dense.Config.vocab = 321
STEPS = 8
'''


@pytest.fixture
def mixed(command):
  command.gin.write_text(command.gin.read_text() + MORE)
  return command


def test_a_run_with_all_of_them_and_its_config(mixed):
  status, out, err = mixed.run()
  assert (status, err) == (0, '')
  assert 'held out' in out
  assert [line['step'] for line in mixed.metrics] == list(range(1, 9))
  assert all(4 < line['loss'] < 8 for line in mixed.metrics)  # log(321) = 5.8
  again = cli.arguments(pretrain.main, [str(mixed.workdir / 'config.gin')], [])
  assert isinstance(again['data'], mixture.Mixture)
  assert again['data'].stages == (mixture.Stage(2, (1.0, 1.0)),)
  assert again['packing'] == best_fit.BestFit(fragment=4)
  assert isinstance(again['objective'], denoising.SpanCorruption)
  assert len(json.loads((mixed.workdir / 'report' / 'summary.json').read_text())) > 3
  status, _, err = mixed.run('STEPS = 9', 'denoising.SpanCorruption.density = 0.3')
  assert (status, 'objective.density: there 0.15, here 0.3' in err) == (2, True)


@pytest.mark.parametrize(('bindings', 'said'), [
    (['dense.Config.vocab = 300'], 'pieces=300 and the special ids of the objective go up to 320'),
    (['mixture.Mixture.rates = (1.0, 0.0)', 'mixture.Mixture.stages = ()'], 'other has rate 0'),
    (['denoising.SpanCorruption.density = 2.0'], 'density=2.0')])
def test_what_does_not_fit_is_said_at_once(mixed, bindings, said):
  if 'mixture.Mixture.stages = ()' in bindings:
    mixed.gin.write_text('\n'.join(line for line in mixed.gin.read_text().splitlines() if 'Stage' not in line))
  status, _, err = mixed.run(*bindings)
  assert (status, said in err) == (2, True), err
