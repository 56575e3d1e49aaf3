"""A whole model from a folder in Hugging Face's form to a WORKDIR and back: weights, tokeniser, and the proof.

Either is there whole, its logits compared with those of what it was made of, or not at all.
"""
import json
import pathlib
import shutil

import numpy as np

from lmlib import gin_text, trees
from lmlib.data import tokenizer as tokenizers
from lmlib.data.tokenizer import Loaded, Tokenizer
from lmlib.interop import check, folder, hf
from lmlib.interop.family import INERT, shapes
from lmlib.models import protocol
from lmlib.terminal import Terminal
from lmlib.train import workdir
from lmlib.train.checkpoint import restore_params
from lmlib.train.checkpoint_arrays import Reader
from lmlib.train.step import placed

# Carried along beside the weights, as they are.
BESIDE = ('tokenizer.json', 'tokenizer.model', 'spiece.model', 'tokenizer_config.json', 'special_tokens_map.json',
          'added_tokens.json', 'vocab.json', 'vocab.txt', 'merges.txt', 'generation_config.json',
          'chat_template.jinja', 'chat_template.json')
PUBLISHED = 'published'  # the folder in a WORKDIR that keeps them, and the config.json
DTYPES = ('float32', 'bfloat16', 'float16')


def to_workdir(source: str, target: str, *, dtype: str | None, checked: bool | None, terminal: Terminal):
  """Makes the WORKDIR `target` of the folder `source`; see experiments/convert.py.

  ValueError for what is wrong with either, RunFault if the logits differ.
  """
  _one_of('dtype', dtype, (None, *DTYPES))
  into = pathlib.Path(target).expanduser()
  folder.refuse_existing(into)
  published = hf.read(source)
  config = published.config
  count = trees.count(shapes(config))
  terminal.say(f'source      {source}: {published.said["model_type"]}, {count:,} weights in '
               f'{len(published.tensors):,} tensors')
  if published.overlooked:
    terminal.say(f'left aside  in config.json, of unknown meaning: {", ".join(published.overlooked)}')
  size = sum(stored.nbytes for stored in published.stored.values()) if dtype is None else count * _width(dtype)
  with folder.new(into, size) as partial:
    beside = partial / PUBLISHED
    beside.mkdir()
    _carry(published.folder, beside, (hf.CONFIG, *BESIDE))
    if (found := _tokenizer(published.folder, config, terminal)) is not None:
      found.save(partial / 'tokenizer.model')
    model = gin_text.macro_text({'MODEL': config})
    (partial / 'config.gin').write_text(f'# The model of {source}, as those of gin_configs/models/.\n{model}')
    manifest = {'identity': workdir.flat({'model': config}), 'converted': str(source), 'parameters': count}
    (partial / 'manifest.json').write_text(json.dumps(manifest | workdir.environment(), indent=2) + '\n')
    step = partial / 'checkpoints' / '0'
    step.mkdir(parents=True)
    hf.to_checkpoint(published, step, dtype, _progress(terminal))
    if _wanted(checked, config, terminal):
      written = _logits(published.family, config, lambda: restore_params(partial / 'checkpoints', _abstract(config))[0])
      source_logits = _logits(published.family, config, lambda: hf.load(published, rounded=dtype)[1])
      _say(terminal, check.compared(f'{target} beside its source', written, source_logits, check.OWN_LIMIT))
      _beside_transformers(published.family, config, published.folder, written, dtype, terminal)


def to_folder(source: str, config: protocol.Config, target: str, *, model_type: str | None, dtype: str, longest: int,
              checked: bool | None, terminal: Terminal):
  """Makes a folder in Hugging Face's form of the model `config` in the WORKDIR `source`; as to_workdir."""
  _one_of('dtype', dtype, DTYPES)
  here, into = pathlib.Path(source).expanduser(), pathlib.Path(target).expanduser()
  folder.refuse_existing(into)
  kept = folder.read_json(here / PUBLISHED / hf.CONFIG) if (here / PUBLISHED / hf.CONFIG).is_file() else {}
  family = hf.writer(config, model_type, kept.get('model_type'))
  reader = Reader(here / 'checkpoints')
  terminal.say(f'source      {source} after step {reader.step}, written as {family.model_types[0]}')
  with folder.new(into, trees.count(shapes(config)) * _width(dtype)) as partial:
    said = {key: kept[key] for key in kept if key in INERT - {'torch_dtype', 'auto_map'}} | hf.as_said(family, config)
    said |= {key: kept[key] for key in ('id2label', 'label2id') if key in kept}  # our config has no names of classes
    if kept:
      _carry(here / PUBLISHED, partial, ('generation_config.json',))
    if (here / 'tokenizer.model').is_file():
      said |= _write_tokenizer(here, partial, terminal)
    (partial / hf.CONFIG).write_text(json.dumps(said | {'dtype': dtype}, indent=2) + '\n')
    hf.from_checkpoint(reader, config, family, partial, dtype=dtype, longest=longest,
                       progress=_progress(terminal))
    if _wanted(checked, config, terminal):
      # In float32 and without what only training has, whatever the run computed in.
      plain = hf.read(partial).config
      written = _logits(family, plain, lambda: hf.load(partial)[1])
      rounded = lambda: hf.rounded(family, plain, restore_params(here / 'checkpoints', _abstract(plain))[0], dtype)
      _say(terminal, check.compared(f'{target} beside its source', written, _logits(family, plain, rounded),
                                    check.OWN_LIMIT))
      _beside_transformers(family, plain, partial, written, None, terminal)


