"""What is saved comes back bit for bit, or is refused; nothing that is good is lost."""
import json
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlib import sharding, trees
from lmlib.train import checkpoint, keeping

LAYERS, WIDTH, HIDDEN = 3, 32, 64  # an array above 1 kB is stored as it is, others share nodes
OPTIMIZER = optax.chain(  # named tuples, empty states, MaskedNodes and a state in bfloat16
    optax.masked(optax.add_decayed_weights(0.1), {'embedding': True, 'blocks': {'up': True, 'scale': False}}),
    optax.masked(optax.adam(0.1, mu_dtype=jnp.bfloat16),
                 {'embedding': False, 'blocks': {'up': True, 'scale': True}}))


@struct.dataclass
class State:
  step: jax.Array
  params: dict
  optimizer: tuple
  skipped: jax.Array


def new(seed: int = 0, hidden: int = HIDDEN, layers: int = LAYERS) -> State:
  a, b, c = jax.random.split(jax.random.key(seed), 3)
  params = {'embedding': jax.random.normal(a, (64, WIDTH)),
            'blocks': {'up': jax.random.normal(b, (layers, WIDTH, hidden)),
                       'scale': jax.random.normal(c, (layers, WIDTH))}}
  return train(State(jnp.int32(seed), params, OPTIMIZER.init(params), jnp.int32(0)))


@jax.jit
def train(state: State) -> State:
  updates, optimizer = OPTIMIZER.update(jax.tree.map(jnp.sin, state.params), state.optimizer, state.params)
  return State(state.step + 1, optax.apply_updates(state.params, updates), optimizer, state.skipped)


train_donated = jax.jit(train, donate_argnums=0)


def abstract(state, place=None):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place and place(x)), state)


def bits(state) -> dict:
  return {name: np.asarray(x).tobytes() for name, x in trees.flat(state).items()}


@pytest.fixture
def said():
  return []


@pytest.fixture
def checkpoints(tmp_path, said):
  made = checkpoint.Checkpoints(tmp_path / 'checkpoints', say=said.append)
  yield made
  made.close()


def saved(checkpoints, *steps):
  for step in steps:
    checkpoints.save(step, new(step), {'step': step})
  checkpoints.wait()


def stored_weight(folder: pathlib.Path) -> tuple[pathlib.Path, int]:
  """The file and the offset of the middle of a weight of step 2."""
  weight = np.asarray(new(2).params['embedding']).tobytes()
  path, = [path for path in folder.rglob('d/*') if weight in path.read_bytes()]
  return path, path.read_bytes().index(weight) + len(weight) // 2


def test_what_was_saved_comes_back(checkpoints, said):
  state = new().replace(skipped=jnp.int32(7))
  odd = jax.lax.bitcast_convert_type(jnp.uint32([0x7FC00001, 0x80000000]), jnp.float32)  # a NaN, minus zero
  state.params['embedding'] = state.params['embedding'].at[0, :2].set(odd)
  meta = {'step': 5, 'loss': 0.1, 'data': {'seed': [1, 2], 'name': 'Δ'}}
  assert checkpoints.restore(abstract(state)) is None
  assert checkpoints.latest() is None
  checkpoints.save(5, state, meta)
  restored, step, read = checkpoints.restore(abstract(state))
  assert bits(restored) == bits(state)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert (step, read, said) == (5, meta, [])
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))
  assert bits(train_donated(restored)) == bits(train(state))


def test_the_names_on_disk_are_readable(checkpoints, tmp_path):
  saved(checkpoints, 5)
  record = json.loads((tmp_path / 'checkpoints/5/_CHECKPOINT_METADATA').read_text())['custom_metadata']
  assert {'params/blocks_0/up', 'params/blocks_2/scale', 'optimizer/1/inner_state/0/mu/blocks_1/up',
          'step'} <= record['arrays'].keys()
  assert record['arrays']['params/blocks_0/up']['shape'] == [WIDTH, HIDDEN]


def test_the_state_may_be_donated_at_once(checkpoints):
  state = new()
  expected, like = bits(state), abstract(state)
  copies, _ = checkpoint._apart(state)  # what the writer holds while training goes on
  checkpoints.save(1, state)
  for _ in range(3):
    state = train_donated(state)
  assert bits(trees.stacked(copies, like, like.params)) == expected
  assert bits(checkpoints.restore(like)[0]) == expected


def test_save_returns_before_the_disk_is_done(checkpoints, monkeypatch):
  gate = threading.Event()
  finalize = checkpoint.ocp.PyTreeCheckpointHandler.finalize
  monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, 'finalize',
                      lambda self, path: (gate.wait(20), finalize(self, path))[1])
  checkpoints.save(1, new())
  assert checkpoints.latest() is None  # still on its way
  gate.set()
  checkpoints.wait()
  assert checkpoints.latest() == 1


