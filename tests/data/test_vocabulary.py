"""Loading TensorFlow: nothing on the screen, unless it fails."""
import os
import subprocess
import sys

import pytest

from lmlib.data import vocabulary

LOAD = ('from lmlib.data.vocabulary import load_quietly; load_quietly(); import tensorflow as tf; tf.constant(1)')


def test_seqio_is_loaded_without_a_word():
  done = subprocess.run([sys.executable, '-c', LOAD], capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_what_was_kept_off_the_screen_is_shown_if_it_failed(capfd):
  with vocabulary._standard_error_aside():
    os.write(2, b'noise')
  assert capfd.readouterr().err == ''

  def failing():
    with vocabulary._standard_error_aside():
      os.write(2, b'a reason')
      raise KeyError

  with pytest.raises(KeyError):
    failing()
  assert capfd.readouterr().err == 'a reason'
