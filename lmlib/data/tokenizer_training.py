"""Training: from texts to the file of a SentencePiece model or of a byte-level BPE.

Differs from SentencePiece's defaults (Kudo and Richardson 2018): text is not normalised, nothing is
added before it, no white space is dropped, and unknown characters fall back to their bytes. Line ends
take part in pieces, such as '):\\n'. With across_words pieces may span words and scripts too, such as
'):\\n    return', which takes a sixth off the tokens of source code, but a small model predicts whole
phrases worse than words.
"""
from collections.abc import Iterable, Iterator
import io
import itertools
import re

import sentencepiece

from lmlib.data.tokenizer_formats import PATTERNS, SPACE

BLOCK = 1000  # characters of a training sentence: long beside any piece, short enough to train quickly
# SentencePiece refuses a sentence that holds one of these: its space, its unknown, its end.
RESERVED = str.maketrans('', '', SPACE + '\u2585\x00')


def sentencepiece_model(config, texts: Iterable[str], characters: int) -> bytes:
  """A serialised model as a `tokenizer.SentencePiece` describes it. ValueError if the texts are too few."""
  model, raised = io.BytesIO(), []

  def sentences():
    try:
      yield from sampled((text.translate(RESERVED) for text in texts), config.sample / max(characters, 1))
    except (Exception, KeyboardInterrupt) as error:  # of which SentencePiece makes a RuntimeError of its own
      raised.append(error)
      raise

  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(), model_writer=model, model_type=config.model_type, vocab_size=config.pieces,
        byte_fallback=True, split_digits=True, normalization_rule_name='identity', add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        split_by_whitespace=not config.across_words, split_by_unicode_script=not config.across_words,
        max_sentencepiece_length=config.longest, character_coverage=config.coverage,
        max_sentence_length=8 * BLOCK, num_threads=1, minloglevel=3)
  except RuntimeError as error:
    if raised:
      raise raised[0] from None
    raise ValueError(f'SentencePiece.pieces={config.pieces} cannot be made from {characters} characters '
                     f'(coverage={config.coverage}): {reason(str(error))}') from error
  return model.getvalue()


def byte_level_json(config, texts: Iterable[str], characters: int) -> str:
  """A tokenizer.json as a `tokenizer.ByteLevelBpe` describes it. ValueError if the texts are too few."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers
  trained = tokenizers.Tokenizer(models.BPE())
  cut = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[config.pattern]), behavior='isolated')
  in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  trained.pre_tokenizer = pre_tokenizers.Sequence([cut, in_bytes])
  trained.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=config.pieces, special_tokens=list(config.marks), show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=config.longest)
  trained.train_from_iterator(sampled(texts, config.sample / max(characters, 1)), trainer)
  if trained.get_vocab_size() != config.pieces:
    raise ValueError(f'ByteLevelBpe.pieces={config.pieces} cannot be made from {characters} characters: '
                     f'there are no more than {trained.get_vocab_size()} different pieces in them')
  return trained.to_str()


def sampled(texts: Iterable[str], share: float) -> Iterator[str]:
  """About `share` of the texts, in blocks spread evenly over them."""
  share = min(1.0, share)
  # Block i is taken where i * share passes a whole number: evenly spread, and no random state.
  return (block for i, block in enumerate(itertools.chain.from_iterable(map(blocks, texts)))
          if int((i + 1) * share) > int(i * share))


def blocks(text: str) -> Iterator[str]:
  """A text cut before a newline at most every BLOCK characters, or there if a line is longer."""
  start = 0
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