def test_the_newest_are_kept(checkpoints):
  saved(checkpoints, 1, 2, 10, 9)
  assert checkpoints.steps() == [9, 10]


def test_the_best_by_a_score_stays_also_for_the_next_session(tmp_path):
  keep = keeping.Keep(1, best='held out/nats')
  for session in ((1, 2, 3), (4, 5)):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=keep)
    for step in session:
      saved(checkpoints, step)
      checkpoints.scored(step, {'held out/nats': float(abs(step - 2)), 'another': -float(step)})
    checkpoints.close()
  assert checkpoints.steps() == [2, 5]
  with pytest.raises(ValueError, match="'held out/nats' is none of the scores of the evaluations: another"):
    checkpoints.scored(5, {'another': 1.0})


def test_a_write_that_takes_long_is_said_and_goes_on(tmp_path, monkeypatch, said):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=keeping.Keep(slow=0.05), say=said.append)
  gate = threading.Event()
  finalize = checkpoint.ocp.PyTreeCheckpointHandler.finalize
  monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, 'finalize',
                      lambda self, path: (gate.wait(20), finalize(self, path))[1])
  checkpoints.save(1, new())
  while not said:
    time.sleep(0.01)
  line, = said
  path = tmp_path / '1.slow.0.txt'
  assert line == (f'checkpoint of step 1 is being written for 0.05 s now and is not done; the run goes on; what all '
                  f'threads do is in {path}')
  assert 'Thread' in path.read_text()
  gate.set()
  checkpoints.wait()
  saved(checkpoints, 2)  # in time, or not: nobody is left waiting
  checkpoints.close()
  assert checkpoints.steps() == [1, 2]


def test_a_folder_that_has_vanished_is_not_made_again(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  saved(checkpoints, 1)
  shutil.rmtree(tmp_path / 'checkpoints')
  with pytest.raises(OSError, match=r'checkpoint of step 2 .*: the folder has vanished; there is no earlier one'):
    checkpoints.save(2, new())
  checkpoints.close()
  assert not any(tmp_path.iterdir())


def left_with_a_fault(folder, step, say=print):
  with checkpoint.Checkpoints(folder, say=say) as checkpoints:
    checkpoints.save(step, new())
    raise ValueError('the fault')


def test_a_fault_leaves_a_save_its_time(tmp_path):
  with pytest.raises(ValueError, match='the fault'):
    left_with_a_fault(tmp_path, 1)
  assert [path.name for path in tmp_path.iterdir()] == ['1']


def test_what_fails_on_the_way_out_does_not_hide_the_fault_before_it(tmp_path, monkeypatch, said):

  def failing(self, path):
    raise OSError('No space left on device')

  monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, 'finalize', failing)
  with pytest.raises(ValueError, match='the fault'):
    left_with_a_fault(tmp_path, 1, said.append)
  line, = said
  assert line.startswith(f'checkpoint of step 1 could not be written to {tmp_path}/1: ')


def test_an_older_one_goes_only_when_a_newer_one_is_complete(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  saved(checkpoints, 1)
  checkpoints.save(2, new())
  assert 1 in checkpoints.steps()
  checkpoints.close()
  assert checkpoints.steps() == [2]


def alter(path, at, bit=0):
  data = path.read_bytes()
  path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:])


def truncate(path, at):
  path.write_bytes(path.read_bytes()[:at])


def wrong_shape(path):
  path.write_text(path.read_text().replace(f'[{WIDTH}, {HIDDEN}]', f'[{WIDTH}, {HIDDEN + 1}]', 1))


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def another_step(folder):
  shutil.rmtree(folder)
  shutil.copytree(folder.parent / '1', folder)


RECORD = '_CHECKPOINT_METADATA'
DAMAGE = {
    'one bit of the data': lambda folder: alter(*stored_weight(folder)),
    'data cut short': lambda folder: truncate(*stored_weight(folder)),
    'data gone': lambda folder: stored_weight(folder)[0].unlink(),
    'manifest gone': lambda folder: (folder / 'manifest.ocdbt').unlink(),
    'record gone': lambda folder: (folder / RECORD).unlink(),
    'record cut short': lambda folder: truncate(folder / RECORD, -100),
    'a shape in the record': lambda folder: wrong_shape(folder / RECORD),
    'another step in its place': another_step,
    'an empty folder': empty,
}


