"""Layouts that a model does not fit are refused with one that it does; what stays whole is said."""
import dataclasses

import pytest

from lmlib import fitting, sharding
from lmlib.models import dense, moe, protocol
from lmlib.nn.moe import Experts
from lmlib.sharding import Layout

SMALL = dense.Config(vocab=96, layers=4, width=24, hidden=40, heads=12, kv_heads=6, head_width=4)


@pytest.mark.parametrize(('layout', 'model', 'expected'), [
    (dict(data=1, tensor=8), dict(), r'Layout.tensor=8 does not divide kv_heads=6 or the 2 heads of each: '
                                     r'tensor=2, data=4 would'),
    (dict(tensor=4), dict(kv_heads=12, hidden=42), r'tensor=4.*hidden=42: tensor=2 would'),
    (dict(data=1, tensor=-1), dict(), r'Layout.tensor=-1, here 8, does not divide kv_heads=6'),
    (dict(data=1, fsdp=8), dict(width=20), r'Layout.fsdp=8 does not divide width=20: fsdp=4, data=2 would'),
    (dict(data=1, stage=8), dict(), r'Layout.stage=8 does not divide layers=4: stage=4, data=2 would'),
    (dict(data=1, expert=8), dict(), r'Layout.expert=8 does not divide experts, of which this model has none: '
                                     r'expert=1, data=8 would')])
def test_a_layout_that_does_not_fit_a_model_says_which_would(layout, model, expected):
  boxed = protocol.boxed(dataclasses.replace(SMALL, **model))
  with sharding.use(Layout(**layout)), pytest.raises(ValueError, match=expected):
    fitting.check(boxed)


def test_experts_that_do_not_fit():
  boxed = protocol.boxed(moe.Config(experts=Experts(count=6)))
  expected = r'Layout.expert=4 does not divide experts=6: expert=2, data=4 would'
  with sharding.use(Layout(data=2, expert=4)), pytest.raises(ValueError, match=expected):
    fitting.check(boxed)
  with sharding.use(Layout(expert=2)):
    assert fitting.check(boxed) == []


def test_what_may_stay_whole_is_said():
  boxed = protocol.boxed(dataclasses.replace(SMALL, vocab=97, kv_heads=3))
  assert fitting.check(boxed) == []
  assert fitting.told(boxed) == ''
  with sharding.use(Layout(data=2, tensor=4)):
    assert fitting.check(boxed) == ['tensor=4: kv_heads=3', 'tensor=4: vocab=97']
  with sharding.use(Layout(data=2, fsdp=4, zero=2, slices=2)):
    assert fitting.told(boxed) == 'fsdp splits optimizer state and gradients (ZeRO-2); data goes over 2 slices'
  with sharding.use(Layout(data=4, tensor=2)):
    assert fitting.told(boxed) == 'tensor=2: kv_heads=3 stays whole; tensor=2: vocab=97 stays whole'
