"""FLOPs against formulas written out by hand, and against what XLA counts in the compiled program."""
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lmlib.kernels import attention
from lmlib.models import dense, protocol
from lmlib.plan.cost import train_flops

V, L, D, F, N, K, H, T = 64, 3, 32, 48, 4, 2, 8, 24
CONFIG = dense.Config(vocab=V, layers=L, width=D, hidden=F, heads=N, kv_heads=K, head_width=H, length=T)
MATRICES = L * (2 * D * N * H + 2 * D * K * H + 3 * D * F)  # q and out, k and v, gate and up and down
NORMS = (2 * L + 1) * D
# A query at t sees t + 1 keys, (T + 1) / 2 on average; a score and a weighted sum are 2 H FLOPs a head, key.
SEEN = L * 2 * (2 * N * H) * (T + 1) / 2


@pytest.mark.parametrize('tied', [True, False])
def test_both_counts_are_what_their_formulas_say(tied):
  found = train_flops(dataclasses.replace(CONFIG, tied=tied), T)
  tables = V * D if tied else 2 * V * D
  assert found.six_nd == 6 * (MATRICES + tables + NORMS)
  assert found.exact == 6 * (MATRICES + V * D) + 3 * SEEN


def test_attention_grows_with_the_length_and_nothing_else_does():
  short, long = train_flops(CONFIG, 8), train_flops(CONFIG, 24)
  assert long.six_nd == short.six_nd
  assert long.exact - short.exact == 3 * L * 4 * N * H * (24 - 8) / 2


def test_scanning_layers_changes_no_count():
  assert train_flops(CONFIG, T) == train_flops(dataclasses.replace(CONFIG, scan=False, remat='full'), T)


def test_the_forward_pass_is_a_third_of_what_xla_counts(monkeypatch):
  """Unrolled, since XLA counts a loop once; plain attention, which also computes the masked half."""
  monkeypatch.setattr(attention, 'attention', lambda q, k, v, **_: attention.reference(q, k, v))
  config = dataclasses.replace(CONFIG, scan=False, width=128, hidden=384, head_width=32, vocab=512, length=64)
  params = jax.eval_shape(lambda: protocol.new(config, jax.random.key(0)))
  tokens_BT = jax.ShapeDtypeStruct((1, 64), jnp.int32)
  compiled = jax.jit(config.model().apply).lower({'params': params}, tokens_BT).compile()
  masked = config.attention_flops(2 * 64 - 1) - config.attention_flops(64)  # a query meets 64 keys, not 32.5
  expected = 64 * (train_flops(config, 64).exact / 3 + masked)
  # XLA also counts norms, softmax, rotations and activations, some 40 FLOPs for each of their numbers.
  assert 1 < compiled.cost_analysis()['flops'] / expected < 1.05
