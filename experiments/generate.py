"""Continues prompts, or talks, with a model that lmlib trained or tuned, or with one of others.

  python experiments/generate.py --gin_file=generate.gin --gin_bindings='PROMPTS = ("import ",)'
  python experiments/generate.py --gin_file=generate_file.gin --gin_bindings='PATH = "prompts.jsonl"'
  python experiments/generate.py --gin_file=chat.gin --gin_bindings='WORKDIR = "SmolLM2-135M-Instruct"'
  python experiments/generate.py --gin_file=generate.gin --gin_bindings='generate.main.search = @beams.Beams()' \\
      --gin_bindings='sampling.Sampling.temperature = 0.0'

WORKDIR is the folder of a run, one in Hugging Face's form, a GGUF file, or `package:NAME` of one in a package.
"""
from lmlib import cli

if __name__ == '__main__':  # before jax is imported, which reads its log level then
  cli.run(__file__)

import dataclasses
import json
import time

import jax

from lmlib import sharding
from lmlib.data.chat import Chat
from lmlib.interop.opened import opened
from lmlib.models import protocol
from lmlib.serve import texts, weights
from lmlib.serve.beams import Beams
from lmlib.serve.best_of import BestOf
from lmlib.serve.contrastive import Contrastive
from lmlib.serve.conversation import talk
from lmlib.serve.drafts import EarlyLayers, Heads, Lookup, Model
from lmlib.serve.generate import continued, stream
from lmlib.serve.sampling import Sampling
from lmlib.serve.speculative import Drafted


def main(*, workdir: str, prompts: tuple = (), file: str | None = None, how: Sampling = Sampling(0.7, most=200),
         search: Beams | Contrastive | BestOf | None = None, against: str | None = None, guidance: float = 1.0,
         draft: Lookup | EarlyLayers | Heads | str | None = None, chat: Chat | None = None, system: str | None = None,
         start: int | None = None, batch: int = 16, layout=sharding.Layout()):
  """Prints each of `prompts` and what follows it, or answers the lines of a file, or talks.

  file: .txt with a prompt a line, or .jsonl with a `prompt` or `messages` a line; printed is each line with its
  `text`, why it `ended` and its `logp` in nats, and its `score` among others that were searched. chat: how messages
  become a prompt; prompts are questions then, behind the turn `system`, and without prompts or file one talks.
  search: what to write instead of draws by `how`. against and guidance: away from the continuation of which text, and
  how far (1: not at all). start: the token that the decoder of an encoder-decoder begins with; None: the tokeniser's
  bos. draft: what guesses tokens ahead, or the WORKDIR of a smaller model that does; the text stays the same, and how
  many guesses were right is printed. Prompt i draws by the seed how.seed + i, whatever the batch.
  """
  talks = chat is not None and not prompts and file is None
  if bool(prompts) + (file is not None) + talks != 1:
    raise ValueError(f'prompts={prompts!r} and file={file!r}: give one of them, or a chat to talk')
  if system is not None and chat is None:
    raise ValueError(f'system={system!r} has no effect without a chat')
  if talks and (search is not None or against is not None):
    raise ValueError(f'search={search} and against={against!r} are of prompts: leave them out to talk')
  if search is not None and against is not None and not isinstance(search, BestOf):
    raise ValueError(f'against={against!r} guides draws, and search={search} is none')
  if draft is not None and (against is not None or not isinstance(search, BestOf | None)):
    raise ValueError(f'draft={draft} goes with draws of one prompt, not with search={search} and against={against!r}')
  if (against is None) != (guidance == 1.0):
    raise ValueError(f'guidance={guidance} has no effect without against, nor against={against!r} without guidance')
  if batch < 1:
    raise ValueError(f'batch={batch} must be at least 1')
  found = opened(workdir, cli.saved_model, 'WORKDIR')
  model, tokenizer, source = found.config, found.tokenizer, found.source
  if not protocol.decodes(model):
    raise ValueError(f'WORKDIR {source!r} holds an encoder: it scores hidden tokens and generates none')
  if how.most >= model.length:
    raise ValueError(f"Sampling.most={how.most} leaves no room for a prompt in the model's length={model.length}")
  if protocol.encodes(model) and start is None:
    start = tokenizer.bos
  records = [] if talks else texts.records(file) if file is not None else [{'prompt': prompt} for prompt in prompts]
  ids, room = [], model.length if protocol.encodes(model) else model.length - how.most
  for number, record in enumerate(records, 1):
    ids.append(texts.tokens(record, tokenizer, chat, system))
    if len(ids[-1]) > room:
      raise ValueError(f'prompt {number} of {len(records)} has {len(ids[-1])} tokens; beside Sampling.most={how.most} '
                       f"there is room for {room} in the model's length={model.length}")

  with sharding.use(layout):
    params = found.params(model)
    if jax.default_backend() == 'cpu' and not protocol.encodes(model):
      model, params = weights.laid_out(model, params)
    if isinstance(draft, str):
      small = opened(draft, cli.saved_model, 'draft')
      given = small.config, small.params(small.config)
      draft = Model(*(weights.laid_out(*given) if jax.default_backend() == 'cpu' else given))
    settings = dict(eos=tokenizer.eos, tokenizer=texts.Meaning(tokenizer), start=start)
    settings |= {} if draft is None else dict(draft=draft)
    told, written, began = Drafted(), 0, time.perf_counter()
    if talks:
      print(f'{source}: Ctrl-C leaves an answer, Ctrl-D ends', flush=True)
      talk(lambda ids: stream(model, params, [ids], how, chunk=4, **settings), tokenizer, chat, room=room,
           system=system, stop=how.stop)
      return
    if file is None:
      print(source)
    for first in range(0, len(ids), batch):
      given = ids[first:first + batch]
      rows = [dataclasses.replace(how, seed=how.seed + first + i) for i in range(len(given))]
      if against is not None:
        settings |= dict(against=[tokenizer.prompt(against)] * len(given), guidance=guidance)
      found = (continued(model, params, given, rows, **settings) if search is None else
               search.best(model, params, given, how, **settings))
      for record, row in zip(records[first:], found):
        told, written = told.plus(row.drafted or Drafted()), written + len(row.tokens)
        if file is None:
          print(f'---- {record["prompt"]!r} is {"continued" if chat is None else "answered"}\n'
                f'{record["prompt"] if chat is None else ""}{row.text}\n')
        else:
          scored = {} if row.score is None else {'score': row.score}
          if draft is not None:
            scored |= {'acceptance': row.drafted.acceptance, 'tokens_a_step': row.drafted.tokens_a_step}
          said = record | {'text': row.text, 'ended': row.ended, 'logp': sum(row.logp)} | scored
          print(json.dumps(said, ensure_ascii=False), flush=True)
    if draft is not None and file is None:
      print(f'drafts      {told.acceptance:.0%} of {told.drafted} tokens accepted, {told.tokens_a_step:.2f} tokens a '
            f'run of the model; {written / (time.perf_counter() - began):.1f} tokens/s with compilation')
