"""Scores text with a model of a WORKDIR, trained or converted: bits per byte, beside compressors.

  python experiments/evaluate.py --gin_file=evaluate.gin --gin_bindings='GLOB = "texts/*.txt"'
"""
from lmlib import cli

if __name__ == '__main__':  # before jax is imported, which reads its log level then
  cli.run(__file__)

import json
import pathlib

from lmlib import sharding
from lmlib.data.sources import TextFiles
from lmlib.data.tokenizer import Tokenizer
from lmlib.eval import perplexity
from lmlib.models import protocol
from lmlib.train.checkpoint import restore_params
from lmlib.train.step import placed


def main(*, workdir: str, source: TextFiles, layout=sharding.Layout(), length: int | None = None,
         stride: int | None = None):
  """Prints the bits per byte of whole documents of `source` as one JSON object, the last line.

  They are read in windows of `length` tokens (None: the model's longest), `stride` apart (None: half).
  """
  folder = pathlib.Path(workdir).expanduser()
  model = cli.saved_model(workdir)
  tokenizer = Tokenizer.load(folder / 'tokenizer.model')
  length = model.length if length is None else length
  stride = max(1, length // 2) if stride is None else stride
  texts = [document.text for document in source.documents()]
  before = tokenizer.bos if tokenizer.starts else tokenizer.eos  # what stands before a document where they follow
  documents = [([before, *tokenizer.encode(text).tolist(), tokenizer.eos], len(text.encode()))
               for text in texts]
  with sharding.use(layout):
    params, step, _ = restore_params(folder / 'checkpoints', placed(protocol.boxed(model)))
    score = perplexity.score(model, params, documents, length=length, stride=stride)
  print(f'{workdir} after step {step} on {len(texts)} documents, {score.bytes:,} bytes')
  print(json.dumps({'bits_per_byte': score.bits_per_byte, 'perplexity': score.perplexity, 'tokens': score.tokens,
                    'compressors_bits_per_byte': perplexity.compressors([text.encode() for text in texts])}))
