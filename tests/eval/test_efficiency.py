"""Efficiency: arithmetic by hand with a clock of its own, memory by shapes, and a real model once."""
import dataclasses
import json

import jax
import numpy as np
import pytest

from lmlib.data.tokenizer import Bytes
from lmlib.eval.candidate import Candidate
from lmlib.eval.efficiency import Efficiency, Memory, Score
from lmlib.plan import cost
from tests.laws.encoders import made
from tests.laws.models import CONFIGS

CONFIG = dataclasses.replace(CONFIGS['dense'], vocab=300, layers=1)  # of length 32


class Machine:
  """A clock, and a decoder that takes 1 s to the first token and 0.25 s for each other; 40 s where it compiles."""

  def __init__(self, extra=()):
    self.time, self.extra, self.asked = 0.0, list(extra), []

  def clock(self) -> float:
    return self.time

  def decode(self, prompts, new):
    self.asked.append((len(prompts), len(prompts[0]), new))
    self.time += 1 + 0.25 * (new - 1) + (40 if len(self.asked) <= 2 else self.extra.pop(0) if self.extra else 0)
    return [[0] * new for _ in prompts]


def test_times_by_hand():
  machine = Machine()
  how = Efficiency(prompt=6, new=9, batch=4, repeats=3, flops=lambda config, length: 100.0 * length, price_per_hour=3.6,
                   watts=8.0)
  figures = how.timed(CONFIG, {'w': np.zeros(10, np.float32)}, machine.decode, machine.clock).figures()
  assert machine.asked == [(4, 6, 1), (4, 6, 9)] * 4
  assert figures['seconds_to_first_token'] == 1
  assert figures['seconds_per_token'] == 0.25
  assert figures['tokens_per_second'] == pytest.approx(4 * 9 / 3)
  assert figures['prompt_tokens_per_second'] == 24
  assert figures['flops_per_token'] == 1500
  assert figures['prompt_flops_per_second'] == 24 * 1500
  assert figures['decoding_flops_per_second'] == pytest.approx(1500 * 12)
  assert figures['price_per_million_tokens'] == pytest.approx(3.6 / 3600 / 12 * 1e6)  # 83 units
  assert figures['joules_per_token'] == pytest.approx(8 / 12)
  assert figures['kwh_per_million_tokens'] == pytest.approx(8 / 12 * 1e6 / 3.6e6)
  assert figures['weights_bytes'] == 40
  json.dumps(figures)


def test_medians_shrug_off_one_slow_repeat():
  machine = Machine(extra=[0, 0, 5, 5, 0, 0])
  score = Efficiency(prompt=6, new=5, repeats=3).timed(CONFIG, {}, machine.decode, machine.clock)
  figures = score.figures()
  assert score.first == (1, 6, 1)
  assert score.token == (0.25, 0.25, 0.25)
  assert (figures['seconds_to_first_token'], figures['seconds_to_first_token_quartiles']) == (1, [1, 3.5])
  assert figures['repeats'] == 3
  assert not {'flops_per_token', 'price_per_million_tokens', 'joules_per_token'} & figures.keys()
  assert [(one.metric, one.score, one.higher_is_better) for one in score.results('m')][:3] == [
      ('seconds to first token', 1, False), ('seconds per token', 0.25, False), ('tokens per second', 2.5, True)]


def test_the_cache_is_keys_and_values():
  """2 of K H numbers a layer and token, and little else: counters of rows."""
  params = made(CONFIG)
  memory = Memory.of(CONFIG, params, batch=4, length=32)
  numbers = 2 * CONFIG.layers * CONFIG.kv_heads * CONFIG.head_width
  assert 4 * numbers <= memory.cache_of_token <= 4 * numbers * 1.1
  assert memory.weights == 4 * sum(x.size for x in jax.tree.leaves(params))
  assert memory.peak > memory.weights
  assert Memory.of(CONFIG, params, batch=8, length=32).cache == pytest.approx(2 * memory.cache, rel=0.01)


def test_flops_are_two_for_each_weight_that_multiplies():
  """By hand, of a dense model with a gated MLP and a tied table: products, and attention over half the places."""
  c = CONFIG
  N, K, H, D, T = c.heads, c.kv_heads, c.head_width, c.width, 32
  products = c.layers * (D * N * H * 2 + 2 * D * K * H + 3 * D * c.hidden) + D * c.vocab
  attention = c.layers * sum(2 * 2 * N * H * (t + 1) for t in range(T)) / T
  assert cost.Forward()(c, T) == pytest.approx(2 * products + attention)
  assert cost.Forward()(c, T) == pytest.approx(cost.train_flops(c, T).exact / 3)


def test_a_real_model_is_timed():
  evaluation = Efficiency(prompt=8, new=16, batch=2, repeats=2, flops=cost.Forward())
  evaluation.check()
  results = evaluation.run(Candidate('m', CONFIG, made(CONFIG), Bytes().train()))
  found = {one.metric: one.score for one in results}
  assert found['seconds to first token'] > 0
  assert found['tokens per second'] > 0
  assert found['flops per token'] == cost.Forward()(CONFIG, 24)
  assert found['weights bytes'] == 4 * sum(x.size for x in jax.tree.leaves(made(CONFIG)))
  assert results[0].facts['repeats'] == 2


@pytest.mark.parametrize(('changes', 'said'), [
    (dict(prompt=0), 'prompt=0'), (dict(new=1), 'new=1 must be at least 2'), (dict(batch=0), 'batch=0'),
    (dict(repeats=0), 'repeats=0'), (dict(price_per_hour=0.0), 'price_per_hour=0.0'), (dict(watts=-1.0), 'watts=-1.0')])
def test_settings_that_cannot_be_are_refused(changes, said):
  with pytest.raises(ValueError, match=rf'Efficiency\.{said}'):
    Efficiency(**changes).check()


def test_what_cannot_be_timed_is_refused():
  with pytest.raises(ValueError, match=r'prompt=20 and new=16 exceed the length=32'):
    Efficiency(prompt=20, new=16).timed(CONFIG, {})
  with pytest.raises(ValueError, match='4 tokens were asked for behind each of 1 prompts; there came'):
    Efficiency(prompt=8, new=4).timed(CONFIG, {}, lambda prompts, new: [[0]] * len(prompts))


def test_a_score_stands_without_what_was_not_asked():
  assert Score((1.0,), (2.0,), 8, 5, 1).figures().keys() == {
      'seconds_to_first_token', 'seconds_to_first_token_quartiles', 'seconds_per_token', 'seconds_per_token_quartiles',
      'tokens_per_second', 'tokens_per_second_quartiles', 'repeats', 'prompt_tokens', 'new_tokens', 'batch',
      'prompt_tokens_per_second'}
