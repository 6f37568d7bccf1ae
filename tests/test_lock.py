"""Two trainings in one folder: one is refused, a dead one is replaced."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import model_helpers
import program_helpers
import pytest

from dmdd_jax import run as run_lib
from dmdd_jax import storage
from dmdd_jax.launch import lock

HOLD = """
import sys
from dmdd_jax.launch import lock
with lock.held(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
  """A process that trains in the folder, as far as others can see."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(tmp_path)],
    env={**os.environ, 'PYTHONPATH': program_helpers.REPOSITORY},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.communicate()


def _refusal(folder):
  with pytest.raises(lock.LockedError) as caught, lock.held(folder):
    pass
  return str(caught.value)


def _write_lock(folder, **changes):
  owner = {'host': socket.gethostname(), 'pid': os.getpid(), 'born': 'before'}
  owner |= {'since': '2026-01-02 03:04:05', **changes}
  (folder / lock.NAME).write_text(json.dumps(owner))


def test_a_second_process_is_refused_in_one_line(holder, tmp_path):
  refusal = _refusal(tmp_path)
  assert '\n' not in refusal
  for text in (str(holder.pid), socket.gethostname(), str(tmp_path)):
    assert text in refusal
  holder.communicate('')  # It ends, and takes its lock along.
  assert os.listdir(tmp_path) == []
  with lock.held(tmp_path):
    pass


def test_a_killed_process_is_replaced_without_a_hand(
  holder, tmp_path, warnings
):
  holder.send_signal(signal.SIGKILL)
  # Nobody has asked for its exit status yet: it is a zombie, and has a number.
  os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
  with lock.held(tmp_path):
    assert str(os.getpid()) in _refusal(tmp_path)
  assert os.listdir(tmp_path) == []
  assert str(holder.pid) in warnings[0]


def test_a_number_that_another_process_has_by_now_is_no_sign_of_life(tmp_path):
  _write_lock(tmp_path)
  with lock.held(tmp_path):
    pass


def test_another_host_is_believed_and_the_command_removes_its_lock(tmp_path):
  folder = tmp_path / "it's a run"
  folder.mkdir()
  _write_lock(folder, host='far-away', pid=1)
  refusal = _refusal(folder)
  assert 'host far-away' in refusal and 'since 2026-01-02' in refusal
  subprocess.run(refusal.rpartition(': ')[2], shell=True, check=True)
  with lock.held(folder):
    pass


@pytest.mark.parametrize('content', ['', '{', '[]', '{"host": "a"}'])
def test_a_lock_that_does_not_say_whose_it_is_is_believed(
  tmp_path, monkeypatch, content
):
  monkeypatch.setattr(lock, '_WAIT_SECONDS', 0.0)
  (tmp_path / lock.NAME).write_text(content)
  assert f'rm {tmp_path / lock.NAME}' in _refusal(tmp_path)


def test_of_several_that_take_over_at_once_one_trains(tmp_path):
  _write_lock(tmp_path)
  start, done = threading.Barrier(8), threading.Barrier(8)

  def train(_):
    start.wait()
    try:
      with lock.held(tmp_path):
        done.wait()
        return 1
    except lock.LockedError:
      done.wait()
      return 0

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert sum(pool.map(train, range(8))) == 1


def test_an_error_lets_go_and_the_lock_of_another_stays(tmp_path):
  with pytest.raises(OSError, match='broken'), lock.held(tmp_path):
    raise OSError('broken')
  assert os.listdir(tmp_path) == []
  with lock.held(tmp_path):
    _write_lock(tmp_path, host='far-away')
  assert 'far-away' in _refusal(tmp_path)


def test_a_full_disk_leaves_no_empty_lock(tmp_path, monkeypatch):
  def full(file, mine):
    raise OSError(28, 'No space on device')

  monkeypatch.setattr(lock, '_write', full)
  with pytest.raises(OSError, match='No space'), lock.held(tmp_path):
    pass
  assert os.listdir(tmp_path) == []


def test_a_folder_of_another_file_system(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, 'is_remote', lambda name: True)
  _write_lock(tmp_path)
  with lock.held(tmp_path):
    assert 'gcloud storage rm' not in _refusal(tmp_path)
    assert str(os.getpid()) in _refusal(tmp_path)
  assert os.listdir(tmp_path) == []
  _write_lock(tmp_path, host='far-away')
  assert 'gcloud storage rm' in _refusal(tmp_path)


def test_a_training_is_refused_before_it_reads_its_data(holder, tmp_path):
  config = model_helpers.tiny_config(data__root=str(tmp_path / 'missing'))
  with pytest.raises(lock.LockedError, match=str(holder.pid)):
    run_lib.train_and_evaluate(config, str(tmp_path))
