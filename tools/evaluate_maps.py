"""Evaluates anomaly maps, or image scores, that any software wrote.

  python tools/evaluate_maps.py --maps DIR --data DIR --output DIR

DIR holds a map for every test image, .tiff or .npy of any floating point, at
the place that the image has in the data set (CATEGORY/test/DEFECT/ID.tiff). It
may be what is sent to MVTec's server (anomaly_images/CATEGORY/...). Image
scores are the mean of a map's 100 highest pixels, or come from a CSV:

  python tools/evaluate_maps.py --scores scores.csv --data DIR --output DIR

Writes results.json, results.csv, results.md, images.csv with a row for each
image and defects.csv with a row for each defect.
"""

from absl import app
from absl import flags

from dmdd_jax import cli
from dmdd_jax import evaluate_maps
from dmdd_jax import storage
from dmdd_jax.data import layouts

_MAPS = cli.define_path('maps', '', 'Folder of maps; without, --scores.')
_DATA = cli.define_path('data', None, 'Folder of the data.', required=True)
_OUTPUT = cli.define_path('output', None, 'Results go here.', required=True)
_LAYOUT = flags.DEFINE_enum(
  'layout', layouts.MVTEC_AD, layouts.NAMES, 'Of --data; train/ is not needed.'
)
_CATEGORIES = flags.DEFINE_list(
  'categories', [], 'All with maps, or with scores, if empty.'
)
_SCORES = cli.define_path(
  'scores', '', 'CSV with the columns file and score: image scores.'
)
_SCORE = flags.DEFINE_string(
  'score',
  '',
  'Image score: max, topN (mean of the N highest pixels) or csv. By default csv'
  ' with --scores and top100 without.',
)
_RESIZE = flags.DEFINE_bool(
  'resize', False, "Resize maps of another size than their image's (bilinear)."
)
_LIMITS = flags.DEFINE_list(
  'pro_limits',
  ['0.3', '0.05'],
  'False-positive rates up to which AU-PRO is taken.',
)
_ROWS = flags.DEFINE_bool(
  'rows', True, 'Measure each image and defect; doubles the time.'
)
_FOLDER = {
  name: flags.DEFINE_string(name, '', f'--layout folder: {text} below --data.')
  for name, text in {
    'test_normal': 'normal images',
    'defect': 'defective images',
    'masks': 'their masks',
  }.items()
}


def main(argv: list[str]) -> None:
  """Evaluates and prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  folder = {name: flag.value for name, flag in _FOLDER.items()}
  evaluated = evaluate_maps.evaluate_maps(
    _MAPS.value,
    {'name': _LAYOUT.value, 'root': _DATA.value, **folder},
    _CATEGORIES.value,
    scores_file=_SCORES.value,
    score=_SCORE.value,
    resize=_RESIZE.value,
    pro_limits=[float(limit) for limit in _LIMITS.value],
    rows=_ROWS.value,
  )
  tables = evaluate_maps.tables(evaluated)
  storage.write_texts(_OUTPUT.value, tables)
  print(tables['results.md'])


if __name__ == '__main__':
  cli.run(main)
