"""Runs the command of a results.json again and compares the figures.

  python tools/reproduce.py runs/mvtec/screw/results.json --workdir runs/again

The file is that of a category. Exit status 1 where a figure differs by more
than --tolerance. Runs of one revision, of the same versions and on the same
device, are equal bit for bit on a CPU.
"""

import json
import sys

from absl import app
from absl import flags

from dmdd_jax import cli
from dmdd_jax import reproduce

_WORKDIR = cli.define_path('workdir', None, 'A new folder.', required=True)
_TOLERANCE = flags.DEFINE_float('tolerance', 0.0, 'Of two equal figures.')


def main(argv: list[str]) -> None:
  """Prints what differs; status 1 if a figure does."""
  if len(argv) != 2:
    raise app.UsageError('name one results.json')
  with open(argv[1]) as file:
    before = json.load(file)
  after = reproduce.rerun(before, _WORKDIR.value)
  for name in reproduce.REASONS:
    if before.get(name) != after.get(name):
      print(f'other {name}: {before.get(name)} before, {after.get(name)} now')
  differing = reproduce.differences(before, after, _TOLERANCE.value)
  for name, (old, new) in differing.items():
    print(f'{name}: {old} before, {new} now')
  equal = len(reproduce.figures(before)) - len(differing)
  print(f'{equal} figures are equal, {len(differing)} differ')
  sys.exit(1 if differing else 0)


if __name__ == '__main__':
  cli.run(main)
