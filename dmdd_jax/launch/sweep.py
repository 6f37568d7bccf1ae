"""Categories x seeds, in several processes, resumable; mean and deviation.

Each pair of category and seed is a `python -m dmdd_jax.main` of its own in
WORKDIR/seed_S. A finished run is not run again, an interrupted run continues
from its checkpoint. SIGTERM is passed on to the runs, see preemption.py.

Experimental: run on one machine, by hand and by tests. Never run: as a SLURM
array, where `array_share` reads the variables of the task.

Synopsis:

  results = sweep.run('configs/mvtec.py', ('screw',), seeds=(0, 1, 2),
                      workdir='runs/sweep', processes=2)
  table = sweep.write_summary(results, 'runs/sweep')
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import math
import os
import subprocess
import sys
from typing import Any

from absl import logging
import numpy as np

from dmdd_jax import storage
from dmdd_jax.launch import children
from dmdd_jax.launch import preemption
from dmdd_jax.metrics import results as results_lib


class SweepError(ValueError):
  """At least one run failed; the message names the logs of all that did."""


def run(
  config_file: str,
  categories: Sequence[str],
  *,
  seeds: Sequence[int],
  workdir: str,
  processes: int = 1,
  overrides: Sequence[str] = (),
  share: tuple[int, int] = (0, 1),
  launch: Callable[[Sequence[str], str], Any] | None = None,
) -> dict[int, dict[str, Any]]:
  """Runs every pair that is not finished, then writes the tables.

  Args:
    config_file: as for `main --config`.
    categories: names, at least one.
    seeds: different numbers, at least one.
    workdir: gets seed_S/CATEGORY folders, seed_S/CATEGORY.log, and the tables
      results.json, results.csv, results.md.
    processes: number of runs at a time.
    overrides: more arguments, e.g. '--config.train.batch_size=8'.
    share: (index, count): run every count-th pair from that index on. The
      tables hold all finished pairs, those of other shares too.
    launch: starts a command with a log file and returns a child for
      `children.run`; by default a process of this machine, see also
      `ray_cluster`.

  Returns:
    {seed: {category: results}}.

  Raises:
    SweepError: a run failed; the other runs finish and the tables are written
      first.
    Preempted: SIGTERM or Ctrl-C came; the tables of the finished runs are
      written first.
  """
  pairs = [(seed, category) for seed in seeds for category in categories]
  index, count = share
  mine = {
    f'{category}, seed {seed}': (seed, category)
    for seed, category in pairs[index::count]
  }
  starts = {
    name: functools.partial(
      _start, launch or _launch, config_file, overrides, workdir, seed, category
    )
    for name, (seed, category) in mine.items()
  }
  outcome = children.run(starts, processes)
  # A run that did not finish may have results of an earlier command.
  unfinished = [mine[name] for name in (*outcome.failed, *outcome.preempted)]
  results = _write_finished([p for p in pairs if p not in unfinished], workdir)
  if missing := len(pairs) - sum(map(len, results.values())):
    logging.warning(
      '%d of %d runs are not finished; the tables hold the others',
      missing,
      len(pairs),
    )
  failed = [mine[name] for name in outcome.failed]
  logs = [f'{workdir}/seed_{s}/{c}.log' for s, c in failed]
  failure = f'{len(failed)} of {len(mine)} runs failed; see {", ".join(logs)}'
  if outcome.preempted:
    if failed:
      logging.error(failure)
    preemption.leave(
      f'{len(outcome.preempted)} of {len(mine)} runs in {workdir} are not'
      ' finished'
    )
  if failed:
    raise SweepError(failure)
  return results


def _write_finished(
  pairs: Sequence[tuple[int, str]], workdir: str
) -> dict[int, dict[str, Any]]:
  """Reads the results of the pairs that have any; writes the tables."""
  results: dict[int, dict[str, Any]] = {}
  for seed, category in pairs:
    path = os.path.join(workdir, f'seed_{seed}', category, 'results.json')
    if os.path.exists(path):
      with open(path) as file:
        results.setdefault(seed, {})[category] = json.load(file)
  for seed, rows in results.items():
    tables = results_lib.format_tables(rows)
    storage.write_texts(os.path.join(workdir, f'seed_{seed}'), tables)
  if results:
    write_summary(results, workdir)
  return results


def _launch(command: Sequence[str], log: str) -> subprocess.Popen:
  with open(log, 'a') as file:
    return subprocess.Popen(command, stdout=file, stderr=file)


def _start(
  launch: Callable[[Sequence[str], str], Any],
  config_file: str,
  overrides: Sequence[str],
  workdir: str,
  seed: int,
  category: str,
) -> Any:
  """Starts the run of a pair, its log beside the category's folder."""
  folder = os.path.join(workdir, f'seed_{seed}')
  os.makedirs(folder, exist_ok=True)
  command = [sys.executable, '-m', 'dmdd_jax.main', '--config', config_file]
  command += [*overrides, f'--config.data.category={category}']
  command += [f'--config.seed={seed}', '--workdir', folder]
  return launch(command, os.path.join(folder, f'{category}.log'))


