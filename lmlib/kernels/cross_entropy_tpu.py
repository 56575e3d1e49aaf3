"""Facts of logits on TPUs by tiles that stay on the chip: no logits in memory at all, forward or backward.

A tile is some tokens by some of the vocabulary. Forward, tiles of the vocabulary pass by a block of tokens, each
lane with its own greatest logit and its own sum of exponentials (Milakov and Gimelshein 2018), so that lanes are
joined once, behind the last tile. All that is kept is a few numbers a token. Backward, a tile is made again, with
p = exp(logits - lse), and with the gradients of lse, of the target's logit and of the mean logit:

  dlogits[t,v] = p[t,v] (dlse[t] + dmean[t] (1 + logits[t,v] - mean[t])) + dtarget[t] [v = target[t]]
  dx[t] = sum_v dproduct[t,v] w[:,v]           dw[:,v] = sum_t x[t] dproduct[t,v]

in two kernels, for a tile of dx meets the whole vocabulary and a tile of dw all tokens: five products with w where a
pass that kept the logits has three, but sums stay on the chip in float32 and always come in the same order. Where D is
too wide for the chip, a tile's product is summed over blocks of D, there and, for the gradient, back again.

w is read as it is stored, DV or (tied) VD. On several devices each has its rows of the batch and its part of the
vocabulary (by the rules of sharding.py): lse, target and mean are joined over the parts of the vocabulary, dx is
summed over these in float32, and dw over the rows.
"""
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmlib import sharding
from lmlib.kernels import tpu
from lmlib.kernels.blocks import tuned

LANES = tpu.LANES
LEAST = -1e30  # below every logit, and finite, so that no difference is NaN
TILES = ((1024, 256), (512, 512), (256, 1024), (512, 256), (256, 512), (256, 256), (256, 128), (128, 256), (128, 128))
WIDTHS = (2048, 1024, 512, 256, 128)  # blocks of D
PIECE = 1024  # bytes of a block of D at once: a longer product is a loop, for the sake of the program's length


