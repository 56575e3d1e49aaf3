"""What models have answered, kept on disk: an evaluation that is killed goes on with what it has.

A line of JSON an answer, appended when its batch is done, under a hash of the model's fingerprint and of the whole
request: other weights, another tokeniser or another prompt are other answers. The file never changes but at its end;
a line that a kill has cut off there is dropped.
"""
from collections.abc import Iterable
import fcntl
import hashlib
import json
import os
import pathlib

import jax
import numpy as np

import lmlib
from lmlib import trees
from lmlib.data.tokenizer import Tokenizer
from lmlib.models import protocol


class Answers:
  """The answers of one model, in memory and, with a path, in a file that one process has to itself."""

  def __init__(self, path: str | os.PathLike | None = None, fingerprint: str = ''):
    """ValueError for a file that another process has, that cannot be written, or that is damaged before its end."""
    self.fingerprint = fingerprint
    self.repeated = self.new = 0  # answers that were here, answers that were added, since count()
    self._known, self._file = {}, None
    if path is not None:
      self._file = _opened(pathlib.Path(path))
      self._known = _read(self._file, path)

  def find(self, kind: str, request) -> object | None:
    """The answer to a request, anything that JSON can hold; None if there is none yet."""
    answer = self._known.get(self._key(kind, request))
    self.repeated += answer is not None
    return answer

  def add(self, kind: str, pairs: Iterable[tuple]):
    """Keeps (request, answer) pairs; they are with the system when this returns, and survive a kill."""
    fresh = {self._key(kind, request): answer for request, answer in pairs}
    self._known |= fresh
    self.new += len(fresh)
    if self._file is not None:
      self._file.write(''.join(json.dumps({'key': key, 'answer': answer}, ensure_ascii=False) + '\n'
                               for key, answer in fresh.items()).encode())
      self._file.flush()

  def count(self) -> tuple[int, int]:
    """How many answers were here and how many are new since this was last asked."""
    counted, self.repeated, self.new = (self.repeated, self.new), 0, 0
    return counted

  def close(self):
    if self._file is not None:
      self._file.close()

  def _key(self, kind: str, request) -> str:
    said = json.dumps([self.fingerprint, kind, request], ensure_ascii=False, separators=(',', ':'))
    return hashlib.sha256(said.encode('utf-8', 'surrogatepass')).hexdigest()[:32]


def fingerprint(config: protocol.Config, params, tokenizer: Tokenizer) -> str:
  """A hash of all that a model's answers depend on: its config, every weight, its tokeniser and this version."""
  checksum = jax.jit(trees.checksum)
  weights = {name: int(np.asarray(checksum(leaf))) for name, leaf in trees.flat(params).items()}
  said = json.dumps([repr(config), weights, tokenizer.fingerprint, lmlib.__version__], sort_keys=True)
  return hashlib.sha256(said.encode()).hexdigest()[:16]


def _opened(path: pathlib.Path):
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open('a+b')
  except OSError as error:
    raise ValueError(f'{path} cannot be written: {error.strerror}') from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise ValueError(f'{path} is in use by another evaluation: wait for it') from None
  return file


def _read(file, path) -> dict:
  """The answers of a file, without a line that was cut off at its end, which goes."""
  file.seek(0)
  text = file.read()
  whole = text[:text.rfind(b'\n') + 1]
  if len(whole) < len(text):
    file.truncate(len(whole))
  found = {}
  for number, line in enumerate(whole.splitlines(), 1):
    try:
      said = json.loads(line)
      found[said['key']] = said['answer']
    except (ValueError, KeyError, TypeError):
      file.close()
      raise ValueError(f'{path} is damaged in line {number}: remove that line, or the file') from None
  return found
