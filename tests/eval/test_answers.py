"""Kept answers: found again by model and request alone, and a kill costs at most the line that it cut."""
import contextlib
import dataclasses

import jax
import pytest

from lmlib.data.tokenizer import Bytes
from lmlib.eval.answers import Answers, fingerprint
from tests.laws.models import CONFIGS, made

PAIRS = [([1, 'a'], 2.5), ([1, 'ü\ud800'], 'text\n'), ([2], [0.1, True])]


def test_answers_are_found_in_the_file_by_kind_request_and_model(tmp_path):
  kept = Answers(tmp_path / 'new' / 'answers.jsonl', 'model')
  kept.add('likelihood', PAIRS)
  assert [kept.find('likelihood', request) for request, _ in PAIRS] == [answer for _, answer in PAIRS]
  assert kept.count() == (3, 3)
  assert kept.count() == (0, 0)
  kept.close()
  again = Answers(tmp_path / 'new' / 'answers.jsonl', 'model')
  assert [again.find('likelihood', request) for request, _ in PAIRS] == [answer for _, answer in PAIRS]
  assert again.find('text', PAIRS[0][0]) is None
  assert again.count() == (3, 0)
  again.close()
  with contextlib.closing(Answers(tmp_path / 'new' / 'answers.jsonl', 'other')) as other:
    assert other.find('likelihood', PAIRS[0][0]) is None


def test_a_line_that_was_cut_off_is_dropped_wherever_it_was_cut(tmp_path):
  path = tmp_path / 'answers.jsonl'
  with_two = Answers(path)
  with_two.add('x', [([0], 1.0)])
  with_two.add('x', [([1], 'long'), ([2], 3.0)])
  with_two.close()
  whole = path.read_bytes()
  ends = [i + 1 for i, byte in enumerate(whole) if byte == ord('\n')]
  assert len(ends) == 3
  for size in range(len(whole)):
    path.write_bytes(whole[:size])
    kept = Answers(path)
    assert [kept.find('x', [n]) is not None for n in range(3)] == [end <= size for end in ends]
    kept.add('x', [([9], 9.0)])
    kept.close()
    again = Answers(path)
    assert again.find('x', [9]) == 9.0
    again.close()


def test_a_file_that_is_damaged_or_in_use_is_named(tmp_path):
  path = tmp_path / 'answers.jsonl'
  path.write_text('{"key": "a", "answer": 1}\nnonsense\n{"key": "b", "answer": 2}\n')
  with pytest.raises(ValueError, match=r'answers.jsonl is damaged in line 2'):
    Answers(path)
  path.unlink()
  mine = Answers(path)
  with pytest.raises(ValueError, match='in use by another evaluation'):
    Answers(path)
  mine.close()
  Answers(path).close()
  with pytest.raises(ValueError, match='cannot be written'):
    Answers(path / 'below')


def test_a_fingerprint_is_of_weights_config_and_tokenizer():
  config, tokenizer = CONFIGS['dense'], Bytes().train()
  params = made(config)
  same = fingerprint(config, jax.tree.map(lambda x: x + 0, params), tokenizer)
  assert same == fingerprint(config, params, tokenizer)
  one_weight = params | {'embedding': params['embedding'].at[3, 2].add(1e-3)}
  others = [fingerprint(config, one_weight, tokenizer),
            fingerprint(dataclasses.replace(config, length=16), params, tokenizer)]
  assert len({same, *others}) == 3
