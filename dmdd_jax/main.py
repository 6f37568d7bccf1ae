"""Trains or evaluates from the command line.

  python -m dmdd_jax.main --config configs/mvtec.py:screw \
    --config.data.root=data/mvtec --config.data.textures=data/dtd/images
  python -m dmdd_jax.main --mode evaluate --workdir runs/mvtec
"""

import os

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from dmdd_jax import cli

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Configuration file, e.g. configs/mvtec.py:screw.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; runs/<name of the config> by default.'
)
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate'], 'What to do.')


def main(argv: list[str]) -> None:
  """Sets the process up and calls train or evaluate."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  config, workdir = _CONFIG.value, _WORKDIR.value
  if config is None and (_MODE.value == 'train' or workdir is None):
    raise app.UsageError('name a configuration, e.g. --config configs/demo.py')
  if workdir is None:
    path = config_flags.get_config_filename(FLAGS['config']).partition(':')[0]
    workdir = os.path.join('runs', os.path.splitext(os.path.basename(path))[0])
  use_compilation_cache()
  logging.info('devices: %s', jax.devices())
  if _MODE.value == 'train':
    from dmdd_jax import train  # Imports TensorFlow, which evaluation need not.

    table = train.run_categories(config, workdir)
  else:
    from dmdd_jax import evaluate

    options = {}
    if config is not None:
      options = {'data_root': config.data.root, 'eval_options': config.eval}
    table = evaluate.evaluate_run(workdir, **options)
  print(table)
  print(f'results: {os.path.join(workdir, "results.md")}')
  print(f'pictures: {os.path.join(workdir, "*", "pictures")}')


def use_compilation_cache() -> None:
  """Keeps compiled programs for the next run, in the user's cache folder.

  `JAX_COMPILATION_CACHE_DIR` names another folder.
  """
  if jax.config.jax_compilation_cache_dir is None:
    folder = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    jax.config.update(
      'jax_compilation_cache_dir', os.path.join(folder, 'dmdd_jax', 'xla')
    )


if __name__ == '__main__':
  cli.run(main)
