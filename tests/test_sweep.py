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
