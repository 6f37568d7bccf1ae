"""Plans a training on TPUs: compiles its programs without any and reads them.

  python tools/plan.py --topology v5e:4x4 --config configs/mvtec.py \
    --output plan.json

It needs libtpu (the extra `tpu`) and takes minutes a program. The tables give
operations, bytes, memory and collectives of each device, and the least time of
a step by the chip's published peaks.
"""

import dataclasses

from absl import app
from absl import flags
from ml_collections import config_flags

from dmdd_jax import cli
from dmdd_jax import storage
from dmdd_jax.metrics import results

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'As for training.', lock_config=True
)
_TOPOLOGY = flags.DEFINE_string(
  'topology', 'v5e:2x2', 'Chips as libtpu names them.'
)
_PROGRAMS = flags.DEFINE_list(
  'programs', [], 'Of distill, segment, joint, predict, exported; all of them.'
)
_OUTPUT = cli.define_path('output', None, 'JSON file.')
_TEXT = cli.define_path('text', '', 'Folder for the compiled programs.')


def main(argv: list[str]) -> None:
  """Compiles, writes and prints."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  import jax  # After the flags: it takes a second.

  # The chips are described, not used: no device but the processor is opened.
  jax.config.update('jax_platforms', 'cpu')
  cli.use_compilation_cache()
  from dmdd_jax import plan as plan_lib
  from dmdd_jax import run as run_lib

  names = [name for name in _CONFIG.value.data.category.split(',') if name]
  config = run_lib.for_category(_CONFIG.value, names[0] if names else '')
  mesh = plan_lib.make_mesh(_TOPOLOGY.value)
  plans = []
  for program in plan_lib.programs(config, mesh, _PROGRAMS.value):
    plans.append(plan_lib.read(program, _TEXT.value))
    if _OUTPUT.value:
      rows = [dataclasses.asdict(plan) for plan in plans]
      storage.write_text(_OUTPUT.value, results.format_json(rows))
  print(plan_lib.format_tables(plans, max(len(names), 1)))


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
