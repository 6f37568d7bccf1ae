"""Categories x seeds: the summary, resuming, and a run that fails."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import program_helpers
import pytest

from dmdd_jax.launch import preemption
from dmdd_jax.launch import sweep


def _found(values):
  """{seed: {category: results}} with one metric, from {seed: {c: value}}."""
  return {
    seed: {c: {'pixel_auroc': v} for c, v in row.items()}
    for seed, row in values.items()
  }


def test_mean_and_deviation_by_hand():
  found = _found({0: {'a': 0.5, 'b': 0.7}, 1: {'a': 0.7, 'b': 0.7}})
  summary = sweep.summarize(found)
  assert list(summary) == ['a', 'b', 'mean']
  a = summary['a']['pixel_auroc']
  assert a['mean'] == pytest.approx(0.6)
  assert a['std'] == pytest.approx(np.sqrt(0.02))
  assert summary['b']['pixel_auroc']['std'] == 0.0
  # Means over categories are .6 and .7.
  assert summary['mean']['pixel_auroc']['mean'] == pytest.approx(0.65)
  assert summary['mean']['pixel_auroc']['std'] == pytest.approx(np.sqrt(0.005))


def test_one_seed_has_no_deviation_and_null_is_undefined(tmp_path):
  found = _found({0: {'a': 0.5, 'b': None}})
  found[0]['a']['image_auroc'] = 1.0
  summary = sweep.summarize(found)
  assert np.isnan(summary['a']['pixel_auroc']['std'])
  assert 'pixel_auroc' not in summary['b']
  assert 'pixel_auroc' not in summary['mean']
  table = sweep.write_summary(found, str(tmp_path))
  assert '±' not in table
  assert set(os.listdir(tmp_path)) == {
    'results.json',
    'results.csv',
    'results.md',
  }


class FakeRun:
  """In the place of `subprocess.Popen`: results, or a failure, at once."""

  ran = []

  def __init__(self, command, stdout, stderr):
    option = '--config.data.category='
    category = next(c for c in command if c.startswith(option))
    category = category.removeprefix(option)
    self.ran.append((category, command))
    self.returncode = int(category == 'bad')
    if category != 'bad':
      folder = os.path.join(command[-1], category)
      os.makedirs(folder)
      with open(os.path.join(folder, 'results.json'), 'w') as file:
        json.dump({'pixel_auroc': 0.5}, file)

  def poll(self):
    return self.returncode


@pytest.fixture
def ran(monkeypatch):
  """(category, command) of each run that was started."""
  monkeypatch.setattr(FakeRun, 'ran', [])
  monkeypatch.setattr(sweep.subprocess, 'Popen', FakeRun)
  return FakeRun.ran


def test_failed_runs_are_named_after_the_others_are_written(tmp_path, ran):
  with pytest.raises(sweep.SweepError, match=r'1 of 2 runs.*seed_3/bad\.log'):
    sweep.run(
      'configs/mvtec.py',
      ('good', 'bad'),
      seeds=(3,),
      workdir=str(tmp_path),
      overrides=('--config.train.batch_size=8',),
    )
  with open(tmp_path / 'results.json') as file:
    assert json.load(file)['good']['pixel_auroc']['mean'] == 0.5
  assert (tmp_path / 'seed_3' / 'results.md').exists()
  for _, command in ran:
    assert '--config.seed=3' in command
    assert '--config.train.batch_size=8' in command


def test_array_tasks_share_the_runs_and_the_last_has_the_whole_table(
  tmp_path, ran
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
    found = sweep.run(
      'configs/mvtec.py',
      ('a', 'b', 'c'),
      seeds=(0,),
      workdir=str(tmp_path),
      share=share,
    )
    assert list(found[0]) == (['a', 'c'] if task == '3' else ['a', 'b', 'c'])
  assert [category for category, _ in ran] == ['a', 'c', 'b']


# In the place of a training: `done` finishes, another waits for SIGTERM.
TRAINING = """
import json, os, signal, sys, time
folder, category = sys.argv[1:]
os.makedirs(f'{folder}/{category}')
if category == 'done':
  with open(f'{folder}/done/results.json', 'w') as file:
    json.dump({'pixel_auroc': 0.5}, file)
else:
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  open(f'{folder}/{category}/started', 'w').close()
  time.sleep(300)
"""
TOOL = """
import os, runpy, subprocess, sys
from dmdd_jax.launch import sweep
def launch(command, log):
  folder, name = os.path.split(log)
  training = [sys.executable, '-c', os.environ['TRAINING']]
  return subprocess.Popen([*training, folder, os.path.splitext(name)[0]])
sweep._launch = launch
runpy.run_path(sys.argv.pop(1), run_name='__main__')
"""


def test_a_sweep_that_is_told_to_end_passes_it_on_and_is_queued_again(tmp_path):
  """As a task of SLURM, whose batch shell alone hears of it."""
  tools = os.path.join(program_helpers.REPOSITORY, 'tools')
  scontrol = tmp_path / 'scontrol'
  scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\n')
  scontrol.chmod(0o755)
  process = subprocess.Popen(
    [f'{tools}/requeue.sh', sys.executable, '-c', TOOL]
    + [f'{tools}/run_categories.py', f'--workdir={tmp_path}']
    + ['--config=configs/mvtec.py', '--categories=done,slow,later'],
    env={
      **program_helpers.environment(tmp_path),
      'PATH': f'{tmp_path}:{os.environ["PATH"]}',
      'SLURM_JOB_ID': '7',
      'TRAINING': TRAINING,
    },
    stderr=subprocess.PIPE,
    text=True,
  )
  while not (tmp_path / 'seed_0/slow/started').exists():
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.1)
  process.terminate()
  _, said = process.communicate()
  assert process.returncode == preemption.STATUS, said
  assert '2 of 3 runs' in said and 'exit status 75' in said
  assert (tmp_path / 'said').read_text() == 'requeue 7\n'
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
