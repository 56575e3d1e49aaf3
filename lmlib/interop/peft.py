"""Adapters in PEFT's form: a folder of adapter_config.json and adapter_model.safetensors; into lmlib and back.

LoRA with rsLoRA and DoRA, IA3, prompt tuning, P-tuning and prefix tuning. Of the networks of P-tuning and of prefix
tuning PEFT keeps only what they make: these come back as a Prompt and as a Prefix without a network. Every key of the
config and every tensor must be known. A pickle file (adapter_model.bin) is never opened.
"""
import json
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmlib import trees
from lmlib.interop import folder as folders
from lmlib.interop import safetensors
from lmlib.interop.family import Family, Said, shapes
from lmlib.interop.peft_tensors import FRONT, Module, modules, split
from lmlib.models import protocol
from lmlib.nn.adapters import Adapter
from lmlib.nn.ia3 import Ia3
from lmlib.nn.lora import Lora
from lmlib.nn.matrices import ends, parts
from lmlib.nn.prompts import Prefix, Prompt, PTuning

CONFIG, FILE = 'adapter_config.json', 'adapter_model.safetensors'
# Of training, of where a model came from, or of where an adapter goes, which its tensors say.
INERT = {'auto_mapping', 'base_model_name_or_path', 'revision', 'inference_mode', 'peft_version', 'task_type',
         'lora_dropout', 'target_modules', 'exclude_modules', 'megatron_core', 'qalora_group_size', 'layers_pattern',
         'init_ia3_weights', 'fan_in_fan_out', 'token_dim', 'num_attention_heads', 'num_layers', 'prompt_tuning_init',
         'prompt_tuning_init_text', 'tokenizer_name_or_path', 'tokenizer_kwargs', 'encoder_hidden_size',
         'encoder_num_layers', 'encoder_dropout', 'encoder_reparameterization_type', 'prefix_projection',
         'init_weights', 'ensure_weight_tying'}
FEW = 5


def read(path, family: Family, config: protocol.Config) -> Adapter:
  """The adapter of a folder, for a model of this family and config.

  ValueError for damaged files, settings and tensors that are not known, and an adapter of another model.
  """
  folder = pathlib.Path(path).expanduser()
  if not folder.is_dir() or (said := folders.inside(folder, CONFIG)) is None:
    raise ValueError(f'{str(path)!r} holds no adapter: there is no {CONFIG}')
  if (file := folders.inside(folder, FILE)) is None:
    pickled = ' but adapter_model.bin: ' + safetensors.WHY if (folder / 'adapter_model.bin').exists() else ''
    raise ValueError(f'{folder}: there is no {FILE}{pickled}')
  said, stored = Said(folders.read_json(said)), {one.name: one for one in safetensors.header(file)}
  kind = said.get('peft_type')
  if kind not in READERS:
    raise ValueError(f'{folder}: peft_type={kind!r}; known are {", ".join(READERS)}')
  try:
    method, small = READERS[kind](said, stored, family, config)
  except (ValueError, TypeError, AttributeError) as error:
    raise ValueError(f'{folder}: {error}') from error
  if unread := [key for key in said.unread() if key not in INERT]:
    raise ValueError(f'{folder}: {CONFIG} says {", ".join(f"{key}={said[key]!r}" for key in unread)}, which is not '
                     'known here')
  return Adapter(jax.tree.map(jnp.asarray, small), method)


def write(path, adapter: Adapter, family: Family, config: protocol.Config):
  """Writes an adapter as a folder that `peft.PeftModel.from_pretrained(model, folder)` reads.

  ValueError for a method that PEFT has no form for, and if there is something at `path`.
  """
  method, path = adapter.method, pathlib.Path(path).expanduser()
  if adapter.weight != 1:
    raise ValueError(f'weight={adapter.weight}: a folder has no word for it; multiply alpha')
  writer = next((WRITERS[cls] for cls in type(method).__mro__ if cls in WRITERS), None)
  if writer is None:
    raise ValueError(f'{type(method).__name__} has no form in PEFT; {", ".join(cls.__name__ for cls in WRITERS)} have')
  small = jax.tree.map(lambda x: np.asarray(x, np.float32), jax.device_get(adapter.tree))
  said, arrays = writer(method, small, family, config)
  task = 'SEQ_2_SEQ_LM' if protocol.encodes(config) and protocol.decodes(config) else 'CAUSAL_LM'
  said = {'task_type': task if protocol.decodes(config) else None, 'inference_mode': True,
          'base_model_name_or_path': None} | said
  with folders.new(path, sum(x.nbytes for x in arrays.values())) as partial:
    tensors = {name: (x.shape, x.dtype) for name, x in arrays.items()}
    with safetensors.Writer(partial, tensors, single=FILE) as file:
      for name, x in arrays.items():
        file.write(name, x)
      file.close()
    (partial / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + '\n')


