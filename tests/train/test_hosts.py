"""The process that holds up the others is named; numbers are told, for one process has none beside it."""
import jax
import pytest

from lmlib import sharding
from lmlib.train.hosts import Hosts, Stragglers


def hosts(waited, product, said, **more):
  """Process 0 of several, which are told: it gathers its own numbers and those of the others."""
  gather = lambda label, mine: [mine, *([w, p] for w, p in zip(waited, product))]
  return Hosts(Stragglers(every=2, **more), said.append, count=1 + len(waited), gather=gather, probe=lambda: 0.001)


def test_the_slowest_is_named_and_the_others_are_not():
  said = []
  compared = hosts([0.02, 0.5, 0.03], [0.001, 0.0011, 0.004], said)
  assert compared.after({'step': 1, 'waited': 0.0}) == {}
  found = compared.after({'step': 2, 'waited': 0.04})
  assert said == ['step 2: process 2 waits 0.5 s a step for its data; the median of 4 processes is 0.025 s',
                  'step 2: process 3 has a device that takes 0.004 s for a product; the median of 4 processes is '
                  '0.00105 s']
  assert found['hosts/waited_most'] == 0.5
  assert compared.after({'step': 3, 'waited': 9.0}) == {}
  compared.after({'step': 4, 'waited': 9.0})
  assert said[2].startswith('step 4: process 0 waits 9 s')  # of two steps, not of four


def test_small_differences_are_no_ones_fault():
  said = []
  hosts([0.004, 0.0, 0.009], [0.001, 0.0013, 0.0014], said).after({'step': 2, 'waited': 0.0})
  assert said == []


def test_alone_nothing_is_measured():
  assert Hosts(Stragglers(every=1), print, gather=None, probe=None).after({'step': 1, 'waited': 0.0}) == {}


@pytest.mark.parametrize('devices', [8, 4])
def test_the_product_takes_time_and_every_device_makes_its_own(monkeypatch, devices):
  """Also inside the mesh of a run, which has other devices too, or only some."""
  monkeypatch.setattr('lmlib.train.hosts.SIDE', 64)
  said = []
  with sharding.use(sharding.Layout(), jax.devices()[-devices:]):
    found = Hosts(Stragglers(every=1), said.append, count=2, gather=lambda label, mine: [mine, mine]).after(
        {'step': 1, 'waited': 0.0})
  assert found['hosts/product_most'] > 0


@pytest.mark.parametrize('given', [{'every': 0}, {'times': 1.0}, {'least': -0.1}])
def test_settings_that_make_no_sense_are_named(given):
  with pytest.raises(ValueError, match=f'{next(iter(given))}='):
    Stragglers(**given)
