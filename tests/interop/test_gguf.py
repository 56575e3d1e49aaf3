"""Models go into GGUF files and come back, numbers, tokeniser and all; what a file cannot mean is refused."""
import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from lmlib import trees
from lmlib.data.tokenizer import Bytes, SentencePiece, Tokenizer
from lmlib.interop import gguf, gguf_file, gguf_names, gguf_tokenizer
from lmlib.nn.decoder import Ends
from lmlib.nn.stack import Execution
from tests.data.prose import CHINESE, ENGLISH
from tests.goldens.make_gguf import TOKENS_T
from tests.interop.gguf_models import MODELS, TEMPLATE, params, tokenizer

PROSE = ENGLISH + CHINESE
models = pytest.mark.parametrize('name', MODELS)
LLAMA = MODELS['llama']


def matrices(tree):
  """Which leaves a file keeps in the type asked for: those that are matrices in it."""
  return {name for name, x in trees.flat(tree).items() if x.ndim - name.startswith('blocks/') > 1
          and not name.endswith('_bias')}


@models
def test_what_is_written_is_read(name, tmp_path):
  """F16: float16 rounding of matrices and nothing else, whatever the axes, joints and pairs of the architecture."""
  config, ours = MODELS[name], params(MODELS[name])
  gguf.save(tmp_path / 'm.gguf', config, ours, tokenizer())
  back, theirs, read = gguf.load(tmp_path / 'm.gguf')
  assert back == config
  assert gguf_file.opened(tmp_path / 'm.gguf').metadata['general.architecture'] == name.split(' ')[0]
  rounded = matrices(ours)
  for path, x in trees.flat(theirs).items():
    wanted = trees.flat(ours)[path]
    np.testing.assert_array_equal(x, wanted.astype(np.float16).astype(np.float32) if path in rounded else wanted, path)
  assert (read.fingerprint, read.chat_template) == (Tokenizer(read.model).fingerprint, TEMPLATE)
  text = 'the cat sat: 12 dogs\n\n<|im_end|> \u4e2d'
  np.testing.assert_array_equal(read.encode_with_specials(text), tokenizer().encode_with_specials(text))
  assert (read.bos, read.eos, read.starts) == (tokenizer().bos, tokenizer().eos, tokenizer().starts)


def test_f32_is_exact_and_q8_is_near(tmp_path):
  ours = params(LLAMA)
  for kind, far in (('F32', 0), ('Q8_0', 0.5 / 127)):  # half a step of the largest of a block
    gguf.save(tmp_path / 'm.gguf', LLAMA, ours, None, kind=kind)
    _, theirs, read = gguf.load(tmp_path / 'm.gguf')
    assert read is None
    for path, x in trees.flat(theirs).items():
      wanted = trees.flat(ours)[path]
      assert abs(x - wanted).max() <= far * 1.01 * abs(wanted).max(), path  # a scale is a float16
  assert (np.asarray(theirs['embedding']) != ours['embedding']).any()
  assert gguf_file.opened(tmp_path / 'm.gguf').tensors['blk.0.attn_norm.weight'].kind == 'F32'


def test_pairs_of_neighbours_are_not_written(tmp_path):
  """What is read turns halves, whatever the file; a model that turns neighbours would not come back as it is."""
  config = dataclasses.replace(LLAMA, positions=dataclasses.replace(LLAMA.positions, neighbours=True))
  with pytest.raises(ValueError, match='neighbours'):
    gguf.save(tmp_path / 'm.gguf', config, params(config), None)


