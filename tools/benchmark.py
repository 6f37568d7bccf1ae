"""Measures speed and memory, each figure beside a baseline of the same run.

  python tools/benchmark.py --suite metrics --output metrics.json

Suites: metrics, input, train, predict, startup. Prints a table.
"""

from absl import app
from absl import flags

from dmdd_jax import benchmark
from dmdd_jax import cli
from dmdd_jax.metrics import results

_SUITE = flags.DEFINE_enum('suite', None, benchmark.SUITES, 'What to measure.')
_OUTPUT = flags.DEFINE_string('output', None, 'JSON file to write.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Of each measurement.')


def main(argv: list[str]) -> None:
  """Measures, writes and prints."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  report = benchmark.run(_SUITE.value, _REPEATS.value)
  if _OUTPUT.value:
    results.write_json(_OUTPUT.value, report)
  print(benchmark.format_report(report))


if __name__ == '__main__':
  flags.mark_flag_as_required('suite')
  cli.run(main)
