"""Sentence encoders in the form of sentence-transformers: an encoder's folder, modules.json and 1_Pooling/config.json.

That package cuts texts at max_seq_length without a word; here a text that is too long is refused unless told to cut.
"""
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from lmlib.data.wordpiece import WordPiece
from lmlib.interop import hf
from lmlib.interop.folder import inside, read_json
from lmlib.models import protocol
from lmlib.nn.pooling import Pooling
from lmlib.serve.embed import embed

MODULES, SENTENCES, TOKENIZER = 'modules.json', 'sentence_bert_config.json', 'tokenizer.json'
MODES = {'pooling_mode_mean_tokens': 'mean', 'pooling_mode_cls_token': 'first', 'pooling_mode_max_tokens': 'max'}


@dataclasses.dataclass(frozen=True)
class SentenceEncoder:
  """A model that gives texts vectors, as a folder holds it."""
  config: protocol.Config
  params: Any
  tokenizer: WordPiece
  pooling: Pooling

  def embed(self, texts, *, batch: int = 32, long: str = 'refuse') -> np.ndarray:
    """One vector a text, float32; see serve.embed, and WordPiece.rows for `long`."""
    return embed(self.config, self.params, self.tokenizer.rows(texts, long=long), self.pooling, batch=batch)


def load(path) -> SentenceEncoder:
  """The sentence encoder of a folder. ValueError for one that lacks a part, or has one that is not known here."""
  folder = pathlib.Path(path).expanduser()
  pooling = pooling_of(folder)
  published = hf.read(folder)
  said = read_json(folder / SENTENCES) if inside(folder, SENTENCES) else {}
  if said.get('do_lower_case'):
    raise ValueError(f'{folder / SENTENCES}: do_lower_case=True, beside what the tokenizer does, is not known here')
  if inside(folder, TOKENIZER) is None:
    raise ValueError(f'{folder} has no {TOKENIZER}')
  longest = min(said.get('max_seq_length') or published.config.length, published.config.length)
  tokenizer = WordPiece.load(folder / TOKENIZER, longest)
  if tokenizer.vocab > (vocab := published.config.vocab):
    raise ValueError(f'{folder}: the tokenizer has {tokenizer.vocab} ids, the model embeds vocab={vocab}')
  config, params = hf.load(published)
  return SentenceEncoder(config, params, tokenizer, pooling)


def pooling_of(folder: pathlib.Path) -> Pooling:
  """What modules.json and the folders it names say of pooling. ValueError for modules that are not known here."""
  if (path := inside(folder, MODULES)) is None:
    raise ValueError(f'{folder} is no sentence encoder: it has no {MODULES}')
  try:
    modules = json.loads(path.read_bytes())
    named = [(str(module['type']).rpartition('.')[2], module['path']) for module in modules]
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise ValueError(f'{path}: not a list of modules: {error}') from error
  kinds = [kind for kind, _ in named]
  if kinds not in (['Transformer', 'Pooling'], ['Transformer', 'Pooling', 'Normalize']):
    raise ValueError(f'{path} lists {", ".join(kinds)}; known here is Transformer, Pooling and, or not, Normalize')
  (_, first), (_, where) = named[:2]
  if first or not isinstance(where, str) or pathlib.PurePath(where).name != where or where in ('', '..'):
    raise ValueError(f'{path}: the encoder must lie in the folder itself, and pooling in a folder of it, '
                     f'not in {first!r} and {where!r}')
  if (config := inside(folder / where, 'config.json')) is None:
    raise ValueError(f'{folder / where} has no config.json, which says how states are pooled')
  on = [mode for mode, value in read_json(config).items() if mode.startswith('pooling_mode') and value]
  if len(on) != 1 or on[0] not in MODES:
    raise ValueError(f'{config} asks for {", ".join(on) or "no pooling"}; known here is one of {", ".join(MODES)}')
  return Pooling(MODES[on[0]], len(kinds) == 3)


def write(folder: pathlib.Path, pooling: Pooling, *, width: int, length: int):
  """Writes the files that make a sentence encoder of an encoder's folder; `length` is of its texts, in tokens."""
  kinds = ['Transformer', 'Pooling', *(['Normalize'] if pooling.normalised else [])]
  paths = {'Transformer': '', 'Pooling': '1_Pooling', 'Normalize': '2_Normalize'}
  modules = [{'idx': i, 'name': str(i), 'path': paths[kind], 'type': f'sentence_transformers.models.{kind}'}
             for i, kind in enumerate(kinds)]
  for kind in kinds[1:]:
    (folder / paths[kind]).mkdir()
  put = lambda path, said: path.write_text(json.dumps(said, indent=2) + '\n')
  put(folder / MODULES, modules)
  put(folder / SENTENCES, {'max_seq_length': length, 'do_lower_case': False})
  put(folder / '1_Pooling' / 'config.json',
      {'word_embedding_dimension': width} | {mode: kind == pooling.kind for mode, kind in MODES.items()})
