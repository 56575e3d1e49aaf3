"""A step of a run done once more, from the checkpoint before it: the same numbers, and what every layer did."""
import dataclasses
import pathlib

from lmlib.train import layers, metrics
from lmlib.train.checkpoint import restore_state
from lmlib.train.spikes import Events
from lmlib.train.training import Course

COMPARED = 'loss', 'grad_norm', 'update_norm', 'param_norm'


@dataclasses.dataclass(frozen=True)
class Difference:
  """A number of a step that metrics.jsonl has otherwise."""
  step: int
  name: str
  recorded: float
  replayed: float

  def __str__(self):
    return f'step {self.step}: {self.name} {self.replayed:.9g}, recorded {self.recorded:.9g}'


@dataclasses.dataclass(frozen=True)
class Replayed:
  """A step, the index of its batch and what was in it; its metrics, and norms by weight as layers.plain has them."""
  step: int
  batch: int
  begin: int  # the step of the checkpoint
  documents: list[str]
  values: dict[str, float]
  layers: dict[str, dict[str, float]]
  compared: int  # steps that metrics.jsonl has, of those replayed
  differences: tuple[Difference, ...]


def replay(course: Course, folder: pathlib.Path, step: int, *, batch: int | None = None, say=print) -> Replayed:
  """Does the steps from the last checkpoint before `step` up to it again. Nothing in `folder` is changed.

  batch: the index of another batch for `step`, such as one that was left out. ValueError if there is no checkpoint
  before `step`.
  """
  order = Events(folder).order()
  state, begin, _ = restore_state(folder / 'checkpoints', course.shapes, newest=step - 1, say=say)
  known = {line['step']: line for line in metrics.read(folder / 'metrics.jsonl')}
  found, compared = [], []

  def seen(number: int, values):
    values = layers.plain({name: values[name] for name in (*COMPARED, 'finite')})
    if (line := known.get(number)) is not None:
      compared.append(number)
      found.extend(Difference(number, name, line[name], values[name]) for name in COMPARED
                   if metrics.finite(values[name]) != line[name])
    return values

  state = course.upto(state, step - 1, order, seen)
  index = order.index(step - 1) if batch is None else batch
  given = course.batch(index)
  _, norms = course.layers(state, given, *course.frozen)
  norms = layers.plain(norms)
  _, values = course.step(state, given)
  if index == order.index(step - 1):
    values = seen(step, values)
  else:
    values = layers.plain({name: values[name] for name in (*COMPARED, 'finite')})
  return Replayed(step, index, begin, course.batches.describe(index), values, norms, len(compared), tuple(found))
