"""DeepSeek-V2 and V3 (2024): latent attention, shared and routed experts, in V3 a module for the token after the next.

Of the module that V3 publishes as one more layer, the embedding and the output matrix are the model's own; what
transformers writes lacks the layer, and is read without it.
"""
import math

from lmlib.interop.decoders import INV_FREQ, LAYER, TIED, rope, said_rope
from lmlib.interop.family import Entry, Family, Said
from lmlib.models import latent_moe
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.latent_attention import LatentStyle
from lmlib.nn.moe import Experts
from lmlib.nn.positions import Rope, Yarn
from lmlib.nn.router import TopK

SHARED = {r'model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight': "the model's own, which its modules share"}
TRAINING = ('aux_loss_alpha', 'seq_aux', 'ep_size', 'qk_head_dim', 'head_dim', 'num_key_value_heads')


def read_v2(said: Said) -> latent_moe.Config:
  """Our config of a config.json of V2."""
  said.only('scoring_func', 'softmax', default='softmax')
  said.only('norm_topk_prob', False, default=False)
  grouped = said.only('topk_method', 'greedy', 'group_limited_greedy', default='greedy') != 'greedy'
  router = TopK(said['num_experts_per_tok'], normalised=False, scale=float(said.get('routed_scaling_factor', 1.0)),
                groups=said['n_group'] if grouped else None, groups_chosen=said['topk_group'] if grouped else None)
  said.get('n_group'), said.get('topk_group')
  return _read(said, router, rope(said, said['max_position_embeddings'], neighbours=True), 0)


def read_v3(said: Said) -> latent_moe.Config:
  """Our config of a config.json of V3; its modules for further tokens, if the files beside it hold them."""
  said.only('scoring_func', 'sigmoid', default='sigmoid')
  said.only('topk_method', 'noaux_tc', default='noaux_tc')
  router = TopK(said['num_experts_per_tok'], score='sigmoid', normalised=said.get('norm_topk_prob', True),
                balanced=True, scale=float(said.get('routed_scaling_factor', 2.5)), groups=said.get('n_group', 8),
                groups_chosen=said.get('topk_group', 4), group_best=2)
  neighbours = said.get('rope_interleave', True)
  future = said.get('num_nextn_predict_layers', 0)
  first = f'model.layers.{said["num_hidden_layers"]}.eh_proj.weight'
  if said.tensors is not None and first not in said.tensors:
    future = 0
  return _read(said, router, rope(said, said['max_position_embeddings'], neighbours=neighbours), future)


def _read(said: Said, router: TopK, positions: Rope, future: int) -> latent_moe.Config:
  said.only('hidden_act', 'silu', default='silu')
  for switch in ('attention_bias', 'mlp_bias'):
    said.only(switch, False, default=False)
  said.only('moe_layer_freq', 1, default=1)
  for key in TRAINING:
    said.get(key)  # of training, or said again elsewhere
  scaling = Said(said.get('rope_parameters') or said.get('rope_scaling') or {})
  grown = 1.0
  if isinstance(positions.scaling, Yarn) and (mscale := scaling.get('mscale_all_dim')):
    grown = _grown(float(mscale), positions.scaling.factor)
  hidden, shared = said['moe_intermediate_size'], said.get('n_shared_experts')
  return latent_moe.Config(
      vocab=said['vocab_size'], layers=said['num_hidden_layers'], dense_layers=said.get('first_k_dense_replace', 0),
      width=said['hidden_size'], hidden=said['intermediate_size'], heads=said['num_attention_heads'],
      length=said['max_position_embeddings'], positions=positions,
      attention=LatentStyle(said['kv_lora_rank'], said.get('q_lora_rank'), said['qk_nope_head_dim'],
                            said['qk_rope_head_dim'], said['v_head_dim'], scale=grown**2),
      experts=Experts(said['n_routed_experts'], hidden, router, shared=shared and shared * hidden), future=future,
      norms=Norms(epsilon=said.get('rms_norm_eps', 1e-6)), ends=Ends(tied=said.get('tie_word_embeddings', False)))


def _grown(mscale: float, factor: float) -> float:
  return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def write_v2(config: latent_moe.Config) -> dict:
  """A config.json of our config."""
  router = config.experts.router
  return _write(config) | {'topk_method': 'greedy' if router.groups is None else 'group_limited_greedy',
                           'scoring_func': 'softmax', 'norm_topk_prob': False}


def write_v3(config: latent_moe.Config) -> dict:
  """A config.json of our config."""
  return _write(config) | {
      'topk_method': 'noaux_tc', 'scoring_func': 'sigmoid', 'norm_topk_prob': config.experts.router.normalised,
      'rope_interleave': config.positions.neighbours, 'num_nextn_predict_layers': config.future}


