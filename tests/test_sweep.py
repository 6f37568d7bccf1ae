"""Categories x seeds: the summary, resuming, and a run that fails."""

import json
import os
import subprocess

import numpy as np
import pytest

from dmdd_jax import sweep


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


def test_failed_runs_are_named_after_the_others_are_written(
  tmp_path, monkeypatch
):
  commands = []

  def fake_run(command, stdout, stderr):
    commands.append(command)
    option = '--config.data.category='
    category = next(c for c in command if c.startswith(option))
    folder = os.path.join(command[-1], category.removeprefix(option))
    if folder.endswith('bad'):
      return subprocess.CompletedProcess(command, 1)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'results.json'), 'w') as file:
      json.dump({'pixel_auroc': 0.5}, file)
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(sweep.subprocess, 'run', fake_run)
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
  assert all('--config.seed=3' in command for command in commands)
  assert all('--config.train.batch_size=8' in command for command in commands)


def test_array_tasks_share_the_runs_and_the_last_has_the_whole_table(
  tmp_path, monkeypatch
):
  ran = []

  def fake_run(command, stdout, stderr):
    option = '--config.data.category='
    category = next(c for c in command if c.startswith(option))
    ran.append(category.removeprefix(option))
    folder = os.path.join(command[-1], ran[-1])
    os.makedirs(folder)
    with open(os.path.join(folder, 'results.json'), 'w') as file:
      json.dump({'pixel_auroc': 0.5}, file)
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(sweep.subprocess, 'run', fake_run)
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
  assert ran == ['a', 'c', 'b']


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
