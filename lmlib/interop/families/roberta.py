"""RoBERTa (Liu et al. 2019), as `RobertaForMaskedLM` publishes it, and XLM-RoBERTa; BERT's form with other ends."""
import numpy as np

from lmlib.interop.families import bert
from lmlib.interop.family import PROBE, Entry, Family, Said
from lmlib.models import encoder
from lmlib.nn.positions import Learned

HEADS = {'ForMaskedLM': (True, False), 'Model': (False, True)}
KINDS = ('Roberta', 'XLMRoberta')


def read(said: Said) -> encoder.Config:
  """Our config of a config.json."""
  known = [[kind + name] for kind in KINDS for name in HEADS]
  name = said.only('architectures', *known, default=known[0])[0]
  has = HEADS[name.rpartition('Roberta')[2]]
  predicts, pooler = has if said.tensors is None else bert.heads(said.tensors, 'lm_head.')
  offset = said.get('pad_token_id', 1) + 1
  return bert.config(said, encoder.Ends(types=said.get('type_vocab_size', 2), predicts=predicts, pooler=pooler),
                     said['max_position_embeddings'] - offset, positions=Learned(offset))


def write(config: encoder.Config) -> dict:
  """The config.json of our config; its architecture is RoBERTa's in either case."""
  name = 'RobertaForMaskedLM' if config.ends.predicts else 'RobertaModel'
  if config.positions.offset < 1:
    raise ValueError(f'Learned.offset={config.positions.offset}: positions of RoBERTa come after that of its padding')
  return {'architectures': [name], 'pad_token_id': config.positions.offset - 1,
          **bert.written(config, config.length + config.positions.offset)}


def tensors(config: encoder.Config) -> dict[str, Entry]:
  """The table of weights."""
  if not config.ends.predicts:
    return bert.body(config, '')
  return bert.body(config, 'roberta.') | {
      'lm_head.dense.weight': Entry('F D', {'transform': ''}), 'lm_head.dense.bias': Entry('F', {'transform_bias': ''}),
      **bert.norm('lm_head.layer_norm', 'transform_norm'), 'lm_head.bias': Entry('V', {'output_bias': ''})}


def probe(config: encoder.Config) -> tuple[tuple, dict]:
  """Tokens without that of padding, from which transformers counts positions."""
  shape, padding = (2, min(config.length, PROBE)), config.positions.offset - 1
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab - 1, shape, np.int32)
  tokens_BT += tokens_BT >= padding
  return (tokens_BT,), {'input_ids': tokens_BT}


ROBERTA = Family(
    model_types=('roberta', 'xlm-roberta'), architectures=('RobertaForMaskedLM', 'XLMRobertaForMaskedLM'), read=read,
    write=write, tensors=tensors, prefixes=('roberta.',),
    ignored={r'(roberta\.)?embeddings\.position_ids': 'they count from the padding on'},
    copies={'lm_head.decoder.weight': 'roberta.embeddings.word_embeddings.weight',
            'lm_head.decoder.bias': 'lm_head.bias'},
    probe=probe)