@dataclasses.dataclass(frozen=True)
class Tile:
  """What of tokens, vocabulary and D is on the chip at once; the last divides D."""
  tokens: int
  vocab: int
  width: int


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Tiles of the three kernels."""
  forward: Tile
  states: Tile  # dx
  matrix: Tile  # dw


def sizes(tokens: int, width: int, vocab: int, x_dtype, w_dtype, memory: int | None = None) -> Sizes | None:
  """The tiles that should be fastest, of those that fit into `memory` bytes; None if none fits.

  memory: None takes three quarters of what the chip has, for _memory() knows not all that a compiler does.
  """
  memory = tpu.memory() * 3 // 4 if memory is None else memory
  item = jnp.dtype(x_dtype).itemsize
  outs = {'forward': 0, 'states': item, 'matrix': jnp.dtype(w_dtype).itemsize}
  up = lambda n, to: -(-n // to) * to
  widths = [width] + [size for size in WIDTHS if size < width and width % size == 0]
  tiles = {Tile(min(t, up(tokens, 16)), min(v, up(vocab, LANES)), d): None for t, v in TILES for d in widths}
  found = {}
  for name, out in outs.items():
    fitting = [tile for tile in tiles if _memory(name, tile, width, item, out) <= memory]
    if not fitting:
      return None
    found[name] = min(fitting, key=functools.partial(_time, name, width=width, item=item))
  return tuned('cross_entropy_tpu', f'{jnp.dtype(x_dtype).name} {tokens}x{width}x{vocab}', Sizes(**found))


def _memory(name: str, tile: Tile, width: int, item: int, out: int) -> int:
  """Bytes that a kernel needs, generously: blocks twice, sums, and values of a tile in between."""
  area, width = tile.tokens * tile.vocab, -(-width // LANES) * LANES
  block = -(-tile.width // LANES) * LANES
  blocks = 2 * item * (tile.tokens + tile.vocab) * block
  if name == 'forward':
    return blocks + 12 * area + 32 * tile.tokens * LANES
  along = tile.tokens if name == 'states' else tile.vocab
  return blocks + (14 + item) * area + along * (width * (2 * out + (4 if out != 4 else 0)) + 4 * block)


def _time(name: str, tile: Tile, width: int, item: int) -> float:
  """Of a multiplication of a token with a word, in that of the multiplication alone: a rough estimate.

  A TPU multiplies some 500 times while it reads a bfloat16, and 5e7 times while it goes to the next tile.
  """
  steps = width // tile.width
  again = 2 - 1 / steps  # of what is read on the way to the product and on the way back
  x, w = {'forward': (steps > 1, 1), 'states': (steps > 1, again), 'matrix': (again, steps > 1)}[name]
  products = 1 if name == 'forward' else 2
  reading = 500 * item / 2 / products * (x / tile.vocab + w / tile.tokens)
  return max(1, reading) + 5e7 / products / (tile.tokens * tile.vocab * tile.width)


def lacking(x_BTD, w_DV, logits) -> list[str]:
  """What of a case is not done here."""
  D, V = w_DV.shape
  kinds = jnp.float32, jnp.bfloat16
  cases = {'a backend but a TPU, or a CPU that interprets it':
               jax.default_backend() != 'cpu' and tpu.chip() is None,
           'arrays but of float32 or bfloat16': x_BTD.dtype not in kinds or w_DV.dtype not in kinds,
           f'a width of {D}, of which no tile fits on the chip':
               sizes(TILES[0][0], D, V, x_BTD.dtype, w_DV.dtype) is None}
  return [case for case, there in cases.items() if there]


@dataclasses.dataclass(frozen=True)
class _Case:
  """What the kernels are compiled for."""
  logits: object
  entropy: bool
  sizes: Sizes | None
  interpret: object


def facts(x_BTD, w_DV, targets_BT, logits, entropy: bool, *, sizes_of: Sizes | None = None, interpret=None):
  """(lse_BT, target_BT, most_BT, mean_BT), see cross_entropy.facts().

  sizes_of: tiles, whose default is sizes(). interpret: see tpu.call().
  """
  w = w_DV.T if logits.tied else w_DV  # of a transposed table the transpose is the table
  found = _facts(_Case(logits, entropy, sizes_of, interpret), x_BTD, w, targets_BT)
  return found if entropy else (*found[:3], None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _facts(case: _Case, x_BTD, w, targets_BT):
  return _forward(case, x_BTD, w, targets_BT)[0]


def _placed(case: _Case, x_BTD, w):
  """Specs of BTD, of w and of BT, and the mesh axes that split rows and vocabulary; none on one device."""
  V = w.shape[0 if case.logits.tied else 1]
  rows, places, words = sharding.split('BTV', (*x_BTD.shape[:2], V))
  of_w = P(words or None, None) if case.logits.tied else P(None, words or None)
  return P(rows or None, places or None, None), of_w, P(rows or None, places or None), (*rows, *places), words


def _apart(function, specs, out):
  return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False) if sharding.in_use() else function


def _first(case: _Case, w, words):
  """The number of the first word of this device's part of the vocabulary."""
  return jax.lax.axis_index(words) * w.shape[0 if case.logits.tied else 1] if words else 0


def _forward(case: _Case, x_BTD, w, targets_BT):
  of_x, of_w, of_rows, _, words = _placed(case, x_BTD, w)

  def mine(x_BTD, w, targets_BT):
    B, T, D = x_BTD.shape
    facts_M4 = _facts_call(case, x_BTD.reshape(-1, D), w, targets_BT.reshape(-1) - _first(case, w, words))
    lse_M, target_M, most_M, mean_M = facts_M4.T
    if words:
      top_M = jax.lax.pmax(lse_M, words)
      share_M = jnp.exp(lse_M - top_M)
      sum_M = jax.lax.psum(share_M, words)
      lse_M, target_M, most_M = top_M + jnp.log(sum_M), jax.lax.psum(target_M, words), jax.lax.pmax(most_M, words)
      mean_M = jax.lax.psum(share_M * mean_M, words) / sum_M
    return tuple(y.reshape(B, T) for y in (lse_M, target_M, most_M, mean_M))

  found = _apart(mine, (of_x, of_w, of_rows), (of_rows,) * 4)(x_BTD, w.astype(x_BTD.dtype), targets_BT)
  return found, (x_BTD, w, targets_BT, found[0], found[3])


