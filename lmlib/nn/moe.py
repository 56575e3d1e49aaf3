"""A mixture of experts (Shazeer et al. 2017): hidden layers of which each token passes those that a router chooses."""
import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmlib import sharding
from lmlib.kernels import grouped_matmul as grouped
from lmlib.nn import dispatch, layers
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

    weights, letters = self.matrices(x_BTD.dtype)
    y_BTD = dispatch.mixed(functools.partial(computed, experts), x_BTD, routing, weights, letters, experts.hidden)
    if experts.shared is not None:
      y_BTD += Mlp(D, experts.shared, experts.style, self.out_scale, name='shared')(x_BTD)
    return sharding.constrain(y_BTD, 'BTD'), routing.sums

  def matrices(self, dtype) -> tuple[dict, dict]:
    """The experts' matrices and biases by name, and their letters; float32 where devices sum their gradients so."""
    style, weights, letters = self.experts.style, {}, {}
    matrices = [('up', 'EDF', 'D', 1.0), ('down', 'EFD', 'F', self.out_scale)]
    for name, axes, fan_in, scale in [('gate', 'EDF', 'D', 1.0)] * style.gated + matrices:
      matrix = layers.cast(layers.weight(self, name, axes, fan_in, scale), dtype)
      weights[name] = matrix.inner if isinstance(matrix, layers.Wide) else layers.array(matrix)
      letters |= {name: axes, f'{name}_bias': f'E{axes[-1]}'}
      if style.bias:
        weights[f'{name}_bias'] = layers.bias(self, f'{name}_bias', f'E{axes[-1]}').astype(dtype)
    return weights, letters


def computed(experts: Experts, weights: dict, x_MD, sizes_E, most: int | None):
  """What its expert makes of each row, MD; rows are sorted by expert, at most `most` of one if that is known."""
  style, limit = experts.style, experts.limit
  group_M = jnp.minimum(grouped.group(sizes_E, x_MD.shape[0]), sizes_E.shape[0] - 1)

  def product(x_MF, name: str):
    y_MF = grouped.grouped_matmul(x_MF, weights[name].astype(x_MF.dtype), sizes_E, most=most)
    return y_MF + weights[f'{name}_bias'][group_M] if style.bias else y_MF

  hidden_MF = product(x_MD, 'gate' if style.gated else 'up')
  hidden_MF = ACTIVATIONS[style.activation](hidden_MF if limit is None else jnp.minimum(hidden_MF, limit))
  if style.gated:
    up_MF = product(x_MD, 'up')
    hidden_MF *= up_MF if limit is None else jnp.clip(up_MF, -limit, limit) + 1
  return product(layers.kept(hidden_MF, 'hidden'), 'down')


def real(places: Places, B: int, T: int) -> jax.Array:
  """BT bool: which tokens are not padding."""
  rows = places.rows
  if places.coming is not None:
    return rows.place_BT >= 0
  return jnp.ones((B, T), bool) if rows.segment_BT is None else rows.segment_BT > 0