def reference(kind: str, raw: np.ndarray) -> np.ndarray:
  """Blocks of a kind, one after the other, entry by entry as ggml defines them."""
  half = lambda at: float(raw[at:at + 2].view(np.float16)[0])
  low, high = (lambda b: int(b) & 15), (lambda b: int(b) >> 4)
  match kind:
    case 'Q8_0':
      return half(0) * raw[2:].view(np.int8).astype(float)
    case 'Q4_0':
      return half(0) * (np.array([*map(low, raw[2:]), *map(high, raw[2:])]) - 8)
    case 'Q4_1':
      return half(0) * np.array([*map(low, raw[4:]), *map(high, raw[4:])]) + half(2)
    case 'Q5_0' | 'Q5_1':
      start = 2 if kind == 'Q5_0' else 4
      fifth = int(raw[start:start + 4].view(np.uint32)[0])
      nibbles = [*map(low, raw[start + 4:]), *map(high, raw[start + 4:])]
      q = np.array([n | (fifth >> i & 1) << 4 for i, n in enumerate(nibbles)])
      return half(0) * (q - 16) if kind == 'Q5_0' else half(0) * q + half(2)
    case 'Q4_K' | 'Q5_K':
      s, out = raw[4:16].astype(int), []
      for j in range(8):
        scale = s[j] & 63 if j < 4 else s[j + 4] & 15 | s[j - 4] >> 6 << 4
        least = s[j + 4] & 63 if j < 4 else s[j + 4] >> 4 | s[j] >> 6 << 4
        q = raw[-128:][32 * (j // 2):][:32].astype(int) >> 4 * (j % 2) & 15
        if kind == 'Q5_K':
          q |= (raw[16:48].astype(int) >> j & 1) << 4
        out.append(half(0) * scale * q - half(2) * least)
      return np.concatenate(out)
    case 'Q6_K':
      ql, qh, scales, out = raw[:128].astype(int), raw[128:192].astype(int), raw[192:208].view(np.int8), np.zeros(256)
      for n in range(256):
        part, i = n // 128, n % 128
        nibble = ql[64 * part + i % 64] >> 4 * (i // 64) & 15
        q = nibble | (qh[32 * part + i % 32] >> 2 * (i // 32) & 3) << 4
        out[n] = half(208) * scales[n // 16] * (q - 32)
      return out
    case 'F32' | 'F16':
      return raw.view(kind.replace('F', 'float')).astype(float)
    case 'BF16':
      return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(float)


@pytest.mark.parametrize('kind', gguf_file.KINDS)
def test_kinds_of_tensors_are_read_as_defined(kind, tmp_path):
  _, entries, size = gguf_file.KINDS[kind]
  draw = np.random.default_rng(0)
  blocks = draw.integers(0, 256, (6, size * (256 // entries)), np.uint8)
  for row in blocks.reshape(-1, size):
    if kind in ('F32', 'F16', 'BF16'):
      row[-1] &= 0x3f  # no infinities
    else:
      at = [208] if kind == 'Q6_K' else [0] if kind in ('Q8_0', 'Q4_0', 'Q5_0') else [0, 2]
      for i in at:
        row[i:i + 2] = np.array([draw.normal()], np.float16).view(np.uint8)
  (tmp_path / 'blocks').write_bytes(blocks.tobytes())
  found = gguf_file.Stored(tmp_path / 'blocks', 'x', kind, (6, 256)).read()
  wanted = np.concatenate([reference(kind, row.copy()) for row in blocks.reshape(-1, size)]).reshape(6, 256)
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * abs(wanted).max())  # float32 and its order


def said(config=LLAMA, **changes):
  """The metadata and shapes of a file, with changes of keys of its architecture."""
  _, tensors = gguf._tensors(config, 'llama')
  metadata = gguf_names.metadata('llama', config)
  return metadata | {f'llama.{key}': value for key, value in changes.items()}, {n: t.shape for n, t in tensors.items()}


@pytest.mark.parametrize(('changes', 'expected'), [
    ({'rope.scaling.type': 'linear', 'rope.scaling.factor': 4.0, 'rope.scaling.beta': 2.0}, 'rope.scaling.beta=2.0'),
    ({'rope.scaling.type': 'su', 'rope.scaling.factor': 4.0}, "rope.scaling.type='su' is not known"),
    ({'rope.dimension_count': 4}, 'rope.dimension_count=4 does not fit heads of 8'),
    ({'expert_count': 8}, 'expert_count=8'), ({'attention.value_length': 16}, 'value_length=16'),
    ({'attention.causal': False}, 'causal=False'), ({'block_count': 3}, 'block_count=3, but there are tensors of 2'),
    ({'block_count': 2**40}, 'whole number'), ({'vocab_size': 7}, 'vocab_size=7.*288 rows'),
    ({'attention.head_count': np.array([4, 3])}, 'head_count=array'), ({'embedding_length': None}, 'embedding_length'),
    ({'attention.layer_norm_rms_epsilon': float('nan')}, 'epsilon=nan must be a positive'),
    ({'feed_forward_length': 2**30}, 'feed_forward_length'), ({'rope.freq_base': 'x'}, "freq_base='x'"),
    ({'logit_scale': 0.5}, 'logit_scale=0.5'),
    ({'attention.sliding_window': 8}, 'sliding_window=8'), ({'final_logit_softcapping': 9.0}, 'softcapping=9.0')])
def test_what_no_config_can_say_is_refused_by_its_key(changes, expected):
  with pytest.raises(ValueError, match=expected):
    gguf_names.config(*said(**changes), {})


def test_a_switch_that_is_off_asks_for_nothing():
  assert gguf_names.config(*said(**{'expert_count': 0, 'attention.clamp_kqv': 0.0}), {}) == LLAMA


def test_an_unknown_architecture_is_told_the_nearest():
  for name, nearest in (('lama', 'llama'), ('qwen4', 'qwen')):
    with pytest.raises(ValueError, match=rf'general\.architecture={name!r} is not known.*did you mean "{nearest}.*'
                                         'known are: qwen2, llama'):
      gguf_names.architecture({'general.architecture': name})
  with pytest.raises(ValueError, match=r"general\.type='adapter'"):
    gguf_names.architecture({'general.architecture': 'llama', 'general.type': 'adapter'})


def test_tensors_that_do_not_fit_are_listed(tmp_path):
  config, ours = LLAMA, params(LLAMA)
  gguf.save(tmp_path / 'm.gguf', config, ours, None, kind='F32')
  file = gguf_file.opened(tmp_path / 'm.gguf')
  stored = [dataclasses.replace(one, name='blk.0.extra.weight' if name == 'blk.0.attn_q.weight' else name,
                                shape=one.shape[::-1] if name == 'blk.1.ffn_up.weight' else one.shape)
            for name, one in file.tensors.items()]
  gguf_file.write(tmp_path / 'bad.gguf', file.metadata, stored, lambda name: np.zeros(
      next(one.shape for one in stored if one.name == name)))
  with pytest.raises(ValueError, match=r'bad\.gguf: tensors unknown: blk\.0\.extra\.weight; tensors missing: '
                                       r'blk\.0\.attn_q\.weight; tensors of another shape: blk\.1\.ffn_up\.weight is '):
    gguf.load(tmp_path / 'bad.gguf')


def test_a_model_that_no_architecture_holds_is_not_written(tmp_path):
  for change, expected in ((dict(ends=Ends(bigrams=7)), 'bigrams'), (dict(positions=None), 'positions=None')):
    with pytest.raises(ValueError, match=f'no architecture of GGUF can hold this model: .*llama.*{expected}'):
      gguf.save(tmp_path / 'm.gguf', dataclasses.replace(LLAMA, **change), {}, None)
  with pytest.raises(ValueError, match="kind='Q4_0' must be one of F32, F16, Q8_0"):
    gguf.save(tmp_path / 'm.gguf', LLAMA, params(LLAMA), None, kind='Q4_0')
  with pytest.raises(ValueError, match="architecture='lama' must be one of"):
    gguf.save(tmp_path / 'm.gguf', LLAMA, params(LLAMA), None, architecture='lama')
  assert not list(tmp_path.iterdir())
  how = dataclasses.replace(LLAMA, execution=Execution('bfloat16', scan=False))
  gguf.save(tmp_path / 'm.gguf', how, params(LLAMA), None)  # how a model is run is no part of it


@pytest.mark.parametrize(('changes', 'expected'), [
    (dict(pre='smolm'), r'tokenizer.ggml.pre=.smolm. .* \(did you mean "smollm"\?\)'), (dict(pre=None), 'pre=None'),
    (dict(model='bert'), "model='bert'"), (dict(tokens=['a', 'b']), '2 pieces, but the embedding 288 rows'),
    (dict(tokens=[1]), 'list of strings'),
    (dict(merges=['a b c']), "merges has 'a b c'"), (dict(merges=None), 'merges'),
    (dict(eos_token_id=999), 'eos_token_id=999'), (dict(token_type=np.zeros(3)), 'token_type must be 288 numbers')])
def test_a_tokenizer_that_cannot_be_is_refused_by_its_key(changes, expected):
  metadata = gguf_tokenizer.metadata(tokenizer(), 288)
  metadata['tokenizer.ggml.token_type'] = np.array(metadata['tokenizer.ggml.token_type'])
  changed = metadata | {f'tokenizer.ggml.{key}': value for key, value in changes.items()}
  with pytest.raises(ValueError, match=expected):
    gguf_tokenizer.tokenizer({key: value for key, value in changed.items() if value is not None or 'pre' in key}, 288)


@pytest.mark.parametrize(('changes', 'starts'), [
    ({}, True), (dict(add_bos_token=False), False), (dict(add_bos_token=None), False),
    (dict(add_bos_token=None, pre='llama-bpe'), True)])
def test_whether_texts_begin_with_bos(changes, starts):
  metadata = gguf_tokenizer.metadata(tokenizer(), 288)
  metadata['tokenizer.ggml.token_type'] = np.array(metadata['tokenizer.ggml.token_type'])
  changed = metadata | {f'tokenizer.ggml.{key}': value for key, value in changes.items()}
  changed = {key: value for key, value in changed.items() if value is not None}
  assert gguf_tokenizer.tokenizer(changed, 288).starts == starts


def test_rows_without_a_piece_become_unused_ones():
  metadata = gguf_tokenizer.metadata(tokenizer(), 300)
  assert metadata['tokenizer.ggml.tokens'][288:290] == ['[PAD288]', '[PAD289]']
  metadata['tokenizer.ggml.token_type'] = np.array(metadata['tokenizer.ggml.token_type'])
  read = gguf_tokenizer.tokenizer(metadata, 300)
  text = 'the cat [PAD288] sat'
  np.testing.assert_array_equal(read.encode(text), tokenizer().encode(text))


def test_sentencepiece_goes_out_and_in():
  made = SentencePiece(500, sample=10**6).train([PROSE] * 8, 8 * len(PROSE))
  metadata = gguf_tokenizer.metadata(made, 500)
  for name, kind in (('token_type', np.int32), ('scores', np.float32)):
    metadata[f'tokenizer.ggml.{name}'] = np.array(metadata[f'tokenizer.ggml.{name}'], kind)
  assert metadata['tokenizer.ggml.model'] == 'llama'
  read = gguf_tokenizer.tokenizer(metadata, 500)
  for text in (PROSE[:500], ' x  y\n\n\t\u4e2d\u2581 </s> 12'):
    np.testing.assert_array_equal(read.encode(text), made.encode(text))
  assert (read.bos, read.eos, read.vocab) == (made.bos, made.eos, made.vocab)
  spaced = gguf_tokenizer.tokenizer(metadata | {'tokenizer.ggml.add_space_prefix': True}, 500)
  np.testing.assert_array_equal(spaced.encode('x'), made.encode(' x'))


def test_tokenizers_without_words_in_gguf_are_refused():
  with pytest.raises(ValueError, match="of kind 'bytes'"):
    gguf_tokenizer.metadata(Bytes().train(), 300)
  unigram = SentencePiece(500, model_type='unigram').train([PROSE] * 8, 8 * len(PROSE))
  with pytest.raises(ValueError, match='no BPE'):
    gguf_tokenizer.metadata(unigram, 500)
  with pytest.raises(ValueError, match='288 pieces, for an embedding of 100 rows'):
    gguf_tokenizer.metadata(tokenizer(), 100)


def test_logits_of_a_file_are_those_kept(tmp_path):
  """Of transformers, for the same bytes: rows of q and k, which the file has in pairs, included."""
  with np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'gguf.npz') as kept:
    (tmp_path / 'm.gguf').write_bytes(kept['raw'].tobytes())
    wanted_TV = kept['logits_TV']
  config, read, its = gguf.load(tmp_path / 'm.gguf')
  assert config == LLAMA and its.marks == tokenizer().marks  # noqa: PT018
  found_TV = jax.jit(config.model().apply)({'params': read}, TOKENS_T[None])[0][0]
  np.testing.assert_allclose(found_TV, wanted_TV, atol=1e-5 * np.abs(wanted_TV).max())  # float32, another order
