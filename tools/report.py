"""Writes the report of a run, one self-contained page, from what is on disk.

  python tools/report.py --workdir runs/mvtec

Opens in any browser, without network. Evaluations write what it needs; one of
an older run is made up for by `--mode evaluate`.
"""

from absl import app

from dmdd_jax import cli
from dmdd_jax.report import page

_WORKDIR = cli.define_path(
  'workdir', None, 'Folder of a run or of a category.', required=True
)


def main(argv: list[str]) -> None:
  """Writes the page and prints its path."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  print(page.write(_WORKDIR.value))


if __name__ == '__main__':
  cli.run(main)
