"""lmlib: Transformer language models in JAX, readable in a weekend and trusted on a pod.

Importing lmlib imports nothing else; take what is needed, for example
`from lmlib.models import dense`.
"""
__version__ = '0.1.0'