def _backward(case: _Case, saved, slopes):
  x_BTD, w, targets_BT, lse_BT, mean_BT = saved
  dlse_BT, dtarget_BT, _, dmean_BT = slopes
  of_x, of_w, of_rows, rows, words = _placed(case, x_BTD, w)
  dw_dtype = jnp.float32 if rows else w.dtype

  def mine(x_BTD, w, targets_BT, *of_token):
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    targets_BT = targets_BT - _first(case, w, words)
    given_M6 = jnp.stack([y.astype(jnp.float32).reshape(-1) for y in (*of_token, targets_BT)], axis=1)
    dx_MD = _states_call(case, x_MD, w, given_M6, jnp.float32 if words else x_MD.dtype)
    dw = _matrix_call(case, x_MD, w, given_M6, dw_dtype)
    dx_MD = jax.lax.psum(dx_MD, words).astype(x_MD.dtype) if words else dx_MD
    return dx_MD.reshape(x_BTD.shape), jax.lax.psum(dw, rows) if rows else dw

  of_token = lse_BT, dlse_BT, dtarget_BT, dmean_BT, mean_BT
  dx_BTD, dw = _apart(mine, (of_x, of_w, *[of_rows] * 6), (of_x, of_w))(
      x_BTD, w.astype(x_BTD.dtype), targets_BT, *of_token)
  return dx_BTD, dw.astype(w.dtype), None


_facts.defvjp(_forward, _backward)


def _dot(a, b, dims):
  """a . b over the dimensions (of a, of b), float32; float32 operands are not rounded to bfloat16."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Kernel:
  """One kernel's view of a case: its tile, and how many of them there are."""
  case: _Case
  tile: Tile
  tokens: int  # a multiple of the tile's
  vocab: int  # any number
  width: int
  dtype: object

  @property
  def steps(self) -> int:
    return self.width // self.tile.width

  @property
  def tied(self) -> bool:
    return self.case.logits.tied

  @property
  def ragged(self) -> bool:
    return self.vocab % self.tile.vocab > 0

  def grid(self) -> tuple[int, int]:
    return self.tokens // self.tile.tokens, pl.cdiv(self.vocab, self.tile.vocab)

  def pieces(self, body):
    """Runs body(where) for the pieces of a block of D."""
    size = PIECE // jnp.dtype(self.dtype).itemsize
    if self.tile.width % size or self.tile.width == size:
      body(pl.ds(0, self.tile.width))
    else:
      piece = lambda i, _: body(pl.ds(pl.multiple_of(i * size, size), size))
      jax.lax.fori_loop(0, self.tile.width // size, piece, None)

  def of_w(self, at):
    """The index of a piece of D in a block of w."""
    return (slice(None), at) if self.tied else (at, slice(None))

  def summed(self, x_ref, w_ref, product_ref, step):
    """Adds this block of D to the product of the tile."""
    @pl.when(step == 0)
    def _():
      product_ref[...] = jnp.zeros(product_ref.shape, jnp.float32)

    def add(at):
      product_ref[...] += _dot(x_ref[:, at], w_ref[self.of_w(at)], ((1,), (1 if self.tied else 0,)))

    @pl.when(step < self.steps)
    def _():
      self.pieces(add)

  def whole(self, at, step):
    """Where a piece lies in all of D, on the way back."""
    start = (2 * (self.steps - 1) - step) * self.tile.width + at.start
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), at.size)

  def words(self, j):
    """The numbers of the words of tile j, 1V."""
    return j * self.tile.vocab + jax.lax.broadcasted_iota(jnp.int32, (1, self.tile.vocab), 1)

  def pulled(self, product_MV, given_ref, j):
    """The gradient of a tile's products; given: lse, dlse, dtarget, dmean, mean and target of each token."""
    lse_M1, dlse_M1, dtarget_M1, dmean_M1, mean_M1, target_M1 = (given_ref[:, i:i + 1] for i in range(6))
    logits_MV, word_1V = self.case.logits.of(product_MV), self.words(j)
    slope = dlse_M1 + dmean_M1 * (1 + logits_MV - mean_M1) if self.case.entropy else dlse_M1
    hit_MV = word_1V == target_M1.astype(jnp.int32)
    dlogits_MV = jnp.exp(logits_MV - lse_M1) * slope + jnp.where(hit_MV, dtarget_M1, 0.0)
    dproduct_MV = self.case.logits.pulled(dlogits_MV, logits_MV)
    if self.ragged:  # beyond the vocabulary a tile holds anything
      dproduct_MV = jnp.where(word_1V < self.vocab, dproduct_MV, 0.0)
    return dproduct_MV.astype(self.dtype)


