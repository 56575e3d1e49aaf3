"""What decoding remembers of every layer, and the tokens, for rows of different lengths.

A layer's arrays are what its attention keeps of each place: keys and values, or less. Places are the axis before
the last, behind that of heads, so that products with a head's keys read them where they are. Place p of a row lies
in slot p, or in slot p modulo their number where layers see no further back than that (a ring). Entries may be of 8
bits with a scale a place and head (Scaled), a quarter of what float32 takes.
"""
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from lmlib.kernels.decode_attention import MOST, Held
from lmlib.quant import integers

EIGHTS = ('int8', 'float8_e4m3fn')  # types of Scaled


@struct.dataclass
class Scaled:
  """Entries of 8 bits, such as BKSH, and what those of a place and head are multiplied by, BKS1 in float32."""
  values: jax.Array
  scale: jax.Array

  @classmethod
  def of(cls, x, dtype) -> 'Scaled':
    """Each entry to the nearest number of 8 bits; the largest of a place and head is met exactly."""
    values, scale = integers.rows(x, dtype)
    return cls(values, scale[..., None])

  def plain(self, dtype) -> jax.Array:
    """The entries as one array."""
    return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def plain(kept, dtype):
  """What a layer keeps, arrays or Scaled, as arrays; those that are some already stay of their type."""
  return _each(lambda x: x.plain(dtype) if isinstance(x, Scaled) else x, kept)


def like(old, new):
  """New entries as a layer keeps the old ones."""
  return _each(lambda old, new: Scaled.of(new, old.values.dtype) if isinstance(old, Scaled) else new, old, new)


def _each(function, *trees):
  return jax.tree.map(function, *trees, is_leaf=lambda x: isinstance(x, Scaled))


@struct.dataclass
class Cache:
  """What row b knows of its first used_B[b] places."""
  layers: Any  # arrays or Scaled, such as (k_LBKSH, v_LBKSH), or a list of L without L (stack.Apart)
  used_B: jax.Array
  tokens_BS: jax.Array  # what the places hold; their number is the cache's length
  slots: int = struct.field(pytree_node=False)  # places that are kept; fewer than the length: the last ones
  fresh: bool = struct.field(pytree_node=False)  # nothing is in it: the next tokens see only each other

  @classmethod
  def empty(cls, shapes, *, layers: int, batch: int, length: int, dtype, window: int | None = None) -> 'Cache':
    """An empty cache for `batch` rows of `length` places; `shapes` are those of a place in a layer's arrays.

    dtype: of EIGHTS for Scaled. window: no layer sees further back than so many places, which is all that is kept.
    """
    slots = length if window is None else min(window, length)

    def zeros(shape):
      x = jnp.zeros((layers, batch, *shape[:-1], slots, shape[-1]), dtype)
      return Scaled(x, jnp.zeros((*x.shape[:-1], 1), jnp.float32)) if x.dtype.name in EIGHTS else x

    used_B, tokens_BS = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, length), jnp.int32)
    return cls(tuple(map(zeros, shapes)), used_B, tokens_BS, slots, fresh=True)

  @property
  def length(self) -> int:
    return self.tokens_BS.shape[1]

  @property
  def ring(self) -> bool:
    return self.slots < self.length

  def spared(self, places: int) -> 'Cache':
    """An empty cache like this one from which the last `places` tokens can be taken back.

    A ring gets so many slots more: new tokens push out no place that is seen from before them.
    """
    assert self.fresh
    slots = min(self.slots + places, self.length) if self.ring else self.slots
    grown = lambda x: jnp.zeros((*x.shape[:-2], slots, x.shape[-1]), x.dtype)
    return self.replace(layers=jax.tree.map(grown, self.layers), slots=slots)

  def back(self, used_B) -> 'Cache':
    """The cache with only the first used_B places of each row filled; of a ring, see spared()."""
    return self.replace(used_B=used_B)

  def last(self) -> jax.Array:
    """B int32: the token of each row's last filled place, -1 where none is."""
    at_B1 = jnp.maximum(self.used_B - 1, 0)[:, None]
    return jnp.where(self.used_B > 0, jnp.take_along_axis(self.tokens_BS, at_B1, axis=1)[:, 0], -1)

  def coming(self, T: int, real_BT=None) -> 'Coming':
    """Where the next T tokens of every row go; those where real_BT is 0 are padding and go nowhere."""
    if real_BT is None:
      place_BT = self.used_B[:, None] + jnp.arange(T)[None]
    else:
      count_BT = jnp.cumsum(real_BT > 0, axis=1)
      place_BT = jnp.where(real_BT > 0, self.used_B[:, None] + count_BT - 1, -1)
    used_B = jnp.maximum(self.used_B, place_BT.max(1) + 1)
    before_BS, after_BS = held(self.used_B, self.slots), held(used_B, self.slots)
    return Coming(place_BT, real_BT, before_BS, after_BS, used_B, self.slots, self.ring, self.fresh)

  def after(self, layers, tokens_BT, coming: 'Coming') -> 'Cache':
    """The cache with these tokens and what the layers keep of them."""
    slot_BT = jnp.where(coming.place_BT >= 0, coming.place_BT, self.length)
    return Cache(layers, coming.used_B, put(self.tokens_BS, tokens_BT, slot_BT), self.slots, fresh=False)

  def take(self, row_B) -> 'Cache':
    """The cache of these rows, in this order; a row may come several times, and goes on by itself then."""
    return self.replace(layers=taken(self.layers, row_B), used_B=self.used_B[row_B], tokens_BS=self.tokens_BS[row_B])


