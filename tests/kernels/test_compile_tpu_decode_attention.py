"""Steps of decoding compile for every TPU at the sizes of models that are served, and read caches where they lie."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from lmlib import trees
from lmlib.kernels import decode_attention
from lmlib.kernels.attention import Pattern
from lmlib.kernels.decode_attention import Held
from lmlib.models import dense, latent_moe, protocol
from lmlib.nn.latent_attention import LatentStyle
from lmlib.nn.stack import Execution
from lmlib.plan import compiled

pytest.importorskip('libtpu')
LLAMA = dict(B=64, K=8, G=4, H=128, S=8192)
LATENT = dict(B=64, K=1, G=128, H=576, S=8192, kept=640, value_width=512)
CASES = {
    'Llama 3 8B, pages of 16': dict(LLAMA, page=16),
    'of 128, int8': dict(LLAMA, page=128, dtype=jnp.int8),
    'of 128, float8': dict(LLAMA, page=128, dtype=jnp.float8_e4m3fn),
    '8B, rows, four queries, a window, softcap and sinks':
        dict(LLAMA, T=4, pattern=Pattern(window=1024, softcap=30.0), sinks=True),
    'Llama 3 70B, pages of 128': dict(LLAMA, G=8, page=128),
    'latents, pages of 64': dict(LATENT, page=64),
    'latents, rows of int8, two queries': dict(LATENT, dtype=jnp.int8, T=2),
    '128k places of a few rows': dict(LLAMA, B=4, S=131072, page=16),
    'float32, five rows, chunks': dict(LLAMA, B=5, S=1024, dtype=jnp.float32, pattern=Pattern(chunk=100, stride=3)),
    'heads of 64 in twice the width': dict(LLAMA, H=64, kept=128, value_width=64, page=16),
}
CHIPS = [(chip, name) for chip in compiled.TPUS for name in list(CASES)[:3] + list(CASES)[5:6]]
CHIPS += [('v5e', name) for name in CASES if ('v5e', name) not in CHIPS]


def shapes(*, B, K, G, H, S, T=1, page=None, dtype=jnp.bfloat16, kept=None, value_width=None, sinks=False,
           pattern=Pattern()):
  """(a function, and what it takes)."""
  shape = lambda dtype, *axes: jax.ShapeDtypeStruct(axes, dtype)
  places = (B, K, S) if page is None else (B * S // page, K, page)
  small = jnp.dtype(dtype).itemsize == 1
  keys = shape(dtype, *places, kept or H)
  scale = shape(jnp.float32, *places) if small else None
  latent = K == 1
  held = Held(keys, None if latent else keys, shape(jnp.int32, B), page and shape(jnp.int32, B, S // page), scale,
              None if latent else scale, value_width=value_width)
  q = shape(jnp.bfloat16 if small else dtype, B, T, K, G, H)
  attend = functools.partial(decode_attention.partial, pattern=pattern, implementation='tpu')
  return (lambda q, held, sink_KG: attend(q, held, sink_KG=sink_KG)), q, held, (
      shape(jnp.float32, K, G) if sinks else None)


@pytest.mark.parametrize(('chip', 'name'), CHIPS)
def test_compiles_and_copies_no_cache(chip, name):
  function, q, held, sink_KG = shapes(**CASES[name])
  program = compiled.program(function, q, held, sink_KG, machine=chip)
  kept = held.k.size * held.k.dtype.itemsize
  # What is made beside: queries and results, and the scales of latents in the order of blocks.
  assert program.memory_analysis().temp_size_in_bytes < kept / 8
  B, T, K, G, H = q.shape
  flops = 2 * B * T * K * G * held.slots * (H + held.width)
  assert flops <= program.cost_analysis()['flops'] < 1.2 * flops


def step(config, B: int = 16):
  """(the program of a step of a model on a v5e, the bytes of its cache), with all places but one filled."""
  params = jax.eval_shape(lambda: protocol.new(config, jax.random.key(0)))
  cache = jax.eval_shape(lambda: config.cache(B, config.length)).replace(fresh=False)
  run = lambda params, cache, tokens_BT: config.model().apply({'params': params}, tokens_BT, None, cache,
                                                              method='hidden')[:2]
  tokens_BT = jax.ShapeDtypeStruct((B, 1), jnp.int32)
  return compiled.program(run, params, cache, tokens_BT, machine='v5e'), trees.nbytes(cache.layers)


SIZES = dict(vocab=512, width=512, hidden=512, heads=32, length=8192)


@pytest.mark.parametrize('cache', [None, 'int8'])
def test_steps_of_models_take_it_by_themselves(cache):
  """Its calls are those that the model makes when it is asked for by name, and none where the reference is."""
  config = dense.Config(layers=1, kv_heads=8, head_width=128, **SIZES)
  calls = {name: step(dataclasses.replace(config, execution=Execution('bfloat16', cache=cache, decoding=name)))[0]
           .as_text().count('tpu_custom_call') for name in ('auto', 'decode_tpu', 'reference')}
  assert calls['auto'] == calls['decode_tpu'] > calls['reference'] == 0


def test_latents_are_read_where_a_cache_keeps_them():
  """What is made beside is less than a fiftieth of it: nothing is joined, filled up or laid out anew."""
  program, kept = step(latent_moe.Config(layers=2, dense_layers=1, attention=LatentStyle(),
                                         execution=Execution('bfloat16'), **SIZES))
  assert program.memory_analysis().temp_size_in_bytes < kept / 50
