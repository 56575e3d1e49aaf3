"""Every kind of experts on every layout: `pytest tests/nn/dispatch_matrix.py`, minutes long; see test_dispatch.py."""
import pytest

from lmlib.nn import dispatch
from tests.nn.test_dispatch import LAYERS, LAYOUTS, B, assert_equal, computed


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', LAYERS)
def test_eight_devices_equal_one(name, layout):
  assert_equal(computed(name, layout), computed(name, None))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', LAYERS)
def test_short_trips(name, layout, monkeypatch):
  monkeypatch.setattr(dispatch, 'LEAST', 1)
  monkeypatch.setattr(dispatch, 'ROOM', 0.4)
  assert_equal(computed(name, layout, B, 'shorter'), computed(name, None))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', LAYERS)
def test_few_rows(name, layout):
  assert_equal(computed(name, layout, 2), computed(name, None, 2))
