"""Evaluates the checkpoint of a category, or of every category of a run.

  python tools/evaluate_checkpoint.py --workdir W [--data DIR] --output DIR

Writes results.json, results.csv, results.md and pictures below the output; with
--maps also the float32 maps, in the layout tools/evaluate_maps.py reads.
"""

from absl import app
from absl import flags

from dmdd_jax import cli

_WORKDIR = cli.define_path('workdir', None, 'Of the run.', required=True)
_DATA = cli.define_path('data', None, "Data root; the training's if empty.")
_OUTPUT = cli.define_path('output', None, 'Results go here.', required=True)
_MAPS = cli.define_path('maps', None, 'Folder to write the maps to.')
_RECALIBRATE = flags.DEFINE_bool(
  'recalibrate', False, 'Fit thresholds again on the held-out images.'
)
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; the newest if empty.')
_RESOLUTIONS = flags.DEFINE_list('resolutions', None, 'model, native or both.')
_SMOOTHING = flags.DEFINE_float('smoothing_sigma', None, 'Pixels; 0 is none.')
_INTERVALS = flags.DEFINE_bool('intervals', None, 'With 95 % intervals.')


def main(argv: list[str]) -> None:
  """Evaluates and prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  from dmdd_jax import run as run_lib

  changes = {
    'data.root': _DATA.value,
    'eval.resolutions': _RESOLUTIONS.value and tuple(_RESOLUTIONS.value),
    'eval.smoothing_sigma': _SMOOTHING.value,
    'eval.intervals': _INTERVALS.value,
  }
  table = run_lib.evaluate_run(
    _WORKDIR.value,
    changes={k: v for k, v in changes.items() if v is not None},
    step=_STEP.value,
    output=_OUTPUT.value,
    maps=_MAPS.value,
    recalibrate=_RECALIBRATE.value,
  )
  print(table)


if __name__ == '__main__':
  cli.run(main)
