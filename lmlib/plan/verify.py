"""Whether a run's parallel program computes what one device does, tried on a small copy of its model (shrink.py).

Everything is float32. Two programs that sum the same numbers in another order differ by some 1e-7 of what they sum;
a wrong mask, a sum over devices too many or too few, or a gradient that stays on one of them is off by a share of it.
A tensor is compared by the norm of its difference over its own norm, or over FLOOR of the typical norm of a tensor
where its own is less: a bias of keys, which softmax does not feel, has a gradient of rounding alone.
"""
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from lmlib import sharding, trees
from lmlib.data import objectives, order
from lmlib.data.packing import Raw
from lmlib.data.tokenizer import Bytes
from lmlib.models import protocol
from lmlib.nn import adapters
from lmlib.optim.kinds import BALANCE
from lmlib.plan import shrink
from lmlib.post.sft import Tuning
from lmlib.train import step as step_of

TOLERANCE, FLOOR = 2e-5, 1e-3
OF_UPDATES = 2e-4  # optimizers divide small numbers, and Muon iterates
DRAWS, MOVED = 8, 3e-6  # of experts that score alike, rounding chooses: batches to try, and how far weights are moved
SCALES = 1e-2, 1e2  # of the stream behind a block, at first
NEAR = 2.0  # nats: of the first loss, about that of guessing


@dataclasses.dataclass(frozen=True)
class Row:
  """What was checked, of what, and what came of it: how far it was off and how far it may be, or a yes or no.

  Neither, where something was not checked; `said` tells why, or more.
  """
  check: str
  of: str
  difference: float | None = None
  tolerance: float | None = None
  right: bool | None = None
  said: str = ''

  @property
  def checked(self) -> bool:
    return self.difference is not None or self.right is not None

  @property
  def fine(self) -> bool:
    return self.right is not False and (self.difference is None or self.difference <= self.tolerance)  # NaN is not

  def __str__(self):
    numbers = '' if self.difference is None else f'{self.difference:.1e} of {self.tolerance:.0e}'
    word = '' if not self.checked else 'ok' if self.fine else 'DIFFERS' if self.right is None else 'WRONG'
    return f'{self.check:<22} {self.of:<52} {numbers:>16}  {" ".join(filter(None, [word, self.said]))}'.rstrip()


@dataclasses.dataclass(frozen=True)
class Trained:
  """What a run trains and how: letters and shapes of its weights, and loss(params, batch, *frozen) of them.

  config: of the model; of(config, loss) makes (boxed, loss function) of it and a loss of train/losses.py; tuning: what
  beside the model is trained, if something is.
  """
  config: protocol.Config
  loss: Any
  of: Callable
  tuning: Tuning | None = None

  def replaced(self, **changes) -> 'Trained':
    return dataclasses.replace(self, **changes)

  @functools.cached_property
  def parts(self):
    return self.of(self.config, self.loss)

  @property
  def boxed(self):
    return self.parts[0]

  @property
  def function(self):
    return self.parts[1]

  @functools.cached_property
  def frozen(self) -> tuple:
    """What a step is given and does not change: the weights beside an adapter, on the host."""
    if self.tuning is None or self.tuning.adapter is None:
      return ()
    return (jax.device_get(jax.jit(protocol.new, static_argnums=0)(self.config, jax.random.key(2))),)

  def new(self, key):
    """New weights of what is trained."""
    if not self.frozen:
      return protocol.new(self.config, key)
    return adapters.new(self.tuning.adapter, protocol.boxed(self.config), *self.frozen, key)


def whole(config: protocol.Config, loss) -> Trained:
  """A run that trains all weights of a model."""
  return Trained(config, loss, lambda config, loss: (protocol.boxed(config), loss.of(config)))


def tuned(tuning: Tuning, loss) -> Trained:
  """A run of fine-tuning, on random weights in the place of those that it begins with."""

  def of(config, loss):
    here = dataclasses.replace(tuning, config=config)
    return here.boxed(), here.loss(loss)

  return Trained(tuning.config, loss, of, tuning)


def restarts(packing) -> bool:
  """Whether positions count anew in each document of a row, by a packing of data/packing.py or None."""
  return packing is not None and getattr(packing, 'restart', True)


