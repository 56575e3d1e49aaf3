"""Self-attention with grouped heads, around the kernel that attends."""
import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmlib import sharding
from lmlib.kernels import attention as kernel
from lmlib.kernels import decode_attention
from lmlib.kernels.attention import Pattern, Rows
from lmlib.nn import layers
from lmlib.nn.places import Places
from lmlib.nn.positions import rotate

QK_NORMS = (None, 'head', 'all')


@dataclasses.dataclass(frozen=True)
class AttentionStyle:
  bias: str = ''  # which projections have one: any of the letters q, k, v and o, in this order
  qk_norm: str | None = None  # RMSNorm of queries and keys: of each 'head' (Qwen 3) or of 'all' at once (OLMo 2)
  patterns: tuple[Pattern, ...] = (Pattern(),)  # layer l has patterns[l % how many]
  sinks: bool = False  # a learned score of seeing nothing, a head (GPT-OSS)

  def __post_init__(self):
    if self.bias not in (allowed := ('', 'qkv', 'qkvo', 'qv', 'qvo', 'o')):
      raise ValueError(f'AttentionStyle.bias={self.bias!r} must be one of {allowed}')
    if self.qk_norm not in QK_NORMS:
      raise ValueError(f'AttentionStyle.qk_norm={self.qk_norm!r} must be one of {QK_NORMS}')
    if not self.patterns:
      raise ValueError('AttentionStyle.patterns is empty: give at least one Pattern')

  @property
  def kinds(self) -> tuple[Pattern, ...]:
    """The patterns that differ."""
    return tuple(dict.fromkeys(self.patterns))

  def kind(self, layer):
    """Which of the kinds a layer, a number or an array of it, has."""
    return jnp.asarray([self.kinds.index(pattern) for pattern in self.patterns])[layer % len(self.patterns)]

  @property
  def window(self) -> int | None:
    """How far back any layer looks; None: to the beginning."""
    windows = [pattern.window or pattern.chunk for pattern in self.patterns]
    return None if None in windows else max(windows)

  def flops(self, layers: int, length: int, width: int) -> float:
    """FLOPs a token of scores and weighted sums of `width` entries, all heads together, mean over a sequence."""
    keys = [self.patterns[layer % len(self.patterns)].mean_keys(length) for layer in range(layers)]
    return 2 * 2 * width * sum(keys)


