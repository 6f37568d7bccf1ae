"""Measuring: time, memory, what a machine can do at best, and tables of it.

Every figure stands beside a baseline, somebody else's way of doing the same
measured in the same run, and beside a limit, what the machine could do at best:
floating-point operations over the measured rate of a matrix product, bytes over
the measured rate of a copy. Times are medians of several repeats after a
warm-up, with the smallest and largest beside them: these machines are shared
and noisy, so the ratios of one run are what compares.

Synopsis:

  seconds = benchmark.measure(function, repeats=5)
  figure = benchmark.rate('maps', 'images/s', 100, seconds, baseline=...)
  print(benchmark.format_table([figure]))

The suites are in `suites`, `latency` and `growth`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import gc
import math
import os
import platform
import statistics
import threading
import time
from typing import Any

import numpy as np

# Of the repository.
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), '../..'))


@dataclasses.dataclass(frozen=True)
class Options:
  """How to measure.

  Attributes:
    repeats: of each measurement.
    size: side of the images, in pixels.
    torch_python: a Python that has torch, for the peer of the train suite; by
      default this one, if it has it.
    pictures: folder for the plots of the growth suite.
  """

  repeats: int = 5
  size: int = 256
  torch_python: str = ''
  pictures: str = 'docs'


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Of several calls: median, lowest and highest, and processor time."""

  median: float
  lowest: float
  highest: float
  processor: float


@dataclasses.dataclass(frozen=True)
class Figure:
  """One measured number. With a unit per second more is better, else less.

  Attributes:
    name: what was measured.
    unit: of all its numbers, e.g. 'pairs/s', 's', 'MB'.
    value: the median; NaN where it could not be measured, and the name says
      why.
    low: the lowest of the repeats; None where there is one number.
    high: the highest.
    baseline: the same of the baseline, None without one.
    baseline_is: what the baseline is.
    limit: the best that can be had, None where it is not known.
    limit_is: where the limit comes from.
  """

  name: str
  unit: str
  value: float
  low: float | None = None
  high: float | None = None
  baseline: float | None = None
  baseline_is: str = ''
  limit: float | None = None
  limit_is: str = ''

  def over(self, other: float) -> float:
    """How many times better than another number of the unit."""
    more = self.unit.endswith('/s')
    return self.value / other if more else other / self.value


def measure(
  function: Callable[[], Any], repeats: int, warmup: int = 1
) -> Seconds:
  """Calls a function `warmup` + `repeats` times; only the latter count."""
  for _ in range(warmup):
    function()
  wall, processor = [], []
  for _ in range(repeats):
    gc.collect()
    started = time.perf_counter(), time.process_time()
    function()
    wall.append(time.perf_counter() - started[0])
    processor.append(time.process_time() - started[1])
  return Seconds(
    statistics.median(wall),
    min(wall),
    max(wall),
    statistics.median(processor),
  )


def rate(
  name: str, unit: str, count: float, seconds: Seconds, **others: Any
) -> Figure:
  """Units per second: `count` in each measured time; `others` of `Figure`."""
  return Figure(
    name,
    unit,
    count / seconds.median,
    count / seconds.highest,
    count / seconds.lowest,
    **others,
  )


def duration(name: str, seconds: Seconds, **others: Any) -> Figure:
  """A measured time as a figure; `others` of `Figure`."""
  return Figure(
    name, 's', seconds.median, seconds.lowest, seconds.highest, **others
  )


def peak_memory(function: Callable[[], Any]) -> int:
  """Bytes of resident memory a call adds at its peak, sampled every 2 ms."""

  def resident() -> int:
    with open('/proc/self/statm') as file:
      return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

  gc.collect()
  before, peak, done = resident(), 0, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.002):
      peak = max(peak, resident())

  watcher = threading.Thread(target=watch)
  watcher.start()
  try:
    function()
  finally:
    done.set()
    watcher.join()
  return max(peak - before, 0)


def matmul_peak(dtype: str = 'float32', size: int = 2048) -> float:
  """Measured rate of a matrix product on the default device, FLOP/s."""
  import jax
  import jax.numpy as jnp

  x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
  product = jax.jit(lambda a, b: a @ b)
  seconds = measure(lambda: product(x, x).block_until_ready(), 5)
  return 2 * size**3 / seconds.lowest


def copy_bandwidth(size: int = 2**27) -> float:
  """Measured rate of a copy on one core, bytes read and written a second."""
  source = np.ones(size, np.uint8)
  target = np.empty_like(source)
  seconds = measure(lambda: np.copyto(target, source), 5)
  return 2 * size / seconds.lowest


def environment() -> dict[str, Any]:
  """The machine and the versions a figure belongs to."""
  from dmdd_jax import provenance  # Imports jax, which not every suite needs.

  return {
    'machine': platform.machine(),
    'processor': _processor(),
    'cores': len(os.sched_getaffinity(0)),
    'load_average': os.getloadavg()[0],
    'versions': provenance.versions(),
    'git_revision': provenance.git_revision(),
  }


def format_table(figures: Sequence[Figure]) -> str:
  """A Markdown table of figures."""
  lines = [
    '| | measured (lowest to highest) | baseline | limit |',
    '|---|---|---|---|',
  ]
  for figure in figures:
    value = f'{figure.value:.3g} {figure.unit}'
    if figure.low is not None:
      value += f' ({figure.low:.3g} to {figure.high:.3g})'
    if math.isnan(figure.value):
      value = 'not measured'
    cells = [figure.name, value]
    for other, text in (
      (figure.baseline, figure.baseline_is),
      (figure.limit, figure.limit_is),
    ):
      cells.append('')
      if other is not None:
        cells[-1] = f'{other:.3g}, {text}: **{figure.over(other):.2f}x**'
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def _processor() -> str:
  """The processor's name, as the kernel has it."""
  try:
    with open('/proc/cpuinfo') as file:
      names = [line for line in file if line.startswith('model name')]
    return names[0].partition(':')[2].strip()
  except (OSError, IndexError):
    return platform.processor()
