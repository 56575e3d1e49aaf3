"""Kernels on a GPU beside their peers: attention, forward and backward, packed documents, decoding, cross-entropy.

  python benchmarks/kernels.py     on a machine with an H100 or H200, jax[cuda13] and, for two peers, torch and tokamax

Attention is causal, bfloat16, 32 query heads on 8 key heads of width 128, 16,384 tokens (32,768 at the last length)
in rows of 2k to 32k. FLOP/s count the products that causality leaves, forward 2 and backward 5 of them. All sides
take turns, each time with fresh random data; torch runs in a process of its own afterwards. Before anything is
timed our kernels are held to float64. Steps of decoding are one query of each of 64 rows, 8,192 cached places,
contiguous and in pages of 16 and 128, bfloat16 and int8; their bandwidth is that of the keys and values that must be
read, beside the GPU's own in a copy. Goals: 0.9 of cuDNN forward and 0.8 backward; packed documents at the dense
speed times the share of blocks that are live; decoding at 0.85 of the bandwidth; cross-entropy in a quarter of the
memory at no more time.
"""
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

HEADS, KV_HEADS, WIDTH, TOKENS, LENGTHS = 32, 8, 128, 16384, (2048, 4096, 8192, 16384, 32768)
ROUNDS, CALLS = 7, 4  # rounds of turns, calls a turn
DOCUMENTS = 16  # in a row of PACKED tokens
PACKED = 16384
ROWS, MODEL, VOCAB = 8192, 2048, 128256  # of cross-entropy: tokens, width, vocabulary
ROWS_HELD, HELD = 64, 8192  # rows that decode together, and places of each
GOALS = {'forward': 0.9, 'backward': 0.8, 'packed': 1.0, 'decoding': 0.85, 'cross-entropy memory': 0.25,
         'cross-entropy time': 1.0}
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # torch needs memory too


def batch(length: int) -> int:
  return max(1, TOKENS // length)


def flops(length: int) -> float:
  """Of the forward pass, causal."""
  return 4 * batch(length) * HEADS * length * length * WIDTH / 2


def new(length: int, key):
  """q, k, v and a gradient of the output."""
  import jax
  import jax.numpy as jnp
  B, K, G, H = batch(length), KV_HEADS, HEADS // KV_HEADS, WIDTH
  shapes = (B, length, K, G, H), (B, length, K, H), (B, length, K, H), (B, length, K, G, H)
  return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(jax.random.split(key, 4), shapes))


def attends(implementation: str):
  """attention(q, k, v[, documents of the rows]) by one implementation."""
  from lmlib.kernels import attention
  return lambda q, k, v, segments_BT=None: attention.attention(
      q, k, v, rows=attention.Rows(segment_BT=segments_BT), implementation=implementation)


def by_tokamax(implementation: str):
  """The same by tokamax, one document a row."""
  import tokamax

  def attend(q_BTKGH, k_BSKH, v_BSKH):
    B, T, K, G, H = q_BTKGH.shape
    out_BTNH = tokamax.dot_product_attention(q_BTKGH.reshape(B, T, K * G, H), k_BSKH, v_BSKH, is_causal=True,
                                             implementation=implementation)
    return out_BTNH.reshape(q_BTKGH.shape)

  return attend


def peers() -> dict:
  """attention(q, k, v) by what others wrote for JAX, of those that are installed and do the case."""
  import jax
  found = {'cudnn': attends('cudnn')}
  for kind in ('mosaic', 'triton') if importlib.util.find_spec('tokamax') else ():
    try:
      jax.eval_shape(by_tokamax(kind), *jax.eval_shape(lambda: new(LENGTHS[0], jax.random.key(0)))[:3])
    except Exception as reason:  # a package of any version may raise any
      print(f'tokamax by {kind!r} is left out: {type(reason).__name__}: {str(reason).splitlines()[0]}', flush=True)
    else:
      found[f'tokamax {kind}'] = by_tokamax(kind)
  return found


