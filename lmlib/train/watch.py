"""What a run looks out for while it trains: one setting, and what comes of it."""
from collections.abc import Callable
import contextlib
import dataclasses
import pathlib

from lmlib.train import layers
from lmlib.train.goodput import Ledger
from lmlib.train.hang import Hang, Watchdog
from lmlib.train.hosts import Hosts, Stragglers
from lmlib.train.spikes import Events, Numbers, Order, Spikes
from lmlib.train.traces import Profile, Traces


@dataclasses.dataclass(frozen=True)
class Watch:
  """What is looked out for. Nothing of it changes what is computed, but for spikes, after which a run goes back.

  spikes: leaps of the loss (spikes.py); hang: that nothing moves any more (hang.py); profile: steps to trace
  (traces.py); stragglers: slow processes among several (hosts.py). None is off.
  """
  spikes: Spikes | None = None
  hang: Hang | None = Hang()
  profile: Profile | None = Profile()
  stragglers: Stragglers | None = Stragglers()


class Watching:
  """A Watch over one pass of the loop, which tells it of every step; a context manager.

  Raises spikes.Spike or health.RunFault from after(). All processes call every method.
  """

  def __init__(self, watch: Watch, course, *, folder: pathlib.Path, order: Order, record, ledger: Ledger,
               say: Callable[[str], None]):
    """course: what is trained (training.Course); record: the metrics.Record of this pass."""
    self._watch, self._course, self._order, self._events = watch, course, order, Events(folder)
    self._record, self._ledger = record, ledger
    describe = lambda step: course.batches.describe(order.index(step - 1))
    self._numbers = Numbers(watch.spikes, record.before, describe=describe, say=say)
    self._dog = watch.hang and Watchdog(watch.hang, folder)
    self._traces = watch.profile and Traces(watch.profile, folder, say)
    self._hosts = watch.stragglers and Hosts(watch.stragglers, say)
    self._open = contextlib.ExitStack()

  def before(self, number: int):
    """Step `number` is about to begin; its batch is there."""
    if self._dog:
      self._dog.step(number)
    if self._traces:
      self._traces.before(number)

  def after(self, line: dict, state):
    """A step is written down as `line`; `state` is that of now, a step later or of this one."""
    self._ledger.stepped(line)
    if self._dog:
      self._dog.took(line['seconds'])
    if self._traces:
      self._traces.after(line['step'])
    if self._hosts and (found := self._hosts.after(line)):
      self._record.evaluated(line['step'], found)
    self._numbers.see(line, lambda why: self._note(line, state, why))

  @contextlib.contextmanager
  def during(self, cause: str, number: int):
    """Around what is no step, after step `number`: 'saving' or 'evaluating'."""
    elsewhere = self._dog.elsewhere(f'{cause} after step {number}') if self._dog else contextlib.nullcontext()
    with elsewhere, self._ledger.during(cause):
      yield
    self._record.evaluated(number, {'goodput': self._ledger.share()})

  def __enter__(self) -> 'Watching':
    if self._traces:
      self._open.callback(self._traces.close)
    if self._dog:
      self._open.enter_context(self._dog)
    return self

  def __exit__(self, *_):
    self._open.close()

  def _note(self, line: dict, state, why: str):
    """Of a step that changed nothing: what it read and, with Spikes, norms of its layers with the weights of now."""
    index, course = self._order.index(line['step'] - 1), self._course
    event = {'step': line['step'], 'batch': index, 'why': why, 'left_out': [], 'rollback': None,
             'recorded': recorded(line), 'documents': course.batches.describe(index)}
    if self._watch.spikes:
      _, found = course.layers(state, course.batch(index), *course.frozen)
      event |= {'weights_after_step': int(state.step), 'layers': layers.plain(found)}
    self._events.write(event)


def recorded(line: dict) -> dict:
  """What a line of metrics.jsonl says of how a step went."""
  return {name: line[name] for name in ('loss', 'grad_norm', 'update_norm', 'finite', 'data') if name in line}
