"""Checks a category of images in MVTec AD's layout and names every fault.

  python tools/check_data.py --root data/mvtec --category screw \
    [--sheet sheet.png --textures data/dtd/images]

Prints counts, sizes and one line per fault, with its file; the exit status is
1 if there are faults. --sheet draws synthesised pairs (normal, anomalous,
mask) with the fields of configs/default.py: --options.synthesis.region_share=1.
"""

import os
import sys

from absl import app
from absl import flags
from ml_collections import config_flags

from dmdd_jax import cli

_ROOT = cli.define_path('root', None, 'Of the categories.', required=True)
_CATEGORY = flags.DEFINE_string('category', None, 'Its name.', required=True)
_SHEET = cli.define_path('sheet', None, 'Contact sheet to write.')
_TEXTURES = cli.define_path('textures', '', 'Procedural ones if empty.')
_DEFAULT = os.path.join(os.path.dirname(__file__), '../configs/default.py')
_CONFIG = config_flags.DEFINE_config_file(
  'options', os.path.abspath(_DEFAULT), 'Whose synthesis --sheet shows.'
)


def main(argv: list[str]) -> None:
  """Checks, prints and draws."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  from dmdd_jax.data import check
  from dmdd_jax.data import images

  images.allow_pixels(_CONFIG.value.data.max_pixels)
  white_level = _CONFIG.value.data.white_level
  report = check.check_category(_ROOT.value, _CATEGORY.value, white_level)
  print(check.format_report(report))
  if _SHEET.value:
    from dmdd_jax import config as config_lib
    from dmdd_jax.data import pipeline  # TensorFlow takes seconds to import.

    config = _CONFIG.value
    config_lib.check(config)
    check.write_sheet(
      _SHEET.value,
      _ROOT.value,
      _CATEGORY.value,
      pipeline.options(config),
      textures=_TEXTURES.value,
      seed=config.seed,
      white_level=white_level,
    )
    print(f'contact sheet: {_SHEET.value}')
  if report.faults:
    sys.exit(1)


if __name__ == '__main__':
  cli.run(main)