def seconds(function, *arguments) -> float:
  """Of a call, over CALLS that the device runs one after another."""
  import jax
  jax.block_until_ready(function(*arguments))
  start = time.perf_counter()
  out = [function(*arguments) for _ in range(CALLS)]
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / CALLS


class Side:
  """One implementation at one length: its forward pass, and its backward pass alone."""

  def __init__(self, attend):
    import jax
    self.forward = jax.jit(attend)
    self.linear = jax.jit(lambda q, k, v, *more: jax.vjp(lambda *qkv: attend(*qkv, *more), q, k, v)[1])
    self.back = jax.jit(lambda back, dout: back(dout))

  def time(self, q, k, v, dout, *more) -> tuple[float, float]:
    return seconds(self.forward, q, k, v, *more), seconds(self.back, self.linear(q, k, v, *more), dout)


def errors() -> dict[str, float]:
  """The largest error of values and gradients relative to float64, of each of our kernels, dense and packed."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from lmlib.kernels import attention
  random, found = np.random.default_rng(0), {}
  B, T, K, G, H = 2, 1024, 2, 2, WIDTH
  given = [random.normal(size=shape) for shape in ((B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H))]
  given = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in given]
  documents = np.sort(random.integers(0, 7, (B, T)), axis=1).astype(np.int32)
  for packed in (False, True):
    rows = attention.Rows(segment_BT=jnp.asarray(documents)) if packed else attention.Rows()

    def both(implementation, arrays, rows=rows):
      attend = lambda *qkv: attention.attention(*qkv, rows=rows, implementation=implementation)
      out, back = jax.jit(lambda *qkv: jax.vjp(attend, *qkv))(*arrays[:3])
      return [np.asarray(x, np.float64) for x in (out, *jax.jit(lambda back, dout: back(dout))(back, arrays[3]))]

    with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
      expected = both('reference', [jnp.asarray(x) for x in given])
    for name in ('hopper', 'gpu'):
      got = both(name, [jnp.asarray(x, jnp.bfloat16) for x in given])
      each = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, expected)]
      found[f'{name}{" packed" if packed else ""}'] = float(max(each))
  return found


def dense(figures) -> None:
  """TFLOP/s of every side at every length, medians and their range, and ratios to cuDNN round by round."""
  import jax
  others, ours = peers(), {name: attends(name) for name in ('hopper', 'gpu')}
  for length in LENGTHS:
    sides = {name: Side(attend) for name, attend in (others | ours).items()}
    taken = {name: [] for name in sides}
    for turn in range(ROUNDS):
      arrays = new(length, jax.random.key(turn))
      for name, side in sides.items():
        taken[name].append(side.time(*arrays))
    for name, pairs in taken.items():
      for i, (way, share) in enumerate((('forward', 1), ('backward', 2.5))):
        speeds = [share * flops(length) / pair[i] / 1e12 for pair in pairs]
        ratios = [base[i] / pair[i] for base, pair in zip(taken['cudnn'], pairs)]
        figures[f'{name} {way} {length}'] = tell(f'{name} {way} {length}', speeds, ratios)


def tell(what: str, speeds, ratios) -> dict:
  """One line of a table, and its figures."""
  middle, ratio = statistics.median(speeds), statistics.median(ratios)
  print(f'{what:<28}{middle:>7.0f} TFLOP/s ({min(speeds):.0f} to {max(speeds):.0f})   {ratio:.2f} of cuDNN '
        f'({min(ratios):.2f} to {max(ratios):.2f})', flush=True)
  return {'TFLOP/s': middle, 'range': [min(speeds), max(speeds)], 'ratio': ratio,
          'ratios': [min(ratios), max(ratios)]}


def torch_worker() -> None:
  """torch's scaled_dot_product_attention by FlashAttention: a JSON object of TFLOP/s."""
  import torch
  from torch.nn.attention import SDPBackend, sdpa_kernel
  found = {}

  def timed(function) -> float:
    function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
      function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / CALLS

  for kind in ('FLASH_ATTENTION', 'CUDNN_ATTENTION'):
    for length in LENGTHS:
      speeds = []
      for _ in range(ROUNDS):
        draw = lambda heads: torch.randn(batch(length), heads, length, WIDTH, device='cuda', dtype=torch.bfloat16,  # noqa: B023
                                         requires_grad=True)
        q, k, v = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)
        with sdpa_kernel(getattr(SDPBackend, kind)):
          attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: B023
          with torch.no_grad():
            ahead = timed(attend)
          out = attend()
          dout = torch.randn_like(out)
          back = timed(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))  # noqa: B023
        speeds.append((flops(length) / ahead / 1e12, 2.5 * flops(length) / back / 1e12))
      for i, way in enumerate(('forward', 'backward')):
        found[f'torch {kind} {way} {length}'] = statistics.median(pair[i] for pair in speeds)
  print(json.dumps(found))


