"""Runs comparisons of configs/ablation.py and tabulates them.

  python tools/ablate.py --comparisons trunk,losses --seeds 0,1,2 \
    --categories screw,toothbrush --workdir runs/ablation --processes 2 \
    --output docs/experiments -- --config.data.root=data/mvtec

Arguments after `--` go to every run. Each comparison's table is written into
its page (`ablate.PAGES`). The same command again runs what is not yet finished.
"""

import datetime
import os

from absl import flags

from configs import ablation
from dmdd_jax import ablate
from dmdd_jax import cli

_COMPARISONS = flags.DEFINE_list(
  'comparisons', list(ablation.COMPARISONS), 'Which; all by default.'
)
_CATEGORIES = flags.DEFINE_list('categories', ['screw'], 'Categories.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds.')
_WORKDIR = cli.define_path('workdir', None, 'Folder.', required=True)
_PROCESSES = flags.DEFINE_integer('processes', 1, 'Runs at a time.')
_OUTPUT = cli.define_path(
  'output', None, 'Folder of the Markdown pages; default WORKDIR.'
)


def main(argv: list[str]) -> None:
  """Runs the comparisons; prints and writes a section for each."""
  folder = _OUTPUT.value or _WORKDIR.value
  for comparison in _COMPARISONS.value:
    table = ablate.run(
      comparison,
      _CATEGORIES.value,
      seeds=[int(seed) for seed in _SEEDS.value],
      workdir=_WORKDIR.value,
      processes=_PROCESSES.value,
      overrides=argv[1:],
    )
    title = f'{comparison}, {datetime.date.today()}'
    path = os.path.join(folder, ablate.PAGES[comparison])
    ablate.write_section(path, comparison, f'### {title}\n\n{table}')
    print(f'{title}\n\n{table}\nresults: {path}')


if __name__ == '__main__':
  cli.run(main)