class Attention(nn.Module):
  """Self-attention. `kv`, a layer's (k_BKSH, v_BKSH), makes it decode; None trains."""
  width: int
  heads: int
  kv_heads: int
  head_width: int
  style: AttentionStyle = AttentionStyle()
  epsilon: float = 1e-6  # of QK norm
  out_scale: float = 1.0
  implementation: str = 'auto'  # of kernels.attention, over whole rows
  decoding: str = 'auto'  # and of steps of decoding

  @property
  def sizes(self) -> dict[str, int]:
    return dict(D=self.width, K=self.kv_heads, G=self.heads // self.kv_heads, H=self.head_width)

  @nn.compact
  def __call__(self, x_BTD, places: Places, kind=0, kv=None):
    """Returns attention of x, BTD, and kv with the keys and values of x in it.

    kind: which of style.kinds this layer has, where there are several.
    """
    q_BTKGH = self.into(x_BTD, 'q', 'KGH')
    k_BTKH, v_BTKH = self.into(x_BTD, 'k', 'KH'), self.into(x_BTD, 'v', 'KH')
    q_BTKGH, k_BTKH = self.normed(q_BTKGH, 'q_norm'), self.normed(k_BTKH, 'k_norm')
    if places.turns:
      B, T, K, G, H = q_BTKGH.shape
      turns = self.of_kind(places.turns, kind)
      q_BTKGH = rotate(q_BTKGH.reshape(B, T, K * G, H), turns).reshape(B, T, K, G, H)
      k_BTKH = rotate(k_BTKH, turns)
    q_BTKGH, k_BTKH, v_BTKH = map(layers.kept, (q_BTKGH, k_BTKH, v_BTKH), 'qkv')
    seen, rows = (k_BTKH, v_BTKH), places.rows
    if kv is not None:
      coming = places.coming
      seen, kv = coming.join(kv, seen)
      rows = rows.replace(place_BS=coming.places_BS)
      if coming.fresh and not any(pattern.chunk or pattern.stride for pattern in self.style.kinds):
        rows = Rows(segment_BT=coming.real_BT)  # the same, and blocked attention can do it
    if (prefix := layers.beside(self, 'prefix')) is not None:
      seen, rows = prefix.join(seen), rows.replace(front=prefix.k.shape[0])
    attended_BTKGH = self.attended(q_BTKGH, seen, rows, places, kind, kv)
    out_BTKGH = layers.kept(sharding.constrain(attended_BTKGH, 'BTKGH'), 'attended')
    return self.out(out_BTKGH), kv

  def out(self, out_BTKGH):
    """What the heads read, projected into the stream, BTD."""
    out_KGHD = layers.cast(layers.weight(self, 'out', 'KGHD', 'KGH', self.out_scale), out_BTKGH.dtype)
    y_BTD = layers.product('BTKGH,KGHD->BTD', out_BTKGH, out_KGHD)
    if 'o' in self.style.bias:
      y_BTD += layers.bias(self, 'out_bias', 'D').astype(y_BTD.dtype)[None, None]
    return y_BTD

  def into(self, x_BTD, name: str, axes: str):
    """The projection `name` of x, BT and `axes`."""
    # Scores start at size one, whatever they are multiplied by.
    scale = self.head_width**-0.5 / (self.style.patterns[0].scale or self.head_width**-0.5) if name == 'q' else 1.0
    w = layers.cast(layers.weight(self, name, f'D{axes}', 'D', scale), x_BTD.dtype)
    y = layers.product(f'BTD,D{axes}->BT{axes}', x_BTD, w)
    if name in self.style.bias:
      y += layers.bias(self, f'{name}_bias', axes).astype(x_BTD.dtype)[None, None]
    return y

  def normed(self, x, name: str):
    """Queries or keys after the norm that the style asks for."""
    if self.style.qk_norm is None:
      return x
    if self.style.qk_norm == 'head':
      return layers.RmsNorm(self.epsilon, axes='H', name=name)(x)
    axes = 'KGH' if x.ndim == 5 else 'KH'
    return layers.RmsNorm(self.epsilon, axes=axes, name=name)(x)

  def of_kind(self, turns, kind):
    """The angles of this layer: local layers may have their own."""
    local = [min(int(pattern.local), len(turns) - 1) for pattern in self.style.kinds]
    if len(set(local)) == 1:
      return turns[local[0]]
    return jax.tree.map(lambda *both: jnp.stack(both)[jnp.asarray(local)[kind]], *turns)

  def attended(self, q_BTKGH, seen, rows, places: Places, kind, kv=None):
    """What the heads read, BTKGH, by the pattern of this layer's kind."""
    sink_KG = layers.bias(self, 'sink_bias', 'KG') if self.style.sinks else None
    added = {'slopes': places.slope_KG, 'a bias': places.bias_BKGTS, 'keys in front': rows.front or None}
    added = [name for name, there in added.items() if there is not None]
    held = places.coming.held(seen, kv) if kv is not None and places.coming.step else None
    if held is not None and (by := decode_attention.of_step(q_BTKGH, held, added, self.decoding)):
      attend = lambda pattern, q_BTKGH, held: decode_attention.decode_attention(
          q_BTKGH, held, pattern, place_BT=rows.place_BT, sink_KG=sink_KG, implementation=by)
      given = q_BTKGH, held
    else:
      attend = lambda pattern, q_BTKGH, seen: kernel.attention(
          q_BTKGH, *seen, pattern, rows, slope_KG=places.slope_KG, bias_BKGTS=places.bias_BKGTS, sink_KG=sink_KG,
          implementation=self.implementation if kv is None else 'auto')
      given = q_BTKGH, seen
    branches = [functools.partial(attend, pattern) for pattern in self.style.kinds]
    return branches[0](*given) if len(branches) == 1 else jax.lax.switch(kind, branches, *given)
