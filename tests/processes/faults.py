"""What several real processes do when something goes wrong: minutes, so `pytest tests/processes/faults.py` by name.

The default run of the tests has two processes (test_two.py) and the wire between them (tests/test_wire.py).
"""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lmlib.train.spikes import Events
from tests.experiments import test_sft
from tests.experiments.conftest import Command, texts  # noqa: F401, a fixture
from tests.experiments.test_evaluate import EVALUATED, QUESTIONS
from tests.post import small
from tests.processes import soak
from tests.processes.running import ROOT, Tiny
from tests.train import courses


@pytest.fixture
def tiny(tmp_path):
  return Tiny(tmp_path)


@pytest.fixture(scope='module')
def alone(tmp_path_factory) -> list[float]:
  """The losses of a run in one process, on one device."""
  folder = tmp_path_factory.mktemp('alone') / 'run'
  courses.run(folder, courses.Rows())
  return courses.losses_of(folder)


def layout(**sizes) -> list[str]:
  return [f'sharding.Layout.{name} = {size}' for name, size in ({'data': 1} | sizes).items()]


def good(found):
  for status, _, err in found:
    assert (status, err) == (0, '')


def test_a_run_goes_on_in_other_processes_on_other_meshes(tiny, alone):
  """Weights split over four; over two, with layers one after the other; rows cut in two; then one process."""
  good(tiny.run(4, 'tiny.main.steps = 8', *layout(fsdp=4)))
  good(tiny.run(2, 'tiny.main.steps = 14', *layout(fsdp=2, tensor=2), 'tiny.main.scan = False', devices=2))
  good(tiny.run(2, 'tiny.main.steps = 19', *layout(data=2, context=2), devices=2))
  courses.run(tiny.workdir, courses.Rows())
  assert tiny.losses == pytest.approx(alone, abs=1e-5)
  assert len(set(tiny.data)) == courses.STEPS


@pytest.mark.parametrize('who', [0, 2])
def test_a_disk_that_is_full_for_one_is_one_line_and_nothing_is_lost(tiny, alone, who):
  found = tiny.run(3, "tiny.main.fault = 'full'", f'tiny.main.who = {who}', 'tiny.main.at = 8', *layout(data=-1))
  assert [status for status, *_ in found] == [1] * 3
  line = found[0][2].splitlines()[-1]
  assert 'File too large' in line, found
  assert found[1][2] == ''
  good(tiny.run(3, *layout(data=-1)))
  assert tiny.losses == pytest.approx(alone, abs=1e-5)


def test_a_folder_that_has_vanished_is_one_line(tiny):
  found = tiny.run(2, "tiny.main.fault = 'gone'", *layout(data=-1))
  assert [status for status, *_ in found] == [1, 1]
  folder = tiny.workdir / 'checkpoints'
  assert found[0][2] == (f'checkpoint of step 10 could not be written to {folder}/10: the folder has vanished; '
                         'there is no earlier one\n')
  assert not folder.exists()


def test_a_fault_beside_a_save_that_the_others_do_not_end_is_one_line(tiny):
  """Process 0 waits for 1 in a step, and process 1, on its way out, for process 0 to end its save."""
  found = tiny.run(2, "tiny.main.fault = 'held'", *layout(data=-1))
  assert [status for status, *_ in found] == [2, 2]
  assert found[0][2] == 'process 1: bad thing=3\n'


