import gzip
import json
import re
import sysconfig

import pyarrow
from pyarrow import parquet
import pytest

from lmlib.data import files
from lmlib.data.sources import DataFolder, Document, StandardLibrary, TextFiles


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def fails(source, *words):
  with pytest.raises(ValueError, match=re.escape(str(words[0]))) as error:
    list(source.documents())
  for word in words:
    assert str(word) in str(error.value)
  assert '\n' not in str(error.value)


def test_standard_library_is_sorted_repeatable_and_has_no_tests():
  names = [document.name for document in StandardLibrary().documents()]
  assert names == sorted(names) == [document.name for document in StandardLibrary().documents()]
  assert {'argparse.py', 'asyncio/base_events.py', 'json/decoder.py'} <= set(names)
  parts = {part for name in names for part in name.split('/')}
  assert not parts & {'test', 'tests', 'idle_test', 'site-packages', '__pycache__'}


def test_standard_library_is_about_12_megabytes():
  assert 8e6 < sum(len(document.text.encode()) for document in StandardLibrary().documents()) < 20e6


def test_standard_library_skips_and_counts_what_is_no_text(folder, monkeypatch):
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(folder))
  (folder / 'test').mkdir()
  files = {'a.py': b'x = 1\n', 'b.py': b'', 'c.py': b'# \xe9', 'd.so': b'\0', 'test/e.py': b'1'}
  for name, raw in files.items():
    (folder / name).write_bytes(raw)
  assert list(StandardLibrary().documents()) == [Document('a.py', 'x = 1\n')]
  assert [name for name, _ in StandardLibrary().skipped()] == ['b.py', 'c.py']
  assert 'not UTF-8 at byte 2' in StandardLibrary().skipped()[1][1]


def test_standard_library_without_source_is_an_error(folder, monkeypatch):
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(folder))
  fails(StandardLibrary(), folder, 'TextFiles')


def test_text_is_what_the_file_holds_compressed_or_not(folder):
  (folder / 'below').mkdir()
  text = 'Zeilen\r\nmit\tTab \u2581 und\r'
  (folder / 'b.txt').write_bytes(text.encode())
  with gzip.open(folder / 'below' / 'a.md.gz', 'wb') as file:
    file.write(text.encode())
  want = [Document('b.txt', text), Document('below/a.md.gz', text)]
  assert list(TextFiles('**/*.*').documents()) == want
  assert list(TextFiles(('below/*', './b.txt', '*.txt')).documents()) == want  # a file is read once


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz'])
def test_lines_are_documents(folder, suffix):
  lines = [json.dumps({'body': body, 'n': 1}) for body in ('one', 'zwei \u00fc\n', 'a\0b')]
  raw = '\n'.join([lines[0], '', *lines[1:]]).encode()
  (folder / f'x{suffix}').write_bytes(gzip.compress(raw) if suffix.endswith('.gz') else raw)
  want = {1: 'one', 3: 'zwei \u00fc\n', 4: 'a\0b'}
  assert list(TextFiles('*', field='body').documents()) == [
      Document(f'x{suffix}:{line}', text) for line, text in want.items()]


def test_glob_that_matches_nothing(folder):
  (folder / 'a.txt').write_text('a')
  fails(TextFiles('*.text'), "TextFiles.glob='*.text'", folder)
  fails(TextFiles(('a.txt', '*.text')), "TextFiles.glob='*.text'", folder)
  fails(TextFiles(()), 'TextFiles.glob=()')


@pytest.mark.parametrize(('raw', 'words'), [
    (b'', ['empty file']),
    (b'PNG\0\1', ['binary file', 'NUL at byte 3']),
    (b'caf\xc3\xa9 caf\xe9!', ['not UTF-8 at byte 9']),
])
@pytest.mark.parametrize('suffix', ['.txt', '.txt.gz'])
def test_files_that_are_no_text(folder, raw, words, suffix):
  (folder / f'x{suffix}').write_bytes(gzip.compress(raw) if suffix == '.txt.gz' else raw)
  fails(TextFiles('*'), f'x{suffix}', *words)


@pytest.mark.parametrize(('raw', 'words'), [
    (b'', ['empty file']),
    (b'\n\n', ['empty file']),
    (b'{"text": "a"}\n{"text": }\n', ['line 2', 'not JSON']),
    (b'{"text": "a"}\n{"txt": "a"}\n', ['line 2', "'text'", "['txt']"]),
    (b'{"text": "a"}\n["text"]\n', ['line 2', "'text'", 'list']),
    (b'{"text": 5}\n', ['line 1', "'text'", '5']),
    (b'{"text": ""}\n', ['line 1', "'text'"]),
    (b'{"text": "\\ud800"}\n', ['line 1', "'text'", 'surrogate']),
    (b'{"text": "a"}\n{"text": "\xff"}\n', ['line 2', 'not UTF-8 at byte 24']),
])
def test_bad_lines(folder, raw, words):
  (folder / 'x.jsonl').write_bytes(raw)
  fails(TextFiles('x.jsonl', field='text'), 'x.jsonl', *words)


