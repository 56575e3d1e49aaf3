"""A checkpoint written in parts is one that the others read, and the other way; what is damaged is noticed."""
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmlib import trees
from lmlib.train import checkpoint, checkpoint_arrays
from lmlib.train.checkpoint_arrays import Reader, Writer, blocks, chunks, copied

SHAPES = {'embedding': (11, 6), 'blocks': {'experts': (3, 4, 20, 18), 'scale': (3, 6)}, 'temperature': ()}


def params() -> dict:
  draw = np.random.default_rng(0)
  return jax.tree.map(lambda shape: jnp.asarray(draw.normal(size=shape), jnp.float32), SHAPES,
                      is_leaf=lambda x: isinstance(x, tuple))


ABSTRACT = jax.eval_shape(params)
FLAT = {name: np.asarray(leaf) for name, leaf in trees.flat(params()).items()}


def written(folder, dtype='float32', step=0):
  """Every expert of every layer by itself, the last first."""
  path = folder / str(step)
  path.mkdir(parents=True)
  with Writer(path, ABSTRACT, dict.fromkeys(FLAT, np.dtype(dtype)), {'blocks/experts': 1}, step=step) as writer:
    for name in ('embedding', 'temperature'):
      writer.write(f'params/{name}', (), FLAT[name])
    for layer in (2, 1, 0):
      writer.write(f'params/blocks_{layer}/scale', (), FLAT['blocks/scale'][layer])
      for expert in (3, 1, 0, 2):
        writer.write(f'params/blocks_{layer}/experts', (expert,), FLAT['blocks/experts'][layer, expert])
    writer.close()
  return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """Chunks of a few rows, and commits of a few chunks."""
  monkeypatch.setattr(checkpoint_arrays, 'CHUNK', 1_000)
  monkeypatch.setattr(checkpoint_arrays, 'COMMIT', 6_000)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_what_is_written_in_parts_is_restored_whole(tmp_path, dtype):
  written(tmp_path, dtype, step=7)
  found, step, meta = checkpoint.restore_params(tmp_path, ABSTRACT)
  assert (step, meta) == (7, {})
  for name, leaf in trees.flat(found).items():
    np.testing.assert_array_equal(leaf, FLAT[name].astype(dtype).astype(np.float32), err_msg=name)


def test_the_checksums_are_those_of_the_whole_arrays(tmp_path):
  record = checkpoint.record_of(written(tmp_path))
  for name, x in trees.unstacked({'params': params()}, params()).items():
    assert record['arrays'][name]['checksum'] == int(trees.checksum(x)), name


@pytest.mark.parametrize('others', [False, True], ids=['of a writer', 'of a run'])
def test_parts_are_read_alone(tmp_path, others):
  if others:
    made = checkpoint.Checkpoints(tmp_path)
    made.save(0, {'params': params(), 'step': jnp.int32(0)})
    made.close()
  else:
    written(tmp_path)
  reader = Reader(tmp_path)
  for expert in range(4):
    found = reader.read('params/blocks_1/experts', (expert,))
    np.testing.assert_array_equal(found, FLAT['blocks/experts'][1, expert])
  np.testing.assert_array_equal(reader.read('params/embedding'), FLAT['embedding'])
  reader.verify()


def test_a_changed_byte_is_noticed(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint_arrays, 'CHUNK', 10_000)  # above 1 kB a chunk is stored as it is
  path = written(tmp_path)
  needle = FLAT['blocks/experts'][1, 2, 3:5].tobytes()[:40]
  file, = (file for file in (path / 'd').iterdir() if needle in file.read_bytes())
  content = bytearray(file.read_bytes())
  content[content.index(needle) + 8] ^= 1
  file.write_bytes(content)
  reader = Reader(tmp_path)
  with pytest.raises(ValueError, match=r'checkpoint .*/0 is damaged: '):  # noqa: PT012, either of the two may see it
    for expert in range(4):
      reader.read('params/blocks_1/experts', (expert,))
    reader.verify()


def test_a_record_that_is_missing_or_altered_is_named(tmp_path):
  with pytest.raises(ValueError, match='no checkpoint in'):
    Reader(tmp_path / 'nowhere')
  path = written(tmp_path)
  text = (path / checkpoint.RECORD).read_text()
  (path / checkpoint.RECORD).write_text(text.replace('"step": 0', '"step": 1'))
  with pytest.raises(ValueError, match='is damaged: _CHECKPOINT_METADATA is altered'):
    Reader(tmp_path)


@pytest.mark.parametrize(('shape', 'lead', 'expected'), [
    ((), 0, ()), ((50,), 0, (50,)), ((500,), 0, (250,)), ((90, 50), 0, (5, 50)), ((9, 500), 0, (1, 250)),
    ((4, 2, 3), 0, (4, 2, 3)), ((4, 2, 3), 1, (1, 2, 3)), ((9, 40, 5), 0, (1, 40, 5))])
def test_chunks_are_as_large_as_may_be(shape, lead, expected):
  chunk = chunks(shape, 4, lead)
  assert chunk == expected
  seen = np.zeros(shape, int)
  for block in blocks(shape, chunk):
    seen[block] += 1
  assert (seen == 1).all()


VIEWS = {'plain': lambda x: x, 'transposed': lambda x: x.transpose(2, 0, 1), 'turned': lambda x: x.T,
         'every other': lambda x: x[:, ::2].T, 'a row': lambda x: x[:, 1:2].transpose(2, 1, 0),
         'reversed': lambda x: x[::-1].T, 'one number': lambda x: x[1, 1, 1], 'none': lambda x: x[:0].T,
         'repeated': lambda x: np.broadcast_to(x[:1], x.shape).T}


@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize('kinds', [('float32', 'float32'), ('float32', 'bfloat16'), ('bfloat16', 'float32')])
def test_a_copy_is_a_copy_whatever_the_strides(view, kinds):
  assert ml_dtypes.bfloat16  # numpy knows the name once this is imported
  x = view(np.random.default_rng(0).normal(size=(5, 33, 18)).astype(kinds[0]))
  out = np.full(x.shape, 7, kinds[1])
  assert copied(np.asarray(x), out) is out
  np.testing.assert_array_equal(out, np.asarray(x).astype(kinds[1]))
