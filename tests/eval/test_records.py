"""Records of files, and the place of what is wrong."""
import pytest

from lmlib.eval import records


def test_all_forms_give_the_same_records(tmp_path):
  (tmp_path / 'a.csv').write_text('\ufeffprompt,note\n"one, ""two""\nthree",x\n中文,\n', encoding='utf-8')
  (tmp_path / 'a.jsonl').write_text('{"prompt": "one, \\"two\\"\\nthree", "note": "x"}\n\n'
                                    '{"prompt": "中文", "note": ""}\n', encoding='utf-8')
  expected = [{'prompt': 'one, "two"\nthree', 'note': 'x'}, {'prompt': '中文', 'note': ''}]
  for name, lines in (('a.csv', (3, 4)), ('a.jsonl', (1, 3))):
    found = list(records.read(tmp_path / name, ('prompt',)))
    assert [record for _, record in found] == expected
    assert [where for where, _ in found] == [f'{tmp_path / name}, line {line}' for line in lines]


@pytest.mark.parametrize(('name', 'text', 'said'), [
    ('a.csv', 'x,y\n1,2\n', r"a\.csv, line 1: no field 'prompt', but \['x', 'y'\]"),
    ('a.csv', 'prompt,y\n1,2\n1\n', r'a\.csv, line 3: 2 fields are named'),
    ('a.csv', 'prompt,y\n1,2,3\n', r'a\.csv, line 2: 2 fields are named'), ('a.csv', 'prompt\n', 'holds no records'),
    ('a.csv', 'prompt\n"a" b\n', r'a\.csv, line 2: not CSV'), ('a.jsonl', '\n', 'holds no records'),
    ('a.jsonl', '{"prompt": "a"}\n{"x": 1}\n', r"a\.jsonl, line 2: no field 'prompt', but \['x'\]"),
    ('a.jsonl', '{"prompt"\n', r'a\.jsonl, line 1: not JSON'), ('a.txt', 'a', r'must end in \.jsonl')])
def test_what_is_no_record_is_refused(tmp_path, name, text, said):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=said):
    list(records.read(tmp_path / name, ('prompt',)))


@pytest.mark.parametrize('name', ['a.csv', 'a.jsonl', 'a.parquet'])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
  with pytest.raises(ValueError, match=rf'{name}: unreadable: .*[Nn]o such file'):
    list(records.read(tmp_path / name))


def test_fields_of_fields():
  record = {'prompt': {'text': 'a', 'toxicity': 0.25, 'none': None, 'label': True}}
  assert records.text(record, 'prompt.text', 'f, line 1') == 'a'
  assert records.number(record, 'prompt.toxicity', 'f, line 1') == 0.25
  assert records.number(record, 'prompt.none', 'f, line 1') is None
  for call, said in ((lambda: records.text(record, 'prompt.x', 'f, line 1'), r"f, line 1: no field 'prompt\.x'"),
                     (lambda: records.text(record, 'prompt.toxicity', 'f, line 1'), 'not a text'),
                     (lambda: records.number(record, 'prompt.toxicity', 'f, line 1', high=0.2), '0.25, no number'),
                     (lambda: records.number(record, 'prompt.label', 'f, line 1'), 'True, no number'),
                     (lambda: records.one_of(record, 'prompt.label', (0, 1), 'f, line 1'), 'True, none of 0, 1')):
    with pytest.raises(ValueError, match=said):
      call()
