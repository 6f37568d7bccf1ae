"""Categories x seeds: the summary, resuming, and a run that fails."""

import json
import os
import subprocess
import sys

import numpy as np
import program_helpers
import pytest

from dmdd_jax.launch import preemption
from dmdd_jax.launch import sweep


def _results(values):
  """{seed: {category: results}} with one metric, from {seed: {c: value}}."""
  return {
    seed: {c: {'pixel_auroc': v} for c, v in row.items()}
    for seed, row in values.items()
  }


def test_mean_and_deviation_by_hand():
  results = _results({0: {'a': 0.5, 'b': 0.7}, 1: {'a': 0.7, 'b': 0.7}})
  summary = sweep.summarize(results)
  assert list(summary) == ['a', 'b', 'mean']
  a = summary['a']['pixel_auroc']
  assert a['mean'] == pytest.approx(0.6)
  assert a['std'] == pytest.approx(np.sqrt(0.02))
  assert summary['b']['pixel_auroc']['std'] == 0.0
  # Means over categories are .6 and .7.
  assert summary['mean']['pixel_auroc']['mean'] == pytest.approx(0.65)
  assert summary['mean']['pixel_auroc']['std'] == pytest.approx(np.sqrt(0.005))


def test_one_seed_has_no_deviation_and_null_is_undefined(tmp_path):
  results = _results({0: {'a': 0.5, 'b': None}})
  results[0]['a']['image_auroc'] = 1.0
  summary = sweep.summarize(results)
  assert np.isnan(summary['a']['pixel_auroc']['std'])
  assert 'pixel_auroc' not in summary['b']
  assert 'pixel_auroc' not in summary['mean']
  table = sweep.write_summary(results, str(tmp_path))
  assert '±' not in table
  assert set(os.listdir(tmp_path)) == {
    'results.json',
    'results.csv',
    'results.md',
  }


# A configuration file that acts in place of the training which reads it: `bad`
# fails, `slow` waits for SIGTERM, any other category finishes at once.
STAND_IN = """
import json, os, signal, sys, time
options = dict(word.split('=', 1) for word in sys.argv if '=' in word)
category = options['--config.data.category']
workdir = sys.argv[sys.argv.index('--workdir') + 1]
folder = os.path.join(workdir, category)
os.makedirs(folder)
with open(f'{folder}/command.json', 'w') as file:
  json.dump(sys.argv, file)
if category == 'bad':
  os._exit(1)
if category == 'slow':
  signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
  open(f'{folder}/started', 'w').close()
  time.sleep(300)
with open(f'{folder}/results.json', 'w') as file:
  json.dump({'pixel_auroc': 0.5}, file)
os._exit(0)
"""


@pytest.fixture
def stand_in(tmp_path):
  """The path of that file."""
  path = tmp_path / 'stand_in.py'
  path.write_text(STAND_IN)
  return str(path)


def test_failed_runs_are_named_after_the_others_are_written(tmp_path, stand_in):
  with pytest.raises(sweep.SweepError, match=r'1 of 2 runs.*seed_3/bad\.log'):
    sweep.run(
      stand_in,
      ('good', 'bad'),
      seeds=(3,),
      workdir=str(tmp_path),
      overrides=('--config.train.batch_size=8',),
    )
  with open(tmp_path / 'results.json') as file:
    assert json.load(file)['good']['pixel_auroc']['mean'] == 0.5
  assert (tmp_path / 'seed_3' / 'results.md').exists()
  for category in ('good', 'bad'):
    path = tmp_path / 'seed_3' / category / 'command.json'
    command = json.loads(path.read_text())
    assert '--config.seed=3' in command
    assert '--config.train.batch_size=8' in command


def test_array_tasks_share_the_runs_and_the_last_has_the_whole_table(
  tmp_path, stand_in
):
  for task in ('3', '4'):
    share = sweep.array_share(
      {
        'SLURM_ARRAY_TASK_ID': task,
        'SLURM_ARRAY_TASK_MIN': '3',
        'SLURM_ARRAY_TASK_MAX': '4',
        'SLURM_ARRAY_TASK_COUNT': '2',
      }
    )
    results = sweep.run(
      stand_in,
      ('a', 'b', 'c'),
      seeds=(0,),
      workdir=str(tmp_path),
      share=share,
    )
    own, all_of_them = ['a', 'c'], ['a', 'b', 'c']
    # A run that is started twice fails: its folder is there.
    assert list(results[0]) == (own if task == '3' else all_of_them)


def test_a_terminated_sweep_passes_it_on_and_is_queued_again(
  tmp_path, stand_in
):
  """As in SLURM, which sends SIGTERM to the batch shell alone."""
  tools = os.path.join(program_helpers.REPOSITORY, 'tools')
  scontrol = tmp_path / 'scontrol'
  scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n')
  scontrol.chmod(0o755)
  log = tmp_path / 'log'
  with open(log, 'w') as file:
    process = subprocess.Popen(
      [f'{tools}/requeue.sh', sys.executable, f'{tools}/run_categories.py']
      + [f'--workdir={tmp_path}', f'--config={stand_in}']
      + ['--categories=done,slow,later'],
      env={
        **program_helpers.environment(tmp_path),
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'SLURM_JOB_ID': '7',
      },
      stderr=file,
    )
  try:
    program_helpers.wait_for(
      lambda: (
        (tmp_path / 'seed_0/slow/started').exists()
        or process.poll() is not None
      )
    )
    assert process.poll() is None, log.read_text()
    process.terminate()
    status = process.wait(timeout=60)
  finally:
    process.terminate()  # Again, in case an assertion failed.
  assert status == preemption.STATUS, log.read_text()
  assert '2 of 3 runs' in log.read_text()
  assert 'exit status 75' in log.read_text()
  assert (tmp_path / 'arguments').read_text() == 'requeue 7\n'
  assert not (tmp_path / 'seed_0/later').exists()
  assert list(json.loads((tmp_path / 'results.json').read_text())) == [
    'done',
    'mean',
  ]


def test_without_an_array_one_runs_all_and_a_gap_is_refused():
  assert sweep.array_share({}) == (0, 1)
  array = {
    'SLURM_ARRAY_TASK_ID': '2',
    'SLURM_ARRAY_TASK_MIN': '0',
    'SLURM_ARRAY_TASK_MAX': '4',
    'SLURM_ARRAY_TASK_COUNT': '3',
  }
  with pytest.raises(ValueError, match='--array=0-N'):
    sweep.array_share(array)