def _read_lora(said: Said, stored, family: Family, config):
  """(method, small tree) of lora_A and lora_B; modules of smaller rank are filled up with zeros."""
  rank, alpha = said.get('r', 8), said.get('lora_alpha', 8)
  stable, dora = said.get('use_rslora', False), said.get('use_dora', False)
  said.only('bias', 'none', default='none')
  said.only('init_lora_weights', True, False, 'gaussian', default=True)  # others change the weights of the base
  ranks, alphas = said.get('rank_pattern') or {}, said.get('alpha_pattern') or {}
  some = said.get('layers_to_transform') is not None
  found = _found(stored, modules(family, config, shapes(config)), ('lora_A.weight', 'lora_B.weight') + (
      ('lora_magnitude_vector',) if dora else ()))
  own = {module.name: (_of(ranks, module.name, rank), _of(alphas, module.name, alpha)) for module, _ in found}
  most = max((r for r, _ in own.values()), default=rank)
  method = Lora(most, float(alpha), tuple(sorted({path for module, _ in found for path in module.paths})), stable, dora)
  small = _zeros(method, config)
  filled = set()
  for module, tensors in found:
    r, a = own[module.name]
    scale = Lora(r, float(a), stable=stable).scale / method.scale
    made = {'lora_A.weight': module.lora_a(r), 'lora_B.weight': module.lora_b(r)}
    if dora:
      made['lora_magnitude_vector'] = module.magnitude()
    for suffix, tensor in made.items():
      for path, layer, x in split(tensor, _read(tensors[suffix], tensor.shape)):
        for one in module.paths if suffix == 'lora_A.weight' else (path.rpartition('/')[0],):
          where = small[f'{one}/{path.rpartition("/")[2]}'][layer]
          if suffix == 'lora_A.weight':
            where[..., :r] = x
          elif suffix == 'lora_B.weight':
            where[:r] = x * np.float32(scale)
          else:
            where[...] = x
          filled.add((one, layer))
  missing = sorted({f'layer {layer} of {path}' for path in method.targets for layer in range(
      small[f'{path}/a'].shape[0]) if (path, layer) not in filled})
  if missing and (dora or not some):
    raise ValueError(f'there are no tensors for {_few(missing)}, though others of it are adapted')
  return method, trees.replaced({}, small)


def _write_lora(method: Lora, small, family: Family, config):
  """(adapter_config, tensors); where several of ours are one of theirs, their ranks stand side by side."""
  found, arrays, ranks, alphas, adapted = parts(small), {}, {}, {}, []
  every = modules(family, config, shapes(config))
  for module in every.values():
    if not (here := [path for path in module.paths if path in found]):
      continue
    adapted.append(module)
    same = len(here) == len(module.paths) and all(np.array_equal(
        found[path]['a'][module.layer], found[here[0]]['a'][module.layer]) for path in here)
    if method.magnitude and not same:
      raise ValueError(f'{module.name} is {", ".join(module.paths)} in one, which DoRA of {", ".join(here)} cannot be '
                       'written for: lora_A would have to be the same')
    times = 1 if same else len(here)
    rank = method.rank * times
    if times > 1:
      ranks[module.name] = rank
      alphas[module.name] = method.scale * (rank**0.5 if method.stable else rank)
    a = np.concatenate([found[path]['a'][module.layer] for path in here[:1 if same else None]], axis=-1)
    b = []
    for place in module.lora_b(rank).places:
      b.append(np.zeros(place.shape, np.float32))
      if (path := place.path.rpartition('/')[0]) in here:
        first = 0 if same else method.rank * here.index(path)
        b[-1][first:first + method.rank] = found[path]['b'][module.layer]
    made = [(module.lora_a(rank), [a]), (module.lora_b(rank), b)]
    if method.magnitude:
      made.append((module.magnitude(), [found[path]['scale'][module.layer] for path in module.paths]))
    arrays |= {tensor.name: tensor.join(values) for tensor, values in made}
  _all_written(found, adapted, family)
  return {'peft_type': 'LORA', 'r': method.rank, 'lora_alpha': method.alpha, 'use_rslora': method.stable,
          'use_dora': method.magnitude, 'lora_dropout': 0.0, 'bias': 'none', 'init_lora_weights': True,
          'fan_in_fan_out': adapted[0].transposed, 'rank_pattern': ranks, 'alpha_pattern': alphas,
          'target_modules': _targets(adapted, every)}, arrays