@pytest.fixture(scope='module')
def two_saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('two') / 'checkpoints'
  checkpoints = checkpoint.Checkpoints(folder)
  saved(checkpoints, 1, 2)
  checkpoints.close()
  return folder


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_one_is_set_aside_and_the_one_before_it_used(damage, two_saved, tmp_path, said):
  folder = pathlib.Path(shutil.copytree(two_saved, tmp_path / 'checkpoints'))
  damage(folder / '2')
  params, step, _ = checkpoint.restore_params(folder, abstract(new().params), say=said.append)
  assert (step, len(said)) == (1, 1)
  assert bits(params) == bits(new(1).params)
  assert (folder / '2').exists(), 'a reader changes nothing'

  said.clear()
  checkpoints = checkpoint.Checkpoints(folder, say=said.append)
  state, step, meta = checkpoints.restore(abstract(new()))
  assert (step, meta, checkpoints.steps()) == (1, {'step': 1}, [1])
  assert bits(state) == bits(new(1))
  assert (folder / '2.damaged').is_dir()
  line, = said
  assert re.fullmatch(rf'checkpoint of step 2 is damaged \(.+\): set aside as {folder}/2.damaged; '
                      'trying that of step 1', line)
  saved(checkpoints, 2)  # the step is free again
  checkpoints.close()
  assert checkpoints.steps() == [1, 2]


def test_an_altered_byte_is_harmless_or_noticed(two_saved, tmp_path):
  folder = pathlib.Path(shutil.copytree(two_saved, tmp_path / 'checkpoints')) / '2'
  like, expected, random, noticed = abstract(new()), bits(new(2)), np.random.default_rng(0), 0
  files = sorted((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  for path in files + 20 * files[-1:]:
    data = path.read_bytes()
    at = random.integers(len(data))
    alter(path, at, random.integers(8))
    try:
      assert bits(checkpoint._read(folder, like)[0]) == expected, (path, at)
    except checkpoint.Damaged:
      noticed += 1
    path.write_bytes(data)
  assert noticed >= 15, 'nearly all of the largest file is data'


def test_nothing_is_started_anew_if_all_are_damaged(checkpoints, tmp_path, said):
  saved(checkpoints, 1, 2)
  for step in (1, 2):
    DAMAGE['manifest gone'](tmp_path / f'checkpoints/{step}')
  for _ in range(2):  # and not at the second try either
    with pytest.raises(ValueError, match=r'no usable checkpoint.*1\.damaged, 2\.damaged.*remove the folder'):
      checkpoints.restore(abstract(new()))
  assert len(said) == 2
  assert 'there is no older one' in said[1]


def test_names_of_damaged_ones_do_not_clash(checkpoints, tmp_path):
  saved(checkpoints, 1)
  for aside in ('2.damaged', '2.damaged.1'):
    saved(checkpoints, 2)
    DAMAGE['data gone'](tmp_path / 'checkpoints/2')
    assert checkpoints.restore(abstract(new()))[1] == 1
    assert (tmp_path / 'checkpoints' / aside).is_dir()


def test_what_an_interrupted_save_left_is_removed(checkpoints, tmp_path, said):
  saved(checkpoints, 1)
  folder = tmp_path / 'checkpoints'
  shutil.copytree(folder / '1', folder / '2.orbax-checkpoint-tmp')
  shutil.copytree(folder / '1', folder / '0.removed')
  assert checkpoints.restore(abstract(new()))[1] == 1
  assert said == [f'removed {folder}/2.orbax-checkpoint-tmp: a checkpoint whose writing was interrupted']
  assert [p.name for p in folder.iterdir()] == ['1']


@pytest.mark.parametrize(('other', 'text'), [
    ({'hidden': 2 * HIDDEN}, r'params/blocks_0/up is \(32, 64\) there and \(32, 128\) here'),
    ({'layers': LAYERS + 1}, r'params/blocks_3/scale is absent there and \(32,\) here'),
    ({'layers': LAYERS - 1}, r'params/blocks_2/scale is \(32,\) there and absent here'),
], ids=['width', 'more layers', 'fewer layers'])
def test_another_model_is_refused_and_nothing_is_touched(other, text, checkpoints, tmp_path, said):
  saved(checkpoints, 1, 2)
  with pytest.raises(ValueError, match=text):
    checkpoints.restore(abstract(new(**other)))
  assert checkpoints.steps() == [1, 2]
  assert said == []


def test_another_optimizer_is_refused_but_gives_its_weights(checkpoints, tmp_path):
  saved(checkpoints, 1)
  state = new(1)
  other = state.replace(optimizer=optax.sgd(0.1, momentum=0.9).init(state.params))
  with pytest.raises(ValueError, match='optimizer/0/trace'):
    checkpoints.restore(abstract(other))
  params, step, meta = checkpoint.restore_params(tmp_path / 'checkpoints', abstract(state.params))
  assert bits(params) == bits(state.params)
  assert (step, meta) == (1, {'step': 1})


def test_the_reader_chooses_the_type(checkpoints, tmp_path):
  saved(checkpoints, 1)
  half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), new().params)
  params, _, _ = checkpoint.restore_params(tmp_path / 'checkpoints', half)
  assert bits(params) == bits(jax.tree.map(lambda x: x.astype(jnp.bfloat16), new(1).params))
  whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.int32), new().params)
  with pytest.raises(ValueError, match='float32 there and int32 here'):
    checkpoint.restore_params(tmp_path / 'checkpoints', whole)


