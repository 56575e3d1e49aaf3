"""FLOPs against formulas written out by hand, and against what XLA counts in the compiled program."""
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lmlib.kernels import attention
from lmlib.models import dense, encoder, encoder_decoder, moe, protocol
from lmlib.nn.decoder import Ends
from lmlib.nn.moe import Experts
from lmlib.nn.router import TopK
from lmlib.plan.cost import train_flops
from tests.laws.models import executed

V, L, D, F, N, K, H, T = 64, 3, 32, 48, 4, 2, 8, 24
CONFIG = dense.Config(vocab=V, layers=L, width=D, hidden=F, heads=N, kv_heads=K, head_width=H, length=T)
MATRICES = L * (2 * D * N * H + 2 * D * K * H + 3 * D * F)  # q and out, k and v, gate and up and down
NORMS = (2 * L + 1) * D
# A query at t sees t + 1 keys, (T + 1) / 2 on average; a score and a weighted sum are 2 H FLOPs a head, key.
SEEN = L * 2 * (2 * N * H) * (T + 1) / 2


@pytest.mark.parametrize('tied', [True, False])
def test_both_counts_are_what_their_formulas_say(tied):
  found = train_flops(dataclasses.replace(CONFIG, ends=Ends(tied=tied)), T)
  tables = V * D if tied else 2 * V * D
  assert found.six_nd == 6 * (MATRICES + tables + NORMS)
  assert found.exact == 6 * (MATRICES + V * D) + 3 * SEEN


def test_attention_grows_with_the_length_and_nothing_else_does():
  short, long = train_flops(CONFIG, 8), train_flops(CONFIG, 24)
  assert long.six_nd == short.six_nd
  assert long.exact - short.exact == 3 * L * 4 * N * H * (24 - 8) / 2


def test_scanning_layers_changes_no_count():
  assert train_flops(CONFIG, T) == train_flops(executed(CONFIG, scan=False, remat='full'), T)


def test_the_forward_pass_is_a_third_of_what_xla_counts(monkeypatch):
  """Unrolled, since XLA counts a loop once; plain attention, which also computes the masked half."""
  monkeypatch.setattr(attention, 'attention', lambda q, k, v, *_, **__: attention.reference(q, k, v))
  config = dataclasses.replace(executed(CONFIG, scan=False), width=128, hidden=384, head_width=32, vocab=512, length=64)
  params = jax.eval_shape(lambda: protocol.new(config, jax.random.key(0)))
  tokens_BT = jax.ShapeDtypeStruct((1, 64), jnp.int32)
  compiled = jax.jit(config.model().apply).lower({'params': params}, tokens_BT).compile()
  masked = config.attention_flops(2 * 64 - 1) - config.attention_flops(64)  # a query meets 64 keys, not 32.5
  expected = 64 * (train_flops(config, 64).exact / 3 + masked)
  # XLA also counts norms, softmax, rotations and activations, some 40 FLOPs for each of their numbers.
  assert 1 < compiled.cost_analysis()['flops'] / expected < 1.05


def test_an_encoder_sees_all_and_looks_its_tables_up():
  config = encoder.Config(vocab=V, layers=L, width=D, hidden=F, heads=N, head_width=H, length=T)
  matrices = L * (4 * D * N * H + 2 * D * F) + D * D  # and the head's
  assert train_flops(config, T).exact == 6 * (matrices + (D + 1) * V) + 3 * L * 2 * (2 * N * H) * T


def test_a_token_of_an_encoder_decoder_takes_part_in_its_own_side():
  """Written out for a row of S inputs and A of the decoder, and divided by both."""
  config = encoder_decoder.Config(vocab=V, encoder_layers=2, layers=L, width=D, hidden=F, heads=N, head_width=H)
  S, A, attention, mlp = 20, 4, 4 * D * N * H, 3 * D * F
  inputs = 2 * (attention + mlp) + L * attention / 2  # keys and values of the inputs
  answers = L * (attention + attention / 2 + mlp) + D * V
  seen = 2 * (2 * N * H) * (S * 2 * S + A * L * ((A + 1) / 2 + S))
  found = train_flops(config, S, A).exact
  assert found == pytest.approx((6 * (S * inputs + A * answers) + 3 * seen) / (S + A))
  for model, answer in ((config, None), (CONFIG, 4)):
    with pytest.raises(ValueError, match=f'answer={answer}'):
      train_flops(model, S, answer)


def test_of_experts_those_that_compute_a_token_count():
  config = moe.Config(vocab=V, layers=L, width=D, heads=N, kv_heads=K, head_width=H, length=T,
                      experts=Experts(6, F, TopK(2, balanced=True), shared=F))
  found = train_flops(config, T)
  matrices = MATRICES + L * (2 * 3 * D * F + D * 6)  # two experts of six beside the shared one, and the router
  assert found.exact == 6 * (matrices + V * D) + 3 * SEEN
  assert found.six_nd == 6 * (matrices + V * D + NORMS + L * 2)  # a third of the router's offsets too
