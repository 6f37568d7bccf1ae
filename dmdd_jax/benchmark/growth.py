"""How time and memory grow with the work: figures, and plots for the docs.

A distillation step against batch size, resolution and the number of devices;
the metrics of a test set against its size, to 10,000 images of synthetic maps.

Synopsis:

  figures = growth.run(options)  # Writes growth_*.svg too.
"""

from collections.abc import Sequence
import json
import os
import subprocess
import sys
import time

import jax
import numpy as np

from dmdd_jax.benchmark import measure
from dmdd_jax.benchmark import metrics
from dmdd_jax.benchmark import train_step

BATCHES = (2, 4, 8, 16)
SIZES = (64, 128, 192, 256)
DEVICES = (1, 2, 4)
TEST_SIZES = (100, 1000, 10_000)
# A step's median seconds as JSON: arguments are size, batch, devices, repeats.
_STEP = """
import json, sys
from dmdd_jax import cli
from dmdd_jax.benchmark import growth
cli.use_compilation_cache()
print(json.dumps(growth.step_seconds(*map(int, sys.argv[1:]))))
"""


def step_seconds(
  size: int, batch_size: int, devices: int, repeats: int
) -> tuple[float, float, float]:
  """Median, lowest and highest seconds of a distillation step."""
  from dmdd_jax import sharding

  options = measure.Options(repeats, size)
  bench = train_step.TrainBench(options, batch_size=batch_size, devices=devices)
  rng = np.random.default_rng(0)
  shape = (batch_size, size, size)
  batch = {
    'image': rng.random((*shape, 3), np.float32),
    'normal': rng.random((*shape, 3), np.float32),
    'mask': np.float32(rng.random((*shape, 1)) < 0.05),
  }
  step, _, _ = bench.compile('distill', sharding.to_global(bench.mesh, batch))
  measured = measure.measure(step, repeats)
  return measured.median, measured.lowest, measured.highest


def _steps(
  axis: str, cases: Sequence[tuple[int, int, int, int]], repeats: int
) -> list[measure.Figure]:
  """The first case is the baseline: the others, if cost is proportional.

  Args:
    axis: what grows, for the names.
    cases: (value on the axis, size, batch size, devices).
    repeats: of each step.
  """
  figures = []
  before = os.environ.get('XLA_FLAGS', '')
  for value, size, batch_size, devices in cases:
    flags = f'--xla_force_host_platform_device_count={devices}'
    done = subprocess.run(
      [sys.executable, '-c', _STEP]
      + [str(n) for n in (size, batch_size, devices, repeats)],
      check=True,
      stdout=subprocess.PIPE,
      env={**os.environ, 'XLA_FLAGS': f'{before} {flags}'},
    )
    median, lowest, highest = json.loads(done.stdout.splitlines()[-1])
    pixels = batch_size * size * size
    if not figures:
      unit_cost = median / pixels
    figures.append(
      measure.Figure(
        f'step, {axis} {value}',
        's',
        median,
        lowest,
        highest,
        baseline=unit_cost * pixels,
        baseline_is='in proportion to the first',
      )
    )
  return figures


def synthetic_test_set(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Maps and masks of any number of images, made from a hundred.

  Copies are raised by a little, so that their scores are others.
  """
  base_maps, base_masks = metrics.fake_test_set(100, size)
  rows = np.arange(count) % 100
  maps, masks = base_maps[rows], base_masks[rows]
  maps += np.float32(1e-3) * np.arange(count, dtype=np.float32)[:, None, None]
  return maps, masks


def _evaluations(
  size: int, counts: Sequence[int]
) -> tuple[list[measure.Figure], list[measure.Figure]]:
  """Seconds and peak memory of all metrics, for test sets that grow."""
  times, memories = [], []
  for count in counts:
    seconds, added, given = _evaluation(count, size)
    if not times:
      first = seconds / count
    times.append(
      measure.Figure(
        f'metrics, {count} maps of {size} x {size}',
        's',
        seconds,
        baseline=first * count,
        baseline_is='in proportion to the first',
      )
    )
    memories.append(
      measure.Figure(
        f'metrics, {count} maps, memory beyond maps and masks',
        'MB',
        added / 1e6,
        limit=given / 1e6,
        limit_is='maps and masks themselves',
      )
    )
  return times, memories


def _evaluation(count: int, size: int) -> tuple[float, int, int]:
  """Seconds and bytes that all metrics take, and bytes of what they are of."""
  from dmdd_jax.metrics import results

  maps, masks = synthetic_test_set(count, size)
  scores, labels = maps.max(axis=(1, 2)), masks.max(axis=(1, 2))
  seconds = []

  def compute():
    started = time.perf_counter()
    results.compute(maps, masks, scores, labels, extra=())
    seconds.append(time.perf_counter() - started)

  added = measure.peak_memory(compute)
  return seconds[0], added, maps.nbytes + masks.nbytes


def run(options: measure.Options) -> list[measure.Figure]:
  """Measures all of it and writes the plots to `options.pictures`."""
  repeats, size = min(options.repeats, 3), options.size
  half = size // 2
  sizes = [s for s in SIZES if s <= size]
  # A host's processor can stand for several devices, a GPU cannot.
  on_host = jax.default_backend() == 'cpu'
  devices = [n for n in DEVICES if on_host or n <= jax.device_count()]
  groups = {
    'batch size': (
      BATCHES,
      _steps('batch size', [(n, half, n, 1) for n in BATCHES], repeats),
    ),
    'image side': (
      sizes,
      _steps('image side', [(n, n, 4, 1) for n in sizes], repeats),
    ),
    'devices': (
      devices,
      _steps('devices', [(n, half, 8, n) for n in devices], repeats),
    ),
  }
  counts = TEST_SIZES if size >= 256 else (100, 200)
  times, memories = _evaluations(size, counts)
  os.makedirs(options.pictures, exist_ok=True)
  _plot(
    os.path.join(options.pictures, 'growth_step.svg'),
    [
      (axis, 'seconds a step', values, figures)
      for axis, (values, figures) in groups.items()
    ],
  )
  _plot(
    os.path.join(options.pictures, 'growth_evaluation.svg'),
    [
      ('images in the test set', 'seconds', counts, times),
      ('images in the test set', 'MB beyond the maps', counts, memories),
    ],
  )
  steps = [figure for _, figures in groups.values() for figure in figures]
  return [*steps, *times, *memories]


def _plot(
  path: str,
  panels: Sequence[tuple[str, str, Sequence[int], Sequence[measure.Figure]]],
) -> None:
  """Panels of (x label, y label, x values, figures), with proportion dashed."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  matplotlib.rcParams['svg.hashsalt'] = 'dmdd_jax'  # The same file every time.
  figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2))
  for axis, (x_label, y_label, values, figures) in zip(axes, panels):
    axis.plot(values, [f.value for f in figures], 'o-', label='measured')
    if all(f.baseline is not None for f in figures):
      proportional = [f.baseline for f in figures]
      axis.plot(values, proportional, '--', color='gray', label='proportional')
    axis.set(xlabel=x_label, ylabel=y_label, xscale='log', yscale='log')
    axis.set_xticks(values, [str(v) for v in values])
    axis.set_yticks(
      [f.value for f in figures], [f'{f.value:.2g}' for f in figures]
    )
    axis.minorticks_off()
    axis.legend(frameon=False)
  figure.tight_layout()
  figure.savefig(path, metadata={'Date': None})
  pyplot.close(figure)
