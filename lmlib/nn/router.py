"""Which experts a token goes to, as pairs of a token and an expert, with what training makes of the choice.

  token choice   every token takes its `chosen` best experts (Shazeer et al. 2017), all of them or, with a `capacity`,
                 as far as an expert has room (Switch, Fedus et al. 2021)
  expert choice  every expert takes its best tokens (Zhou et al. 2022)

Scores are float32. Of equal scores the first counts as higher. Unlike Switch and GShard (Lepikhin et al. 2020),
capacity is counted in each row and goes to tokens in their order, whichever of its choices an expert is to a
token: neither another row nor a later token changes what a token gets.
"""
import dataclasses
import math

from flax import struct
import jax
import jax.numpy as jnp

SCORES = ('softmax', 'sigmoid')


@struct.dataclass
class Routing:
  """M pairs a row, with every token of it at least once or, in expert choice, as often as it is chosen."""
  place_BM: jax.Array  # of the token in its row
  expert_BM: jax.Array  # 0 .. E - 1, or E where nothing is computed
  weight_BM: jax.Array  # of the expert's output
  sums: dict  # see moe.MixtureOfExperts
  chosen: int = struct.field(pytree_node=False)  # pairs of a token, at most
  room: int | None = struct.field(pytree_node=False, default=None)  # pairs of an expert in a row, at most, if known
  ordered: bool = struct.field(pytree_node=False, default=True)  # token by token, each as often