def _write(config: latent_moe.Config) -> dict:
  style, experts, positions = config.attention, config.experts, said_rope(config.positions)
  router = experts.router
  if isinstance(config.positions.scaling, Yarn) and style.scale != 1.0:
    mscale = (math.sqrt(style.scale) - 1) / (0.1 * math.log(config.positions.scaling.factor))
    positions['rope_scaling']['mscale_all_dim'] = round(mscale, 9)
  if experts.shared is not None and experts.shared % experts.hidden:
    raise ValueError(f'deepseek has shared experts of whole experts, not shared={experts.shared} of '
                     f'hidden={experts.hidden}')
  return positions | {
      'vocab_size': config.vocab, 'num_hidden_layers': config.layers, 'first_k_dense_replace': config.dense_layers,
      'hidden_size': config.width, 'intermediate_size': config.hidden, 'num_attention_heads': config.heads,
      'num_key_value_heads': config.heads, 'max_position_embeddings': config.length, 'kv_lora_rank': style.rank,
      'q_lora_rank': style.q_rank, 'qk_nope_head_dim': style.head_width, 'qk_rope_head_dim': style.turned_width,
      'v_head_dim': style.value_width, 'n_routed_experts': experts.count, 'moe_intermediate_size': experts.hidden,
      'n_shared_experts': experts.shared and experts.shared // experts.hidden, 'num_experts_per_tok': router.chosen,
      'routed_scaling_factor': router.scale, 'n_group': router.groups, 'topk_group': router.groups_chosen,
      'rms_norm_eps': config.norms.epsilon, 'hidden_act': 'silu', 'tie_word_embeddings': config.ends.tied}


def tensors(config: latent_moe.Config) -> dict[str, Entry | tuple[Entry, ...]]:
  """The table of weights: layers of three stacks of ours bear one name and numbers that go on."""
  first = {'dense/blocks': 0, 'blocks': config.dense_layers, 'further/blocks/block': config.layers}
  there = [path for path, count in zip(first, (config.dense_layers, 1, config.future)) if count]

  def entry(dims, *parts, among=tuple(there)):
    return tuple(Entry(dims, {f'{path}/{name}': letters for name, letters in parts}, start=first[path])
                 for path in among)

  attention, mlp, shared = f'{LAYER}self_attn', f'{LAYER}mlp', f'{LAYER}mlp.shared_experts'
  routed = tuple(path for path in there if path != 'dense/blocks')
  table = {
      'model.embed_tokens.weight': Entry('V D', {'embedding': ''}), 'model.norm.weight': Entry('D', {'norm/scale': ''}),
      f'{LAYER}input_layernorm.weight': entry('D', ('attention_norm/scale', '')),
      f'{LAYER}post_attention_layernorm.weight': entry('D', ('mlp_norm/scale', '')),
      f'{attention}.kv_a_proj_with_mqa.weight': entry('+ D', ('attention/kv_down', 'R'), ('attention/k_turned', 'P')),
      f'{attention}.kv_a_layernorm.weight': entry('R', ('attention/kv_norm/scale', '')),
      f'{attention}.kv_b_proj.weight': entry('K+ R', ('attention/k', 'H'), ('attention/v', 'W')),
      f'{attention}.o_proj.weight': entry('D KW', ('attention/out', '')),
      f'{mlp}.gate.weight': entry('E D', ('experts/router', ''), among=routed)}
  queries = ('attention/q', 'H'), ('attention/q_turned', 'P')
  if config.attention.q_rank is None:
    table[f'{attention}.q_proj.weight'] = entry('K+ D', *queries)
  else:
    table |= {f'{attention}.q_a_proj.weight': entry('Q D', ('attention/q_down', '')),
              f'{attention}.q_a_layernorm.weight': entry('Q', ('attention/q_norm/scale', '')),
              f'{attention}.q_b_proj.weight': entry('K+ Q', *queries)}
  for name, dims in (('gate', 'F D'), ('up', 'F D'), ('down', 'D F')):
    table[f'{mlp}.experts.{{E}}.{name}_proj.weight'] = entry(dims, (f'experts/{name}', ''), among=routed)
    if config.dense_layers:
      table[f'{mlp}.{name}_proj.weight'] = entry(dims, (f'mlp/{name}', ''), among=('dense/blocks',))
    if config.experts.shared is not None:
      table[f'{shared}.{name}_proj.weight'] = entry(dims, (f'experts/shared/{name}', ''), among=routed)
  if config.experts.router.balanced:
    table[f'{mlp}.gate.e_score_correction_bias'] = entry('E', ('experts/balance_bias', ''), among=routed)
  if config.future:
    table |= _further(config)
  if not config.ends.tied:
    table['lm_head.weight'] = Entry('V D', {'output': ''})
  return table


def _further(config: latent_moe.Config) -> dict[str, Entry]:
  """Of the modules, what is not of their blocks."""
  place = lambda dims, parts: Entry(dims, {f'further/blocks/{name}': letters for name, letters in parts.items()},
                                    start=config.layers)
  return {f'{LAYER}enorm.weight': place('D', {'token_norm/scale': ''}),
          f'{LAYER}hnorm.weight': place('D', {'hidden_norm/scale': ''}),
          f'{LAYER}eh_proj.weight': place('D +', {'from_token': 'F', 'from_hidden': 'F'}),
          f'{LAYER}shared_head.norm.weight': place('D', {'norm/scale': ''})}


COMMON = dict(tensors=tensors, prefixes=('model.',), ignored=INV_FREQ | SHARED, copies=TIED)
V2 = Family(('deepseek_v2',), ('DeepseekV2ForCausalLM',), read_v2, write_v2, **COMMON)
V3 = Family(('deepseek_v3',), ('DeepseekV3ForCausalLM',), read_v3, write_v3, **COMMON)
