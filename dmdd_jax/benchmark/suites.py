"""The suites of the benchmark by name.

Synopsis:

  report = suites.run('metrics', measure.Options())
"""

import dataclasses
import importlib
from typing import Any

from dmdd_jax.benchmark import measure

# The module of each suite, imported when it is run: several load much.
SUITES = {
  'input': 'input',
  'train': 'train_step',
  'predict': 'latency',
  'metrics': 'metrics',
  'coverage': 'coverage',
  'startup': 'startup',
  'growth': 'growth',
}


def run(suite: str, options: measure.Options) -> dict[str, Any]:
  """Runs a suite.

  Returns:
    {'suite', 'options', 'environment', 'figures': [fields of `Figure`, or of
    what the suite has instead], 'table': Markdown}

  Raises:
    ValueError: unknown suite.
  """
  if suite not in SUITES:
    raise ValueError(f'unknown suite {suite!r}; choose one of {tuple(SUITES)}')
  environment = measure.environment()
  module = importlib.import_module(f'dmdd_jax.benchmark.{SUITES[suite]}')
  figures = module.run(options)
  return {
    'suite': suite,
    'options': dataclasses.asdict(options),
    'environment': environment,
    'figures': [dataclasses.asdict(figure) for figure in figures],
    'table': getattr(module, 'format_table', measure.format_table)(figures),
  }
