"""How many steps a training takes in a given time, from measured steps.

Synopsis:

  config = budget.pick(config, minutes=20)
  print(config.train.total_steps)
"""

from collections.abc import Mapping
import contextlib
import math
import statistics
import tempfile
import time

from absl import logging
import jax
import ml_collections

from dmdd_jax import trainer as trainer_lib
from dmdd_jax.training import steps

STEPS = ('train.total_steps', 'train.distill_steps')
# What `pick` decides, and what a training that goes on must keep.
FIELDS = (*STEPS, 'train.batch_size')
_CPU_BATCH = 4  # As in configs/mvtec_cpu.py.
# Steps of each phase: the first ones compile or find their batches ready made.
_SKIPPED, _MEASURED = 3, 5
_FEW = 100  # Steps.


class _Measured(Exception):  # noqa: N818 - it ends a training, and is no error.
  """All steps are measured."""


def pick(
  config: ml_collections.ConfigDict, minutes: float, keep_batch: bool = False
) -> ml_collections.ConfigDict:
  """Sets the number of steps so that training takes these minutes here.

  The share of `train.distill_steps` stays as it is. Compilation, checkpoints
  and evaluation are not counted. On a CPU a step has at most four pairs: many
  small steps learn more there than a few large ones.

  Args:
    config: of one category.
    minutes: for the steps alone, above 0.
    keep_batch: leave `train.batch_size` as it is.

  Returns:
    The config with other values in `FIELDS`.

  Raises:
    ValueError: `minutes` is no number above 0.
    ValueError, FileNotFoundError: the data cannot be used, see `Trainer`.
  """
  number = isinstance(minutes, (int, float)) and not isinstance(minutes, bool)
  if not number or not 0 < minutes < math.inf:
    raise ValueError(f'minutes is {minutes!r}; it must be a number above 0')
  config = config.copy_and_resolve_references()
  train = config.train
  if jax.default_backend() == 'cpu' and not keep_batch:
    train.batch_size = min(train.batch_size, _CPU_BATCH)
  seconds = step_seconds(config)
  share = train.distill_steps / train.total_steps
  train.total_steps, train.distill_steps = split(minutes, seconds, share)
  logging.info(
    'minutes = %g: %d steps of %d pairs, %d of the student; a step takes %s',
    minutes,
    train.total_steps,
    train.batch_size,
    train.distill_steps,
    ', '.join(f'{value:.3g} s ({name})' for name, value in seconds.items()),
  )
  if train.total_steps < _FEW:
    logging.warning(
      'only %d steps fit into %g minutes: expect little of the model, or give'
      ' it more time, a smaller data.image_size or train.batch_size',
      train.total_steps,
      minutes,
    )
  return config


def split(
  minutes: float, seconds: Mapping[str, float], share: float
) -> tuple[int, int]:
  """(total_steps, distill_steps) of a budget.

  Args:
    minutes: the budget.
    seconds: of a step in each of one or two phases.
    share: of the steps that `distill_steps` counts; of two phases, the first.
  """
  first, last = [*seconds.values()][0], [*seconds.values()][-1]
  total = int(60 * minutes / (share * first + (1 - share) * last))
  total = max(len(seconds), total - total % 10 if total > _FEW else total)
  distill = round(share * total)
  if len(seconds) > 1:
    distill = min(max(distill, 1), total - 1)
  return total, distill


def step_seconds(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Seconds of a step, with its input, in each phase of a training.

  Trains a few steps in a temporary folder, without what compiles.

  Args:
    config: of one category, checked.

  Returns:
    {phase: median}, in the order of the phases.
  """
  count = _SKIPPED + _MEASURED
  total = config.train.total_steps
  phases = dict.fromkeys(steps.phase(config, i) for i in (0, total - 1))
  short = config.copy_and_resolve_references()
  with short.unlocked():
    short.train.total_steps = count * len(phases)
    if len(phases) > 1:
      short.train.distill_steps = count
    else:  # 0 stays 0: the student, or its head, is not trained at all.
      short.train.distill_steps = min(short.train.distill_steps, count)
    short.train.checkpoint_every = short.train.total_steps
  ends = [time.monotonic()]
  with tempfile.TemporaryDirectory() as folder:
    trainer = trainer_lib.Trainer(short, folder)

    def note(done: int, of: int) -> None:
      jax.block_until_ready(trainer.state)
      ends.append(time.monotonic())
      if done == of:  # What comes after the last step is not measured.
        raise _Measured

    try:
      with contextlib.suppress(_Measured):
        trainer.run(progress=note)
    finally:
      trainer.close()
  times = [after - before for before, after in zip(ends, ends[1:])]
  return {
    phase: statistics.median(times[index * count :][_SKIPPED:count])
    for index, phase in enumerate(phases)
  }
