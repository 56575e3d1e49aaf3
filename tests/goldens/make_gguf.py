"""Writes gguf.npz: a GGUF file of a small LLaMA, and the logits that transformers computes with it.

  python -m tests.goldens.make_gguf

Needs torch and transformers. The file is kept whole, so that reading is held to another's numbers even if writing
and reading came to agree on a wrong order of rows.
"""
import pathlib
import tempfile

import numpy as np

from lmlib.interop import gguf
from tests.interop.gguf_models import MODELS, params, tokenizer

TOKENS_T = np.random.default_rng(0).integers(5, 280, 24, np.int32)


def main():
  import torch
  import transformers
  with tempfile.TemporaryDirectory() as folder:
    gguf.save(pathlib.Path(folder) / 'm.gguf', MODELS['llama'], params(MODELS['llama']), tokenizer(), kind='Q8_0')
    raw = (pathlib.Path(folder) / 'm.gguf').read_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file='m.gguf', dtype=torch.float32).eval()
  with torch.inference_mode():
    logits_TV = model(torch.tensor(TOKENS_T[None].astype(np.int64))).logits[0].numpy()
  kept = {'raw': np.frombuffer(raw, np.uint8), 'logits_TV': logits_TV}
  np.savez_compressed(pathlib.Path(__file__).parent / 'gguf.npz', **kept)


if __name__ == '__main__':
  main()
