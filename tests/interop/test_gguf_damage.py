"""A damaged GGUF file is refused by its name: no crash, no hang, no memory taken on a header's word."""
import re
import struct
import tracemalloc

import numpy as np
import pytest

from lmlib.interop import gguf, gguf_file
from tests.interop.gguf_models import MODELS, params, tokenizer

LLAMA = MODELS['llama']
EXTREMES = (0, 1, 2**31, 2**40, 2**61, 2**63, 2**64 - 1)
MOST = 20_000_000  # bytes that reading a file of 100 kB, whatever it says, may take


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> bytes:
  path = tmp_path_factory.mktemp('gguf') / 'm.gguf'
  gguf.save(path, LLAMA, params(LLAMA), tokenizer(), kind='Q8_0')
  return path.read_bytes()


@pytest.fixture(scope='module')
def data(whole, tmp_path_factory) -> int:
  """Where the header ends."""
  path = tmp_path_factory.mktemp('gguf') / 'm.gguf'
  path.write_bytes(whole)
  return min(stored.start for stored in gguf_file.opened(path).tensors.values())


def outcome(path, raw: bytes, read) -> str:
  """'' if the file is read, else why not; anything but a ValueError that names it is a fault."""
  path.write_bytes(raw)
  tracemalloc.start()
  try:
    read(path)
    return ''
  except ValueError as error:
    said = str(error)
  finally:
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < MOST, f'{most:,} bytes for {len(raw):,}'
  assert said.startswith(str(path)), said
  return said


def mutated(whole: bytes, data: int, draw) -> bytes:
  """A copy with a few bytes of the header changed: at random, to extremes, cut out, doubled, or swapped."""
  raw = bytearray(whole)
  for _ in range(draw.integers(1, 4)):
    at, size = int(draw.integers(0, data)), int(draw.choice([1, 4, 8]))
    match draw.integers(0, 5):
      case 0:
        raw[at:at + size] = draw.integers(0, 256, size, np.uint8).tobytes()
      case 1:
        raw[at:at + size] = EXTREMES[draw.integers(0, len(EXTREMES))].to_bytes(8, 'little')[:size]
      case 2:
        del raw[at:at + size]
      case 3:
        raw[at:at] = raw[at:at + size]
      case 4:
        other = int(draw.integers(0, data))
        raw[at:at + size], raw[other:other + size] = raw[other:other + size], raw[at:at + size]
  return bytes(raw)


def test_mutations_of_the_header(whole, data, tmp_path):
  """Most are refused; what is not, such as another letter of a piece, gives a model or says why not."""
  draw, said = np.random.default_rng(0), []
  for i in range(240):
    raw = mutated(whole, data, draw)
    said.append(outcome(tmp_path / 'm.gguf', raw, gguf_file.opened))
    if not said[-1] and i % 16 == 0:
      outcome(tmp_path / 'm.gguf', raw, gguf.load)
  assert 60 < sum(map(bool, said)) < 240
  assert len({text.split(': ', 1)[-1][:25] for text in said}) > 12  # of many kinds


def test_every_truncation(whole, data, tmp_path):
  for length in [*range(0, 300), *range(300, data, 397), *range(data, len(whole), 4999), len(whole) - 1]:
    assert outcome(tmp_path / 'm.gguf', whole[:length], gguf_file.opened), length
  assert outcome(tmp_path / 'm.gguf', whole + b'\0' * 64, gguf_file.opened)


def header(pairs: int = 0, count: int = 0, rest: bytes = b'', version: int = 3) -> bytes:
  return b'GGUF' + struct.pack('<IQQ', version, count, pairs) + rest


def text(value: str) -> bytes:
  return struct.pack('<Q', len(value)) + value.encode()


ARRAY = text('a') + struct.pack('<II', 9, 4)
TENSOR = text('x') + struct.pack('<I', 1)


@pytest.mark.parametrize(('raw', 'expected'), [
    (b'', 'no GGUF file: 0 bytes'), (b'PK' * 20, "which begin b'PKPK'"), (header(version=1), 'version 1'),
    (header(version=3 << 24), 'version 50331648'), (header(pairs=2**60), '1,152,921,504,606,846,976 keys'),
    (header(count=2**63), 'tensors would take'), (header(1, rest=struct.pack('<Q', 2**62) + bytes(40)), 'a key of'),
    (header(1, rest=ARRAY + struct.pack('<Q', 2**61)), "'a' would take"),
    (header(1, rest=text('a') + struct.pack('<IIQ', 9, 9, 1) + bytes(20)), 'type 9'),
    (header(1, rest=text('a') + struct.pack('<I', 13) + bytes(20)), 'type 13'),
    (header(1, rest=text('a') + struct.pack('<IQ', 8, 1) + b'\xff' + bytes(9)), 'no UTF-8'),
    (header(2, rest=2 * (text('a') + struct.pack('<II', 4, 1))), "key 'a' is there twice"),
    (header(1, rest=text('general.alignment') + struct.pack('<II', 4, 12)), 'alignment=12 must be a power'),
    (header(0, 1, text('x') + struct.pack('<I', 9) + bytes(20)), '9 axes'),
    (header(0, 1, TENSOR + struct.pack('<QIQ', 32, 99, 0)), 'type 99'),
    (header(0, 1, TENSOR + struct.pack('<QIQ', 33, 8, 0)), r'shape \(33,\), which no Q8_0 fills'),
    (header(0, 1, TENSOR + struct.pack('<QIQ', 2**62, 0, 0)), 'truncated or altered: its tensors end'),
    (header(0, 1, TENSOR + struct.pack('<QIQ', 8, 0, 64)), 'byte 64 of the data, where 0 must'),
    (header(0, 2, (TENSOR + struct.pack('<QIQ', 8, 0, 0)) * 2), "'x' is there twice")])
def test_headers_that_lie(raw, expected, tmp_path):
  assert re.search(expected, outcome(tmp_path / 'm.gguf', raw, gguf_file.opened))


def test_a_file_that_shrinks_while_it_is_read(whole, tmp_path):
  path = tmp_path / 'm.gguf'
  path.write_bytes(whole)
  last = list(gguf_file.opened(path).tensors.values())[-1]
  path.write_bytes(whole[:-100])
  with pytest.raises(ValueError, match=f'm.gguf: ends within {last.name}: it became shorter'):
    last.read()
  path.unlink()
  with pytest.raises(ValueError, match=r'm\.gguf: unreadable: No such file'):
    last.read()
  with pytest.raises(ValueError, match=r'm\.gguf: unreadable: No such file'):
    gguf.load(path)