def _facts_kernel(kernel: _Kernel, x_ref, w_ref, target_ref, facts_ref, product_ref, most_ref, sum_ref, hit_ref,
                  mean_ref):
  """One tile, summed over D, into the facts of its tokens."""
  j, step, entropy = pl.program_id(1), pl.program_id(2), kernel.case.entropy

  @pl.when((j == 0) & (step == 0))
  def _():
    most_ref[...] = jnp.full(most_ref.shape, LEAST, jnp.float32)
    for ref in (sum_ref, hit_ref, mean_ref):
      ref[...] = jnp.zeros(ref.shape, jnp.float32)

  kernel.summed(x_ref, w_ref, product_ref, step)

  @pl.when(step == kernel.steps - 1)
  def _():
    logits_MV, word_1V, target_M1 = kernel.case.logits.of(product_ref[...]), kernel.words(j), target_ref[...]
    hit_MV = jnp.where(word_1V == target_M1, logits_MV, 0.0)
    if kernel.ragged:
      logits_MV = jnp.where(word_1V < kernel.vocab, logits_MV, LEAST)
    lanes = [slice(at, at + LANES) for at in range(0, kernel.tile.vocab, LANES)]
    most_M128 = functools.reduce(jnp.maximum, [logits_MV[:, of] for of in lanes], most_ref[...])
    shrink_M128 = jnp.exp(most_ref[...] - most_M128)
    raised = [jnp.exp(logits_MV[:, of] - most_M128) for of in lanes]
    most_ref[...] = most_M128
    sum_ref[...] = sum_ref[...] * shrink_M128 + sum(raised)
    hit_ref[...] += sum(hit_MV[:, of] for of in lanes)
    if entropy:
      mean_ref[...] = mean_ref[...] * shrink_M128 + sum(y * logits_MV[:, of] for y, of in zip(raised, lanes))

  @pl.when((step == kernel.steps - 1) & (j == pl.num_programs(1) - 1))
  def _():
    most_M1 = most_ref[...].max(1, keepdims=True)
    shrink_M128 = jnp.exp(most_ref[...] - most_M1)
    sum_M1 = (sum_ref[...] * shrink_M128).sum(1, keepdims=True)
    facts_ref[:, 0:1] = most_M1 + jnp.log(sum_M1)
    facts_ref[:, 1:2] = hit_ref[...].sum(1, keepdims=True)
    facts_ref[:, 2:3] = most_M1
    facts_ref[:, 3:4] = (mean_ref[...] * shrink_M128).sum(1, keepdims=True) / sum_M1


def _finished(kernel: _Kernel, sums, out_ref, last):
  """Writes float32 sums out in the type of the result, if they are not there already."""
  if sums:
    @pl.when(last)
    def _():
      out_ref[...] = sums[0][...].astype(out_ref.dtype)


def _first_zero(ref, first):
  @pl.when(first)
  def _():
    ref[...] = jnp.zeros(ref.shape, jnp.float32)


