"""Routers against their equations in loops; padding, ties, capacity and losses."""
import functools

import jax
import numpy as np
import pytest

from lmlib.nn.router import ExpertChoice, TopK

B, T, E = 2, 6, 8
REAL_BT = np.array([[1] * 6, [0, 1, 1, 1, 1, 0]], bool)
ALL_BT = np.ones((B, T), bool)


def logits(seed: int = 0):
  return np.random.default_rng(seed).normal(size=(B, T, E)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def route(router, logits_BTE, real_BT, offset_E=None, limited=True):
  return router.route(logits_BTE, real_BT, offset_E, limited=limited)


def pairs(routing) -> dict:
  """The weight of every (row, token, expert)."""
  rows = zip(*(np.asarray(x) for x in (routing.place_BM, routing.expert_BM, routing.weight_BM)))
  return {(row, token, expert): weight for row, found in enumerate(rows)
          for token, expert, weight in zip(*(x.tolist() for x in found)) if expert < E}


def softmax(x):
  return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@pytest.mark.parametrize('normalised', [True, False])
def test_softmax_and_the_best(normalised):
  """Also the other way round: a softmax over the chosen is the softmax over all, normalised."""
  x, expected = logits(), {}
  for b, t in np.argwhere(REAL_BT):
    best = np.argsort(-x[b, t])[:3]
    weights = softmax(x[b, t, best]) if normalised else softmax(x[b, t])[best]
    expected |= {(b, t, e): 1.5 * weight for e, weight in zip(best, weights)}
  found = pairs(route(TopK(3, normalised=normalised, scale=1.5), x, REAL_BT))
  assert found == {key: pytest.approx(value, rel=1e-5) for key, value in expected.items()}


def test_sigmoid_with_offsets_and_groups():
  """DeepSeek-V3: offsets choose groups and experts, and are in no weight."""
  x, offset_E, expected = logits(), np.linspace(-1, 1, E).astype(np.float32), {}
  for b, t in np.ndindex(B, T):
    score = 1 / (1 + np.exp(-x[b, t]))
    ranked = score + offset_E
    groups = np.argsort(-np.sort(ranked.reshape(4, 2)).sum(-1))[:2]
    allowed = [e for e in range(E) if e // 2 in groups]
    best = sorted(allowed, key=lambda e: -ranked[e])[:3]
    expected |= {(b, t, e): 2.5 * score[e] / score[best].sum() for e in best}
  router = TopK(3, score='sigmoid', groups=4, groups_chosen=2, group_best=2, scale=2.5, balanced=True)
  found = pairs(route(router, x, ALL_BT, offset_E))
  assert found == {key: pytest.approx(value, rel=1e-5) for key, value in expected.items()}
  assert found.keys() != pairs(route(router, x, ALL_BT, np.zeros(E, np.float32))).keys()


def test_of_equal_scores_the_first_counts_as_higher():
  x = np.zeros((B, T, E), np.float32)
  x[:, :, [2, 5, 6]] = 1
  chosen = lambda **more: {e for b, t, e in pairs(route(TopK(**more), x, ALL_BT)) if (b, t) == (0, 0)}
  assert chosen(chosen=2) == {2, 5}
  assert chosen(chosen=5) == {2, 5, 6, 0, 1}
  assert chosen(chosen=2, groups=4, groups_chosen=1) == {2, 3}


def test_capacity_goes_to_the_first_tokens_of_a_row():
  """Padding takes none of it; neither another row nor a later token changes what a token gets."""
  x = logits()
  x[0, :, 0] = x[1, :, 0] = 9  # all want expert 0, for which a row has room for 2 tokens of 6
  found = route(TopK(1, capacity=2.0), x, REAL_BT)
  assert set(pairs(found)) == {(0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 2, 0)}
  assert tuple(map(float, found.sums['dropped'])) == (6, 10)
  assert found.room == 2
  free = route(TopK(1, capacity=2.0), x, REAL_BT, None, False)  # with a cache
  assert len(pairs(free)) == 10
  assert float(free.sums['dropped'][0]) == 0


def test_an_expert_has_room_for_its_share_of_all_choices():
  """Of 6 tokens with 3 choices among 8 experts, 2.25 come to each: with capacity 1 there is room for 3."""
  found = pairs(route(TopK(3, capacity=1.0), logits(3), ALL_BT))
  everything = pairs(route(TopK(3), logits(3), ALL_BT))
  for b, e in np.ndindex(B, E):
    wanted = [t for t in range(T) if (b, t, e) in everything]
    assert [t for t in range(T) if (b, t, e) in found] == wanted[:3]
  assert len(found) < len(everything)


def test_experts_choose_their_best_tokens():
  x = logits()
  found, score = route(ExpertChoice(2.0), x, REAL_BT), softmax(x)
  room, kept = 2, pairs(found)  # ceil(2.0 * 6 / 8)
  for b, e in np.ndindex(B, E):
    real = [t for t in range(T) if REAL_BT[b, t]]
    best = sorted(real, key=lambda t: -score[b, t, e])[:room]
    assert {t for t in range(T) if (b, t, e) in kept} == set(best)
    assert all(kept[b, t, e] == pytest.approx(score[b, t, e], rel=1e-5) for t in best)
  passed = sum(not any((b, t, e) in kept for e in range(E)) for b, t in np.argwhere(REAL_BT))
  assert tuple(map(float, found.sums['dropped'])) == (passed, 10)


def test_experts_that_choose_look_ahead():
  x = logits()
  later = x.copy()
  later[0, -1, 7] += 9
  first = lambda x: {key for key in pairs(route(ExpertChoice(1.0), x, ALL_BT)) if key[1] < T - 1 and key[0] == 0}
  assert first(x) != first(later)


@pytest.mark.parametrize('over', ['row', 'batch'])
@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
def test_auxiliary_losses(over, score):
  """Against their formulas in loops, over real tokens alone."""
  x, k = logits(), 3
  share = softmax(x) if score == 'softmax' else 1 / (1 + np.exp(-x))
  share /= share.sum(-1, keepdims=True)
  expected = []
  for b in range(B):
    real = [(r, t) for r, t in np.argwhere(REAL_BT) if over == 'batch' or r == b]
    f = np.mean([np.isin(np.arange(E), np.argsort(-x[r, t])[:k]) for r, t in real], 0) * E / k
    p = np.mean([share[r, t] for r, t in real], 0)
    z = np.mean([np.log(np.exp(x[b, t]).sum())**2 for r, t in np.argwhere(REAL_BT) if r == b])
    expected.append(0.1 * (f * p).sum() + 0.01 * z)
  router = TopK(k, score=score, balance_loss=0.1, balance_over=over, z_loss=0.01)
  np.testing.assert_allclose(route(router, x, REAL_BT).sums['auxiliary_B'], expected, rtol=1e-5)


def test_the_balance_loss_of_even_loads_is_its_weight():
  x = np.full((1, E, E), -9, np.float32)
  x[0, np.arange(E), np.arange(E)] = 9
  found = TopK(1, balance_loss=0.25).route(x, np.ones((1, E), bool)).sums
  np.testing.assert_allclose(found['auxiliary_B'], [0.25], rtol=1e-5)
  np.testing.assert_allclose(found['expert_load_E'][0] / found['expert_load_E'][1], np.ones(E))


def test_telemetry_counts_real_tokens():
  x = np.zeros((B, T, E), np.float32)
  sums = route(TopK(2), x, REAL_BT).sums
  load, even = sums['expert_load_E']
  assert (np.asarray(load).tolist(), float(even)) == ([10, 10, 0, 0, 0, 0, 0, 0], 10 * 2 / E)
  entropy, tokens = sums['router_entropy']
  assert float(entropy / tokens) == pytest.approx(np.log(E), rel=1e-6)


@pytest.mark.parametrize(('settings', 'said'), [
    (dict(score='tanh'), "router.TopK.score='tanh' must be one of"),
    (dict(capacity=0.0), 'capacity=0.0 must be positive'),
    (dict(groups=2), 'groups=2 and groups_chosen=None'), (dict(balance_over='batch'), 'has no effect'),
    (dict(chosen=0), 'chosen=0 must be a positive integer')])
def test_settings_that_cannot_be_are_refused(settings, said):
  with pytest.raises(ValueError) as error:  # noqa: PT011, looked at below
    TopK(**settings)
  assert said in str(error.value)


@pytest.mark.parametrize(('router', 'said'), [
    (TopK(9), 'chosen=9 exceeds the 8 experts'), (TopK(2, groups=3, groups_chosen=1), 'groups=3 does not divide'),
    (TopK(5, groups=4, groups_chosen=2), 'cannot give chosen=5'),
    (TopK(1, groups=4, groups_chosen=2, group_best=3), 'group_best=3 exceeds the 2'),
    (ExpertChoice(9.0), 'capacity=9.0 exceeds the 8 experts')])
def test_routers_that_do_not_fit_the_experts_are_refused(router, said):
  with pytest.raises(ValueError) as error:  # noqa: PT011, looked at below
    router.check(E)
  assert said in str(error.value)
