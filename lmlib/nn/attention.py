"""Self-attention with grouped heads and rotary positions, around the kernel that attends."""
from flax import linen as nn

from lmlib import sharding
from lmlib.kernels import attention as kernel
from lmlib.nn import cache, layers
from lmlib.nn.positions import rotate


class Attention(nn.Module):
  """Causal self-attention. `kv`, a layer's (k_BSKH, v_BSKH), makes it decode; None trains."""
  width: int
  heads: int
  kv_heads: int
  head_width: int
  out_scale: float = 1.0

  @property
  def sizes(self) -> dict[str, int]:
    return dict(D=self.width, K=self.kv_heads, G=self.heads // self.kv_heads, H=self.head_width)

  @nn.compact
  def __call__(self, x_BTD, turns, segments_BT=None, kv=None, used_B=None, prefix_BT=None):
    """Returns attention of x, BTD, and kv with the keys and values of x put in after the first used_B.

    turns: of positions.turns(), the angles of the positions of x.
    prefix_BT: 1 where every query of the document sees the key, not only the later ones; without kv only.
    """
    w = lambda *args: layers.weight(self, *args).astype(x_BTD.dtype)
    q_BTKGH = layers.product('BTD,DKGH->BTKGH', x_BTD, w('q', 'DKGH', 'D'))
    k_BTKH = layers.product('BTD,DKH->BTKH', x_BTD, w('k', 'DKH', 'D'))
    v_BTKH = layers.product('BTD,DKH->BTKH', x_BTD, w('v', 'DKH', 'D'))
    B, T, K, G, H = q_BTKGH.shape
    q_BTKGH = rotate(q_BTKGH.reshape(B, T, K * G, H), turns).reshape(B, T, K, G, H)
    k_BTKH = rotate(k_BTKH, turns)

    if kv is None:
      out_BTKGH = kernel.attention(q_BTKGH, k_BTKH, v_BTKH, segments_BT=segments_BT, prefix_BS=prefix_BT)
    else:
      kv = tuple(cache.put(old, new, used_B) for old, new in zip(kv, (k_BTKH, v_BTKH)))
      out_BTKGH = kernel.attention(q_BTKGH, *kv, start_B=used_B)
    out_BTKGH = sharding.constrain(out_BTKGH, 'BTKGH')
    return layers.product('BTKGH,KGHD->BTD', out_BTKGH, w('out', 'KGHD', 'KGH', self.out_scale)), kv
