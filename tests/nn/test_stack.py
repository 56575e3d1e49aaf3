"""How blocks are run: settings that cannot be."""
import pytest

from lmlib.nn.stack import Execution


@pytest.mark.parametrize('remat', ['all', 'hidden', (), ('hidden', 'gate'), ('full',)])
def test_what_remat_may_be(remat):
  expected = (r"remat=.*must be None, one of \['dots', 'full'\], or a tuple of tensors to keep, of "
              r"\('q', 'k', 'v', 'attended', 'hidden', 'attention', 'mlp'\)")
  with pytest.raises(ValueError, match=expected):
    Execution(remat=remat)
  Execution(remat=('q', 'hidden'))