def test_an_altered_array_is_set_aside_by_all(tiny, alone):
  good(tiny.run(2, 'tiny.main.steps = 12', *layout(data=-1)))
  assert {'10', '12'} <= set(tiny.checkpoints())
  largest = max((tiny.workdir / 'checkpoints' / '12').rglob('d/*'), key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  found = tiny.run(2, *layout(data=-1))
  good(found)
  assert 'checkpoint of step 12 is damaged' in found[0][1]
  assert 'begin at 10' in found[0][1]
  assert '12.damaged' in tiny.checkpoints()
  assert tiny.losses == pytest.approx(alone, abs=1e-5)


WATCHED = 'tiny.main.watch = @watch.Watch()'


def test_a_spike_sends_all_back_and_the_run_ends_as_if_its_batch_had_never_been(tiny, tmp_path):
  spikes = WATCHED, 'watch.Watch.spikes = @spikes.Spikes()', 'spikes.Spikes.window = 6', 'tiny.main.poisoned = (16,)'
  found = tiny.run(2, *spikes, *layout(fsdp=2))
  good(found)
  assert 'going on from the checkpoint of step 15 without the batch 16 (time 1 of at most 8)' in found[0][1]
  assert found[1][1] == ''
  event, = Events(tiny.workdir).read()
  assert (event['step'], event['left_out'], event['documents']) == (17, [16], ['rows of 16'])
  courses.run(tmp_path / 'never', courses.Rows(gone=[16]))
  assert tiny.losses == pytest.approx(courses.losses_of(tmp_path / 'never'), abs=1e-5)


def test_a_process_that_is_stuck_ends_all_with_its_stacks(tiny):
  """Process 1 waits for its data for ever, process 0 for process 1."""
  hang = WATCHED, 'watch.Watch.hang = @hang.Hang()', 'hang.Hang.least = 2.0'
  found = tiny.run(2, "tiny.main.fault = 'stuck'", *hang, *layout(data=-1))
  assert [status for status, *_ in found] == [1, 1]
  last = found[0][2].splitlines()[-1]
  assert 'hangs: nothing has moved for 2 s' in last
  assert 'in stuck' in (tiny.workdir / 'stacks_1.txt').read_text()
  good(tiny.run(2, *layout(data=-1)))
  assert len(set(tiny.data)) == courses.STEPS


def test_a_process_that_waits_for_its_data_is_named(tiny):
  stragglers = WATCHED, 'watch.Watch.stragglers = @hosts.Stragglers()', 'hosts.Stragglers.every = 6'
  found = tiny.run(3, "tiny.main.fault = 'slow'", *stragglers, *layout(data=-1))
  good(found)
  lines = [line for line in found[0][1].splitlines() if 'a step for its data' in line]
  assert [line.partition(' waits ')[0] for line in lines] == [
      f'step {step}: process 1' for step in (12, 18, 24)]


@pytest.mark.parametrize('who', [0, 1])
def test_survivors_of_a_killed_process_end_within_half_a_minute_with_one_line(tiny, who):
  processes = tiny.start(3, "tiny.main.fault = 'kill'", f'tiny.main.who = {who}', *layout(data=-1))
  assert processes[who].wait(240) == -signal.SIGKILL
  start = time.monotonic()
  found = [process.communicate(timeout=60) for process in processes]
  assert time.monotonic() - start < 30
  survivor = 0 if who else 1
  if who == 0 and processes[survivor].returncode == -signal.SIGABRT:
    return  # jax's own service was in process 0: its client aborts too, and may be sooner than we are
  assert processes[survivor].returncode == 1
  assert found[survivor][1].splitlines()[-1] == (
      f'process {who} of 3 ended without a word (killed, out of memory, or its machine is gone); run the same command '
      'to go on from the last checkpoint')


def test_kills_at_random_leave_the_losses_of_a_run_that_was_left_alone(tmp_path):
  found = soak.soak(tmp_path, kills=3, processes=4)
  assert found['kills'] == 3


def test_the_launcher_stops_a_pretraining_run_of_two_and_starts_it_again(tmp_path, texts):  # noqa: F811
  """experiments/launch.py, experiments/pretrain.py: SIGTERM, status 75, the same command again, the report."""
  ours = {'XLA_FLAGS', 'PJRT_NPROC'}
  environment = {name: value for name, value in os.environ.items() if name not in ours} | {
      'PYTHONPATH': str(ROOT), 'LMLIB_CACHE': str(tmp_path / 'cache'), 'JAX_PLATFORMS': 'cpu'}
  run = Command(tmp_path, texts, environment)
  run.gin.write_text(run.gin.read_text().replace('Cosine', 'Constant'))

  def launch(steps: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-u', str(ROOT / 'experiments/launch.py'), '--gin_file=launch.gin',
         f'--gin_bindings=RUN = ("{run.gin}",)', f'--gin_bindings=launch.main.bindings = ("STEPS = {steps}",)'],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  first = launch(100_000)
  soak.until(lambda: run.last_step() >= 3, first)
  first.send_signal(signal.SIGTERM)
  out, err = first.communicate(timeout=120)
  assert first.returncode == 75, (out, err)
  last = run.last_step()
  assert err.splitlines()[-1].startswith('stopped by SIGTERM')
  assert err.splitlines()[-1].endswith(f'after step {last} of 100000, saved; run the same command to go on')
  second = launch(last + 5)
  out, err = second.communicate(timeout=240)
  assert second.returncode == 0, (out, err)
  assert run.last_step() == last + 5
  assert json.loads((run.workdir / 'report/summary.json').read_text())['steps'] == last + 5
  assert (run.workdir / 'config.gin').is_file()


def in_processes(count: int, command: list[str], folder) -> str:
  """What is printed by a command that ends well in so many processes."""
  environment = {name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'PJRT_NPROC')} | {
      'PYTHONPATH': str(ROOT), 'LMLIB_CACHE': str(folder / 'cache'), 'JAX_PLATFORMS': 'cpu'}
  local = json.dumps({'processes': count, 'devices': 1, 'restarts': 0})
  done = subprocess.run([sys.executable, '-c', soak.LAUNCH, local, json.dumps(command)], env=environment, cwd=ROOT,
                        text=True, capture_output=True, timeout=600)
  assert (done.returncode, done.stderr) == (0, ''), done.stdout
  return done.stdout


SPLIT = 'sharding.Layout.data = 1', 'sharding.Layout.fsdp = 2'