def _states_kernel(kernel: _Kernel, x_ref, w_ref, given_ref, dx_ref, product_ref, dproduct_ref, *sums):
  """One tile into dx of its tokens: over D for the product, and back for the gradient."""
  j, step, last = pl.program_id(1), pl.program_id(2), kernel.steps - 1
  tiles, sums_ref = pl.num_programs(1), sums[0] if sums else dx_ref
  _first_zero(sums_ref, (j == 0) & (step == 0))
  kernel.summed(x_ref, w_ref, product_ref, step)

  @pl.when(step == last)
  def _():
    dproduct_ref[...] = kernel.pulled(product_ref[...], given_ref, j)

  def add(at, *, masked: bool):
    w = w_ref[kernel.of_w(at)]
    if masked:
      words = j * kernel.tile.vocab + jax.lax.broadcasted_iota(jnp.int32, w.shape, 0 if kernel.tied else 1)
      w = jnp.where(words < kernel.vocab, w, jnp.zeros_like(w))
    sums_ref[:, kernel.whole(at, step)] += _dot(dproduct_ref[...], w, ((1,), (0 if kernel.tied else 1,)))

  full = (j < tiles - 1) if kernel.ragged else (j < tiles)
  for masked, here in ((False, full), (True, ~full))[:1 + kernel.ragged]:
    pl.when((step >= last) & here)(functools.partial(kernel.pieces, functools.partial(add, masked=masked)))
  _finished(kernel, sums, dx_ref, (j == tiles - 1) & (step == 2 * last))


def _matrix_kernel(kernel: _Kernel, x_ref, w_ref, given_ref, dw_ref, product_ref, dproduct_ref, *sums):
  """One tile into dw of its words: over D for the product, and back for the gradient."""
  j, i, step, last = pl.program_id(0), pl.program_id(1), pl.program_id(2), kernel.steps - 1
  sums_ref = sums[0] if sums else dw_ref
  _first_zero(sums_ref, (i == 0) & (step == 0))
  kernel.summed(x_ref, w_ref, product_ref, step)

  @pl.when(step == last)
  def _():
    dproduct_ref[...] = kernel.pulled(product_ref[...], given_ref, j)

  def add(at):
    pair = (dproduct_ref[...], x_ref[:, at]) if kernel.tied else (x_ref[:, at], dproduct_ref[...])
    sums_ref[kernel.of_w(kernel.whole(at, step))] += _dot(*pair, ((0,), (0,)))

  @pl.when(step >= last)
  def _():
    kernel.pieces(add)

  _finished(kernel, sums, dw_ref, (i == pl.num_programs(1) - 1) & (step == 2 * last))


def _kernel(case: _Case, name: str, x_MD, w, w_dtype):
  """A kernel's view of arrays, and a function that fills tokens up to a multiple of its tile."""
  (M, D), V = x_MD.shape, w.shape[0 if case.logits.tied else 1]
  found = case.sizes or sizes(M, D, V, x_MD.dtype, w_dtype)
  tile = getattr(found, name)
  if D % tile.width or (tile.width < D and tile.width % LANES):
    raise ValueError(f'cross_entropy_tpu.Sizes.{name} {tile}: its width must divide D={D}, by a multiple of {LANES}')
  more = -M % tile.tokens
  filled = lambda y: jnp.pad(y, [(0, more), (0, 0)]) if more else y
  return _Kernel(case, tile, M + more, V, D, x_MD.dtype), filled


def _facts_call(case: _Case, x_MD, w, targets_M):
  kernel, filled = _kernel(case, 'forward', x_MD, w, w.dtype)
  tile, (I, J) = kernel.tile, kernel.grid()
  M, D, V, item = kernel.tokens, kernel.width, kernel.vocab, x_MD.dtype.itemsize
  of_tokens = lambda size: pl.BlockSpec((tile.tokens, size), lambda i, j, step: (i, 0))
  by_token = pltpu.VMEM((tile.tokens, LANES), jnp.float32)
  [facts_M4] = tpu.call(
      functools.partial(_facts_kernel, kernel), name='cross_entropy_forward', grid=(I, J, kernel.steps),
      inputs=[pl.BlockSpec((tile.tokens, tile.width), lambda i, j, step: (i, step)),
              _of_w(kernel, lambda i, j, step: (j, step)), of_tokens(1)],
      outputs=[(jax.ShapeDtypeStruct((M, 4), jnp.float32), of_tokens(4))],
      scratch=[pltpu.VMEM((tile.tokens, tile.vocab), jnp.float32), *[by_token] * 4],
      semantics=('parallel', 'arbitrary', 'arbitrary'), flops=2 * M * D * V, exponentials=M * V,
      bytes_moved=item * D * (I * V + (M if kernel.steps == 1 else J * M)), interpret=case.interpret,
      memory=tpu.memory())(filled(x_MD), w, filled(targets_M[:, None]))
  return facts_M4[:x_MD.shape[0]]