@dataclasses.dataclass(frozen=True)
class Case:
  """A small run: what is trained, by which optimizer, on which batch."""
  trained: Trained
  batch: dict
  optimizer: Any
  layout: sharding.Layout

  @functools.cached_property
  def params(self):
    """Weights in no special place: a norm's scale is not 1, and no bias is 0."""
    new = jax.jit(self.trained.new)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(new)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x * (1 + 0.2 * jax.random.normal(k, x.shape)) + 0.02 * jax.random.normal(k, x.shape)
             for k, x in zip(keys, leaves)]
    return jax.device_get(jax.tree.unflatten(tree, moved))

  def gradients(self, trained: Trained | None = None, *, microbatches: int = 1, layout=None):
    """(gradients, metrics) of the batch, divided by its weight, on the host; of one device or by a layout."""
    trained = trained or self.trained

    def of(params, batch):
      places = None if layout is None else sharding.shardings(trained.boxed, 'gradients')
      grads, _, metrics = step_of.gradients(trained.function, params, batch, *trained.frozen,
                                            microbatches=microbatches, places=places)
      return grads, metrics

    return self.compiled(of, trained, layout)(self.params, self.batch)

  def compiled(self, function, trained: Trained, layout):
    """A function of weights and a batch that computes `function` and returns what is on the host then."""
    program = jax.jit(function)

    def run(params, batch):
      with used(layout):
        params = jax.device_put(params, sharding.shardings(trained.boxed))
        return jax.device_get(program(params, sharding.placer()(batch)))

    return run


@contextlib.contextmanager
def used(layout: sharding.Layout | None):
  """Inside, programs are laid out by `layout` over as many devices as it names, or by none on the first."""
  devices = jax.devices()[:1 if layout is None else math.prod(layout.sizes)]
  with sharding.use(layout or sharding.Layout(), devices):
    yield


