"""The TPU's attention compiles, forward and backward, at the sizes of models that are trained, for chips not here."""
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import pytest

from lmlib import sharding
from lmlib.kernels import attention as kernel
from lmlib.kernels.attention import Pattern, Rows
from lmlib.plan import compiled

pytest.importorskip('libtpu')


@dataclasses.dataclass(frozen=True)
class Case:
  """Of one device: B rows of T, heads, and what else there is."""
  heads: tuple[int, int, int, int]  # K, G, H and the width of v
  T: int
  pattern: Pattern = Pattern()
  packed: bool = False
  B: int = 1
  dtype: str = 'bfloat16'
  added: tuple[str, ...] = ()

  def shapes(self):
    """q, k, v, the gradient of out, documents, what is added to scores."""
    (K, G, H, W), B, T = self.heads, self.B, self.T
    shape = lambda *axes, dtype=self.dtype: jax.ShapeDtypeStruct(axes, dtype)
    of = dict(slope_KG=(K, G), sink_KG=(K, G), bias_BKGTS=(1, K, G, T, T))
    return (shape(B, T, K, G, H), shape(B, T, K, H), shape(B, T, K, W), shape(B, T, K, G, W),
            shape(B, T, dtype=jnp.int32) if self.packed else None,
            {name: shape(*of[name], dtype=jnp.float32) for name in self.added})


CASES = {
    'Llama 3 8B': Case((8, 4, 128, 128), 8192, packed=True),
    'Llama 3 70B': Case((8, 8, 128, 128), 8192, packed=True),
    'DeepSeek-V3': Case((128, 1, 192, 128), 4096),
    'Gemma 2': Case((8, 2, 256, 256), 8192, Pattern(window=4096, softcap=50.0)),
    'a shard of 128k': Case((1, 8, 128, 128), 2**17),
}
MORE = {  # what no model above has
    'T5': Case((12, 1, 64, 64), 512, Pattern(causal=False, scale=1.0), True, 8, added=('bias_BKGTS',)),
    'ALiBi, sinks, chunks, strides of odd lengths in float32': Case(
        (2, 2, 80, 80), 1111, Pattern(chunk=300, stride=3), B=2, dtype='float32', added=('slope_KG', 'sink_KG')),
}
WHERE = [('v4', 'Llama 3 8B'), *(('v5e', name) for name in (*CASES, *MORE)),
         *(('v5p', name) for name in CASES if name != 'Llama 3 70B'),  # the 8B's but for the number of heads
         ('v6e', 'Llama 3 8B'), ('7x', 'Llama 3 8B')]


@pytest.mark.parametrize(('chip', 'name'), WHERE)
def test_compiles(chip, name):
  case = {**CASES, **MORE}[name]

  def both(q, k, v, dout, segment_BT, added):
    attend = lambda q, k, v, added: kernel.attention(q, k, v, case.pattern, Rows(segment_BT=segment_BT), **added)
    out, back = jax.vjp(attend, q, k, v, added)
    return out, back(dout)

  program = compiled.program(both, *case.shapes(), machine=chip)  # 'auto' is 'tpu' there
  kernels = ('attention_forward', 'attention_backward_keys', 'attention_backward_queries', 'attention_backward_bias')
  found = [kernel for kernel in kernels if kernel in program.as_text()]
  assert found == list(kernels[:3 + ('bias_BKGTS' in case.added)])
  # No array of T x T: what is beside arguments and results is a few copies of those.
  memory = program.memory_analysis()
  given = memory.argument_size_in_bytes + memory.output_size_in_bytes
  assert memory.temp_size_in_bytes < 2 * given, (memory.temp_size_in_bytes, given)
  K, G, H, W = case.heads
  square = 2 * case.B * K * G * case.T**2
  least = dataclasses.replace(case.pattern, stride=None).mean_keys(case.T) / case.T * square
  assert 0.99 * least * (H + W) * 3 < program.cost_analysis()['flops'] < 1.5 * square * 5 * (H + W)


def test_compiles_for_devices_that_share_rows_and_heads():
  """Every device runs the kernels on its part; only the gradient of what rows share is summed over devices."""
  with sharding.use(sharding.Layout(data=2, tensor=2), compiled.topology('v5e').devices) as mesh:
    spec = lambda axes, shape: NamedSharding(mesh, sharding.spec(axes, shape, mesh, sharding.ARRAYS))
    placed = lambda axes, *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=spec(axes, shape))
    q, k = placed('BTKGH', 4, 256, 2, 2, 64), placed('BSKH', 4, 256, 2, 64)

    def both(q, k, v, dout, segment_BT, bias_BKGTS):
      attend = lambda q, k, v, bias: kernel.attention(q, k, v, rows=Rows(segment_BT=segment_BT), bias_BKGTS=bias)
      out, back = jax.vjp(attend, q, k, v, bias_BKGTS)
      return out, back(dout)

    program = jax.jit(both).lower(q, k, k, q, placed('BT', 4, 256, dtype=jnp.int32),
                                  placed('BKGTS', 1, 2, 2, 256, 256, dtype=jnp.float32)).compile()
  text = program.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 4
  assert text.count(' all-reduce(') == 1
  assert not text.count(' all-gather(')


def test_compiles_for_a_ring_of_devices():
  """Keys go from neighbour to neighbour, and nothing is gathered."""
  with sharding.use(sharding.Layout(data=1, context=4), compiled.topology('v5e').devices) as mesh:
    spec = lambda axes, shape: NamedSharding(mesh, sharding.spec(axes, shape, mesh, sharding.ARRAYS))
    placed = lambda axes, *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=spec(axes, shape))
    q, k = placed('BTKGH', 1, 4096, 2, 2, 128), placed('BTKH', 1, 4096, 2, 128)

    def both(q, k, v, dout, segment_BT):
      out, back = jax.vjp(lambda *qkv: kernel.attention(*qkv, rows=Rows(segment_BT=segment_BT)), q, k, v)
      return out, back(dout)

    program = jax.jit(both).lower(q, k, k, q, placed('BT', 1, 4096, dtype=jnp.int32)).compile()
  text = program.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') >= 4 * 3  # each part: forward, dk and dv, dq
  assert 'collective-permute' in text
  assert not text.count(' all-gather(')
