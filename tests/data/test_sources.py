import gzip
import json
import re
import sysconfig

import pytest

from lmlib.data.sources import Document, StandardLibrary, TextFiles


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
