"""What verify.py finds: nothing in what is right, and every fault that is put in."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding
from lmlib.data import objectives
from lmlib.models import dense, moe
from lmlib.nn.moe import Experts
from lmlib.nn.router import ExpertChoice, TopK
from lmlib.optim.adamw import AdamW
from lmlib.optim.schedules import Constant
from lmlib.plan import verify
from lmlib.sharding import Layout
from lmlib.train import losses

LAYOUT = Layout(data=2, fsdp=2)
OPTIMIZER = AdamW(Constant(1e-3))
DENSE = dense.Config(layers=2, width=32, hidden=32, heads=4, head_width=8)


def case_of(config=DENSE, loss=losses.NextToken(z_loss=1e-3), layout=LAYOUT, objective=objectives.CAUSAL):
  return verify.case(verify.whole(config, loss), objective, OPTIMIZER, layout)


@functools.cache
def right() -> verify.Case:
  return case_of()


@functools.cache
def one():
  return right().gradients()


def wrong(rows) -> set[str]:
  return {row.check for row in rows if not row.fine}


def test_all_is_right_and_nothing_is_left_out():
  rows = list(verify.checks(right()))
  assert wrong(rows) == set()
  assert {row.check for row in rows} == {'layout = one device', 'optimizer', 'packed documents', 'terms of the loss',
                                         'microbatches', 'scan=False', "remat='full'", 'new weights'}
  of = ' '.join(row.of for row in rows)
  for name in ('loss', 'gradient of blocks/attention/q', 'update of embedding', 'NextToken.z_loss', 'cross-entropy'):
    assert name in of


@dataclasses.dataclass(frozen=True)
class Broken(losses.NextToken):
  """A loss with a fault, of which `what` tells."""
  what: str = ''

  def of(self, config):
    true = super().of(config)

    def loss(params, batch):
      several = sharding.in_use() and sharding.size('data') * sharding.size('fsdp') > 1
      if self.what == 'a weight is not learned' and several:
        params = params | {'norm': jax.lax.stop_gradient(params['norm'])}
      if self.what == 'documents see each other':
        batch = batch | {'segments_BT': jnp.ones_like(batch['segments_BT'])}
      if self.what == 'no gradient':
        params = jax.lax.stop_gradient(params)
      total, weight, metrics = true(params, batch)
      if self.what == 'a mean of means':
        weight = jnp.ones_like(weight)
      if self.what == 'too much on several' and several:
        total = total * 1.001
      return total, weight, metrics

    return loss


@pytest.mark.parametrize(('what', 'found'), [
    ('a weight is not learned', 'layout = one device'), ('too much on several', 'layout = one device'),
    ('documents see each other', 'packed documents'), ('no gradient', 'terms of the loss'),
    ('a mean of means', 'microbatches')])
def test_faults_of_a_loss_are_found(what, found):
  case = dataclasses.replace(right(), trained=verify.whole(right().trained.config, Broken(what=what)))
  rows = {'layout = one device': lambda: verify.against('layout = one device', case.gradients(),
                                                        case.gradients(layout=case.layout)),
          'packed documents': lambda: verify.leaks(case), 'terms of the loss': lambda: verify.terms(
              case, case.gradients()[0]), 'microbatches': lambda: verify.accumulated(case, case.gradients())}[found]
  assert wrong(rows()) == {found}


def test_a_term_whose_weight_does_nothing_is_found(monkeypatch):
  case = dataclasses.replace(right(), trained=verify.whole(right().trained.config, losses.NextToken(z_loss=1e-30)))
  said = [row.of for row in verify.terms(case, case.gradients()[0]) if not row.fine]
  assert said == ['NextToken.z_loss']


def test_an_optimizer_that_a_layout_changes_is_found():

  class Off(AdamW):

    def transformation(self, letters, steps):
      true = super().transformation(letters, steps)

      def update(*args):
        updates, state = true.update(*args)
        return jax.tree.map(lambda x: x * (1 + 1e-2 * (sharding.size('fsdp') - 1)), updates), state

      return true._replace(update=update)

  case = dataclasses.replace(right(), optimizer=Off(Constant(1e-3)))
  assert wrong(verify.optimizers(case, one()[0])) == {'optimizer'}


def test_weights_that_begin_too_large_are_found(monkeypatch):
  true = verify.protocol.new
  monkeypatch.setattr(verify.protocol, 'new', lambda config, key: jax.tree.map(lambda x: 1e3 * x, true(config, key)))
  assert wrong(verify.first(case_of())) == {'new weights'}


def test_numbers_that_are_none_are_differences():
  rows = list(verify.tensors('check', 'of', {'a': np.ones(3)}, {'a': np.full(3, np.nan)}, 1e-5))
  assert [row.fine for row in rows] == [False]
  assert 'DIFFERS' in str(rows[0])


def test_what_cannot_be_checked_is_said():
  experts = functools.partial(moe.Config, layers=2, width=32, heads=4, head_width=8)
  rows = list(verify.leaks(case_of(experts(experts=Experts(router=ExpertChoice())))))
  assert [row.checked for row in rows] == [False]
  assert 'depends on the whole row' in str(rows[0])
  limited = case_of(experts(experts=Experts(router=TopK(capacity=1.0, balance_loss=1e-2, balance_over='batch'))))
  rows = list(verify.leaks(limited))
  assert 'earlier documents' in str(rows[0])
  assert wrong(rows) == set()
  assert not any(row.checked for row in verify.accumulated(limited, None))
