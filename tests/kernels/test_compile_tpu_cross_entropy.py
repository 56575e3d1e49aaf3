"""The TPU's kernels of logits are compiled for TPUs that are not here, at the sizes of models that are trained."""
import functools

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip('libtpu')

from lmlib import sharding
from lmlib.kernels import cross_entropy as kernel
from lmlib.kernels.cross_entropy import Logits
from lmlib.plan import compiled

TOKENS = 8192
# Width, vocabulary and how logits are made.
MODELS = {'Llama 3 8B': (4096, 128256, Logits()), 'Gemma 2 9B': (3584, 256000, Logits(30.0, tied=True)),
          'DeepSeek V3': (7168, 129280, Logits()), 'Qwen 3 8B': (4096, 151936, Logits()),
          'Qwen 3 0.6B': (1024, 151936, Logits(tied=True))}
NAMES = 'cross_entropy_forward', 'cross_entropy_states', 'cross_entropy_matrix'
shape = lambda *axes, dtype='bfloat16': jax.ShapeDtypeStruct(axes, jnp.dtype(dtype))


def graded(width, vocab, logits, implementation='tpu'):
  """The loss with its gradients, by a table or a matrix as the model stores it, and shapes."""
  logits = Logits(logits.softcap, None, logits.tied, implementation)

  def loss(x_BTD, w, targets_BT, weight_BT):
    return kernel.cross_entropy(x_BTD, w.T if logits.tied else w, targets_BT, weight_BT, 1e-4, logits)[0]

  stored = (vocab, width) if logits.tied else (width, vocab)
  tokens = 4, TOKENS // 4
  return jax.value_and_grad(loss, (0, 1)), (shape(*tokens, width), shape(*stored), shape(*tokens, dtype='int32'),
                                            shape(*tokens, dtype='float32'))


@functools.cache  # of equal programs jax would read the second from its cache, which libtpu alone cannot
def program_of(chip: str, model: str, implementation: str):
  function, shapes = graded(*MODELS[model], implementation)
  return compiled.program(function, *shapes, machine=chip)


@pytest.mark.parametrize(('chip', 'model'), [
    *((chip, 'Llama 3 8B') for chip in compiled.TPUS), *(('v5e', name) for name in list(MODELS)[1:]),
    ('v4', 'DeepSeek V3'), ('v4', 'Qwen 3 0.6B'), ('7x', 'DeepSeek V3')])
def test_values_and_gradients(chip, model):
  """And nothing is in memory beside them but some numbers a token: no logits, and no transposed matrix."""
  program = program_of(chip, model, 'tpu')
  text = program.as_text()
  assert all(name in text for name in NAMES)
  assert program.memory_analysis().temp_size_in_bytes < 32 << 20


def test_log_probabilities_and_entropies_of_float32():
  def both(x_BTD, w_VD, targets_BT, *slopes):
    logits = Logits(30.0, 0.7, True, 'tpu')
    out, back = jax.vjp(lambda x, w: kernel.log_probs(x, w.T, targets_BT, logits, entropy=True), x_BTD, w_VD)
    return *out, *back(slopes)

  like = functools.partial(shape, dtype='float32')
  shapes = like(2, 1000, 2048), like(32100, 2048), shape(2, 1000, dtype='int32'), like(2, 1000), like(2, 1000)
  text = compiled.program(both, *shapes, machine='v5e').as_text()
  assert all(name in text for name in NAMES)


def test_memory_beside_the_other_implementations():
  """Bytes on a v5e beside arguments and results, of Llama 3's loss with its gradients."""
  held = {name: program_of('v5e', 'Llama 3 8B', name).memory_analysis().temp_size_in_bytes
          for name in kernel.IMPLEMENTATIONS}
  assert held['reference'] > 4 * TOKENS * MODELS['Llama 3 8B'][1]  # all logits, in float32
  assert held['chunked'] < 0.65 * held['reference']
  assert held['tpu'] < 0.02 * held['chunked']


def test_devices_share_rows_and_vocabulary():
  """Of four chips each holds its part of the vocabulary; what they send each other is joined facts and gradients."""
  width, vocab, _ = MODELS['Llama 3 8B']
  function, shapes = graded(width, vocab, Logits())
  devices = list(compiled.topology('v5e').devices)
  with sharding.use(sharding.Layout(data=2, tensor=2), devices) as mesh:
    place = lambda axes, x: jax.sharding.NamedSharding(mesh, sharding.spec(axes, x.shape, mesh, sharding.ARRAYS))
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(axes, x))
              for axes, x in zip(('BTD', 'DV', 'BT', 'BT'), shapes)]
    program = jax.jit(function).lower(*placed).compile()
  assert all(name in program.as_text() for name in NAMES)
  # dw of a part in float32, and dx of half the tokens, before they are summed and rounded.
  assert program.memory_analysis().temp_size_in_bytes < 1.5 * (4 * width * vocab // 2 + 4 * TOKENS // 2 * width)
