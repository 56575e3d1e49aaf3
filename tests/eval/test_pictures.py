"""Pictures of a report: a bar for each group and model, a line of accuracy by confidence, in full view."""
from matplotlib import image
import numpy as np

from lmlib.eval import pictures
from lmlib.eval.scoreboard import Result

RANDOM = np.random.default_rng(0)


def result(model, n=60, groups=('law', 'physics', 'art'), **more):
  confidence_N = RANDOM.uniform(0.3, 1, n)
  right_N = (RANDOM.uniform(size=n) < confidence_N).astype(float)
  return Result(model, 'm m/lu', 'accuracy', tuple(right_N.tolist()), confidence=tuple(confidence_N.tolist()),
                groups=tuple(groups[i % len(groups)] for i in range(n)), **more)


def columns(path, color):
  """Where in a picture a colour stands, and how wide that is."""
  wanted = np.array([int(color[i:i + 2], 16) for i in (1, 3, 5)]) / 255
  return (np.abs(image.imread(path)[..., :3] - wanted) < 0.02).all(-1)


def test_there_is_a_picture_of_groups_and_one_of_confidence(tmp_path):
  drawn = pictures.draw(tmp_path, [result('a'), result('b')])
  assert [path.name for path in drawn] == ['m_m_lu_accuracy.png', 'm_m_lu_reliability.png']
  bars, lines = drawn
  for color in pictures.COLORS[:2]:
    here_HW = columns(bars, color)
    runs = np.diff(here_HW[:, here_HW.any(0).nonzero()[0][3]].astype(int), prepend=0, append=0)
    assert (runs == 1).sum() >= 3, 'a bar for each of three groups'
    assert here_HW.sum(1).max() > 200, 'the bars are seen'
    assert columns(lines, color).sum() > 200
  blank = (image.imread(bars)[-4:, :, :3] > 0.99).all()
  assert blank, 'nothing is cut off at the lower edge'


def test_what_has_no_groups_and_no_confidence_is_not_drawn(tmp_path):
  alone = Result('a', 't', 'bleu', (), alone=3.0)
  assert pictures.draw(tmp_path, [alone, Result('a', 't', 'f1', (1.0, 0.0)), result('a', groups=('one',))])[0].name == (
      'm_m_lu_reliability.png')


def test_of_many_groups_the_worst_are_drawn(tmp_path):
  many = result('a', 900, [f'subject {n}' for n in range(300)])
  path = pictures.bars([many], tmp_path / 'x.png')
  assert image.imread(path).shape[0] < 4000
