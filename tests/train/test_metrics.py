"""What a run writes down stands there once, whole, and as JSON."""
import contextlib
import io
import json
import math
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lmlib.train import metrics

FLOPS = SimpleNamespace(exact=200.0, six_nd=100.0)


class Screen(io.StringIO):

  def __init__(self, terminal: bool):
    super().__init__()
    self.isatty = lambda: terminal


def record(folder, *, start=0, steps=100, peak=1000.0, screen=None):
  return metrics.Record(folder, start=start, steps=steps, flops=FLOPS, peak=peak,
                        live=metrics.Live(screen or Screen(False)))


def values(loss=2.0, finite=1.0):
  return {'loss': loss, 'nats': loss, 'finite': finite, 'weight': 10.0}


def written(folder, numbers, **options):
  opened = record(folder, **options)
  for step in numbers:
    opened.write(step, values(), seconds=2.0)
  opened.close()


def test_a_line_holds_speed_and_utilisation(tmp_path):
  written(tmp_path, [1, 2])
  first, second = metrics.read(tmp_path / 'metrics.jsonl')
  assert (first['tokens'], second['tokens']) == (10, 20)
  assert (first['tokens_per_second'], first['seconds']) == (5.0, 2.0)
  assert (first['mfu'], first['mfu_6nd']) == (1.0, 0.5)  # 200 and 100 FLOPs x 5 tokens/s of 1000 FLOP/s
  assert 'weight' not in first
  assert first['memory_bytes'] > 1 << 20


def test_tokens_are_those_that_were_read(tmp_path):
  """Of 10 that counted, with 7 read for each of them."""
  opened = record(tmp_path)
  opened.write(1, values() | {'read': 7.0}, seconds=2.0)
  opened.close()
  line, = metrics.read(tmp_path / 'metrics.jsonl')
  assert (line['tokens'], line['tokens_per_second'], line['mfu']) == (70, 35.0, 7.0)
  assert not {'read', 'weight'} & line.keys()


def test_more_than_a_peak_is_no_utilisation():
  """A CPU's peak is measured as the run begins; beside other programs it comes out too low."""
  assert metrics.utilisation(0.2618) == 'MFU 26.2%'
  assert metrics.utilisation(1.0, 0) == 'MFU 100%'
  screen = Screen(False)
  metrics.Live(screen).show(1, 9, {'loss': 1.0, 'tokens_per_second': 5.0, 'mfu': 1.3}, 3.0)
  assert 'MFU unknown (faster than the peak that was taken)' in screen.getvalue()
  assert '130' not in screen.getvalue()


def test_without_a_known_peak_there_is_no_utilisation(tmp_path):
  written(tmp_path, [1], peak=None)
  assert 'mfu' not in metrics.read(tmp_path / 'metrics.jsonl')[0]


def test_what_is_not_finite_is_null(tmp_path):
  opened = record(tmp_path)
  opened.write(1, values(loss=math.nan, finite=0.0), seconds=1.0)
  opened.write(2, values(loss=math.inf, finite=0.0), seconds=1.0)
  opened.close()

  def no_constant(name):
    raise AssertionError(name)

  lines = [json.loads(line, parse_constant=no_constant)
           for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [line['loss'] for line in lines] == [None, None]


@pytest.mark.parametrize('torn', [b'', b'{"step": 99, "lo', b'{"step": 99}', b'\0\0\0\0\n{"step": 99}\n'])
def test_resumed_every_step_stands_there_once(tmp_path, torn):
  written(tmp_path, range(1, 9))
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes() + torn)
  assert len(metrics.read(path)) == 8
  written(tmp_path, range(6, 11), start=5)
  lines = metrics.read(path)
  assert [line['step'] for line in lines] == list(range(1, 11))
  assert [line['tokens'] for line in lines] == list(range(10, 101, 10))


def test_the_lines_before_a_resumption_are_there(tmp_path):
  written(tmp_path, range(1, 9))
  for start in (8, 6, 0):
    with contextlib.closing(record(tmp_path, start=start)) as opened:
      assert [line['step'] for line in opened.before] == list(range(1, start + 1))


def events(folder):
  """The events of all files, in the order of writing: records of length, checksum, event, checksum."""
  for path in sorted((folder / 'tensorboard').iterdir(), key=lambda path: path.stat().st_mtime_ns):
    raw = path.read_bytes()
    while raw:
      size = int.from_bytes(raw[:8], 'little')
      yield Event.FromString(raw[12:12 + size])
      raw = raw[16 + size:]


def test_tensorboard_gets_the_same_figures_and_forgets_what_was_run_again(tmp_path):
  written(tmp_path, [1, 2, 3])
  written(tmp_path, [3, 4], start=2)  # within the same second: a file of its own
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 2
  found = list(events(tmp_path))
  assert [e.step for e in found if e.HasField('summary')] == [1, 2, 3, 3, 4]
  assert [e.step for e in found if e.session_log.status == SessionLog.START] == [3]
  scalars = {value.tag: value.simple_value for value in found[1].summary.value}
  assert (scalars['loss'], scalars['tokens_per_second'], scalars['tokens']) == (2.0, 5.0, 10.0)


def test_a_terminal_shows_one_line_and_other_outputs_a_line_now_and_then(tmp_path):
  terminal, plain = Screen(True), Screen(False)
  written(tmp_path, range(1, 46), steps=45, screen=terminal)
  assert terminal.getvalue().count('\r') == 45
  assert terminal.getvalue().count('\n') == 1  # when it ends
  written(tmp_path, range(1, 46), steps=45, screen=plain)
  lines = plain.getvalue().splitlines()
  assert [line.split()[1] for line in lines] == ['1/45', '20/45', '40/45', '45/45']
  assert lines[1] == 'step 20/45  loss 2.0000  5 tokens/s  MFU 100.0%  0:50 left'
  assert '\r' not in plain.getvalue()


def test_what_is_said_stands_on_its_own_line_above_the_live_one():
  screen = Screen(True)
  live = metrics.Live(screen)
  live.say('one')
  live.show(1, 9, {'loss': 1.0, 'tokens_per_second': 5.0}, 3.0)
  live.say('two')
  live.end()
  assert screen.getvalue() == 'one\n\rstep 1/9  loss 1.0000  5 tokens/s  0:03 left\x1b[K\ntwo\n'


@pytest.mark.parametrize(('seconds', 'text'), [(0, '0:00'), (12, '0:12'), (59.6, '1:00'), (3725, '1:02:05')])
def test_clock(seconds, text):
  assert metrics.clock(seconds) == text