def _one_of(name: str, value, known):
  if value not in known:
    raise ValueError(f'{name}={value!r} must be one of {", ".join(map(repr, known))}')


def _width(dtype: str) -> int:
  return np.dtype(dtype).itemsize


def _progress(terminal: Terminal):
  return lambda share: terminal.progress(f'weights     {share:.0%}', last=share == 1)


def _abstract(config):
  return placed(shapes(config))


def _logits(family, config, params) -> np.ndarray:
  """params() is called here, so that no weights stay in memory."""
  return check.logits(family, config, params())


def _wanted(checked: bool | None, config, terminal) -> bool:
  """Whether logits are to be compared: None, if they can be."""
  if checked is None and (why := check.too_large(config)) is not None:
    terminal.say(f"NOT checked the logits were not compared: {why}. To compare them all the same: "
                 "--gin_bindings='convert.main.check = True'")
    return False
  if checked is False:
    terminal.say('NOT checked the logits were not compared: check = False')
  return checked is not False


def _beside_transformers(family, config, published: pathlib.Path, ours, dtype, terminal):
  if not check.has_transformers():
    terminal.say('            not compared with transformers, which is not installed (pip install torch transformers)')
    return
  theirs = check.their_logits(family, config, published, dtype)
  _say(terminal, check.compared('lmlib beside transformers', ours, theirs, check.LIMIT))


def _say(terminal: Terminal, outcome: check.Outcome):
  terminal.say(f'checked     {outcome.hold()}')


def _carry(source: pathlib.Path, target: pathlib.Path, names):
  for name in names:
    if folder.inside(source, name) is not None:
      shutil.copyfile(source / name, target / name)


def _tokenizer(source: pathlib.Path, config, terminal) -> Tokenizer | None:
  """The tokeniser of a folder; None, which is said, if it has none that lmlib can use. ValueError if it has more
  ids than the model."""
  try:
    found = Loaded(str(source)).load()
  except ValueError as error:
    terminal.say(f'tokenizer   none for lmlib: {error}')
    return None
  if found.vocab > config.vocab:
    raise ValueError(f'{source}: the tokenizer has {found.vocab} ids, the model embeds vocab={config.vocab}')
  return found


def _write_tokenizer(source: pathlib.Path, target: pathlib.Path, terminal) -> dict:
  """Writes the tokeniser of a WORKDIR as others read it; returns what config.json says of it."""
  found = Tokenizer.load(source / 'tokenizer.model')
  marks = {f'{name}_token_id': found.specials[spelling].id for name, spelling in found.marks.items()}
  if (source / PUBLISHED).is_dir() and _same(source / PUBLISHED, found):
    _carry(source / PUBLISHED, target, BESIDE)
    return {}
  try:
    name, content = tokenizers.published(found)
  except ValueError as error:
    terminal.say(f'tokenizer   not written: {error}')
    return marks
  (target / name).write_bytes(content)
  said = {'tokenizer_class': 'PreTrainedTokenizerFast' if name == 'tokenizer.json' else 'LlamaTokenizer',
          **{f'{mark}_token': spelling for mark, spelling in found.marks.items()}, 'add_bos_token': found.starts,
          'add_prefix_space': found.spaced}
  if found.chat_template is not None:
    said['chat_template'] = found.chat_template
  (target / 'tokenizer_config.json').write_text(json.dumps(said, indent=2, ensure_ascii=False) + '\n')
  return marks


def _same(published: pathlib.Path, found: Tokenizer) -> bool:
  try:
    return Loaded(str(published)).load().fingerprint == found.fingerprint
  except ValueError:
    return False
