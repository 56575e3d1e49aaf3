"""A SentencePiece BPE tokeniser that loses nothing: decode(encode(text)) is text, to the byte.

Differs from SentencePiece's defaults (Kudo and Richardson 2018): text is not normalised, nothing is
added before it, no white space is dropped, and unknown characters fall back to their bytes. Line ends
take part in pieces, such as '):\n'. With across_words pieces may span words and scripts too, such as
'):\n    return', which takes a sixth off the tokens of source code, but a small model predicts whole
phrases worse than words. SentencePiece writes a space as U+2581; that character itself, when a text
holds it, is spelt in bytes, so that the two stay apart.
"""
from collections.abc import Iterable, Iterator
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import pathlib
import re

import numpy as np
import sentencepiece

SPACE = '\u2581'
BLOCK = 1000  # characters of a training sentence: long beside any piece, short enough to train quickly
# SentencePiece refuses a sentence that holds one of these: its space, its unknown, its end.
RESERVED = str.maketrans('', '', SPACE + '\u2585\x00')
SPECIALS = 3  # unknown, bos, eos
BYTES = 256


@dataclasses.dataclass(frozen=True)
class SentencePiece:
  """How to train a tokeniser. Deterministic: the same texts in the same order give the same model."""
  pieces: int = 4096  # all of them: 3 specials and 256 bytes count
  longest: int = 32  # characters of a piece
  across_words: bool = False  # a piece may reach over spaces and from one script into another
  coverage: float = 0.9995  # share of the characters read that get a piece; the rest are spelt in bytes
  sample: int = 32_000_000  # characters to train on, spread evenly over a longer text

  def __post_init__(self):
    if self.pieces <= SPECIALS + BYTES:
      raise ValueError(f'SentencePiece.pieces={self.pieces} must exceed {SPECIALS + BYTES}: '
                       f'{SPECIALS} specials and {BYTES} bytes')
    if not 1 <= self.longest <= 512:
      raise ValueError(f'SentencePiece.longest={self.longest} must lie between 1 and 512 characters')
    if not 0.9 <= self.coverage <= 1:
      raise ValueError(f'SentencePiece.coverage={self.coverage} must lie between 0.9 and 1')
    if self.sample < BLOCK:
      raise ValueError(f'SentencePiece.sample={self.sample} must be at least {BLOCK} characters')

  def train(self, texts: Iterable[str], characters: int) -> 'Tokenizer':
    """A tokeniser for `texts`, which hold about `characters` in all. ValueError if they are too few."""
    share = min(1.0, self.sample / max(characters, 1))
    # Block i is taken where i * share passes a whole number: evenly spread, and no random state.
    sentences = (block for i, block in enumerate(itertools.chain.from_iterable(map(blocks, texts)))
                 if int((i + 1) * share) > int(i * share))
    model = io.BytesIO()
    try:
      sentencepiece.SentencePieceTrainer.train(
          sentence_iterator=sentences, model_writer=model, model_type='bpe', vocab_size=self.pieces,
          byte_fallback=True, split_digits=True, normalization_rule_name='identity', add_dummy_prefix=False,
          remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
          split_by_whitespace=not self.across_words, split_by_unicode_script=not self.across_words,
          max_sentencepiece_length=self.longest, character_coverage=self.coverage,
          max_sentence_length=8 * BLOCK, num_threads=1, minloglevel=3)
    except RuntimeError as error:
      raise ValueError(f'SentencePiece.pieces={self.pieces} cannot be made from {characters} characters '
                       f'(coverage={self.coverage}): {reason(str(error))}') from error
    return Tokenizer(model.getvalue())


class Tokenizer:
  """Text to ids and back. No special id is added: bos and eos mark the ends of documents in a store."""

  def __init__(self, model: bytes):
    """ValueError if `model` is no SentencePiece model, or one that cannot spell unknown text in bytes."""
    self.model = model
    try:
      self._processor = sentencepiece.SentencePieceProcessor()
      self._processor.load_from_serialized_proto(model)
    except RuntimeError as error:
      raise ValueError('not a SentencePiece model') from error
    self._spelt = [self._processor.piece_to_id(f'<0x{byte:02X}>') for byte in SPACE.encode()]
    if not all(map(self._processor.is_byte, self._spelt)):
      raise ValueError('a SentencePiece model without byte fallback, which loses text')

  @classmethod
  def load(cls, path) -> 'Tokenizer':
    """The tokeniser of a .model file. ValueError if it cannot be used."""
    try:
      return cls(pathlib.Path(path).read_bytes())
    except (OSError, ValueError) as error:
      raise ValueError(f'{path}: {getattr(error, "strerror", error)}') from error

  def save(self, path: str | os.PathLike):
    pathlib.Path(path).write_bytes(self.model)

  @property
  def vocab(self) -> int:
    return self._processor.vocab_size()

  @property
  def bos(self) -> int:
    return self._processor.bos_id()

  @property
  def eos(self) -> int:
    return self._processor.eos_id()

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the model, in hexadecimal."""
    return hashlib.sha256(self.model).hexdigest()

  def encode(self, text: str) -> np.ndarray:
    """The ids of a text, int32; a control id never comes of text. ValueError for half a surrogate pair."""
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(f'character {error.start} of the text is half of a surrogate pair') from error
    if SPACE not in text:
      return np.array(self._processor.encode(text), np.int32)
    ids = []
    for part in re.split(f'({SPACE})', text):
      ids += self._spelt if part == SPACE else self._processor.encode(part)
    return np.array(ids, np.int32)

  def decode(self, ids) -> str:
    """The text of ids. Control ids are no text; bytes that form no character become U+FFFD."""
    ids = np.asarray(ids, np.int64)
    if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab):
      raise ValueError(f'ids from {ids.min()} to {ids.max()} lie outside the vocabulary of {self.vocab}')
    return b''.join([self._raw[i] for i in ids.tolist()]).decode(errors='replace')

  @functools.cached_property
  def _raw(self) -> tuple[bytes, ...]:
    """The bytes of every id."""
    model, raw = self._processor, []
    for i in range(self.vocab):
      piece = model.id_to_piece(i)
      if model.is_byte(i):
        raw.append(bytes([int(piece[3:5], 16)]))
      else:
        raw.append(b'' if model.is_control(i) or model.is_unknown(i) else piece.replace(SPACE, ' ').encode())
    return tuple(raw)


def blocks(text: str) -> Iterator[str]:
  """A text cut before a newline at most every BLOCK characters, or there if a line is longer."""
  text, start = text.translate(RESERVED), 0
  while start < len(text):
    stop = start + BLOCK
    if stop < len(text) and (line := text.rfind('\n', start + 1, stop)) > 0:
      stop = line
    yield text[start:stop]
    start = stop


def reason(error: str) -> str:
  """What a SentencePiece error says, without the place in its source and in our settings' names."""
  said = re.sub(r'^.*\] ', '', error).strip() or 'too little text'
  return re.sub(r'Increase vocab_size or.*', 'Raise pieces, or lower coverage.', said)