def array_share(environment: Mapping[str, str]) -> tuple[int, int]:
  """(index, count) of a SLURM array task; (0, 1) where there is no array.

  Raises:
    ValueError: the array has gaps between its numbers.
  """
  if 'SLURM_ARRAY_TASK_ID' not in environment:
    return 0, 1
  first = int(environment['SLURM_ARRAY_TASK_MIN'])
  index = int(environment['SLURM_ARRAY_TASK_ID']) - first
  count = int(environment['SLURM_ARRAY_TASK_COUNT'])
  if int(environment['SLURM_ARRAY_TASK_MAX']) - first != count - 1:
    raise ValueError(
      'the SLURM array has gaps between its numbers, so runs would be left'
      ' out: use --array=0-N'
    )
  return index, count


def summarize(
  results: Mapping[int, Mapping[str, Mapping[str, Any]]],
  columns: Sequence[str] = results_lib.TABLE_COLUMNS,
) -> dict[str, dict[str, dict[str, float]]]:
  """Mean and standard deviation (n - 1) over seeds.

  Args:
    results: {seed: {category: results}}.
    columns: which metrics, nested ones by their path, 'maps_mean/au_pro'.

  Returns:
    {category: {metric: {'mean', 'std', 'seeds'}}}. The row 'mean' averages over
    the categories of each seed first. A metric undefined in one run is NaN.
  """
  values: dict[str, dict[str, list[float]]] = {}
  for rows in results.values():
    flat = {c: results_lib.flatten(metrics) for c, metrics in rows.items()}
    for column in columns:
      cells = {c: _number(row.get(column)) for c, row in flat.items()}
      cells['mean'] = float(np.mean(list(cells.values())))
      for category, value in cells.items():
        by_metric = values.setdefault(category, {})
        by_metric.setdefault(column, []).append(value)
  mean = values.pop('mean')
  return {
    category: {
      column: {
        'mean': float(np.mean(cells)),
        'std': float(np.std(cells, ddof=1)) if len(cells) > 1 else math.nan,
        'seeds': len(cells),
      }
      for column, cells in by_metric.items()
      if not np.all(np.isnan(cells))
    }
    for category, by_metric in (*values.items(), ('mean', mean))
  }


def write_summary(
  results: Mapping[int, Mapping[str, Mapping[str, Any]]], workdir: str
) -> str:
  """Writes results.json, .csv and .md of a sweep.

  Returns:
    The table as Markdown: mean and standard deviation over seeds, per cent.
  """
  summary = summarize(results)
  columns = [c for c in results_lib.TABLE_COLUMNS if c in summary['mean']]
  lines = [
    '| ' + ' | '.join(['category', 'seeds', *columns]) + ' |',
    '|---|' + '---:|' * (len(columns) + 1),
  ]
  sheet = [','.join(['category', 'metric', 'mean', 'std', 'seeds'])]
  for category, row in summary.items():
    cells = [percent(row[c]) if c in row else '' for c in columns]
    seeds = max((cell['seeds'] for cell in row.values()), default=0)
    lines.append('| ' + ' | '.join([category, str(seeds), *cells]) + ' |')
    for metric, cell in row.items():
      numbers = [repr(cell['mean']), repr(cell['std']), str(cell['seeds'])]
      sheet.append(','.join([category, metric, *numbers]))
  table = '\n'.join(lines) + '\n'
  storage.write_text(
    os.path.join(workdir, 'results.json'), results_lib.format_json(summary)
  )
  storage.write_text(os.path.join(workdir, 'results.md'), table)
  storage.write_text(
    os.path.join(workdir, 'results.csv'), '\n'.join(sheet) + '\n'
  )
  return table


def _number(value: Any) -> float:
  return math.nan if value is None else float(value)


def percent(cell: Mapping[str, float]) -> str:
  """A cell of `summarize` in per cent, '97.50 ± 0.31'."""
  text = f'{100 * cell["mean"]:.2f}'
  if math.isnan(cell['std']):
    return text
  return f'{text} ± {100 * cell["std"]:.2f}'
