"""The scalars of a training: WORKDIR/scalars.jsonl, one JSON line per write.

The file holds the numbers that TensorBoard shows, for programs that do not
read its event files: `{"step": 50, "train/loss": 0.31, "steps_per_s": 4.2}`.

Synopsis:

  scalars.append('runs/mvtec/screw', 50, {'train/loss': 0.31})
  steps, losses = scalars.read('runs/mvtec/screw')['train/loss']
"""

from collections.abc import Mapping
import json
import math
import os

from dmdd_jax import storage

NAME = 'scalars.jsonl'


def append(
  workdir: str | os.PathLike, step: int, values: Mapping[str, float]
) -> None:
  """Adds a line to the file, which is made if it is missing.

  Args:
    workdir: of the category.
    step: number of steps taken.
    values: {tag: number}; NaN and infinity are written as null.
  """
  line = {'step': step} | {
    tag: float(value) if math.isfinite(value) else None
    for tag, value in values.items()
  }
  text = json.dumps(line, allow_nan=False) + '\n'
  storage.append_text(os.path.join(workdir, NAME), text)


def read(
  workdir: str | os.PathLike,
) -> dict[str, tuple[list[int], list[float]]]:
  """{tag: (steps, values)}, by ascending step; empty if there is no file.

  A run that resumes from a checkpoint repeats steps: the last value of a step
  counts. null is NaN again. A line that a killed run left incomplete is
  skipped.
  """
  path = storage.path(os.path.join(workdir, NAME))
  if not path.exists():
    return {}
  curves: dict[str, dict[int, float]] = {}
  for text in path.read_bytes().splitlines():
    try:
      line = json.loads(text)
      step = line.pop('step')
    except ValueError:
      continue
    for tag, value in line.items():
      number = math.nan if value is None else value
      curves.setdefault(tag, {})[step] = number
  ordered = {tag: sorted(points.items()) for tag, points in curves.items()}
  return {
    tag: ([step for step, _ in points], [number for _, number in points])
    for tag, points in ordered.items()
  }
