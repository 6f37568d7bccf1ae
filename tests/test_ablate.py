"""The comparisons' configs, their folders, the tables, and the pages."""

import json
import os
import subprocess
import sys

import pytest

from configs import ablation
from configs import mvtec
from dmdd_jax import ablate
from dmdd_jax.launch import sweep

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_every_variant_is_a_legal_config():
  for comparison, variants in ablation.COMPARISONS.items():
    assert {} in variants.values(), comparison
    for variant in variants:
      config = ablation.get_config(f'{comparison}/{variant}')
      assert config.data.image_size == 128
      pairs = config.train.total_steps * config.train.batch_size
      assert pairs == 1600, variant


def test_variants_differ_from_the_base_in_their_fields_alone():
  base = ablation.get_config('aim/match_mask')
  margin = ablation.get_config('aim/margin')
  assert margin.loss.aim == 'margin'
  margin.loss.aim = base.loss.aim
  assert margin == base
  # All rows but what they say of the student, which is for a variant to say.
  expected = mvtec.get_config('screw').per_category
  for texture in mvtec.TEXTURES:
    del expected[texture]['train'], expected[texture]['student']
  assert base.per_category == expected
  row = ablation.get_config('screw/no_foreground').per_category.screw.synthesis
  assert (row.foreground, base.per_category.screw.synthesis.foreground) == (
    'off',
    'otsu',
  )


def test_an_unknown_variant_is_refused_with_the_names():
  with pytest.raises(ValueError, match='trunk/encoder_decoder'):
    ablation.get_config('trunk/transformer')


def test_an_unknown_comparison_is_refused_with_the_names(tmp_path):
  with pytest.raises(ValueError, match='optimiser'):
    ablate.run('speed', ('screw',), seeds=(0,), workdir=str(tmp_path))


def _results(value):
  return {
    'image_auroc': value,
    'pixel_auroc': 0.9,
    'maps_mean': {'pixel_auroc': 0.8},
    'validation': {'pixel_auroc': 0.7},
  }


def test_the_base_is_shared_and_eval_variants_only_evaluate(
  tmp_path, monkeypatch
):
  trained, evaluated = [], []

  def fake_sweep(config, categories, *, workdir, seeds, **_):
    trained.append((config, os.path.basename(workdir)))
    return {
      seed: {c: _results(0.5 + 0.1 * seed) for c in categories}
      for seed in seeds
    }

  def fake_evaluate(folder, output, *, changes, recalibrate):
    assert recalibrate
    evaluated.append((os.path.relpath(folder, tmp_path), dict(changes)))
    os.makedirs(output)
    with open(os.path.join(output, 'results.json'), 'w') as file:
      json.dump(_results(0.25), file)

  monkeypatch.setattr(sweep, 'run', fake_sweep)
  monkeypatch.setattr(ablate.run_lib, 'evaluate_workdir', fake_evaluate)
  options = {'seeds': (0, 1), 'workdir': str(tmp_path)}
  text = ablate.run('losses', ('screw',), **options)
  assert [folder for _, folder in trained] == [
    'base',
    'losses-ngm_alone',
    'losses-aim_alone',
  ]
  assert trained[1][0] == 'configs/ablation.py:losses/ngm_alone'
  row = next(r for r in text.splitlines() if r.startswith('| ngm_alone'))
  assert '.5500 ± .0707' in row and '.7000 ± .0000' in row
  trained.clear()
  ablate.run('learning', ('screw',), **options)
  # What two comparisons have is trained once.
  assert ('configs/ablation.py:learning/adam', 'trunk-encoder_adam') in trained
  trained.clear()
  text = ablate.run('score', ('screw',), **options)
  assert [folder for _, folder in trained] == ['base']
  assert (
    os.path.join('base', 'seed_1', 'screw'),
    {'eval.score_top_pixels': 1},
  ) in evaluated
  count = len(evaluated)
  assert ablate.run('score', ('screw',), **options) == text
  assert len(evaluated) == count  # What is finished is not done again.
  maximum = next(r for r in text.splitlines() if r.startswith('| maximum'))
  assert '.2500' in maximum and '.7000' not in maximum


def test_a_section_is_replaced_and_the_page_around_it_kept(tmp_path):
  page = tmp_path / 'trunk.md'
  page.write_text('# Trunk\n\nBefore.\n')
  ablate.write_section(page, 'trunk', 'old')
  ablate.write_section(page, 'losses', 'other')
  page.write_text(page.read_text() + '\nAfter.\n')
  ablate.write_section(page, 'trunk', 'new')
  text = page.read_text()
  assert text.startswith('# Trunk\n\nBefore.\n')
  assert text.endswith('\nAfter.\n')
  assert 'old' not in text and 'other' in text
  assert text.count('<!-- ablation:trunk -->') == 1


def test_every_comparison_has_a_page():
  assert ablate.PAGES.keys() == ablation.COMPARISONS.keys()
  for page in ablate.PAGES.values():
    assert os.path.exists(os.path.join(_ROOT, 'docs', 'experiments', page)), (
      page
    )


def test_a_page_that_is_not_there_is_written(tmp_path):
  ablate.write_section(tmp_path / 'new.md', 'trunk', 'table')
  assert (tmp_path / 'new.md').read_text().startswith('<!-- ablation:trunk')


def test_the_tool_leaves_what_follows_two_dashes_to_the_runs(tmp_path):
  done = subprocess.run(
    [sys.executable, 'tools/ablate.py', '--comparisons=none']
    + [f'--workdir={tmp_path}', '--', '--config.data.root=D'],
    cwd=_ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert done.returncode == 1
  assert "error: unknown comparison 'none'" in done.stderr
