"""Kernels for GPUs, with none: they lower everywhere, and compile for an H100 where JAX's CUDA plugin is installed."""
import jax
from jax import export
from jax._src.mesh import AbstractDevice  # no public name
import jax.numpy as jnp
from jax.sharding import AbstractMesh
import pytest

from lmlib.kernels import attention_gpu, attention_hopper
from lmlib.kernels.attention import Pattern, Rows
from lmlib.plan import compiled

pytestmark = pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')  # jax 0.12
H100 = AbstractMesh((), (), abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu'))
LLAMA_8B, LLAMA_70B, GEMMA = (8192, 8, 4, 128), (4096, 8, 8, 128), (8192, 4, 2, 256)  # positions, K, G and H
CASES = {'Llama 3 8B, packed': (LLAMA_8B, Pattern(), True), 'Llama 3 70B': (LLAMA_70B, Pattern(), False),
         'Gemma 2, a local layer': (GEMMA, Pattern(window=4096, softcap=50.0), False),
         'a part of 128k positions': ((131072, 1, 4, 128), Pattern(), True)}


def with_gradients(attention, pattern, packed: bool, shape):
  """A function of q, k, v and segments, and their shapes: attention and its three gradients."""
  T, K, G, H = shape

  def both(q, k, v, segment_BT):
    attend = lambda q, k, v: attention(q, k, v, pattern, Rows(segment_BT=segment_BT if packed else None))
    out, back = jax.vjp(attend, q, k, v)
    return out, *back(out)

  of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  return both, (of(1, T, K, G, H), of(1, T, K, H), of(1, T, K, H), of(1, T, dtype=jnp.int32))


def triton(q, k, v, pattern, rows):
  return attention_gpu.attention(q, k, v, pattern, rows, interpret=False)


@pytest.mark.parametrize('name', CASES)
def test_attention_lowers(name):
  shape, pattern, packed = CASES[name]
  both, shapes = with_gradients(triton, pattern, packed, shape)
  with jax.sharding.use_abstract_mesh(H100):
    checks = [export.DisabledSafetyCheck.custom_call('__gpu$xla.gpu.triton')]  # its form may change with jaxlib
    made = export.export(jax.jit(both), platforms=['cuda'], disabled_checks=checks)(*shapes)
  assert made.mlir_module().count('custom_call @__gpu$xla.gpu.triton(') == 3


@pytest.mark.skipif(not compiled.available('cuda'), reason="JAX's CUDA plugin is not installed")
@pytest.mark.parametrize('name', CASES)
def test_attention_compiles_for_h100(name):
  shape, pattern, packed = CASES[name]
  made = compiled.program(*flat(with_gradients(triton, pattern, packed, shape)), machine='h100')
  q = shape[0] * shape[1] * shape[2] * shape[3] * 2
  assert made.memory_analysis().temp_size_in_bytes < 6 * q + 2**27  # nothing of the size of the scores


@pytest.mark.skipif(not compiled.available('cuda') or jax.__version_info__ < (0, 11), reason='needs jax 0.11 and CUDA')
@pytest.mark.parametrize('name', [name for name in CASES if 'Gemma' not in name])
def test_hopper_attention_compiles(name):
  shape, pattern, packed = CASES[name]
  made = compiled.program(*flat(with_gradients(attention_hopper.attention, pattern, packed, shape)), machine='h100')
  assert made.as_text().count('mosaic_gpu') >= 3


def flat(pair):
  function, shapes = pair
  return function, *shapes
