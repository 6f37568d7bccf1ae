"""Takes again the step at which a training stopped, and says what broke.

  python tools/replay_batch.py --workdir runs/mvtec/screw

A training whose loss or gradient is not finite keeps the step's batch and state
in WORKDIR/fault; see dmdd_jax/training/faults.py.
"""

from absl import app

from dmdd_jax import cli

_WORKDIR = cli.define_path('workdir', None, 'Category.', required=True)


def main(argv: list[str]) -> None:
  """Replays and prints."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  from dmdd_jax.training import faults  # After the flags: jax takes a second.

  print(faults.replay(_WORKDIR.value))


if __name__ == '__main__':
  cli.run(main)
