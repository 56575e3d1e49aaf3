"""Tokenisers that lose text, of published encoders: WordPiece and its like, from a tokenizer.json.

data/tokenizer.py's Tokenizer gives back every text to the byte, which a language model that writes must. BERT's does
not: it may lower the case, take off accents, put spaces round punctuation and give [UNK] for words that it cannot
spell. So it is a class of its own, which only reads: rows for an encoder, with the special tokens that it was trained
with in place. What a tokenizer.json says of cutting and padding is not done: a text that is too long is refused, or
cut if that is asked for.
"""
import json
import pathlib


class WordPiece:
  """The tokeniser of an encoder."""

  def __init__(self, model: bytes, length: int | None = None):
    """model: a tokenizer.json. length: tokens of a row, special ones included, at most; None: any number."""
    import tokenizers
    try:
      said = json.loads(model)
      self._processor = tokenizers.Tokenizer.from_str(json.dumps(said | {'truncation': None, 'padding': None}))
    except Exception as error:  # the package raises a bare Exception
      raise ValueError(f'not a tokenizer.json: {error}') from error
    if length is not None and length < 3:
      raise ValueError(f'WordPiece length={length} leaves no room for a token between two special ones')
    self.length, self.vocab = length, self._processor.get_vocab_size()
    added = self._processor.get_added_tokens_decoder()
    self.specials = {token.content: i for i, token in added.items() if token.special}

  @classmethod
  def load(cls, path, length: int | None = None) -> 'WordPiece':
    """Of the file `path`. ValueError, naming it, if it holds none."""
    path = pathlib.Path(path).expanduser()
    try:
      return cls(path.read_bytes(), length)
    except OSError as error:
      raise ValueError(f'{path}: unreadable: {error.strerror}') from error
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from error

  def rows(self, texts, *, long: str = 'refuse') -> list[list[int]]:
    """Ids of each text, or of each pair of texts, with special tokens; see types() for which is of the second.

    long: 'refuse' raises ValueError for a text that has more than `length` tokens; 'cut' leaves its end out, and of
    a pair the end of the longer one, until it fits.
    """
    return [found.ids for found in self._encoded(texts, long)]

  def types(self, texts, *, long: str = 'refuse') -> list[list[int]]:
    """What kind each token of rows() is: 0, or 1 for those of the second text of a pair."""
    return [found.type_ids for found in self._encoded(texts, long)]

  def unknown(self, texts) -> list[int]:
    """Of each text, how many pieces it has that cannot be spelt and are given as [UNK]."""
    unknown = self._processor.token_to_id('[UNK]')
    return [sum(i == unknown for i in found.ids) for found in self._encoded(texts, None)]

  def decode(self, ids) -> str:
    """A text with these ids, which is seldom the text that they come from."""
    return self._processor.decode(list(ids))

  def _encoded(self, texts, long: str | None):
    if long not in ('refuse', 'cut', None):
      raise ValueError(f"long={long!r} must be 'refuse' or 'cut'")
    if isinstance(texts, str):
      raise ValueError('texts must be a list of texts, and is one text')
    if long == 'cut' and self.length is not None:
      self._processor.enable_truncation(self.length)
    try:
      found = self._processor.encode_batch([tuple(text) if isinstance(text, list) else text for text in texts])
    finally:
      self._processor.no_truncation()
    for i, row in enumerate(found):
      if long == 'refuse' and self.length is not None and len(row.ids) > self.length:
        raise ValueError(f'text {i} has {len(row.ids)} tokens, more than length={self.length}; '
                         "long='cut' takes its beginning")
    return found
