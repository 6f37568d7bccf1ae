"""Writes a checkpoint as one file for other programs, if it equals it.

  python tools/export.py --workdir runs/mvtec/screw --format stablehlo \
    --output screw.dmdd

Scores and maps are compared on normal training images, or on --images.
"""

from absl import app
from absl import flags

from dmdd_jax import cli

_WORKDIR = cli.define_path('workdir', None, 'Of a category.', required=True)
_FORMAT = flags.DEFINE_string('format', 'stablehlo', 'stablehlo or onnx.')
_OUTPUT = cli.define_path('output', None, 'The file.', required=True)
_IMAGES = cli.define_path(
  'images', None, 'To compare on: an image, a folder, a glob or a list.'
)
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; the newest if empty.')


def main(argv: list[str]) -> None:
  """Exports and prints what was compared."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  cli.use_compilation_cache()
  from dmdd_jax.export import (
    write as export_lib,  # After the flags: jax takes a second.
  )

  metadata = export_lib.export(
    _WORKDIR.value, _FORMAT.value, _OUTPUT.value, _IMAGES.value, _STEP.value
  )
  verified = metadata['verified']
  print(
    f'{_OUTPUT.value}: {verified["images"]} images, largest difference of'
    f' score {verified["largest_score_difference"]:.2g}, of map'
    f' {verified["largest_map_difference"]:.2g}'
  )


if __name__ == '__main__':
  cli.run(main)