@pytest.mark.parametrize(('writer', 'reader'), [
    (None, {'fsdp': 8}), ({'fsdp': 8}, None), ({'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}),
], ids=['one to fsdp', 'fsdp to one', 'fsdp to tensor'])
def test_any_mesh_reads_what_any_mesh_wrote(writer, reader, checkpoints):
  def place(layout):
    if layout is None:
      return lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layout = sharding.Layout(**{'data': 1} | layout)
    mesh, axes = layout.mesh(), {1: 'L', 2: 'VD', 3: 'LDF'}
    return lambda x: jax.sharding.NamedSharding(mesh, sharding.spec(
        axes.get(x.ndim, ''), x.shape, mesh, layout.weights) if x.shape[0:] else jax.sharding.PartitionSpec())

  state = new()
  checkpoints.save(1, jax.device_put(state, jax.tree.map(place(writer), state)))
  restored, _, _ = checkpoints.restore(abstract(state, place(reader)))
  assert bits(restored) == bits(state)
  wanted = jax.tree.map(place(reader), state)
  assert all(x.sharding.is_equivalent_to(y, x.ndim)
             for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted)))


def test_an_existing_step_and_bad_arguments_are_refused(checkpoints, tmp_path):
  saved(checkpoints, 1)
  with pytest.raises(ValueError, match='a checkpoint of step 1 exists'):
    checkpoints.save(1, new())
  with pytest.raises(ValueError, match='JSON'):
    checkpoints.save(2, new(), {'x': jnp.zeros(1)})
  with pytest.raises(ValueError, match='JSON'):
    checkpoints.save(2, new(), {1: 'keys come back as text'})
  with pytest.raises(ValueError, match='keep=0'):
    checkpoint.Checkpoints(tmp_path, keep=0)
  with pytest.raises(ValueError, match='there is none'):
    checkpoint.restore_params(tmp_path / 'nowhere', abstract(new().params))
  assert not (tmp_path / 'nowhere').exists()


FULL_DISK = '''
import pathlib, resource, signal, sys
sys.path.insert(0, sys.argv[2])
import test_checkpoint as t
from lmlib.train import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = checkpoint.Checkpoints(sys.argv[1])
t.saved(checkpoints, 1, 2)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
checkpoints.save(3, t.new(3))
try:
  checkpoints.wait()
except OSError as error:
  print(error)
print(sorted(p.name for p in pathlib.Path(sys.argv[1]).iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
assert t.bits(checkpoints.restore(t.abstract(t.new()))[0]) == t.bits(t.new(2))
t.saved(checkpoints, 4)  # there is room again
checkpoints.close()
print(checkpoints.steps())
'''


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path):
  # A limit on the size of a file fails in write(2) as a full disk does, with EFBIG for ENOSPC.
  here = pathlib.Path(__file__).parent
  done = subprocess.run([sys.executable, '-W', 'error', '-c', FULL_DISK, str(tmp_path), str(here)],
                        capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  error, files, steps = done.stdout.splitlines()
  assert re.fullmatch(rf'checkpoint of step 3 could not be written to {tmp_path}/3: .*File too large.*; '
                      'the last good one is of step 2', error), error
  assert files == "['1', '2']"
  assert steps == '[2, 4]'
  assert done.stderr == '', 'orbax keeps quiet'


def test_a_failed_write_is_raised_at_the_next_save(checkpoints, monkeypatch, tmp_path, capfd):
  saved(checkpoints, 1)

  def fail(self, path):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, 'finalize', fail)
    checkpoints.save(2, new(2))
    checkpoints._writer._async_manager._thread.join()
  with pytest.raises(OSError, match=r'step 2 could not be written to .*/2: .*No space.* is of step 1'):
    checkpoints.save(3, new(3))
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['1']
  saved(checkpoints, 3)
  assert checkpoints.steps() == [1, 3]
  assert capfd.readouterr().err == ''


@pytest.mark.parametrize('error', [
    MemoryError('host'), jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: device'), PermissionError('denied'),
], ids=['host', 'device', 'storage'])
def test_a_reader_out_of_memory_or_reach_is_no_damage(error, checkpoints, monkeypatch, said):
  saved(checkpoints, 1, 2)

  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(jax, 'make_array_from_callback', fail)
  with pytest.raises(type(error)):
    checkpoints.restore(abstract(new()))
  monkeypatch.setattr(checkpoint.ts, 'open', fail)
  with pytest.raises(type(error)):
    checkpoints.restore(abstract(new()))
  assert (checkpoints.steps(), said) == ([1, 2], [])