def packed(figures) -> None:
  """Packed documents beside one document, and the share of blocks that are live."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from lmlib.kernels import attention, attention_ranges
  place_1T = jnp.arange(PACKED, dtype=jnp.int32)[None]
  ratios, one_side, several_side = {'forward': [], 'backward': []}, Side(attends('hopper')), Side(attends('hopper'))
  for turn in range(ROUNDS):
    cuts = np.random.default_rng(turn).choice(np.arange(1, PACKED), DOCUMENTS - 1, replace=False)
    segments_1T = np.searchsorted(np.sort(cuts), np.arange(PACKED), side='right')[None].astype(np.int32)
    whole = attention.Rows(place_1T, place_1T, segments_1T, segments_1T)
    live = [attention_ranges.met(attention.Pattern(), rows, 128, 128)[0].mean()
            for rows in (whole, whole.replace(segment_BT=None, segment_BS=None))]
    share, arrays = float(live[0] / live[1]), new(PACKED, jax.random.key(turn))
    one, several = one_side.time(*arrays), several_side.time(*arrays, jnp.asarray(segments_1T))
    for i, way in enumerate(ratios):
      ratios[way].append(one[i] * share / several[i])
  for way, values in ratios.items():
    figures[f'packed {way}'] = {'ratio': statistics.median(values), 'ratios': [min(values), max(values)], 'live': share}
    print(f'{DOCUMENTS} documents in {PACKED}, {way}: {statistics.median(values):.2f} of dense speed x live share '
          f'({min(values):.2f} to {max(values):.2f})', flush=True)


def decoded(figures) -> None:
  """Steps of decoding: bytes of keys and values that must be read by time, beside a copy's bytes by time."""
  import jax
  import jax.numpy as jnp

  from lmlib.kernels import decode_attention
  from lmlib.kernels.attention import Pattern
  B, S, K, G, H = ROWS_HELD, HELD, KV_HEADS, HEADS // KV_HEADS, WIDTH
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v = (jax.random.normal(key, shape, jnp.bfloat16)
             for key, shape in zip(keys, ((B, 1, K, G, H), (B, K, S, H), (B, K, S, H))))
  eight = lambda x: (jnp.round(x * 30).astype(jnp.int8), jnp.full(x.shape[:3], 1 / 30, jnp.float32))
  length_B = jnp.full((B,), S, jnp.int32)
  (k8, k_scale), (v8, v_scale) = eight(k), eight(v)
  pages = lambda x, size: x.reshape(B, K, S // size, size, H).swapaxes(1, 2).reshape(-1, K, size, H)
  table = lambda size: jax.random.permutation(keys[3], B * S // size).astype(jnp.int32).reshape(B, -1)
  cases = {'contiguous': decode_attention.Held(k, v, length_B),
           'int8': decode_attention.Held(k8, v8, length_B, k_scale=k_scale, v_scale=v_scale),
           **{f'pages of {size}': decode_attention.Held(pages(k, size), pages(v, size), length_B, page_BX=table(size))
              for size in (16, 128)}}
  step = jax.jit(lambda q, held: decode_attention.decode_attention(q, held, Pattern(), implementation='gpu'))
  copy, times = jax.jit(lambda x: x + 1), {name: [] for name in ('copy', *cases)}
  for _ in range(ROUNDS):
    times['copy'].append(seconds(copy, k))
    for name, held in cases.items():
      times[name].append(seconds(step, q, held))
  reach = lambda name, moved: moved / statistics.median(times[name])
  most = reach('copy', 2 * k.nbytes)
  for name, held in cases.items():
    moved = sum(x.nbytes for x in (held.k, held.v, held.k_scale, held.v_scale) if x is not None)
    figures[f'decoding {name}'] = {'ratio': reach(name, moved) / most, 'GB/s': reach(name, moved) / 1e9}
    print(f'decoding {name}: {reach(name, moved) / 1e9:.0f} GB/s, {reach(name, moved) / most:.2f} of a copy',
          flush=True)


def crossed(figures) -> None:
  """Cross-entropy with its gradients: memory that XLA sets aside, and time, beside all logits at once."""
  import jax
  import jax.numpy as jnp

  from lmlib.kernels import cross_entropy
  kx, kw, kt = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(kx, (4, ROWS // 4, MODEL), jnp.bfloat16)
  w = jax.random.normal(kw, (MODEL, VOCAB), jnp.float32) * MODEL**-0.5
  targets, weight = jax.random.randint(kt, (4, ROWS // 4), 0, VOCAB), jnp.ones((4, ROWS // 4), jnp.float32)
  loss = lambda by: lambda x, w: cross_entropy.cross_entropy(
      x, w, targets, weight, None, cross_entropy.Logits(implementation=by))[0]
  compiled = {name: jax.jit(jax.value_and_grad(loss(by), (0, 1))).lower(x, w).compile()
              for name, by in (('plain', 'reference'), ('lmlib', 'auto'))}
  memory = {name: c.memory_analysis().temp_size_in_bytes / 1e9 for name, c in compiled.items()}
  times = {name: [] for name in compiled}
  for _ in range(ROUNDS):
    for name, c in compiled.items():
      times[name].append(seconds(c, x, w))
  taken = {name: statistics.median(values) for name, values in times.items()}
  figures['cross-entropy'] = {'GB': memory, 'seconds': taken}
  print(f'cross-entropy of {ROWS} x {VOCAB}: {memory} GB, {taken} s', flush=True)


def main() -> None:
  """Everything, a table, and one JSON object as the last line."""
  import jax
  if jax.default_backend() != 'gpu':
    print('missing: a GPU and jax[cuda13]')
    figures, ratios, machine = {}, {}, jax.devices()[0].device_kind
  else:
    figures, machine = {'errors': errors()}, f'{jax.devices()[0].device_kind}, jax {jax.__version__}'
    print('errors against float64:', {name: f'{error:.1e}' for name, error in figures['errors'].items()}, flush=True)
    dense(figures)
    packed(figures)
    decoded(figures)
    crossed(figures)
    if importlib.util.find_spec('torch'):
      done = subprocess.run([sys.executable, __file__, 'torch'], capture_output=True, text=True)
      figures['torch'] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr[-300:]
      print('torch:', figures['torch'], flush=True)
    least = lambda way: min(figures[f'hopper {way} {length}']['ratio'] for length in LENGTHS)
    crossing = figures['cross-entropy']
    ratios = {'forward': least('forward'), 'backward': least('backward'),
              'packed': min(figures[f'packed {way}']['ratio'] for way in ('forward', 'backward')),
              'decoding': min(one['ratio'] for name, one in figures.items() if name.startswith('decoding')),
              **{f'cross-entropy {what}': crossing[unit]['lmlib'] / crossing[unit]['plain']
                 for what, unit in (('memory', 'GB'), ('time', 'seconds'))}}
  holds = bool(ratios) and all(ratios[name] <= goal if 'entropy' in name else ratios[name] >= goal
                               for name, goal in GOALS.items())
  print(json.dumps({'name': 'kernels', 'goal': GOALS, 'ratio': ratios, 'holds': holds, 'figures': figures,
                    'machine': machine}))


if __name__ == '__main__':
  torch_worker() if sys.argv[1:] == ['torch'] else main()
