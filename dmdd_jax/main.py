"""Trains, evaluates or predicts from the command line.

  python -m dmdd_jax.main --config configs/mvtec.py:screw \
    --config.data.root=data/mvtec --config.data.textures=data/dtd/images
  python -m dmdd_jax.main --mode evaluate --workdir runs/mvtec
  python -m dmdd_jax.main --mode predict --workdir runs/mvtec/screw \
    --input new/ --output out/
"""

from collections.abc import Mapping
import os
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
import ml_collections
from ml_collections import config_flags

from dmdd_jax import cli

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Configuration file, e.g. configs/mvtec.py:screw.'
)
cli.define_path('workdir', None, 'Of the run; runs/<config> by default.')
_MODES = ('train', 'evaluate', 'predict')
flags.DEFINE_enum('mode', 'train', _MODES, 'What to do.')
cli.define_path(
  'input',
  None,
  'predict: an image, a folder, a glob, or a list of paths, .txt.',
)
cli.define_path('output', None, 'predict: where the results go.')
_FORMATS = ('tiff', 'npy', 'none')
flags.DEFINE_enum('maps', 'tiff', _FORMATS, 'predict: format of the maps.')
flags.DEFINE_bool('overlays', True, 'predict: write a picture per image.')
flags.DEFINE_bool('resume', True, 'predict: go on with the table in --output.')
flags.DEFINE_bool('watch', False, 'predict: take files as they arrive.')
flags.DEFINE_bool('jsonl', False, 'predict: print a line of JSON per image.')
flags.DEFINE_string('profile_steps', None, 'train: trace of the steps a:b.')
flags.DEFINE_string('coordinator', None, "HOST:PORT of process 0, or 'auto'.")
flags.DEFINE_integer('num_processes', None, 'Number of processes.')
flags.DEFINE_integer('process_id', None, 'Index of this process, from 0.')
flags.DEFINE_integer('category_group', None, 'Set by launch/groups.py.')


def main(argv: list[str]) -> None:
  """Sets the process up and calls train, evaluate or predict."""
  if FLAGS.mode == 'train':
    cli.use_huge_pages(main)
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  config, workdir = _CONFIG.value, FLAGS.workdir
  if config is None and (FLAGS.mode == 'train' or workdir is None):
    raise app.UsageError('name a configuration, e.g. --config configs/demo.py')
  if workdir is None:
    path = config_flags.get_config_filename(FLAGS['config']).partition(':')[0]
    workdir = os.path.join('runs', os.path.splitext(os.path.basename(path))[0])
  changes = {}
  if config is not None:
    changes = dict(config_flags.get_override_values(FLAGS['config']))
  place = set_up_devices(config)
  if FLAGS.mode == 'predict':
    pixels = changes.pop('data.max_pixels', 0)
    if changes:
      raise ValueError(
        f'--config.{next(iter(changes))} has no effect: --mode predict reads'
        " the checkpoint's own configuration, but for config.data.max_pixels"
      )
    from dmdd_jax.data import images

    images.allow_pixels(pixels)
    predict(workdir)
    return
  from dmdd_jax import run as run_lib

  if FLAGS.mode == 'train':
    table = run_lib.train_run(
      config,
      workdir,
      FLAGS.profile_steps,
      place=place,
      group=FLAGS.category_group,
    )
  else:
    options = {}
    if config is not None:
      options = {'given': config, 'changes': changes}
    table = run_lib.evaluate_run(workdir, **options)
  print(table)
  print(f'results: {os.path.join(workdir, "results.md")}')
  print(f'pictures: {os.path.join(workdir, "*", "pictures")}')


def set_up_devices(
  config: ml_collections.ConfigDict | None,
) -> tuple[int, int]:
  """Joins the processes, or picks the devices of a training in groups.

  Returns:
    (index, count) of this host among those that share the groups.
  """
  import jax  # Takes a second, which `--help` need not wait for.

  from dmdd_jax.launch import hosts

  cli.use_compilation_cache()
  place = (0, 1)
  if FLAGS.mode == 'train' and config.mesh.category_groups > 1:
    place = hosts.place(FLAGS.num_processes, FLAGS.process_id)
    if FLAGS.category_group is None:
      # The first process of a host leaves the accelerators to its groups.
      jax.config.update('jax_platforms', 'cpu')
  else:
    hosts.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
  logging.info('devices: %s', jax.devices())
  return place


def predict(workdir: str) -> None:
  """Inspects `--input`; exit status 1 if a file was not read or written.

  With --watch the table alone says so, and a signal ends it with status 0.
  """
  import jax

  from dmdd_jax import predict as predict_lib
  from dmdd_jax import predictions

  if not FLAGS.input or not FLAGS.output or jax.process_count() > 1:
    raise app.UsageError('--mode predict needs --input, --output, one process')

  def print_line(row: Mapping[str, Any]) -> None:
    print(predictions.format_line(row), flush=True)

  summary = predict_lib.predict(
    workdir,
    FLAGS.input,
    FLAGS.output,
    FLAGS.maps,
    FLAGS.overlays,
    resume=FLAGS.resume,
    watches=FLAGS.watch,
    on_row=print_line if FLAGS.jsonl else None,
  )
  if not FLAGS.jsonl:
    print(summary['table'])
  failed, incomplete = len(summary['failed']), len(summary['incomplete'])
  if not FLAGS.watch and (failed or incomplete):
    sys.exit(
      f'error: {failed} files could not be read, {incomplete} have no map or'
      ' overlay'
    )


if __name__ == '__main__':
  cli.run(main)