def _read_ia3(said: Said, stored, family: Family, config):
  """(method, small tree) of the factors."""
  feedforward = said.get('feedforward_modules') or []
  found, targets, inputs, leaves = _found(stored, modules(family, config, shapes(config)), ('ia3_l',)), set(), set(), {}
  for module, tensors in found:
    of_inputs = any(module.name == name or module.name.endswith(f'.{name}') for name in (
        [feedforward] if isinstance(feedforward, str) else feedforward))
    (inputs if of_inputs else targets).update(module.paths)
    tensor = module.ia3(of_inputs)
    for path, layer, x in split(tensor, _read(tensors['ia3_l'], tensor.shape)):
      leaves.setdefault(path, {})[layer] = x
  depths = {path: leaf.shape[0] for path, leaf in trees.flat(nn.unbox(shapes(config))).items() if leaf.ndim}
  if short := sorted(path for path, rows in leaves.items() if len(rows) != depths[path.rpartition('/')[0]]):
    raise ValueError(f'there are no tensors for some layers of {_few(short)}')
  small = trees.replaced({}, {path: np.stack([rows[i] for i in range(len(rows))]) for path, rows in leaves.items()})
  return Ia3(tuple(sorted(targets)), tuple(sorted(inputs))), small


def _write_ia3(method: Ia3, small, family: Family, config):
  """(adapter_config, tensors); of several of ours in one of theirs, those without factors get ones."""
  found, arrays, adapted, fed = parts(small), {}, [], []
  every = modules(family, config, shapes(config))
  for module in every.values():
    here = [path for path in module.paths if path in found]
    if here:
      of_inputs = any(ends(here[0], target) for target in method.inputs)
      tensor = module.ia3(of_inputs)
      arrays[tensor.name] = tensor.join([
          found[path]['scale'][module.layer] if path in found else np.ones(place.shape, np.float32)
          for path, place in zip(module.paths, tensor.places)])
      adapted.append(module)
      fed += [module] * of_inputs
  _all_written(found, adapted, family)
  return {'peft_type': 'IA3', 'target_modules': _targets(adapted, every), 'init_ia3_weights': True,
          'feedforward_modules': _targets(fed, every), 'fan_in_fan_out': adapted[0].transposed}, arrays


def _read_prompt(said: Said, stored, family: Family, config):
  """(method, small tree) of virtual tokens; a network that made them is not in the folder."""
  _no_scale(config)
  table_SD = _read(_only(stored), (said['num_virtual_tokens'], config.width))
  said.only('num_transformer_submodules', 1, None, default=None)
  return Prompt(said['num_virtual_tokens']), {'prompt': {'table': table_SD}}


def _write_prompt(method: Prompt, small, family: Family, config):
  """(adapter_config, tensors)."""
  _no_scale(config)
  kind = {'peft_type': 'P_TUNING', 'encoder_hidden_size': method.hidden} if isinstance(method, PTuning) else {
      'peft_type': 'PROMPT_TUNING', 'prompt_tuning_init': 'RANDOM'}
  table_SD = np.asarray(method.vectors(jax.tree.map(jnp.asarray, small)))
  return kind | {'num_virtual_tokens': method.length, 'token_dim': config.width, 'num_layers': config.layers,
                 'num_attention_heads': config.heads, 'num_transformer_submodules': 1}, {'prompt_embeddings': table_SD}


def _read_prefix(said: Said, stored, family: Family, config):
  """(method, small tree) of keys and values."""
  said.only('num_transformer_submodules', 1, None, default=None)
  S, L, K, H = said['num_virtual_tokens'], config.layers, config.kv_heads, config.head_width
  x_SL2KH = _read(_only(stored), (S, L * 2 * K * H)).reshape(S, L, 2, K, H)
  k_LSKH, v_LSKH = (np.ascontiguousarray(x_SL2KH[:, :, i].swapaxes(0, 1)) for i in range(2))
  return Prefix(S), {'blocks': {'attention': {'prefix': {'k': k_LSKH, 'v': v_LSKH}}}}