def test_field_must_be_given_for_lines_and_for_nothing_else(folder):
  (folder / 'x.jsonl').write_text('{"text": "a"}')
  (folder / 'y.txt').write_text('a')
  fails(TextFiles('*'), 'TextFiles.field=None', 'x.jsonl')
  fails(TextFiles('*.txt', field='text'), "TextFiles.field='text'", '*.txt')


@pytest.mark.parametrize(('name', 'field'), [('x.txt.gz', None), ('x.jsonl.gz', 'text')])
@pytest.mark.parametrize('damage', [
    lambda raw: raw[:-9], lambda raw: b'no gzip', lambda raw: raw[:20] + b'?' * 40])
def test_damaged_gzip(folder, name, field, damage):
  raw = gzip.compress(b'\n'.join(b'{"text": "%d"}' % (i * i) for i in range(1000)))
  (folder / name).write_bytes(damage(raw))
  fails(TextFiles('*', field=field), name, 'gzip')


def texts_of(source):
  return [(document.name, document.text) for document in source.documents()]


def by_part(source):
  return [(document.name, document.text) for part in source.parts() for document in source.documents((part,))]


def test_the_standard_library_in_parts_is_the_whole(folder, monkeypatch):
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(folder))
  for name, text in (('b.py', 'b'), ('a.py', 'a'), ('c.py', '')):
    (folder / name).write_text(text)
  source = StandardLibrary()
  assert source.parts() == ('a.py', 'b.py', 'c.py')
  assert by_part(source) == texts_of(source) == [('a.py', 'a'), ('b.py', 'b')]
  with pytest.raises(ValueError, match=r"no part 'd\.py'"):
    list(source.documents(('d.py',)))


@pytest.mark.parametrize('part', [1, 7, 64, 1000])
@pytest.mark.parametrize('block', [1, 5, 1 << 20])
def test_lines_in_parts_are_the_whole_however_they_are_cut(folder, monkeypatch, part, block):
  """Names with line numbers and all, for .jsonl and for lines of text, with blank lines and no last line end."""
  lines = [json.dumps({'t': '\u732b' * (i % 5) + str(i)}) for i in range(30)]
  lines[3:3] = lines[11:11] = ['', '  ']
  (folder / 'a.jsonl').write_text('\n'.join(lines))
  (folder / 'b.txt').write_text('\r\n'.join(f'line {i}' * (i % 3) for i in range(40)) + '\n', newline='')
  (folder / 'c.jsonl.gz').write_bytes(gzip.compress('\n'.join(lines).encode()))
  source = TextFiles('*', field='t', lines=True)
  whole = texts_of(source)
  assert len(whole) == 30 + 26 + 30
  assert ('b.txt:3', 'line 2line 2') in whole
  monkeypatch.setattr(files, 'PART', part)
  monkeypatch.setattr(files, 'BLOCK', block)
  assert by_part(source) == texts_of(source) == whole
  assert len(source.parts()) > 20 or part > 7
  assert [name for name in source.parts() if '.gz' in name] == ['c.jsonl.gz']


def test_cuts_depend_on_positions_alone(folder, monkeypatch):
  """A line added at the end moves no cut before it."""
  monkeypatch.setattr(files, 'PART', 50)
  (folder / 'a.jsonl').write_text('{"t": "1234567890"}\n' * 20)
  before = TextFiles('*', field='t').parts()
  (folder / 'a.jsonl').write_text('{"t": "1234567890"}\n' * 23)
  assert TextFiles('*', field='t').parts()[:len(before) - 1] == before[:-1]


def test_a_part_of_a_file_that_changed_meanwhile(folder, monkeypatch):
  monkeypatch.setattr(files, 'PART', 30)
  path = folder / 'a.jsonl'
  path.write_text('{"t": "1"}\n' * 20)
  source = TextFiles('*', field='t')
  first, second, *_, last = source.parts()
  path.write_text('{"t": "12"}\n' * 20)
  with pytest.raises(ValueError, match=r'a\.jsonl: changed: no line begins at byte 33'):
    list(source.documents((second,)))
  path.write_text('{"t": "1"}\n')
  with pytest.raises(ValueError, match=r'a\.jsonl: changed: it ends before byte 33'):
    list(source.documents((first,)))
  with pytest.raises(ValueError, match=r'a\.jsonl: changed'):
    list(source.documents((last,)))
  for name in ('b.jsonl', 'a.jsonl[0:9]', 'b.jsonl[0:9] from line 1'):
    with pytest.raises(ValueError, match='there is no part'):
      list(source.documents((name,)))


def test_lines_must_have_an_effect_and_are_text(folder):
  (folder / 'a.jsonl').write_text('{"t": "1"}\n')
  fails(TextFiles('*', field='t', lines=True), 'TextFiles.lines=True has no effect')
  (folder / 'b.txt').write_bytes(b'good\nb\xe4d\n')
  fails(TextFiles('*.txt', lines=True), 'b.txt, line 2: not UTF-8 at byte 6')


