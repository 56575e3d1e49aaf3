"""What a run looks out for while it trains."""
from collections.abc import Callable
import dataclasses

from lmlib.train import layers
from lmlib.train.spikes import Events, Numbers, Order, Spikes


@dataclasses.dataclass(frozen=True)
class Watch:
  """What is looked out for. `spikes`: leaps of the loss (spikes.py)."""
  spikes: Spikes | None = None


class Watching:
  """A Watch over one pass of the loop, which tells it of every step. May raise spikes.Spike or health.RunFault."""

  def __init__(self, watch: Watch, course, *, order: Order, events: Events, record, say: Callable[[str], None]):
    """course: what is trained (training.Course); record: the metrics.Record of this pass."""
    self._watch, self._course, self._order, self._events = watch, course, order, events
    describe = lambda step: course.batches.describe(order.index(step - 1))
    self._numbers = Numbers(watch.spikes, record.before, describe=describe, say=say)

  def after(self, line: dict, state):
    """A step is written down as `line`; `state` is that of now, a step later or of this one."""
    self._numbers.see(line, lambda why: self._note(line, state, why))

  def _note(self, line: dict, state, why: str):
    """Of a step that changed nothing: what it read and, with Spikes, norms of its layers with the weights of now."""
    index, course = self._order.index(line['step'] - 1), self._course
    event = {'step': line['step'], 'batch': index, 'why': why, 'left_out': [], 'back_to': None,
             'recorded': recorded(line), 'documents': course.batches.describe(index)}
    if self._watch.spikes:
      _, found = course.layers(state, course.batch(index), *course.frozen)
      event |= {'weights_after_step': int(state.step), 'layers': layers.plain(found)}
    self._events.write(event)


def recorded(line: dict) -> dict:
  """What a line of metrics.jsonl says of how a step went."""
  return {name: line[name] for name in ('loss', 'grad_norm', 'update_norm', 'finite', 'data') if name in line}
