"""Which checkpoints stay."""
from types import SimpleNamespace

import pytest

from lmlib.train import keeping
from lmlib.train.keeping import Keep

STEPS = list(range(5, 55, 5))
SCORES = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.0}


@pytest.mark.parametrize(('keep', 'scores', 'stay'), [
    (Keep(), {}, [45, 50]), (Keep(1), {}, [50]), (Keep(99), {}, STEPS), (Keep(1, every=20), {}, [20, 40, 50]),
    (Keep(1, best='a/b'), SCORES, [20, 50]), (Keep(1, best='a/b', highest=True), SCORES, [10, 50]),
    (Keep(2, every=15, best='a/b'), SCORES, [15, 20, 30, 45, 50]), (Keep(2, best='a/b'), {}, [45, 50])])
def test_each_rule_keeps_its_own(keep, scores, stay):
  assert [step for step in STEPS if step not in keep.going(STEPS, scores)] == stay
  assert len(stay) <= keep.most(50) or keep.newest > len(STEPS)


def test_a_number_is_that_of_the_newest():
  assert keeping.of(3) == Keep(3)
  assert keeping.of(Keep(every=4)) == Keep(every=4)


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: keeping.of(0), 'keep=0 must be a positive number'), (lambda: keeping.of(True), 'keep=True'),
    (lambda: Keep(every=0), 'Keep.every=0'), (lambda: Keep(highest=True), 'Keep.best=None'),
    (lambda: Keep(slow=0.0), 'Keep.slow=0.0')])
def test_what_keeps_nothing_is_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_score_must_come_from_an_evaluation_at_saved_steps():
  some, keep = [SimpleNamespace(name='perplexity')], Keep(best='perplexity/bits_per_byte')
  assert keeping.checked(keep, some, 10, 20) is keep
  assert keeping.checked(2, (), 10, None) == Keep(2)
  with pytest.raises(ValueError, match="'perplexity/bits_per_byte' is of no evaluation of this run: there are none"):
    keeping.checked(keep, (), 10, None)
  with pytest.raises(ValueError, match='evaluate_every=15 is no multiple of save_every=10'):
    keeping.checked(keep, some, 10, 15)
