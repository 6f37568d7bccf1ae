"""Comparisons of configs/ablation.py over categories and seeds, as tables.

Synopsis:

  text = ablate.run('trunk', ('screw',), seeds=(0, 1, 2),
                    workdir='runs/ablation', processes=2)
  ablate.write_section('docs/experiments/trunk.md', 'trunk', text)
"""

from collections.abc import Mapping, Sequence
import json
import math
import os
from typing import Any

from absl import logging

from configs import ablation
from dmdd_jax import run as run_lib
from dmdd_jax import storage
from dmdd_jax.launch import sweep

# A choice may be made by the first three alone: synthetic anomalies on held-out
# normal images. The others are of the test images, read at the end.
COLUMNS = {
  'validation/image_auroc': 'val. image AUROC',
  'validation/pixel_auroc': 'val. pixel AUROC',
  'validation/pixel_ap': 'val. pixel AP',
  'image_auroc': 'image AUROC',
  'pixel_auroc': 'pixel AUROC',
  'au_pro': 'AU-PRO',
  'maps_mean/image_auroc': 'maps: image AUROC',
  'maps_mean/pixel_auroc': 'maps: pixel AUROC',
  'maps_mean/au_pro': 'maps: AU-PRO',
}
_BASE = 'base'
# The page of docs/experiments/ that holds a comparison's section.
PAGES = {
  'trunk': 'trunk.md',
  'losses': 'losses.md',
  'learning': 'learning.md',
  'precision': 'precision.md',
  'ngm': 'losses.md',
  'aim': 'losses.md',
  'leads': 'losses.md',
  'head': 'head.md',
  'synthesis': 'synthesis.md',
  'screw': 'rotation.md',
  'optimiser': 'optimiser.md',
  'score': 'image_score.md',
  'context': 'context.md',
}


def run(
  comparison: str,
  categories: Sequence[str],
  *,
  seeds: Sequence[int],
  workdir: str,
  processes: int = 1,
  overrides: Sequence[str] = (),
) -> str:
  """Runs what is not yet finished of one comparison and tabulates all of it.

  Args:
    comparison: a key of `ablation.COMPARISONS`.
    categories: names.
    seeds: different numbers.
    workdir: gets a folder per variant, and `base` for all comparisons. Two
      comparisons that share a variant share its folder, named after the first.
    processes: runs at a time.
    overrides: more arguments of every run, e.g. '--config.data.root=D'.

  Returns:
    Markdown, a table per category: a row per variant, mean and standard
    deviation over the seeds as fractions.

  Raises:
    ValueError: unknown comparison.
    SweepError: a run failed.
  """
  if comparison not in ablation.COMPARISONS:
    raise ValueError(
      f'unknown comparison {comparison!r}; choose from'
      f' {", ".join(ablation.COMPARISONS)}'
    )
  options = {'seeds': seeds, 'processes': processes, 'overrides': overrides}
  summaries = {}
  for variant, changes in ablation.COMPARISONS[comparison].items():
    only_eval = all(field.startswith('eval.') for field in changes)
    folder = os.path.join(workdir, _BASE if only_eval else _name(changes))
    config = f'configs/ablation.py:{comparison}/{variant}'
    if only_eval and changes:
      metrics = _reevaluate(folder, variant, changes, categories, seeds)
    else:
      logging.info('%s: %s', config, folder)
      metrics = sweep.run(config, categories, workdir=folder, **options)
    summaries[variant] = sweep.summarize(metrics, tuple(COLUMNS))
  return _tables(summaries, categories)


def _name(changes: Mapping[str, Any]) -> str:
  """The first variant with these changes, so that equal ones train once."""
  return next(
    f'{comparison}-{variant}'
    for comparison, variants in ablation.COMPARISONS.items()
    for variant, others in variants.items()
    if others == changes
  )


def _reevaluate(
  base: str,
  variant: str,
  changes: Mapping[str, Any],
  categories: Sequence[str],
  seeds: Sequence[int],
) -> dict[int, dict[str, Any]]:
  """The base's checkpoints under other fields of `eval`, calibrated anew."""
  metrics: dict[int, dict[str, Any]] = {}
  for seed in seeds:
    for category in categories:
      folder = os.path.join(base, f'seed_{seed}', category)
      output = os.path.join(folder, variant)
      path = os.path.join(output, 'results.json')
      if not os.path.exists(path):
        run_lib.evaluate_workdir(
          folder, output, changes=changes, recalibrate=True
        )
      with open(path) as file:
        results = json.load(file)
      # The base's validation is of its own maps, not of these.
      results.pop('validation')
      metrics.setdefault(seed, {})[category] = results
  return metrics


def _fraction(cell: Mapping[str, float]) -> str:
  """A cell of `sweep.summarize` in the style of the docs, '.9750 ± .0031'."""
  numbers = (x for x in (cell['mean'], cell['std']) if not math.isnan(x))
  return ' ± '.join(f'{x:.4f}'.removeprefix('0') for x in numbers)


def _tables(
  summaries: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]],
  categories: Sequence[str],
) -> str:
  lines = []
  for category in categories:
    lines += [
      f'{category}:',
      '',
      '| ' + ' | '.join(['variant', 'seeds', *COLUMNS.values()]) + ' |',
      '|---|' + '---:|' * (len(COLUMNS) + 1),
    ]
    for variant, summary in summaries.items():
      row = summary[category]
      seeds = max((cell['seeds'] for cell in row.values()), default=0)
      cells = [_fraction(row[c]) if c in row else '' for c in COLUMNS]
      lines.append('| ' + ' | '.join([variant, str(seeds), *cells]) + ' |')
    lines.append('')
  return '\n'.join(lines)


def write_section(path: str | os.PathLike, name: str, text: str) -> None:
  """Puts a text between two comments of a Markdown file.

  Args:
    path: of the file, which is created if it does not exist.
    name: of the section `<!-- ablation:NAME -->`. The section is replaced if
      the file has it, else appended.
    text: Markdown.
  """
  first, last = f'<!-- ablation:{name} -->', f'<!-- /ablation:{name} -->'
  page = ''
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      page = file.read()
  section = f'{first}\n{text.strip()}\n{last}'
  if first in page and last in page:
    before, after = page.split(first, 1)[0], page.split(last, 1)[1]
    page = before + section + after
  else:
    page = f'{page.rstrip()}\n\n{section}\n'.lstrip()
  storage.write_text(os.fspath(path), page)