@dataclasses.dataclass(frozen=True)
class TopK:
  """Token choice. The weights of the experts are their scores, made to sum to one where `normalised`, times `scale`.

  A softmax over the chosen scores (GPT-OSS) is the softmax over all, normalised. With `groups` of neighbouring
  experts a token chooses among those of the `groups_chosen` best; a group is as good as its `group_best` best
  experts together (DeepSeek-V2: 1, V3: 2).
  """
  chosen: int = 2
  score: str = 'softmax'  # or 'sigmoid'
  normalised: bool = True
  scale: float = 1.0
  groups: int | None = None
  groups_chosen: int | None = None
  group_best: int = 1
  bias: bool = False  # of the scores
  balanced: bool = False  # an offset an expert, for choosing alone, that its load moves (Wang et al. 2024)
  capacity: float | None = None  # room of an expert for tokens of a row, in shares of an even load; not with a cache
  balance_loss: float | None = None  # weight of an auxiliary loss that is 1 where loads are even
  balance_over: str = 'row'  # 'row' (DeepSeek-V3, 2024) or 'batch', of a microbatch (Switch)
  z_loss: float | None = None  # weight of log(normaliser)^2 (ST-MoE, Zoph et al. 2022)
  causal = True

  def __post_init__(self):
    where = 'router.TopK'
    for name, allowed in (('score', SCORES), ('balance_over', ('row', 'batch'))):
      if getattr(self, name) not in allowed:
        raise ValueError(f'{where}.{name}={getattr(self, name)!r} must be one of {allowed}')
    for name in ('scale', 'capacity', 'balance_loss', 'z_loss'):
      value = getattr(self, name)
      if (value is None and name == 'scale') or (value is not None and not value > 0):
        raise ValueError(f'{where}.{name}={value!r} must be positive{"" if name == "scale" else "; None turns it off"}')
    for name in ('chosen', 'group_best'):
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
        raise ValueError(f'{where}.{name}={getattr(self, name)!r} must be a positive integer')
    if (self.groups is None) != (self.groups_chosen is None):
      raise ValueError(f'{where}.groups={self.groups} and groups_chosen={self.groups_chosen}: one needs the other')
    if self.balance_over == 'batch' and self.balance_loss is None:
      raise ValueError(f"{where}.balance_over='batch' has no effect with balance_loss=None")

  def check(self, experts: int):
    """ValueError if it cannot choose among so many experts."""
    where = 'router.TopK'
    if self.chosen > experts:
      raise ValueError(f'{where}.chosen={self.chosen} exceeds the {experts} experts')
    if self.groups is None:
      return
    if experts % self.groups:
      raise ValueError(f'{where}.groups={self.groups} does not divide the {experts} experts')
    size = experts // self.groups
    if not 1 <= self.groups_chosen <= self.groups or self.chosen > self.groups_chosen * size:
      raise ValueError(f'{where}.groups_chosen={self.groups_chosen} of groups={self.groups}, each of {size} experts, '
                       f'cannot give chosen={self.chosen}')
    if self.group_best > size:
      raise ValueError(f'{where}.group_best={self.group_best} exceeds the {size} experts of a group')

  def share(self, experts: int) -> float:
    """The share of the experts that computes a token."""
    return self.chosen / experts

  def route(self, logits_BTE, real_BT, offset_E=None, *, limited: bool = True) -> Routing:
    """The pairs of a batch; padding, where real_BT is False, gets none and counts nowhere.

    offset_E: the balancing offsets; limited: capacity binds.
    """
    B, T, E = logits_BTE.shape
    score_BTE = jax.nn.softmax(logits_BTE) if self.score == 'softmax' else jax.nn.sigmoid(logits_BTE)
    ranked_BTE = logits_BTE if self.score == 'softmax' and offset_E is None else score_BTE
    if offset_E is not None:
      ranked_BTE = ranked_BTE + offset_E[None, None]
    expert_BTC = self.choose(jax.lax.stop_gradient(ranked_BTE))
    weight_BTC = jnp.take_along_axis(score_BTE, expert_BTC, -1)
    if self.normalised and self.score == 'softmax':
      weight_BTC = jax.nn.softmax(jnp.take_along_axis(logits_BTE, expert_BTC, -1))
    elif self.normalised:
      weight_BTC /= weight_BTC.sum(-1, keepdims=True) + 1e-20
    hit_BTE = (hits(expert_BTC, E) & real_BT[..., None]).astype(jnp.float32)
    count_BE = hit_BTE.sum(1)
    kept_BTC, room = jnp.broadcast_to(real_BT[..., None], expert_BTC.shape), None
    if self.capacity is not None and limited:
      room = min(math.ceil(self.capacity * T * self.chosen / E), T)
      before_BTE = jnp.cumsum(hit_BTE, axis=1) - hit_BTE  # of a row's tokens, each chooses an expert once
      kept_BTC &= jnp.take_along_axis(before_BTE, expert_BTC, -1) < room
    place_BTC = jnp.broadcast_to(jnp.arange(T)[None, :, None], expert_BTC.shape)
    weight_BTC = jnp.where(kept_BTC, weight_BTC * self.scale, 0)
    if offset_E is not None:  # moved by the sign of this: integers, so that microbatches add up to the batch
      weight_BTC = with_gradient(weight_BTC, offset_E, E * count_BE.sum(0) - count_BE.sum())
    sums = telemetry(count_BE, score_BTE, real_BT, self.chosen)
    if self.capacity is not None:
      sums['dropped'] = (real_BT[..., None] & ~kept_BTC).sum().astype(jnp.float32), count_BE.sum()
    if self.balance_loss is not None or self.z_loss is not None:
      sums['auxiliary_B'] = self.auxiliary(logits_BTE, score_BTE, count_BE, real_BT)
    pairs = (x.reshape(B, -1) for x in (place_BTC, jnp.where(kept_BTC, expert_BTC, E), weight_BTC))
    return Routing(*pairs, sums, self.chosen, room)

  def choose(self, ranked_BTE):
    """BTC int32: the chosen experts of each token, best first."""
    if self.groups is not None:
      shape = *ranked_BTE.shape[:-1], self.groups, -1
      good_BTE = jax.lax.top_k(ranked_BTE.reshape(shape), self.group_best)[0].sum(-1)
      group_BTE = hits(jax.lax.top_k(good_BTE, self.groups_chosen)[1], self.groups)
      ranked_BTE = jnp.where(group_BTE[..., None], ranked_BTE.reshape(shape), -jnp.inf).reshape(ranked_BTE.shape)
    return jax.lax.top_k(ranked_BTE, self.chosen)[1]

  def auxiliary(self, logits_BTE, score_BTE, count_BE, real_BT):
    """B: of each row, the weighted auxiliary losses, means over its tokens."""
    loss_B, real_B1 = 0.0, real_BT.sum(1, keepdims=True)
    mean_B1 = 1 / jnp.maximum(real_B1, 1)
    if self.balance_loss is not None:  # E / k sum_e f[e] p[e]: shares of choices, means of scores that sum to one
      share_BTE = score_BTE / score_BTE.sum(-1, keepdims=True)
      score_BE, scale_B1 = jnp.where(real_BT[..., None], share_BTE, 0).sum(1), mean_B1
      if self.balance_over == 'batch':
        count_BE, score_BE = (x.sum(0, keepdims=True) for x in (count_BE, score_BE))
        scale_B1 = 1 / jnp.maximum(real_B1.sum(), 1)
      even = score_BTE.shape[-1] / self.chosen
      loss_B += self.balance_loss * even * (scale_B1**2 * count_BE * score_BE).sum(1)
    if self.z_loss is not None:
      loss_B += self.z_loss * (mean_B1 * jnp.where(real_BT, jax.nn.logsumexp(logits_BTE, -1)**2, 0)).sum(1)
    return jnp.broadcast_to(loss_B, real_BT.shape[:1])


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
  """Every expert takes the tokens of a row that score it highest, `capacity` experts a token in the mean.

  Loads are even by construction. It is not causal: whether an expert takes a token depends on the whole row, on
  later tokens and on other documents. A decoder trained with it has seen the future, and it refuses a cache.
  """
  capacity: float = 2.0
  bias: bool = False  # of the scores
  causal = False
  balanced = False

  def __post_init__(self):
    if not self.capacity > 0:
      raise ValueError(f'router.ExpertChoice.capacity={self.capacity!r} must be positive')

  def check(self, experts: int):
    """ValueError if it cannot choose among so many experts."""
    if self.capacity > experts:
      raise ValueError(f'router.ExpertChoice.capacity={self.capacity} exceeds the {experts} experts')

  def share(self, experts: int) -> float:
    """The share of the experts that computes a token, in the mean."""
    return self.capacity / experts

  def route(self, logits_BTE, real_BT, offset_E=None, *, limited: bool = True) -> Routing:
    """The pairs of a batch; padding, where real_BT is False, gets none. Rows are never unlimited."""
    assert offset_E is None, 'loads are even'
    B, T, E = logits_BTE.shape
    room = min(T, math.ceil(self.capacity * T / E))
    score_BTE = jax.nn.softmax(logits_BTE)
    score_BET = jnp.where(real_BT[..., None], score_BTE, -1).swapaxes(1, 2)
    weight_BEC, place_BEC = jax.lax.top_k(score_BET, room)
    taken_BEC = weight_BEC >= 0
    expert_BEC = jnp.where(taken_BEC, jnp.arange(E)[None, :, None], E)
    place_BM, expert_BM, weight_BM = (
        x.reshape(B, -1) for x in (place_BEC, expert_BEC, jnp.where(taken_BEC, weight_BEC, 0)))
    times_BT = jnp.zeros((B, T)).at[jnp.arange(B)[:, None], place_BM].add(taken_BEC.reshape(B, -1))
    sums = telemetry(taken_BEC.sum(-1).astype(jnp.float32), score_BTE, real_BT, self.capacity)
    sums['dropped'] = (real_BT & (times_BT == 0)).sum().astype(jnp.float32), real_BT.sum().astype(jnp.float32)
    return Routing(place_BM, expert_BM, weight_BM, sums, E, room, ordered=False)


