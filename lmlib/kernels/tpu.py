"""How kernels run on TPUs: compiled by Mosaic, or on a CPU by one of two interpreters."""
import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

LANES, SUBLANES = 128, 8  # of a register of 32-bit numbers: the least last and second last sizes of a block
BACKENDS = ('tpu', 'cpu')
# Bytes that a kernel may take, by kind of device: v2 to v4 have 16 MiB, v5p and v7x 64, v5e and v6e, the rest, 128.
VMEM = {**dict.fromkeys(('TPU v2', 'TPU v3', 'TPU v4', 'TPU v4 lite', 'cpu'), 16 << 20),
        **dict.fromkeys(('TPU v5', 'TPU v5p', 'TPU7', 'TPU7x'), 52 << 20)}


def call(kernel, *, name: str, grid, inputs, outputs, scratch=(), prefetched: int = 0, semantics=None,
         flops: float, bytes_moved: float, exponentials: float = 0, memory: int | None = None, interpret=None):
  """pl.pallas_call of a TPU kernel: a function of arrays, whose cost the compiler and the planner count.

  grid: sizes; inputs: BlockSpecs of those arrays behind the `prefetched` ones, which are scalars that index maps
  may read; outputs: (ShapeDtypeStruct, BlockSpec) of each; semantics: 'parallel' or 'arbitrary' of each axis of the
  grid, all 'arbitrary' if None. flops, bytes_moved and exponentials are of the whole call. memory: bytes of
  VMEM that it may use; None: the compiler's 16 or 32 MiB. interpret: None compiles on TPU and interprets on a CPU;
  True, or tpu.InterpretParams(...) for the simulator of a TPU's memories.
  """
  interpret = jax.default_backend() == 'cpu' and not compiling() if interpret is None else interpret
  shapes, specs = [shape for shape, _ in outputs], [spec for _, spec in outputs]
  cost = pl.CostEstimate(flops=int(flops), bytes_accessed=int(bytes_moved), transcendentals=int(exponentials))
  return pl.pallas_call(
      kernel, out_shape=shapes, name=name, cost_estimate=cost, interpret=interpret,
      grid_spec=tpu.PrefetchScalarGridSpec(num_scalar_prefetch=prefetched, grid=tuple(grid), in_specs=list(inputs),
                                           out_specs=specs, scratch_shapes=list(scratch)),
      compiler_params=tpu.CompilerParams(dimension_semantics=tuple(semantics or ('arbitrary',) * len(grid)),
                                          vmem_limit_bytes=memory))


def memory() -> int:
  """Bytes of VMEM that a kernel may take on the chip that programs are made for; it had better plan with fewer."""
  return VMEM.get(chip() or 'cpu', 84 << 20)


def compiling() -> bool:
  """Whether a program is being made for TPUs that are not here: see plan/compiled.py."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device is not None and 'TPU' in device.device_kind


def chip() -> str | None:
  """The kind of TPU that programs are made for, such as 'TPU v5 lite'; None if it is no TPU."""
  if compiling():
    return jax.sharding.get_abstract_mesh().abstract_device.device_kind
  return jax.devices()[0].device_kind if jax.default_backend() == 'tpu' else None
