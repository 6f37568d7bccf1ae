"""Processes on a Ray cluster of this machine alone."""

import sys

import program_helpers
import pytest

from dmdd_jax.launch import children
from dmdd_jax.launch import preemption
from dmdd_jax.launch import ray_cluster

ray = pytest.importorskip('ray', reason='needs the extra ray')


@pytest.fixture(scope='module')
def launch():
  yield ray_cluster.connect('local', cpus=1)
  ray.shutdown()


def _python(code):
  return [sys.executable, '-c', code]


def test_statuses_and_logs_are_those_of_the_processes(launch, tmp_path):
  codes = {'good': 'print("fine")', 'bad': 'raise SystemExit(3)'}
  starts = {
    name: lambda name=name: launch(_python(codes[name]), tmp_path / name)
    for name in codes
  }
  outcome = children.run(starts, at_a_time=2)
  assert outcome == children.Outcome(['good'], ['bad'], [])
  assert (tmp_path / 'good').read_text() == 'fine\n'


def test_sigterm_reaches_the_process(launch, tmp_path):
  code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print('ready', flush=True)
time.sleep(60)
"""
  process = launch(_python(code), tmp_path / 'log')
  program_helpers.wait_for(lambda: (tmp_path / 'log').exists())
  program_helpers.wait_for(
    lambda: process.poll() or 'ready' in (tmp_path / 'log').read_text()
  )
  assert process.returncode is None
  process.terminate()
  assert process.wait() == preemption.STATUS


def test_a_terminated_process_that_waits_is_never_begun(tmp_path):
  process = ray_cluster.Process(
    _python('print("begun")'), tmp_path / 'log', cpus=10**6, gpus=0
  )
  assert process.poll() is None
  process.terminate()
  assert process.wait() == preemption.STATUS
  assert not (tmp_path / 'log').exists()


def test_runs_that_no_machine_can_hold_are_refused():
  ray.shutdown()  # The cluster of the tests above.
  try:
    with pytest.raises(ValueError, match='has 1 CPUs and 1000 GPUs'):
      ray_cluster.connect('local', cpus=1, gpus=1000)
  finally:
    ray.shutdown()
