"""Programs compiled for chips that are not here: for TPUs by libtpu, for GPUs by the CUDA plugin, on any CPU.

Both come from PyPI (`pip install 'lmlib[tpu]'`, `'lmlib[cuda]'`) and need no device.
"""
import contextlib
import importlib.util
import os
import re
import warnings

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
import numpy as np

# The smallest machine of each TPU chip that libtpu describes.
TPUS = {'v4': 'v4:2x2x1', 'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2', '7x': 'tpu7x:2x2x1'}
# NVIDIA's data sheet of the H100 SXM5, as XLA asks for it.
GPUS = {'h100': """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""}


def available(platform: str = 'tpu') -> bool:
  """Whether this machine can compile for 'tpu' or 'cuda'."""
  return importlib.util.find_spec({'tpu': 'libtpu', 'cuda': 'jax_cuda13_plugin'}[platform]) is not None


def topology(machine: str, slices: int = 1):
  """The devices of a machine: a chip of TPUS or GPUS, a TPU topology such as 'v5e:16x16', or GPUs as 'h100:8' or, on
  8 hosts, 'h100:8x8'. None of them runs.

  slices: so many of this TPU machine, joined by the network of a data centre.

  ModuleNotFoundError without the compiler; ValueError if it knows no such machine.
  """
  chip, _, count = machine.partition(':')
  platform = 'cuda' if chip in GPUS else 'tpu'
  if not available(platform):
    needs, extra = {'tpu': ('libtpu', 'tpu'), 'cuda': ("JAX's CUDA plugin", 'cuda')}[platform]
    raise ModuleNotFoundError(f'compiling for {machine!r} needs {needs}: pip install "lmlib[{extra}]"')
  if platform == 'cuda':
    if not (sizes := re.fullmatch(r'(?:(\d+)x)?(\d+)', count or '1')):
      raise ValueError(f"machine={machine!r} must be '{chip}', '{chip}:8', or '{chip}:2x8' for 2 hosts with 8 each")
    return topologies.get_topology_desc(topology_name=machine, platform='cuda', target_config=GPUS[chip],
                                        topology=f'1x{sizes[1] or 1}x{sizes[2]}')
  # Several processes may compile at once, and no cloud is asked what machine this is.
  for variable, value in {'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_SKIP_MDS_QUERY': '1'}.items():
    os.environ.setdefault(variable, value)
  try:
    return topologies.get_topology_desc(topology_name=TPUS.get(machine, machine), platform='tpu',
                                        **({'num_slices': slices} if slices > 1 else {}),
                                        # Both cores of a v4 are one device, as they are where JAX runs on it.
                                        **({'chip_config_name': 'megacore'} if machine.startswith('v4') else {}))
  except Exception as error:  # jaxlib raises several kinds
    raise ValueError(f'machine={machine!r} is none of {[*TPUS, *GPUS]} and none that libtpu knows, such as '
                     f"'v5e:16x16': {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def on(devices):
  """Programs lowered inside are for one of these devices."""
  mesh = Mesh(np.array(devices[:1]), ('_',), axis_types=(AxisType.Auto,))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    yield


def program(function, *shapes, machine: str):
  """function compiled for one device of a machine, from ShapeDtypeStructs; see jax.stages.Compiled."""
  devices = topology(machine).devices
  place = SingleDeviceSharding(devices[0])
  given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
  with on(devices), warnings.catch_warnings():
    # Without a device nothing that jax's cache holds can be loaded again: it is compiled anew.
    warnings.filterwarnings('ignore', 'Error reading persistent compilation cache')
    return jax.jit(function).lower(*given).compile()