def test_a_finished_run_of_two_is_scored_as_by_one(tmp_path, texts):  # noqa: F811
  """Weights split over processes: perplexity, generation and the report."""
  scores = []
  for processes, sizes in ((2, SPLIT), (1, ())):
    folder = tmp_path / str(processes)
    folder.mkdir()
    run = Command(folder, texts, {})
    in_processes(processes, [sys.executable, '-u', str(ROOT / 'experiments/pretrain.py'), f'--gin_file={run.gin}', *(
        f'--gin_bindings={binding}' for binding in ('STEPS = 12', *sizes))], tmp_path)
    scores.append(json.loads((run.workdir / 'report/summary.json').read_text())['bits_per_byte'])
    assert (run.workdir / 'report/samples.txt').read_text()
  assert scores[0] == pytest.approx(scores[1], abs=1e-5)


WATCHFUL = """
from lmlib.eval import multiple_choice
from lmlib.eval import prompting
from lmlib.eval import written
from lmlib.train import hosts
from lmlib.train import keeping
from lmlib.train import spikes
from lmlib.train import traces
from lmlib.train import watch

pretrain.main.evaluations = (@evaluations.MultipleChoice(), @evaluations.Written(), @evaluations.Perplexity())
pretrain.main.keep = @keeping.Keep()
keeping.Keep.best = 'perplexity/bits_per_byte'
keeping.Keep.newest = 1
pretrain.main.watch = @watch.Watch()
watch.Watch.spikes = @spikes.Spikes()
watch.Watch.profile = @traces.Profile()
traces.Profile.first = 9
watch.Watch.stragglers = @hosts.Stragglers()
hosts.Stragglers.every = 10
"""


def test_what_is_scored_and_watched_in_a_run_of_two_is_what_one_finds(tmp_path, texts):  # noqa: F811
  """Evaluations on the way, a rule that keeps the best checkpoint, traces of each process, slow ones looked for."""
  (tmp_path / 'mmlu' / 'test').mkdir(parents=True)
  (tmp_path / 'mmlu' / 'test' / 'art_test.csv').write_text('q,a,b,c,d,A\nr,a,b,c,d,C\n')
  (tmp_path / 'questions.jsonl').write_text('{"question": "q", "answer": "a"}\n{"question": "r", "answer": "b"}\n')
  (tmp_path / 'short.jinja').write_text('{{ question.text }}')
  lines, kept = [], []
  for processes, sizes in ((2, SPLIT), (1, ())):
    folder = tmp_path / str(processes)
    folder.mkdir()
    run = Command(folder, texts, {})
    evaluated = EVALUATED.format(texts=texts).replace('evaluate_every = 25', 'evaluate_every = 7')
    run.gin.write_text(run.gin.read_text() + evaluated + (WATCHFUL + QUESTIONS).format(folder=tmp_path))
    in_processes(processes, [sys.executable, '-u', str(ROOT / 'experiments/pretrain.py'), f'--gin_file={run.gin}', *(
        f'--gin_bindings={binding}' for binding in ('STEPS = 28', *sizes))], tmp_path)
    lines.append([json.loads(line) for line in (run.workdir / 'evaluations.jsonl').read_text().splitlines()])
    kept.append(sorted(path.name for path in (run.workdir / 'checkpoints').iterdir()))
    traced = sorted((run.workdir / 'profile_9').rglob('*.xplane.pb'))
    assert [path.relative_to(run.workdir).parts[1] for path in traced] == (
        ['process_0', 'process_1'] if processes == 2 else ['plugins'])
  two, one = lines
  assert [line['step'] for line in two] == [line['step'] for line in one] == [7, 14, 21, 28]
  for mine, other in zip(two, one):
    assert len(other['scores']) > 3
    assert mine['scores'] == pytest.approx(other['scores'], abs=1e-5)
  assert kept[0] == kept[1]


def test_an_adapter_tuned_by_two_is_that_of_one(tmp_path):
  source, chats = small.workdir(tmp_path / 'model'), small.chats(tmp_path / 'all.jsonl', 60)
  scores, written = [], []
  for processes, sizes in ((2, SPLIT), (1, ())):
    folder = tmp_path / str(processes)
    folder.mkdir()
    exact = ('from lmlib.eval import held_out_answers\nsft.main.exact = @held_out_answers.Exact()\n'
             'held_out_answers.Exact.new = 4\n')
    (folder / 'tiny.gin').write_text(test_sft.GIN.format(source=source, chats=chats, workdir=folder / 'run') + exact)
    in_processes(processes, [sys.executable, '-u', str(ROOT / 'experiments/sft.py'), f'--gin_file={folder}/tiny.gin', *(
        f'--gin_bindings={binding}' for binding in (*test_sft.LORA, *sizes))], tmp_path)
    measures = json.loads((folder / 'run/report/summary.json').read_text())['held_out']
    scores.append([measure[when] for measure in measures for when in ('before', 'after')])
    written.append(json.loads((folder / 'run/before.json').read_text())['written'])
    assert (folder / 'run/adapter').is_dir()
  assert scores[0] == pytest.approx(scores[1], abs=1e-4)
  assert written[0] == written[1]
  assert len(written[0]) == 5
