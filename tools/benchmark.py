"""Measures speed and memory, each figure beside a baseline and a limit.

  python tools/benchmark.py --suite metrics --output metrics.json
  python tools/benchmark.py --suite all --output FOLDER

Suites: input, train, predict, metrics, coverage (of confidence
intervals), startup, growth (writes plots too), or all, each in a
process of its own, with their tables in FOLDER/tables.md.
"""

import json
import os
import subprocess
import sys

from absl import app
from absl import flags

from dmdd_jax import cli
from dmdd_jax import storage
from dmdd_jax.benchmark import measure
from dmdd_jax.benchmark import suites
from dmdd_jax.metrics import results

_SUITE = flags.DEFINE_enum(
  'suite', None, [*suites.SUITES, 'all'], 'What to measure.'
)
_OUTPUT = cli.define_path('output', None, 'JSON file, or folder for all.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Of each measurement.')
_SIZE = flags.DEFINE_integer('size', 256, 'Side of the images, in pixels.')
_TORCH = cli.define_path(
  'torch_python', '', 'A Python with torch, to compare the train step with.'
)
_PICTURES = cli.define_path('pictures', 'docs', 'Where plots go.')


def main(argv: list[str]) -> None:
  """Measures, writes and prints."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  cli.use_huge_pages(main)
  if _SUITE.value == 'all':
    run_all(argv[0])
    return
  cli.use_compilation_cache()
  options = measure.Options(
    _REPEATS.value, _SIZE.value, _TORCH.value, _PICTURES.value
  )
  report = suites.run(_SUITE.value, options)
  if _OUTPUT.value:
    storage.write_text(_OUTPUT.value, results.format_json(report))
  print(report['table'])


def run_all(program: str) -> None:
  """Every suite, one after another; a failed one does not stop the rest."""
  folder, tables = _OUTPUT.value or 'benchmark', []
  os.makedirs(folder, exist_ok=True)
  given = [f'--{n}={flags.FLAGS[n].value}' for n in ('repeats', 'size')]
  given += [
    f'--{n}={flags.FLAGS[n].value}' for n in ('torch_python', 'pictures')
  ]
  failed = []
  for suite in suites.SUITES:
    path = os.path.join(folder, f'{suite}.json')
    command = [sys.executable, program, f'--suite={suite}', f'--output={path}']
    if subprocess.run([*command, *given], check=False).returncode:
      failed.append(suite)
      continue
    with open(path) as file:
      tables.append(f'### {suite}\n\n{json.load(file)["table"]}')
  storage.write_text(os.path.join(folder, 'tables.md'), '\n'.join(tables))
  if failed:
    sys.exit(f'error: failed suites: {", ".join(failed)}')


if __name__ == '__main__':
  flags.mark_flag_as_required('suite')
  cli.run(main)