def _write_prefix(method: Prefix, small, family: Family, config):
  """(adapter_config, tensors)."""
  kv_LSKH = [np.asarray(x) for x in method.keys_and_values(jax.tree.map(jnp.asarray, small))]
  x_SL2KH = np.stack(kv_LSKH, 2).swapaxes(0, 1)
  return {'peft_type': 'PREFIX_TUNING', 'num_virtual_tokens': method.length, 'num_layers': config.layers,
          'token_dim': config.kv_heads * config.head_width, 'num_attention_heads': config.kv_heads,
          'num_transformer_submodules': 1, 'prefix_projection': False, 'encoder_hidden_size': config.width}, {
              'prompt_embeddings': np.ascontiguousarray(x_SL2KH.reshape(method.length, -1))}


READERS = {'LORA': _read_lora, 'IA3': _read_ia3, 'PROMPT_TUNING': _read_prompt, 'P_TUNING': _read_prompt,
           'PREFIX_TUNING': _read_prefix}
WRITERS = {Lora: _write_lora, Ia3: _write_ia3, Prompt: _write_prompt, Prefix: _write_prefix}


def _found(stored, known: dict[str, Module], suffixes: tuple[str, ...]) -> list[tuple[Module, dict]]:
  """The modules that have tensors, with those by suffix. ValueError for others, and if one of a module is missing."""
  found, unknown = {}, []
  for name in stored:
    suffix = next((suffix for suffix in suffixes if name.endswith(f'.{suffix}')), None)
    module = None if suffix is None else known.get(name.removeprefix(FRONT).removesuffix(f'.{suffix}'))
    if module is None:
      unknown.append(name)
    else:
      found.setdefault(module.name, {})[suffix] = stored[name]
  if unknown or not found:
    raise ValueError(f'this adapter is of another model: it has {_few(unknown) or "no tensors"}; modules that may be '
                     f'adapted are {", ".join(sorted({name.rpartition(".")[2] for name in known}))}')
  if missing := [f'{name}.{suffix}' for name, there in found.items() for suffix in suffixes if suffix not in there]:
    raise ValueError(f'tensors are missing: {_few(missing)}')
  return [(known[name], there) for name, there in found.items()]


def _read(stored, shape: tuple[int, ...]) -> np.ndarray:
  if stored.shape != shape:
    raise ValueError(f'this adapter is of another model: {stored.name} has the shape {stored.shape}, and must have '
                     f'{shape}')
  if not jnp.issubdtype(stored.dtype, jnp.floating):
    raise ValueError(f'{stored.name} is {stored.dtype}, no floating-point type')
  return stored.read().astype(np.float32)


def _only(stored):
  if set(stored) != {'prompt_embeddings'}:
    raise ValueError(f'there must be prompt_embeddings and nothing else, not {_few(sorted(stored))}')
  return stored['prompt_embeddings']


def _zeros(method: Lora, config) -> dict[str, np.ndarray]:
  """A tree of the method's, by path, to be filled."""
  boxes = nn.unbox(method.boxed(shapes(config)))
  return {path: np.zeros(leaf.shape, np.float32) for path, leaf in trees.flat(boxes).items()}


def _of(patterns: dict, name: str, default):
  """What PEFT's rank_pattern or alpha_pattern says of a module; its keys may be ends of names, not expressions."""
  if odd := [key for key in patterns if not key.replace('.', '').replace('_', '').isalnum()]:
    raise ValueError(f'the pattern {odd[0]!r} is no end of a name')
  return next((value for key, value in patterns.items() if f'.{name}'.endswith(f'.{key}')), default)


def _targets(adapted: list[Module], every: dict[str, Module]) -> list[str]:
  """Last parts of names where these choose the modules and no others, else whole names."""
  last = sorted({module.name.rpartition('.')[2] for module in adapted})
  chosen = [name for name in every if name.rpartition('.')[2] in last]
  return last if len(chosen) == len(adapted) else [module.name for module in adapted]


def _all_written(found: dict, adapted: list[Module], family: Family):
  if lost := sorted(found.keys() - {path for module in adapted for path in module.paths}):
    raise ValueError(f'{", ".join(lost)}: no linear layer of the family {family.model_types[0]} holds this')


def _no_scale(config):
  if config.ends.scale is not None:
    raise ValueError(f'ends.scale={config.ends.scale}: models of transformers that scale embeddings differ in whether '
                     'they scale vectors given in their place')


def _few(names: list[str]) -> str:
  return ', '.join(names[:FEW]) + (f' and {len(names) - FEW} more' if len(names) > FEW else '')
