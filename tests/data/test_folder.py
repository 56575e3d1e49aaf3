"""Values by key, on a disk and elsewhere, and who may write them."""
import json
import os
import socket
import subprocess
import sys

import pytest

from lmlib.data.folder import Folder


@pytest.fixture(params=['disk', 'memory'])
def folder(request, tmp_path) -> Folder:
  return Folder(tmp_path / 'a b' if request.param == 'disk' else f'memory://bucket{tmp_path}')


def test_values_come_back_whole(folder):
  values = {'a': b'', 'b/c': b'1' * 70_000, **{f'many/{i:03}': str(i).encode() for i in range(200)}}
  for key, value in values.items():
    folder.put(key, value)
  assert folder.keys() == sorted(values)
  assert list(folder.get_all(values)) == list(values.values())
  assert list(folder.get_all(['a', 'none', 'b/c'])) == [b'', None, b'1' * 70_000]
  assert (folder / 'b').get('c') == folder.get('b/c')
  folder.delete('a')
  assert folder.get('a') is None
  folder.remove()
  assert folder.keys() == []
  folder.remove()


def test_urls_become_what_tensorstore_reads():
  assert Folder('gs://bucket/a').spec == {'driver': 'gcs', 'bucket': 'bucket', 'path': 'a/'}
  assert Folder('s3://bucket/a/b/').spec == {'driver': 's3', 'bucket': 'bucket', 'path': 'a/b/'}
  assert Folder('file:///tmp/a%20b').spec['path'] == '/tmp/a b/'
  assert str(Folder('gs://bucket/a').beside('.partial') / 'b') == 'gs://bucket/a.partial/b'
  with pytest.raises(ValueError, match="'hdfs://a/b' is neither a path nor a URL"):
    Folder('hdfs://a/b')


def test_one_at_a_time(folder):
  with folder.locked():
    with pytest.raises(ValueError, match=rf'is being written by another process \(process {os.getpid()} on '), \
         Folder(folder).locked():
      pass
    folder.put('a', b'1')
  with folder.locked():
    assert folder.get('a') == b'1'
  with folder.locked():
    folder.remove()
  with folder.locked():
    assert folder.get('a') is None


def test_a_lock_is_waited_for(folder):
  lines = []
  first = folder.locked()
  first.__enter__()

  def wait(line):
    lines.append(line)
    first.__exit__(None, None, None)

  with Folder(folder).locked(wait):
    assert [line.endswith(': waiting for it') for line in lines] == [True]


def test_the_lock_of_a_process_that_is_gone_is_taken_over():
  gone = subprocess.Popen([sys.executable, '-c', ''])
  gone.wait()
  for host, taken in ((socket.gethostname(), True), ('elsewhere', False)):
    folder = Folder(f'memory://locks/{host}')
    folder.put('lock', json.dumps({'pid': gone.pid, 'host': host, 'lock': 'x'}).encode())
    if taken:
      with folder.locked():
        pass
    else:
      with pytest.raises(ValueError, match=rf'process {gone.pid} on elsewhere.*if it is gone, remove memory://'), \
           folder.locked():
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('in the way')
  with pytest.raises(OSError, match=f'cannot write {tmp_path}/file/a: Not a directory'):
    Folder(tmp_path / 'file' / 'a').put('b', b'')
  with pytest.raises(OSError, match=f'cannot write {tmp_path}/file/a: Not a directory'), \
       Folder(tmp_path / 'file' / 'a').locked():
    pass