def case(trained: Trained, objective, optimizer, layout: sharding.Layout, *, restart: bool = False,
         rows: int | None = None) -> Case:
  """The small run of a run, of so many rows or two a device; layout: a small one."""
  tokenizer = Bytes().train()
  objective = shrink.objective(objective, tokenizer.vocab)
  config = shrink.model(trained.config, layout, -(-objectives.vocabulary(objective, tokenizer.vocab) // 8) * 8)
  with used(layout):
    rows = rows or max(2, layout.stage) * sharding.batch_devices()
  draw = functools.partial(packed, objective, tokenizer, config.vocab, rows, config.length, restart)
  found = Case(trained.replaced(config=config), draw(0), optimizer, layout)
  if hasattr(config, 'experts'):
    loads = found.compiled(lambda params, batch: found.trained.function(params, batch, *found.trained.frozen)[2].get(
        'expert_load'), found.trained, None)
    clear = (batch for batch in map(draw, range(DRAWS)) if not _nearly_tied(found.params, batch, loads))
    found = dataclasses.replace(found, batch=next(clear, found.batch))
  return found


def _nearly_tied(params, batch, loads) -> bool:
  """Whether a token goes to another expert when weights move by a little: rounding might do that too."""
  random, sent = np.random.default_rng(0), []
  for size in (0, *(MOVED,) * 4):
    near = jax.tree.map(lambda x: x * (1 + size * random.standard_normal(x.shape)).astype(x.dtype), params)  # noqa: B023
    sent.append(loads(near, batch))
  return any(not np.array_equal(a, b) for other in sent[1:]
             for a, b in zip(jax.tree.leaves(sent[0]), jax.tree.leaves(other)))


def packed(objective, tokenizer, vocab: int, rows: int, length: int, restart: bool, seed: int = 0) -> dict:
  """A batch of rows of two or three documents of random tokens, and what an objective makes of them."""
  random, T = np.random.default_rng(seed), objective.raw(length)
  ids_BT = random.integers(tokenizer.eos + 1, tokenizer.vocab, (rows, T + objective.ahead + 1), dtype=np.int32)
  ends_BT = np.zeros(ids_BT.shape, bool)
  for b in range(rows):
    ends_BT[b, random.choice(np.arange(3, T - 2), 1 + b % 2, replace=False)] = True
  segments_BT = np.cumsum(ends_BT, 1, dtype=np.int32) + 1
  following = tuple(ids_BT[:, j:T + j] for j in range(1, objective.ahead + 1))
  alive = tuple(segments_BT[:, j:T + j] == segments_BT[:, :T] for j in range(1, objective.ahead + 1))
  numbers_B = np.arange(rows, dtype=np.int64)
  raw = Raw(ids_BT[:, :T], following, alive, segments_BT[:, :T], restart, numbers_B)
  batch = objective.of(tokenizer, vocab, length)(raw, order.row_keys(numbers_B, seed=0, stream='verify'))
  return batch | {'row_B': numbers_B.astype(np.uint32)}


def checks(case: Case) -> Iterator[Row]:
  """Every check, a row as soon as it is done."""
  one = case.gradients()
  yield from of_layout(case, one)
  yield from terms(case, one[0])
  yield from accumulated(case, one)
  yield from unrolled(case, one)
  yield from first(case)


def of_layout(case: Case, one) -> Iterator[Row]:
  """The checks that are of the layout; one: the gradients of one device."""
  yield from against('layout = one device', one, case.gradients(layout=case.layout))
  yield from optimizers(case, one[0])
  yield from leaks(case)


def against(check: str, expected, found) -> Iterator[Row]:
  """Losses, then every gradient."""
  for name, value in expected[1].items():
    if name in ('loss', 'auxiliary') or name.startswith('nats'):
      off = abs(float(found[1][name]) - float(value)) / max(abs(float(value)), 1e-3)
      yield Row(check, name, off, TOLERANCE)
  yield from tensors(check, 'gradient of', expected[0], found[0], TOLERANCE)


def tensors(check: str, what: str, expected, found, tolerance: float) -> Iterator[Row]:
  """Every tensor of two trees, by the norm of its difference."""
  expected, found = trees.flat(expected), trees.flat(found)
  norms = {name: float(np.linalg.norm(np.asarray(x, np.float64))) for name, x in expected.items()}
  felt = [norm for name, norm in norms.items() if not name.endswith(BALANCE)]  # which is an error of load
  typical = FLOOR * math.sqrt(sum(norm**2 for norm in felt) / len(felt))
  for name, x in expected.items():
    off = float(np.linalg.norm(np.asarray(found[name], np.float64) - np.asarray(x, np.float64)))
    yield Row(check, f'{what} {name}', off / max(norms[name], typical, 1e-30), tolerance)


def optimizers(case: Case, gradients) -> Iterator[Row]:
  """Two updates of the same gradients, so that what an optimizer keeps is read too."""
  boxed = case.trained.boxed
  optimizer = case.optimizer.transformation(sharding.letters(boxed), 10**6)

  def updates(layout):
    with used(layout):
      shapes = step_of.shapes_of(boxed, optimizer)
      state = step_of.begun(case.params, optimizer, shapes)
      grads = jax.device_put(gradients, sharding.shardings(boxed))
      kept = jax.tree.map(lambda x: x.sharding, shapes.optimizer)
      near = lambda grads, state, params: optimizer.update(grads, sharding.near(state), params)
      update = jax.jit(near, out_shardings=(sharding.replicated(), kept))
      return jax.device_get(update(grads, update(grads, state.optimizer, state.params)[1], state.params)[0])

  yield from tensors('optimizer', 'update of', updates(None), updates(case.layout), OF_UPDATES)


def leaks(case: Case) -> Iterator[Row]:
  """What one document of a row learns does not depend on another's tokens, by the layout's program."""
  check, trained = 'packed documents', case.trained
  router = getattr(getattr(trained.config, 'experts', None), 'router', None)
  if router is not None and not router.causal:
    yield Row(check, type(router).__name__, said='not checked: whom an expert takes depends on the whole row')
    return
  if getattr(router, 'capacity', None) is not None:
    yield Row(check, 'capacity of experts', said='left out here: earlier documents of a row take room from later ones')
    router = dataclasses.replace(router, capacity=None)
    trained = trained.replaced(config=dataclasses.replace(
        trained.config, experts=dataclasses.replace(trained.config.experts, router=router)))
  segments_BT, vocab = case.batch['segments_BT'], trained.config.vocab
  last_B1 = segments_BT.max(1, keepdims=True)

  program = case.compiled(functools.partial(_nats, trained), trained, case.layout)

  def moved(number_B1, apart: bool = True):
    """The share by which the cross-entropy of one document a row changes when the tokens of all others do."""
    batch = dict(case.batch)
    for name in [name for name in batch if name.startswith('weight_')]:
      here_BT = segments_BT == number_B1
      batch[name] = batch[name] * (here_BT if batch[name].ndim == 2 else here_BT[..., None])
    other = dict(batch)
    for tokens, segments in (('tokens_BT', 'segments_BT'), ('inputs_BS', 'input_segments_BS')):
      if tokens in batch:
        other[tokens] = np.where(batch[segments] != number_B1, (batch[tokens] + 1) % vocab, batch[tokens])
        if not apart:
          batch[segments] = other[segments] = (batch[segments] > 0).astype(np.int32)
    before, after = program(case.params, batch), program(case.params, other)
    return abs(float(after) - float(before)) / abs(float(before))

  yield Row(check, 'the first, others changed', moved(np.ones_like(last_B1)), 1e-6)
  yield Row(check, 'the last, others changed', moved(last_B1), 1e-6)
  seen = moved(last_B1, apart=False)
  yield Row(check, 'would be seen in one document', right=seen > 1e-5, said=f'a share of {seen:.0e}')


def _nats(trained: Trained, params, batch):
  _, weight, metrics = trained.function(params, batch, *trained.frozen)
  return metrics['nats'] / weight


def terms(case: Case, one) -> Iterator[Row]:
  """Every term of the loss has a gradient: the batch's is another without it. And which weights none reaches."""
  trained = case.trained
  terms = {name: other for name, other in (
      ('z_loss', _without(trained.loss, 'z_loss')), ('weight', _without(trained.loss, 'weight', 1e-9))) if other}
  alone = trained
  for name, loss in terms.items():
    other = trained.replaced(loss=loss)
    yield _reached(f'{type(trained.loss).__name__}.{name}', jax.tree.map(np.subtract, one, case.gradients(other)[0]))
    alone = alone.replaced(loss=dataclasses.replace(alone.loss, **{name: getattr(loss, name)}))
  experts = getattr(trained.config, 'experts', None)
  for name in ('balance_loss', 'z_loss'):
    if router := _without(getattr(experts, 'router', None), name):
      config = dataclasses.replace(trained.config, experts=dataclasses.replace(experts, router=router))
      grads = case.gradients(trained.replaced(config=config))[0]
      yield _reached(f'{type(router).__name__}.{name}', jax.tree.map(np.subtract, one, grads))
  yield _reached('cross-entropy', case.gradients(alone)[0])
  for name, x in trees.flat(one).items():
    if not np.any(x):
      yield Row('terms of the loss', name, said='no loss of this run reaches it')


def _without(settings, name: str, nothing=None):
  """The settings with one of them turned off; None where it is off or there is none."""
  value = getattr(settings, name, None)
  if value is None:
    return None
  changed = {name: nothing} | ({'balance_over': 'row'} if name == 'balance_loss' else {})
  return dataclasses.replace(settings, **changed)


def _reached(name: str, grads) -> Row:
  norm = math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in jax.tree.leaves(grads)))
  return Row('terms of the loss', name, right=norm > 0, said=f'gradient {norm:.1e}')


