"""Whether the real sizes of a run fit each other: its model, its batch and its layout, whose devices need not be here.

verify.py computes a small copy, whose sizes are chosen so that they fit. Here nothing is small and nothing computed:
what a run refuses as it begins is asked by the same functions, on a mesh without devices, and its loss is traced, by
shapes alone, for what only a layer refuses.
"""
import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax

from lmlib import fitting, sharding, trees
from lmlib.data.tokenizer import Bytes
from lmlib.models import protocol
from lmlib.plan import shrink
from lmlib.plan.verify import Row, Trained, packed
from lmlib.sharding import MESH_AXES, Layout
from lmlib.train import loop
from lmlib.train import step as step_of

CHECK = 'real sizes'
ELSEWHERE = 'hopper', 'cudnn'  # attention that a CPU refuses; traced as 'auto', but for rows that go round a ring


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What of a run must fit: what it trains, by which objective, in which layout, and its numbers."""
  trained: Trained
  objective: Any
  layout: Layout
  batch: int
  length: int
  microbatches: int = 1

  @property
  def rows(self) -> int:
    """Rows of a microbatch."""
    return self.batch // self.microbatches

  def numbers(self):
    """ValueError if the run's numbers do not fit each other or the layout in use."""
    loop.check(batch=self.batch, microbatches=self.microbatches, length=self.length, longest=self.trained.config.length,
               seed=0)

  def weights(self):
    """ValueError if the layout in use does not fit the model's weights, as a run asks: some a layer refuses itself."""
    fitting.check(protocol.boxed(self.trained.config))

  def microbatch(self) -> dict:
    """Shapes and types of the arrays of a microbatch."""
    tokenizer = Bytes().train()
    objective = shrink.objective(self.objective, tokenizer.vocab)
    row = packed(objective, tokenizer, self.trained.config.vocab, 1, self.length, restart=True)
    return {name: jax.ShapeDtypeStruct((self.rows, *x.shape[1:]), x.dtype) for name, x in row.items()}

  def loss(self, boxed):
    """ValueError if a layer or the loss refuses a microbatch in the layout in use; boxed: the model's."""
    trained = self.trained
    execution = trained.config.execution
    if execution.attention in ELSEWHERE and sharding.size('context') == 1:
      execution = dataclasses.replace(execution, attention='auto')
      trained = trained.replaced(config=dataclasses.replace(trained.config, execution=execution))
    frozen = () if boxed is self.trained.boxed else (nn.unbox(boxed),)
    jax.eval_shape(trained.function, nn.unbox(trained.boxed), self.microbatch(), *frozen)


def checks(sizes: Sizes) -> list[Row]:
  """A row for all that fits or does not, with the line that the run would end with."""
  numbers = f'batch={sizes.batch}, microbatches={sizes.microbatches}, length={sizes.length}'
  if why := refused(sizes.numbers):  # on one device too
    return [Row(CHECK, numbers, right=False, said=why)]
  if why := refused(lambda: sizes.trained.parts):
    return [Row(CHECK, type(sizes.trained.loss).__name__, right=False, said=why)]
  layout, tuning = sizes.layout, sizes.trained.tuning
  alone = tuning is None or tuning.adapter is None
  boxed = sizes.trained.boxed if alone else protocol.boxed(sizes.trained.config)
  able = devices(sizes, boxed)
  least = layout.slices if getattr(layout, layout.across) == -1 else 1
  count = max(able, default=least * math.prod(size for size in layout.sizes if size > 0))
  of = f'{layout} on {count} device{"s" * (count > 1)}'
  if why := refused(lambda: layout.mesh(count)):
    return [Row(CHECK, of, right=False, said=why)]
  said = f'fits {", ".join(map(str, able))} devices' if able and -1 in layout.sizes else ''
  rows = [Row(CHECK, of, right=True, said=said)]
  with sharding.use(layout, count):
    asked = {numbers: sizes.numbers, f'{trees.count(boxed):,} weights': sizes.weights}
    rows += [Row(CHECK, name, right=not (why := refused(function)), said=why) for name, function in asked.items()]
    if all(row.fine for row in rows):
      why = refused(lambda: sizes.loss(boxed))
      rows.append(Row(CHECK, f'{type(sizes.trained.loss).__name__} of {sizes.rows} rows, traced', right=not why,
                      said=why))
      told = step_of.told(boxed, sizes.rows), answers(sizes)
      rows += [Row(CHECK, 'layout', said='; '.join(filter(None, told)))] if any(told) else []
  return rows


def answers(sizes: Sizes) -> str:
  """What the layout in use leaves whole of what a decoder writes of its own length, for a report; '' if nothing."""
  if (T := sizes.microbatch()['tokens_BT'].shape[1]) == sizes.length or not T % sharding.size('context'):
    return ''
  return f'context={sharding.size("context")}: rows of {T} tokens of the decoder stay whole'


def devices(sizes: Sizes, boxed) -> list[int]:
  """Numbers of devices that fit a run, ascending: those that a layout names, or all that a size of -1 may mean."""
  layout, config = sizes.layout, sizes.trained.config
  fixed = math.prod(size for size in layout.sizes if size > 0)
  if -1 not in layout.sizes:
    return [fixed]
  axis = MESH_AXES[layout.sizes.index(-1)]
  divided = {'context': sizes.length, 'tensor': config.heads,
             'stage': config.layers - getattr(config, 'dense_layers', 0)}.get(axis, sizes.rows)

  def fit(count: int):
    with sharding.use(layout, count):
      sizes.numbers()
      fitting.check(boxed)
      if layout.pipeline.rounds > 1:
        sizes.weights()  # whose stacks know whether rounds divide them

  return [fixed * n for n in range(1, divided + 1) if divided % n == 0 and not refused(lambda: fit(fixed * n))]  # noqa: B023


def refused(function) -> str:
  """The line of the ValueError that function() raises; '' if it raises none."""
  try:
    function()
  except ValueError as error:
    return ' '.join(str(error).split())
  return ''
