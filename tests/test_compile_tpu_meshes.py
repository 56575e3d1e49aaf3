"""Meshes of the files in meshes/ on TPU topologies as libtpu has them. Run where libtpu is; it takes a minute."""
import numpy as np
import pytest

from lmlib.plan import compiled
from lmlib.sharding import Layout
from tests.test_meshes import PODS, layout_of

pytestmark = pytest.mark.skipif(not compiled.available(), reason='libtpu is not installed')


@pytest.mark.parametrize('name', [name for name, (_, _, topology) in PODS.items() if topology])
def test_a_pod(name, tmp_path):
  devices, slices, topology = PODS[name]
  described = compiled.topology(topology, slices=slices)
  assert len(described.devices) == devices
  mesh = layout_of(name, tmp_path).mesh(described.devices)
  assert mesh.size == devices
  # Slices come outermost: an axis inside one never leaves it.
  own = np.vectorize(lambda device: getattr(device, 'slice_index', 0))(mesh.devices)
  assert all(len(set(part.flat)) == 1 for part in np.split(own, slices))


def test_slices_that_are_not_there():
  two = compiled.topology('v5e:2x4', slices=2).devices
  with pytest.raises(ValueError, match=r'Layout.slices=1, but the 16 devices form 2: slices=2'):
    Layout().mesh(two)
  with pytest.raises(ValueError, match=r'Layout.slices=4, but the 16 devices form 2: slices=2'):
    Layout(slices=4).mesh(two)