def accumulated(case: Case, one) -> Iterator[Row]:
  """A batch in two halves, one after the other, is the batch."""
  router = getattr(getattr(case.trained.config, 'experts', None), 'router', None)
  if getattr(router, 'balance_over', None) == 'batch':
    yield Row('microbatches', 'router', said="not checked: balance_over='batch' is of a microbatch")
    return
  yield from _worst(against('microbatches', one, case.gradients(microbatches=2)))


def unrolled(case: Case, one) -> Iterator[Row]:
  """Layers in a loop or one after the other, with and without remat."""
  config = case.trained.config
  for name, value in (('scan', not config.execution.scan), ('remat', None if config.execution.remat else 'full')):
    other = dataclasses.replace(config, execution=dataclasses.replace(config.execution, **{name: value}))
    yield from _worst(against(f'{name}={value!r}', one, case.gradients(case.trained.replaced(config=other))))


def _worst(rows) -> Iterator[Row]:
  """Of many rows the ones that differ; if there are none, the worst in place of all."""
  rows = list(rows)
  if all(row.fine for row in rows):
    worst = max(rows, key=lambda row: row.difference)
    rows = [dataclasses.replace(worst, of=f'the worst of {len(rows)}', said=worst.of)]
  yield from rows


def first(case: Case) -> Iterator[Row]:
  """New weights: how large the stream is behind the first and the last block, and the first loss."""
  trained, config = case.trained, case.trained.config
  check, params = 'new weights', jax.device_get(jax.jit(protocol.new, static_argnums=0)(config, jax.random.key(0)))
  for name, sizes_L in streams(trained, params, case.batch).items():
    for which, size in (('first', sizes_L[0]), ('last', sizes_L[-1])):
      yield Row(check, f'{name}, {which} of {len(sizes_L)}', right=SCALES[0] <= size <= SCALES[1],
                said=f'root mean square {size:.2g}')
  if trained.frozen:
    return
  nats = case.compiled(functools.partial(_nats, trained), trained, None)(params, case.batch)
  guessed = math.log(config.vocab)
  yield Row(check, f'loss - log({config.vocab})', abs(float(nats) - guessed), NEAR, said=f'{nats:.3f} nats')


def streams(trained: Trained, params, batch) -> dict[str, list[float]]:
  """By stack of blocks, the root mean square of the stream behind each of its layers, where there is something."""
  model = trained.config.model()
  blocks = lambda module, method: method == '__call__' and (module.name or '').endswith('blocks')
  given = [batch['tokens_BT'], batch['segments_BT']]
  inputs = {'inputs_BS': batch['inputs_BS'], 'input_segments_BS': batch['input_segments_BS']} if (
      'inputs_BS' in batch) else {}
  _, kept = model.apply({'params': params}, *given, **inputs, method='hidden', capture_intermediates=blocks,
                        mutable=['intermediates'])
  found = {}
  for name, leaf in trees.flat(kept['intermediates']).items():
    stack = name.partition('/__call__')[0]
    if stack not in found and leaf.ndim == 4:  # LBTD: the stream comes before what a block keeps
      found[stack] = [float(x) for x in np.sqrt(np.square(np.asarray(leaf, np.float64)).mean((1, 2, 3)))]
  return found
