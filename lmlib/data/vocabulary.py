"""A tokeniser as a `seqio.Vocabulary`, for tasks. TensorFlow is loaded when one is made, not before."""
import contextlib
import functools
import os
import sys
import tempfile

import numpy as np

from lmlib.data.tokenizer import Tokenizer


def vocabulary(tokenizer: Tokenizer, *, shift: int = 0):
  """The seqio.Vocabulary of a tokeniser: its ids are the tokeniser's plus `shift`.

  seqio takes id 0 for padding and gives it no weight in a loss. ValueError if id 0 would be text, as with most
  byte-level tokenisers: shift=1 moves all ids up, and whoever hands them to a model takes it away again.
  decode ends at the first eos, as seqio has it; special ids are no text.
  """
  if shift not in (0, 1):
    raise ValueError(f'shift={shift} must be 0 or 1')
  text_at_0 = tokenizer.decode_bytes([0])
  if text_at_0 and not shift:
    raise ValueError(f'id 0 of this tokenizer is the text {text_at_0.decode(errors="replace")!r}, which seqio takes '
                     'for padding and drops from the loss: give shift=1')
  if shift and not text_at_0:
    raise ValueError(f'shift={shift} has no use: id 0 of this tokenizer is no text and can be padding')
  return _vocabulary_class()(tokenizer, shift)


@functools.cache
def load_quietly():
  """Loads seqio and TensorFlow without what their C++ prints on the way, and with no GPU: those are JAX's.

  TensorFlow, left alone, takes all the memory of a GPU. Does nothing if it is loaded already.
  """
  if 'tensorflow' not in sys.modules:
    with _standard_error_aside():
      import seqio  # noqa: F401
      import tensorflow as tf
      tf.config.set_visible_devices([], 'GPU')
      tf.constant(0)  # looks for devices now


@contextlib.contextmanager
def _standard_error_aside():
  """Keeps standard error, also of C++, off the screen; shows it after all if the block fails."""
  sys.stderr.flush()
  screen = os.dup(2)
  with tempfile.TemporaryFile() as aside:
    os.dup2(aside.fileno(), 2)
    try:
      yield
    except BaseException:
      aside.seek(0)
      os.write(screen, aside.read())
      raise
    finally:
      os.dup2(screen, 2)
      os.close(screen)


@functools.cache
def _vocabulary_class():
  import seqio
  import tensorflow as tf

  class Vocabulary(seqio.Vocabulary):
    """See vocabulary()."""

    def __init__(self, tokenizer: Tokenizer, shift: int):
      super().__init__()
      self.tokenizer, self.shift = tokenizer, shift

    def __eq__(self, other):
      return (isinstance(other, Vocabulary) and other.shift == self.shift
              and other.tokenizer.fingerprint == self.tokenizer.fingerprint)

    __hash__ = None

    def __reduce__(self):
      return vocabulary_of, (self.tokenizer, self.shift)

    @property
    def bos_id(self):
      return self._mark('bos')

    @property
    def eos_id(self):
      return self._mark('eos')

    @property
    def unk_id(self):
      return None  # every text can be spelt

    @property
    def _base_vocab_size(self):
      return self.tokenizer.vocab + self.shift

    def _mark(self, name):
      return getattr(self.tokenizer, name) + self.shift if name in self.tokenizer.marks else None

    def _encode(self, s):
      return (self.tokenizer.encode(s) + self.shift).tolist()

    def _decode(self, ids):
      ids = np.asarray(ids, np.int64)
      return self.tokenizer.decode(ids[ids > 0] - self.shift)

    def _encode_tf(self, s):
      if s.shape.rank:  # a row of texts becomes a ragged row of ids
        return tf.map_fn(self._encode_tf, s, fn_output_signature=tf.RaggedTensorSpec([None], tf.int32, ragged_rank=0))
      encode = lambda raw: np.asarray(self._encode(np.asarray(raw).item().decode()), np.int32)
      ids = tf.numpy_function(encode, [s], tf.int32)
      return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids):
      if ids.shape.rank > 1:
        return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)
      return tf.ensure_shape(tf.numpy_function(lambda row: self._decode(row).encode(), [ids], tf.string), [])

  return Vocabulary


def vocabulary_of(tokenizer: Tokenizer, shift: int):
  return vocabulary(tokenizer, shift=shift)
