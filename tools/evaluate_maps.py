"""Evaluates anomaly maps of any software against MVTec-style ground truth.

  python tools/evaluate_maps.py --maps DIR --data DIR --output DIR

DIR/CATEGORY/test/DEFECT/ID.tiff (or .npy), float32, one for every test image.
Writes results.json, results.csv and results.md.
"""

from absl import app
from absl import flags

from dmdd_jax import cli
from dmdd_jax import evaluate_maps
from dmdd_jax import storage
from dmdd_jax.metrics import results

_MAPS = cli.define_path('maps', None, 'Folder of maps.', required=True)
_DATA = cli.define_path('data', None, 'Folder of the data.', required=True)
_OUTPUT = cli.define_path('output', None, 'Results go here.', required=True)
_CATEGORIES = flags.DEFINE_list('categories', [], 'All with maps if empty.')
_TOP = flags.DEFINE_integer(
  'score_top_pixels', 100, 'Image score: mean of so many highest pixels.'
)


def main(argv: list[str]) -> None:
  """Evaluates and prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  rows = evaluate_maps.evaluate_maps(
    _MAPS.value,
    _DATA.value,
    _CATEGORIES.value,
    score_top_pixels=_TOP.value,
  )
  tables = results.format_tables(rows)
  storage.write_texts(_OUTPUT.value, tables)
  print(tables['results.md'])


if __name__ == '__main__':
  cli.run(main)