def write_parquet(path, columns: dict, group: int = 3):
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(pyarrow.table(columns), path, row_group_size=group)


def test_a_split_of_parquet_files_and_of_lines_is_the_same(folder, monkeypatch):
  texts = [f'text {i} \u732b' for i in range(20)]
  write_parquet(folder / 'p/data/train-00000-of-00002.parquet', {'text': texts[:13], 'n': range(13)})
  write_parquet(folder / 'p/data/train-00001-of-00002-a09b74b3ef9c3b56.parquet', {'text': texts[13:], 'n': range(7)})
  write_parquet(folder / 'p/data/test-00000-of-00001.parquet', {'text': ['no']})
  (folder / 'j').mkdir()
  lines = [json.dumps({'text': text}) for text in texts]
  (folder / 'j/train.jsonl').write_text('\n'.join(lines[:13]))
  (folder / 'j/train-1.jsonl.gz').write_bytes(gzip.compress('\n'.join(lines[13:]).encode()))
  (folder / 'j/train_sft.jsonl').write_text(lines[0])
  (folder / 'j/README.md').write_text('x')
  whole = texts_of(DataFolder('p'))
  assert [text for _, text in whole] == texts
  assert whole[12][0] == 'p/data/train-00000-of-00002.parquet:13'
  assert sorted(text for _, text in texts_of(DataFolder('j'))) == sorted(texts)
  assert texts_of(DataFolder('p/**/*.parquet', split=None))[0] == ('p/data/test-00000-of-00001.parquet:1', 'no')
  monkeypatch.setattr(files, 'PART', 1)
  assert len(DataFolder('p').parts()) == 5 + 3
  assert by_part(DataFolder('p')) == whole
  assert by_part(DataFolder('j')) == texts_of(DataFolder('j'))
  records = list(DataFolder('p').records(columns=('n',)))
  assert records[14] == ('p/data/train-00001-of-00002-a09b74b3ef9c3b56.parquet:2', {'n': 1})


@pytest.mark.parametrize('place', ['train/0000.parquet', 'data/train/0000.parquet', 'train.parquet',
                                   'data/train-00000-of-00001.parquet'])
def test_places_of_a_split(folder, place):
  write_parquet(folder / 'x' / place, {'text': ['a']})
  assert texts_of(DataFolder('x')) == [(f'x/{place}:1', 'a')]


def test_splits_that_are_missing_or_not_whole(folder):
  write_parquet(folder / 'x/data/train-00001-of-00003.parquet', {'text': ['a']})
  write_parquet(folder / 'x/data/test-00000-of-00001.parquet', {'text': ['a']})
  fails(DataFolder('x'), 'of 00003 files of the split, number 00000 is missing')
  fails(DataFolder('x', 'dev'), "DataFolder.path='x' holds no split 'dev'", 'it has test, train')
  fails(DataFolder('y'), 'it has none', folder)
  (folder / 'z.txt').write_text('a')
  fails(DataFolder('*.txt', split=None), 'z.txt, which is neither')


@pytest.mark.parametrize('value', ['', None])
def test_empty_texts_are_refused_or_counted(folder, value):
  write_parquet(folder / 'x/train.parquet', {'text': ['a', value, 'b']})
  fails(DataFolder('x'), 'x/train.parquet:2', "'text'", repr(value))
  source = DataFolder('x', skip_empty=True)
  assert texts_of(source) == [('x/train.parquet:1', 'a'), ('x/train.parquet:3', 'b')]
  assert source.skipped() == (('x/train.parquet:2', 'empty text'),)
  assert DataFolder('x').skipped() == ()


def test_parquet_files_that_are_none_or_lack_the_field(folder):
  write_parquet(folder / 'x/train.parquet', {'body': ['a'], 'n': [1]})
  fails(DataFolder('x'), 'x/train.parquet', "no field 'text', but ['body', 'n']")
  fails(DataFolder('x', field='n'), "field 'n' is 1, not a text")
  raw = (folder / 'x/train.parquet').read_bytes()
  for damaged in (raw[:-20], b'', b'PAR1', raw[:4] + b'\xff' * 40 + raw[44:]):
    (folder / 'x/train.parquet').write_bytes(damaged)
    fails(DataFolder('x', field='body'), 'x/train.parquet')
  # Bytes that are no UTF-8 in a column that says they are.
  bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b'\xff']).buffers())
  write_parquet(folder / 'x/train.parquet', {'body': bad})
  fails(DataFolder('x', field='body'), 'x/train.parquet: not UTF-8')


def test_other_faults_of_lines(folder):
  (folder / 'x').mkdir()
  (folder / 'x/train.jsonl').write_text('{"text": "a"}\n' + '[' * 100_000 + '\n')
  fails(DataFolder('x'), 'x/train.jsonl, line 2: ')
  (folder / 'x/train.jsonl').write_text('{"text": "a"}\n7\n')
  with pytest.raises(ValueError, match='line 2: a JSON int, not an object'):
    list(DataFolder('x').records())
