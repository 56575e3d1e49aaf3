"""T5 1.0, T5 1.1 and FLAN-T5 (Raffel et al. 2020), as `T5ForConditionalGeneration` publishes them."""
import numpy as np

from lmlib.interop.family import PROBE, Entry, Family, Said
from lmlib.models import encoder_decoder
from lmlib.nn.block import Norms
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.relative_bias import Buckets

# feed_forward_proj and what it is here: activation, gated. T5's gated gelu is the approximation by tanh.
STYLES = {'relu': ('relu', False), 'gated-gelu': ('gelu_tanh', True), 'gated-silu': ('silu', True),
          'gated-relu': ('relu', True), 'gelu': ('gelu', False)}
LENGTH = 512  # of the texts it was trained on; its positions have no end


def read(said: Said) -> encoder_decoder.Config:
  """Our config of a config.json."""
  tied, layers = tied_and_scaled(said), said['num_layers']
  activation, gated = STYLES[said.only('feed_forward_proj', *STYLES, default='relu')]
  for follows in ('dense_act_fn', 'is_gated_act', 'decoder_start_token_id'):
    said.get(follows)  # from what is read above, or of generating
  said.only('is_encoder_decoder', True, default=True)
  return encoder_decoder.Config(
      vocab=said['vocab_size'], encoder_layers=layers, layers=said.get('num_decoder_layers', layers),
      width=said['d_model'], hidden=said['d_ff'], heads=said['num_heads'], head_width=said['d_kv'],
      length=said.get('n_positions', LENGTH),
      positions=Buckets(said.get('relative_attention_num_buckets', 32),
                        said.get('relative_attention_max_distance', 128)),
      mlp=MlpStyle(activation, gated), norms=Norms(epsilon=said.get('layer_norm_epsilon', 1e-6)),
      ends=encoder_decoder.Ends(tied, said['d_model']**-0.5 if tied else None))


def tied_and_scaled(said: Said) -> bool:
  """Whether a config.json is of T5 1.0, which has one table and scores scaled states; T5 1.1 does neither.

  transformers 5 says of both that they are tied, and tells them apart by whether they scale.
  """
  tied = said.get('tie_word_embeddings', True)
  scaled = said.get('scale_decoder_outputs', tied)
  if scaled and not tied:
    raise ValueError('config.json says scale_decoder_outputs=True and tie_word_embeddings=False: no T5 does both')
  if tied and not scaled and said.tensors is not None and 'lm_head.weight' not in said.tensors:
    raise ValueError('config.json says scale_decoder_outputs=False, of a T5 1.1, whose lm_head.weight is not there')
  return scaled


def write(config: encoder_decoder.Config) -> dict:
  """The config.json of our config."""
  styles = {style: name for name, style in STYLES.items()}
  if (style := (config.mlp.activation, config.mlp.gated)) not in styles:
    raise ValueError(f'MlpStyle.activation={style[0]!r} with gated={style[1]}: T5 has {", ".join(map(str, styles))}')
  return {
      'vocab_size': config.vocab, 'num_layers': config.encoder_layers, 'num_decoder_layers': config.layers,
      'd_model': config.width, 'd_ff': config.hidden, 'num_heads': config.heads, 'd_kv': config.head_width,
      'n_positions': config.length, 'relative_attention_num_buckets': config.positions.buckets,
      'relative_attention_max_distance': config.positions.furthest, 'layer_norm_epsilon': config.norms.epsilon,
      'feed_forward_proj': styles[style], 'tie_word_embeddings': config.ends.tied, 'is_encoder_decoder': True}


def attention(theirs: str, ours: str) -> dict[str, Entry]:
  """The four projections of a kind of attention."""
  axes = {'q': 'KGH D', 'k': 'KH D', 'v': 'KH D'}
  return {**{f'{theirs}.{name}.weight': Entry(dims, {f'{ours}/{name}': ''}) for name, dims in axes.items()},
          f'{theirs}.o.weight': Entry('D KGH', {f'{ours}/out': ''})}


def stack(side: str, gated: bool, crossed: bool) -> dict[str, Entry]:
  """The table of the encoder, or of the decoder."""
  layer, blocks = f'{side}.block.{{L}}.layer.', f'{side}/blocks/'
  last = 2 if crossed else 1
  scale = lambda i, name: {f'{layer}{i}.layer_norm.weight': Entry('D', {f'{blocks}{name}_norm/scale': ''})}
  first, ups = f'{side}.block.0.layer.0.SelfAttention', {'wi_0': 'gate', 'wi_1': 'up'} if gated else {'wi': 'up'}
  found = {f'{first}.relative_attention_bias.weight': Entry('I KG', {f'{side}/relative/distance_bias': ''})}
  found |= attention(f'{layer}0.SelfAttention', f'{blocks}attention') | scale(0, 'attention')
  if crossed:
    found |= attention(f'{layer}1.EncDecAttention', f'{blocks}cross_attention') | scale(1, 'cross_attention')
  dense = f'{layer}{last}.DenseReluDense.'
  found |= {f'{dense}{theirs}.weight': Entry('F D', {f'{blocks}mlp/{ours}': ''}) for theirs, ours in ups.items()}
  found |= {f'{dense}wo.weight': Entry('D F', {f'{blocks}mlp/down': ''})} | scale(last, 'mlp')
  return found | {f'{side}.final_layer_norm.weight': Entry('D', {f'{side}/norm/scale': ''})}


def tensors(config: encoder_decoder.Config) -> dict[str, Entry]:
  """The table of weights."""
  gated = config.mlp.gated
  output = {} if config.ends.tied else {'lm_head.weight': Entry('V D', {'output': ''})}
  return {'shared.weight': Entry('V D', {'embedding': ''}), **stack('encoder', gated, False),
          **stack('decoder', gated, True), **output}


def probe(config: encoder_decoder.Config) -> tuple[tuple, dict]:
  """Tokens of both sides, of different lengths."""
  rng, longest = np.random.default_rng(0), min(config.length, PROBE)
  inputs_BS = rng.integers(0, config.vocab, (2, longest), np.int32)
  tokens_BT = rng.integers(0, config.vocab, (2, max(1, longest // 2)), np.int32)
  return (tokens_BT, None, None, None, inputs_BS), {'input_ids': inputs_BS, 'decoder_input_ids': tokens_BT}


T5 = Family(
    model_types=('t5',), architectures=('T5ForConditionalGeneration',), read=read, write=write, tensors=tensors,
    ignored={r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight':
             'of old files: attention to the inputs has no positions'},
    copies={'encoder.embed_tokens.weight': 'shared.weight', 'decoder.embed_tokens.weight': 'shared.weight',
            'lm_head.weight': 'shared.weight'},
    probe=probe)