def hits(expert_BTC, E: int) -> jax.Array:
  """BTE bool: which of E experts (or groups) are among the chosen."""
  return (expert_BTC[..., None] == jnp.arange(E).reshape(*(1,) * expert_BTC.ndim, E)).any(-2)


def telemetry(count_BE, score_BTE, real_BT, chosen: float) -> dict:
  """Load of each expert in shares of an even one, and entropy in nats of a token's scores: sums and their weights."""
  tokens = real_BT.sum().astype(jnp.float32)
  share_BTE = score_BTE / score_BTE.sum(-1, keepdims=True)
  entropy_BT = -(share_BTE * jnp.log(jnp.maximum(share_BTE, 1e-30))).sum(-1)
  even = tokens * chosen / score_BTE.shape[-1]
  found = {'expert_load_E': (count_BE.sum(0), even),
           'router_entropy': (jnp.where(real_BT, entropy_BT, 0).sum(), tokens)}
  return jax.tree.map(jax.lax.stop_gradient, found)


@jax.custom_vjp
def with_gradient(x, offset_E, gradient_E):
  """x, from where the gradient of any loss finds gradient_E as that of offset_E, of which x does not depend."""
  return x


with_gradient.defvjp(lambda x, offset, gradient: (x, gradient), lambda gradient, dx: (dx, gradient, None))
