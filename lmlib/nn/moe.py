"""A mixture of experts (Shazeer et al. 2017): hidden layers of which each token passes those that a router chooses."""
import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmlib import sharding
from lmlib.kernels.grouped_matmul import grouped_matmul
from lmlib.nn import layers
from lmlib.nn.mlp import ACTIVATIONS, Mlp, MlpStyle
from lmlib.nn.places import Places
from lmlib.nn.router import ExpertChoice, TopK


@dataclasses.dataclass(frozen=True)
class Experts:
  """What stands in the place of a hidden layer."""
  count: int = 8
  hidden: int = 128
  router: TopK | ExpertChoice = TopK()
  shared: int | None = None  # hidden width of one more expert, which all tokens pass (DeepSeekMoE, Dai et al. 2024)
  style: MlpStyle = MlpStyle()
  limit: float | None = None  # gates are at most this and ups within it, and 1 is added to ups (GPT-OSS)

  def __post_init__(self):
    for name in ('count', 'hidden', 'shared'):
      value = getattr(self, name)
      if (value is None and name != 'shared') or (value is not None and (not isinstance(value, int) or value < 1)):
        raise ValueError(f'moe.Experts.{name}={value!r} must be a positive integer')
    if self.limit is not None and (not self.limit > 0 or not self.style.gated):
      raise ValueError(f'moe.Experts.limit={self.limit!r} must be positive and needs style.gated={self.style.gated}; '
                       'None turns it off')
    self.router.check(self.count)

  @property
  def share(self) -> float:
    """The share of the experts that computes a token."""
    return self.router.share(self.count)


class MixtureOfExperts(nn.Module):
  """sum over the chosen experts of weight * down(act(gate x) * up x), plus that of the shared expert.

  Tokens are sorted by expert, and none is dropped but by the router's own limit.
  """
  width: int
  experts: Experts
  out_scale: float = 1.0

  @property
  def sizes(self) -> dict[str, int]:
    return dict(D=self.width, F=self.experts.hidden, E=self.experts.count)

  @nn.compact
  def __call__(self, x_BTD, places: Places):
    """Returns BTD and the router's sums: 'auxiliary_B', losses to be added as means over the tokens of each row,
    and telemetry as pairs of a sum and its weight. ValueError for a cache if the router is not causal.
    """
    (B, T, D), experts, router = x_BTD.shape, self.experts, self.experts.router
    if places.coming is not None and not router.causal:
      raise ValueError(f'{type(router).__name__} lets later tokens decide: there is no decoding with a cache')
    logits_BTE = jnp.einsum('BTD,DE->BTE', x_BTD.astype(jnp.float32), layers.weight(self, 'router', 'DE', 'D'))
    if router.bias:
      logits_BTE += layers.bias(self, 'router_bias', 'E')[None, None]
    offset_E = layers.bias(self, 'balance_bias', 'E') if router.balanced else None
    routing = router.route(logits_BTE, real(places, B, T), offset_E, limited=places.coming is None)

    order_M = jnp.argsort(routing.expert_M, stable=True)
    expert_M, token_M = routing.expert_M[order_M], routing.token_M[order_M]
    sizes_E = (routing.expert_M[None] == jnp.arange(experts.count)[:, None]).sum(1)
    y_MD = self.computed(x_BTD.reshape(B * T, D)[token_M], expert_M, sizes_E, routing.most)
    y_MD = y_MD.astype(jnp.float32) * routing.weight_M[order_M][:, None]
    y_BTD = jnp.zeros((B * T, D), jnp.float32).at[token_M].add(y_MD).reshape(B, T, D).astype(x_BTD.dtype)
    if experts.shared is not None:
      y_BTD += Mlp(D, experts.shared, experts.style, self.out_scale, name='shared')(x_BTD)
    return sharding.constrain(y_BTD, 'BTD'), routing.sums

  def computed(self, x_MD, expert_M, sizes_E, most):
    """What its expert makes of each row, MD; rows are sorted by expert."""
    style, limit = self.experts.style, self.experts.limit
    here_M = jnp.minimum(expert_M, self.experts.count - 1)

    def product(x_MF, name: str, axes: str, fan_in: str, scale: float = 1.0):
      w_EFF = layers.array(layers.weight(self, name, f'E{axes}', fan_in, scale).astype(x_MD.dtype))
      w_EFF = sharding.constrain(w_EFF, f'E{axes}')
      y_MF = grouped_matmul(x_MF, w_EFF, sizes_E, most=most)
      if style.bias:
        y_MF += layers.bias(self, f'{name}_bias', f'E{axes[-1]}').astype(x_MD.dtype)[here_M]
      return y_MF

    hidden_MF = product(x_MD, 'gate' if style.gated else 'up', 'DF', 'D')
    hidden_MF = ACTIVATIONS[style.activation](hidden_MF if limit is None else jnp.minimum(hidden_MF, limit))
    if style.gated:
      up_MF = product(x_MD, 'up', 'DF', 'D')
      hidden_MF *= up_MF if limit is None else jnp.clip(up_MF, -limit, limit) + 1
    return product(hidden_MF, 'down', 'FD', 'F', self.out_scale)


def real(places: Places, B: int, T: int) -> jax.Array:
  """BT bool: which tokens are not padding."""
  rows = places.rows
  if places.coming is not None:
    return rows.place_BT >= 0
  return jnp.ones((B, T), bool) if rows.segment_BT is None else rows.segment_BT > 0