def _of_w(kernel: _Kernel, where):
  """The blocks of w, of (tile of the vocabulary, block of D)."""
  tile = kernel.tile
  if kernel.tied:
    return pl.BlockSpec((tile.vocab, tile.width), where)
  return pl.BlockSpec((tile.width, tile.vocab), lambda *at: where(*at)[::-1])


def _scratch(kernel: _Kernel, out, block):
  area = kernel.tile.tokens, kernel.tile.vocab
  sums = [] if out == jnp.float32 else [pltpu.VMEM(block, jnp.float32)]
  return [pltpu.VMEM(area, jnp.float32), pltpu.VMEM(area, kernel.dtype), *sums]


def _states_call(case: _Case, x_MD, w, given_M6, dtype):
  kernel, filled = _kernel(case, 'states', x_MD, w, w.dtype)
  tile, (I, J), last = kernel.tile, kernel.grid(), kernel.steps - 1
  M, D, V, item = kernel.tokens, kernel.width, kernel.vocab, x_MD.dtype.itemsize
  of_tokens = lambda size: pl.BlockSpec((tile.tokens, size), lambda i, j, step: (i, 0))
  [dx_MD] = tpu.call(
      functools.partial(_states_kernel, kernel), name='cross_entropy_states', grid=(I, J, 2 * last + 1),
      inputs=[pl.BlockSpec((tile.tokens, tile.width), lambda i, j, step: (i, jnp.minimum(step, last))),
              _of_w(kernel, lambda i, j, step: (j, jnp.minimum(step, 2 * last - step))), of_tokens(6)],
      outputs=[(jax.ShapeDtypeStruct((M, D), dtype), of_tokens(D))],
      scratch=_scratch(kernel, dtype, (tile.tokens, D)), semantics=('parallel', 'arbitrary', 'arbitrary'),
      flops=4 * M * D * V, exponentials=M * V, interpret=case.interpret, memory=tpu.memory(),
      bytes_moved=item * D * ((2 * last + 1) * I * V // kernel.steps + (J * M if last else M) + M))(
          filled(x_MD), w, filled(given_M6))
  return dx_MD[:x_MD.shape[0]]


def _matrix_call(case: _Case, x_MD, w, given_M6, dtype):
  kernel, filled = _kernel(case, 'matrix', x_MD, w, dtype)
  tile, (I, J), last = kernel.tile, kernel.grid(), kernel.steps - 1
  M, D, V, item = kernel.tokens, kernel.width, kernel.vocab, x_MD.dtype.itemsize
  block = (tile.vocab, D) if kernel.tied else (D, tile.vocab)
  out = pl.BlockSpec(block, lambda j, i, step: (j, 0) if kernel.tied else (0, j))
  [dw] = tpu.call(
      functools.partial(_matrix_kernel, kernel), name='cross_entropy_matrix', grid=(J, I, 2 * last + 1),
      inputs=[pl.BlockSpec((tile.tokens, tile.width), lambda j, i, step: (i, jnp.minimum(step, 2 * last - step))),
              _of_w(kernel, lambda j, i, step: (j, jnp.minimum(step, last))),
              pl.BlockSpec((tile.tokens, 6), lambda j, i, step: (i, 0))],
      outputs=[(jax.ShapeDtypeStruct(w.shape, dtype), out)],
      scratch=_scratch(kernel, dtype, block), semantics=('parallel', 'arbitrary', 'arbitrary'),
      flops=4 * M * D * V, exponentials=M * V, interpret=case.interpret, memory=tpu.memory(),
      bytes_moved=item * D * ((2 * last + 1) * J * M // kernel.steps + (I * V if last else V)) + 4 * D * V)(
          filled(x_MD), w, filled(given_M6))
  return dw