@struct.dataclass
class Coming:
  """New tokens of a cache and where they and the old ones stand; the same for all layers."""
  place_BT: jax.Array  # of the new tokens, -1 for padding
  real_BT: jax.Array | None  # 0 for padding; None: there is none
  before_BS: jax.Array  # place that each slot held, -1 for none
  after_BS: jax.Array  # place that each slot holds with the new ones in
  used_B: jax.Array
  slots: int = struct.field(pytree_node=False)
  ring: bool = struct.field(pytree_node=False)
  fresh: bool = struct.field(pytree_node=False)

  def put(self, old, new):
    """A layer's arrays, such as BKSH, with the new entries, such as BTKH, in."""
    slot_BT = jnp.where(self.place_BT >= 0, self.place_BT, self.slots)
    if self.ring:  # of more tokens than slots the last stay
      kept_BT = (self.place_BT >= 0) & (self.place_BT >= self.used_B[:, None] - self.slots)
      slot_BT = jnp.where(kept_BT, self.place_BT % self.slots, self.slots)
    return jax.tree.map(lambda old, new: put(old, new, slot_BT), old, like(old, new))

  def join(self, old, new):
    """(what queries of the new tokens may look at, such as BSKH, at places_BS; a layer's arrays afterwards)."""
    after = self.put(old, new)
    if self.fresh:
      return new, after
    dtype = jax.tree.leaves(new)[0].dtype
    seen = jax.tree.map(lambda x: jnp.moveaxis(x, -2, 1), plain(old if self.pushes else after, dtype))
    if self.pushes:  # new entries are seen as they will be kept, so that it does not matter how many come at once
      new = plain(like(old, new), dtype)
      seen = jax.tree.map(lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], 1), seen, new)
    return seen, after

  def held(self, seen, after, value_width: int | None = None) -> Held:
    """What join() gave, keys and values or keys that begin with values, as kernels of steps read it: in its place."""
    if self.pushes:
      after = jax.tree.map(lambda x: jnp.moveaxis(x, 1, -2), seen)
    values = [x.values if isinstance(x, Scaled) else x for x in after] + [None]
    scales = [x.scale[..., 0] if isinstance(x, Scaled) else None for x in after] + [None]
    return Held(*values[:2], k_scale=scales[0], v_scale=scales[1], place_BS=self.places_BS, value_width=value_width)

  @property
  def pushes(self) -> bool:
    """Whether the first of the new tokens may see what the last of them push out."""
    return self.ring and self.place_BT.shape[1] > 1

  @property
  def step(self) -> bool:
    """Whether these are a few tokens behind others: a step of decoding, and not a prompt that is read."""
    return not self.fresh and self.place_BT.shape[1] <= MOST

  @property
  def places_BS(self) -> jax.Array:
    """The places of what join() gives to look at, negative for none."""
    if self.fresh:
      return self.place_BT
    return jnp.concatenate([self.before_BS, self.place_BT], 1) if self.pushes else self.after_BS


def held(used_B, slots: int) -> jax.Array:
  """BS: the place that each slot holds once used_B places are filled, negative for none."""
  last_B1 = used_B[:, None] - 1
  return last_B1 - (last_B1 - jnp.arange(slots)[None]) % slots


def taken(layers, row_B):
  """What layers keep of these rows: of arrays LBS... in tuples, which may be nested, and of lists of BS... a layer."""
  of = lambda x: jax.tree.map(lambda x_BS: x_BS[row_B], x) if isinstance(x, list) else x[:, row_B]
  return jax.tree.map(of, layers, is_leaf=lambda x: isinstance(x, list))


def put(old, new, slot_BT):
  """Writes T new entries of each row, such as BTKH, into its slots of BKSH; a slot beyond the last is nowhere."""
  heads = (slice(None),) * (old.ndim - 3)
  return old.at[jnp.arange(old.shape[0])[:, None], *heads, slot_BT].set(new.astype(old.dtype), mode='drop')
