"""A file of meshes/ for every common pod: as many devices as the pod has, and a run chooses it by one name."""
import dataclasses

import pytest

from lmlib import cli, sharding

# Devices, as JAX counts them; slices; and the TPU topology that libtpu knows.
PODS = {
    'v4_8': (4, 1, 'v4:2x2x1'), 'v4_64': (32, 1, 'v4:2x4x4'), 'v5e_8': (8, 1, 'v5e:2x4'), 'v5e_16': (16, 1, 'v5e:4x4'),
    'v5e_32': (32, 1, 'v5e:4x8'), 'v5e_64': (64, 1, 'v5e:8x8'), 'v5e_128': (128, 1, 'v5e:8x16'),
    'v5e_256': (256, 1, 'v5e:16x16'), 'v5e_2x256': (512, 2, 'v5e:16x16'), 'v5p_8': (4, 1, 'v5p:2x2x1'),
    'v5p_128': (64, 1, 'v5p:4x4x4'), 'v5p_512': (256, 1, 'v5p:4x8x8'), 'v6e_8': (8, 1, 'v6e:2x4'),
    'v6e_256': (256, 1, 'v6e:16x16'), 'h100_8': (8, 1, None), 'h100_64': (64, 8, None)}
ANY = {'data', 'fsdp', 'context'}  # for any number of devices


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh asks of a device that is not here."""
  id: int
  platform: str = 'gpu'
  device_kind: str = 'stub'
  process_index: int = 0


def layout_alone(*, layout):
  """What a file of meshes/ is bound to here: a main() that asks for nothing else."""


def layout_of(name: str, tmp_path) -> sharding.Layout:
  file = tmp_path / 'alone.gin'
  file.write_text('from __gin__ import dynamic_registration\nfrom tests import test_meshes\n'
                  f"include 'meshes/{name}.gin'\n"
                  'test_meshes.layout_alone.layout = %LAYOUT\n')
  return cli.arguments(layout_alone, [str(file)])['layout']


@pytest.mark.parametrize('name', PODS)
def test_a_pod_is_used_whole(name, tmp_path):
  devices, slices, _ = PODS[name]
  layout = layout_of(name, tmp_path)
  mesh = layout.mesh([Device(i) for i in range(devices)])
  assert (mesh.size, layout.slices) == (devices, slices)
  with pytest.raises(ValueError, match=f'uses {devices} of {2 * devices} devices'):
    layout.mesh([Device(i) for i in range(2 * devices)])


def test_every_pod_is_here():
  assert {path.stem for path in (cli.GIN_CONFIGS / 'meshes').glob('*.gin')} >= PODS.keys() | ANY
