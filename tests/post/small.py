"""A model of a moment with a chat template, and conversations for it."""
import functools
import json
import pathlib

import jax

from lmlib import gin_text
from lmlib.data.tokenizer import ByteLevelBpe, Tokenizer, described, envelope
from lmlib.models import dense, protocol
from lmlib.nn.positions import Learned
from lmlib.train.checkpoint import Checkpoints
from tests.data import templates

PIECES = 262
CONFIG = dense.Config(vocab=PIECES, layers=2, width=16, hidden=32, heads=2, kv_heads=2, head_width=8, length=264)
LEARNED = dense.Config(vocab=PIECES, layers=1, width=16, hidden=32, heads=2, kv_heads=2, head_width=8, length=264,
                       positions=Learned())


@functools.cache
def tokenizer(template: str | None = templates.CHATML) -> Tokenizer:
  """Bytes and a few pieces, with the specials of the template."""
  trained = ByteLevelBpe(PIECES, specials=('<|im_start|>', '<|im_end|>'), pattern='gpt2').train(['the the'] * 9, 63)
  said = described(trained.model)
  more = {} if template is None else {'chat_template': template}
  return Tokenizer(envelope(**said | {'bos': '<|bos|>', 'eos': '<|im_end|>'} | more))


def workdir(path: pathlib.Path, config=CONFIG, template: str | None = templates.CHATML) -> pathlib.Path:
  """A WORKDIR with a model at random."""
  path.mkdir(parents=True)
  (path / 'config.gin').write_text(gin_text.macro_text({'MODEL': config}))
  tokenizer(template).save(path / 'tokenizer.model')
  checkpoints = Checkpoints(path / 'checkpoints')
  checkpoints.save(0, {'params': protocol.init(config, jax.random.key(0))})
  checkpoints.close()
  return path


def turns(*said: str) -> list[dict]:
  return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(said)]


def chats(path: pathlib.Path, count: int = 40) -> pathlib.Path:
  """A file of conversations in which an answer is a word of its question, in the three forms in turns."""
  words, lines = ('sun', 'moon', 'tree', 'fox', 'owl'), []
  for i in range(count):
    question, answer = f'{i}: say {words[i % 5]}', words[i % 5]
    lines.append(({'messages': turns(question, answer)},
                  {'conversations': [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]},
                  {'instruction': question, 'output': answer})[i % 3])
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path
