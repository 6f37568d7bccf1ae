"""Runs categories x seeds and tabulates mean and standard deviation.

  python tools/run_categories.py --config configs/mvtec.py --seeds 0,1,2 \
    --categories screw,toothbrush --workdir runs/sweep --processes 2 \
    -- --config.data.root=data/mvtec

Arguments after `--` go to every run. The same command again skips what is
finished. In a SLURM array (`sbatch --array=0-14 ...`) each task runs its share.
With --ray=auto the runs are spread over the machines of a Ray cluster.
"""

import os
import runpy

from absl import flags

from dmdd_jax import cli
from dmdd_jax.launch import ray_cluster
from dmdd_jax.launch import sweep

_CONFIG = flags.DEFINE_string('config', None, 'Config file.', required=True)
_CATEGORIES = flags.DEFINE_list('categories', [], "The config's if empty.")
_SEEDS = flags.DEFINE_list('seeds', ['0'], 'Seeds.')
_WORKDIR = cli.define_path('workdir', None, 'Folder.', required=True)
_PROCESSES = flags.DEFINE_integer(
  'processes', 1, 'Runs at a time, without Ray.'
)
_RAY = flags.DEFINE_string('ray', None, "Cluster: 'auto', 'local', HOST:PORT.")
_RAY_CPUS = flags.DEFINE_integer('ray_cpus', 1, 'Cores of a run.')
_RAY_GPUS = flags.DEFINE_integer('ray_gpus', 0, 'GPUs of a run.')


def main(argv: list[str]) -> None:
  """Runs and prints the table."""
  categories = _CATEGORIES.value
  if not categories:
    config = runpy.run_path(_CONFIG.value)['get_config']()
    categories = config.data.category.split(',')
  seeds, processes = [int(seed) for seed in _SEEDS.value], _PROCESSES.value
  launch = None
  if _RAY.value:
    launch = ray_cluster.connect(_RAY.value, _RAY_CPUS.value, _RAY_GPUS.value)
    processes = len(seeds) * len(categories)
  results = sweep.run(
    _CONFIG.value,
    categories,
    seeds=seeds,
    workdir=_WORKDIR.value,
    processes=processes,
    overrides=argv[1:],
    share=sweep.array_share(os.environ),
    launch=launch,
  )
  if results:
    print(sweep.write_summary(results, _WORKDIR.value))


if __name__ == '__main__':
  cli.run(main)
