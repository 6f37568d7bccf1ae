"""Speed and memory, each figure beside a baseline measured in the same run.

Rates end in `_per_s`; what has `baseline` in its name is somebody else's way of
doing the same. Times are medians of several repeats after a warm-up, with the
smallest and largest beside them: these machines are shared and noisy, so the
ratios of one run are what compares.

Synopsis:

  report = benchmark.run('metrics')
  print(benchmark.format_report(report))
"""

from collections.abc import Callable, Mapping
import gc
import os
import platform
import statistics
import threading
import time
from typing import Any

import numpy as np

SUITES = ('metrics', 'input', 'train', 'predict', 'startup')


def measure(
  function: Callable[[], Any], repeats: int, warmup: int = 1
) -> dict[str, float]:
  """Calls a function and returns its median, lowest and highest seconds."""
  for _ in range(warmup):
    function()
  seconds = []
  for _ in range(repeats):
    gc.collect()
    started = time.perf_counter()
    function()
    seconds.append(time.perf_counter() - started)
  return {
    'median_s': statistics.median(seconds),
    'min_s': min(seconds),
    'max_s': max(seconds),
    'repeats': repeats,
  }


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


def run(suite: str, repeats: int = 5) -> dict[str, Any]:
  """Runs a suite.

  Args:
    suite: one of `SUITES`.
    repeats: of each measurement.

  Returns:
    {'suite', 'environment', 'figures': {name: number or measurement}}

  Raises:
    ValueError: unknown suite.
  """
  suites = {
    'metrics': _metrics,
    'input': _input,
    'train': _train,
    'predict': _predict,
    'startup': _startup,
  }
  if suite not in suites:
    raise ValueError(f'unknown suite {suite!r}; choose one of {SUITES}')
  found = environment()
  return {
    'suite': suite,
    'environment': found,
    'figures': suites[suite](repeats),
  }


def format_report(report: Mapping[str, Any]) -> str:
  """A Markdown table of a report's figures."""
  lines = ['| figure | value | min | max |', '|---|---:|---:|---:|']
  for name, value in report['figures'].items():
    if isinstance(value, Mapping):
      cells = [f'{value[k]:.4g} s' for k in ('median_s', 'min_s', 'max_s')]
    else:
      cells = [f'{value:.4g}', '', '']
    lines.append('| ' + ' | '.join([name, *cells]) + ' |')
  return '\n'.join(lines) + '\n'


def fake_test_set(
  count: int, size: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Maps (N, S, S) float32 with smooth noise and masks uint8 with blobs.

  Three in four images hold one to three discs, on which the map is raised.
  """
  from scipy import ndimage

  rng = np.random.default_rng(seed)
  maps = np.empty((count, size, size), np.float32)
  masks = np.zeros((count, size, size), np.uint8)
  y, x = np.mgrid[:size, :size]
  for index in range(count):
    noise = rng.standard_normal((size // 4, size // 4)).astype(np.float32)
    maps[index] = ndimage.zoom(noise, 4, order=1)[:size, :size]
    for _ in range(rng.integers(1, 4) if index % 4 else 0):
      center, radius = rng.uniform(0, size, 2), rng.uniform(0.02, 0.1) * size
      disc = (y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2
      masks[index][disc] = 1
    maps[index] += 1.5 * masks[index]
  return maps, masks


def _metrics(repeats: int) -> dict[str, Any]:
  """All pixel metrics and AU-PRO, against scikit-learn and 200 thresholds."""
  from sklearn import metrics as sklearn_metrics

  from dmdd_jax.metrics import results

  figures: dict[str, Any] = {}
  for size in (256, 900):
    maps, masks = fake_test_set(100, size)
    labels = masks.max(axis=(1, 2))
    scores = maps.max(axis=(1, 2))
    name = f'maps_100x{size}'

    def ours(maps=maps, masks=masks, scores=scores, labels=labels):
      return results.compute(maps, masks, scores, labels, extra=())

    times = repeats if size == 256 else min(repeats, 3)
    figures[f'{name}/all_pixel_metrics'] = measure(ours, times)
    figures[f'{name}/all_pixel_metrics_images_per_s'] = (
      100 / figures[f'{name}/all_pixel_metrics']['median_s']
    )
    figures[f'{name}/all_pixel_metrics_peak_over_maps'] = (
      1 + peak_memory(ours) / maps.nbytes
    )
    figures[f'{name}/baseline_sklearn_pixel_auroc'] = measure(
      lambda maps=maps, masks=masks: sklearn_metrics.roc_auc_score(
        masks.ravel(), maps.ravel()
      ),
      min(times, 2),
      warmup=0,
    )
    figures[f'{name}/baseline_200_thresholds_pro'] = measure(
      lambda maps=maps, masks=masks: pro_200_thresholds(maps, masks),
      1,
      warmup=0,
    )
  return figures


def pro_200_thresholds(maps: np.ndarray, masks: np.ndarray) -> float:
  """The usual AU-PRO loop, approximate: the baseline of the metrics suite."""
  from scipy import ndimage

  regions = [ndimage.label(mask, np.ones((3, 3)))[0] for mask in masks]
  normal = masks == 0
  rates, overlaps = [], []
  for threshold in np.linspace(maps.max(), maps.min(), 200):
    found = maps >= threshold
    rates.append(np.count_nonzero(found & normal) / np.count_nonzero(normal))
    overlaps.append(
      np.mean(
        np.concatenate(
          [
            ndimage.mean(hit, region, np.arange(1, region.max() + 1))
            for hit, region in zip(found, regions)
            if region.max()
          ]
        )
      )
    )
  within = [rate for rate in rates if rate < 0.3]
  overlaps = [*overlaps[: len(within)], np.interp(0.3, rates, overlaps)]
  return float(np.trapezoid(overlaps, [*within, 0.3]) / 0.3)


def bench_config(size: int = 256, batch_size: int = 8):
  """A configuration with random weights and generated surfaces."""
  from configs import default

  config = default.get_config()
  config.teacher.weights = 'random'
  config.data.image_size = size
  config.train.batch_size = batch_size
  return config


def _pairs(config, count: int = 32) -> tuple[np.ndarray, np.ndarray]:
  """Surfaces (N, S, S, 3) and procedural textures, uint8."""
  from dmdd_jax.data import surfaces

  size = config.data.image_size
  images = [surfaces.surface(str(i), size)[0] for i in range(count)]
  return np.stack(images), surfaces.procedural_textures(count, size)


def _input(repeats: int) -> dict[str, Any]:
  """Pairs synthesised per second, against NumPy image by image."""
  from dmdd_jax.data import pipeline

  config = bench_config(batch_size=32)
  images, textures = _pairs(config)
  batches = 6
  iterator = pipeline.train_dataset(
    images,
    textures,
    pipeline.options(config),
    seed=0,
    batch_size=32,
    total_steps=batches * (repeats + 1),
  ).as_numpy_iterator()

  def ours():
    for _ in range(batches):
      next(iterator)

  def baseline():
    rng = np.random.default_rng(0)
    for index in range(32):
      numpy_pair(images[index % len(images)], textures, rng)

  figures: dict[str, Any] = {}
  figures['pairs_256'] = measure(ours, repeats)
  figures['pairs_256_per_s'] = batches * 32 / figures['pairs_256']['median_s']
  figures['baseline_numpy_32_pairs'] = measure(baseline, repeats)
  figures['baseline_numpy_pairs_256_per_s'] = (
    32 / figures['baseline_numpy_32_pairs']['median_s']
  )
  figures['over_baseline'] = (
    figures['pairs_256_per_s'] / figures['baseline_numpy_pairs_256_per_s']
  )
  return figures


def numpy_pair(
  image: np.ndarray, textures: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """One Perlin-texture pair the usual way: the input suite's baseline."""
  from scipy import ndimage

  size = image.shape[0]
  cells = 2 ** rng.integers(0, 6, 2)
  angles = rng.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
  gradient = np.stack([np.sin(angles), np.cos(angles)], -1)
  y, x = np.meshgrid(
    np.arange(size) * cells[0] / size,
    np.arange(size) * cells[1] / size,
    indexing='ij',
  )
  row, column = y.astype(int), x.astype(int)
  fy, fx = y - row, x - column
  fade_y, fade_x = (t**3 * (t * (6 * t - 15) + 10) for t in (fy, fx))
  noise = np.zeros((size, size))
  for dy, wy in ((0, 1 - fade_y), (1, fade_y)):
    for dx, wx in ((0, 1 - fade_x), (1, fade_x)):
      corner = gradient[row + dy, column + dx]
      offset = corner[..., 0] * (fy - dy) + corner[..., 1] * (fx - dx)
      noise += wy * wx * offset
  noise = ndimage.rotate(
    np.sqrt(2) * noise, rng.uniform(-90, 90), reshape=False, order=1
  )
  mask = (noise > 0.5)[..., None].astype(np.float32)
  texture = textures[rng.integers(len(textures))].astype(np.float32) / 255
  normal = image.astype(np.float32) / 255
  opacity = rng.uniform(0, 0.8)
  blend = (1 - opacity) * texture + opacity * normal
  return normal * (1 - mask) + blend * mask, mask


def matmul_peak(repeats: int = 5, size: int = 2048) -> float:
  """Measured float32 matrix-product rate of the default device, FLOP/s."""
  import jax
  import jax.numpy as jnp

  x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
  product = jax.jit(lambda a, b: a @ b)
  seconds = measure(lambda: product(x, x).block_until_ready(), repeats)
  return 2 * size**3 / seconds['min_s']


def _train(repeats: int) -> dict[str, Any]:
  """A step of each phase: time, FLOPs, share of the matmul peak, input wait."""
  import jax

  from dmdd_jax import sharding
  from dmdd_jax import steps
  from dmdd_jax import train_state
  from dmdd_jax.data import pipeline
  from dmdd_jax.models import dmdd

  config = bench_config()
  mesh = sharding.make_mesh()
  model = dmdd.from_config(config)
  state = train_state.create(config, model, jax.random.key(0))
  images, textures = _pairs(config)
  iterator = pipeline.train_dataset(
    images,
    textures,
    pipeline.options(config),
    seed=0,
    batch_size=config.train.batch_size,
    total_steps=100 * (repeats + 2),
  ).as_numpy_iterator()

  def load():
    rows = next(iterator)
    return sharding.to_global(
      mesh, {key: rows[key] for key in ('image', 'normal', 'mask')}
    )

  peak = matmul_peak(repeats)
  figures: dict[str, Any] = {'limit_matmul_flop_per_s': peak}
  constant = load()
  functions = steps.make_train_steps(config, model, mesh)
  for phase in ('distill', 'segment'):
    compiled = functions[phase].lower(state, constant).compile()
    flops = compiled.cost_analysis()['flops']
    holder = [jax.tree.map(lambda x: x.copy(), state)]

    def step(batch, compiled=compiled, holder=holder):
      holder[0], metrics = compiled(holder[0], batch)
      jax.block_until_ready(metrics)

    alone = measure(lambda step=step: step(constant), repeats)
    fed = measure(lambda step=step: step(load()), repeats)
    name = f'{phase}_step_8x256'
    figures[f'{name}/baseline_constant_batch'] = alone
    figures[f'{name}/fed_by_pipeline'] = fed
    figures[f'{name}/fed_over_constant'] = fed['median_s'] / alone['median_s']
    figures[f'{name}/pairs_per_s'] = 8 / fed['median_s']
    figures[f'{name}/gflop'] = flops / 1e9
    figures[f'{name}/share_of_matmul_peak'] = flops / alone['median_s'] / peak
  return figures


def _predict(repeats: int) -> dict[str, Any]:
  """Images per second at batch 1 and 16, and the teacher alone as a floor."""
  import jax

  from dmdd_jax import sharding
  from dmdd_jax import steps
  from dmdd_jax import train_state
  from dmdd_jax.models import dmdd

  config = bench_config()
  mesh = sharding.make_mesh(jax.devices()[:1])
  model = dmdd.from_config(config)
  state = train_state.create(config, model, jax.random.key(0))
  variables = train_state.variables(state)
  predict = steps.make_predict_step(config, model, mesh)
  teach = jax.jit(lambda v, x: model.apply(v, x / 255.0, method='teach'))
  images, _ = _pairs(config, 16)
  figures: dict[str, Any] = {}
  for batch in (1, 16):
    rows = images[:batch]
    runs = {
      f'batch_{batch}': lambda rows=rows: predict(
        variables, steps.Fusion(), rows
      ),
      f'baseline_teacher_alone_batch_{batch}': lambda rows=rows: teach(
        variables, rows.astype(np.float32)
      ),
    }
    for name, function in runs.items():
      figures[name] = measure(
        lambda function=function: jax.block_until_ready(function()), repeats
      )
      figures[f'{name}_images_per_s'] = batch / figures[name]['median_s']
  return figures


def _startup(repeats: int) -> dict[str, Any]:
  """Seconds from a command to its end, in processes of their own."""
  import subprocess
  import sys

  def command(code: str) -> Callable[[], None]:
    def call() -> None:
      subprocess.run([sys.executable, '-c', code], check=True)

    return call

  codes = {
    'baseline_python': 'pass',
    'import_dmdd_jax': 'import dmdd_jax',
    'import_evaluate': 'import dmdd_jax.evaluate',
    'import_train': 'import dmdd_jax.train',
    'baseline_import_jax': 'import jax',
    'baseline_import_tensorflow': 'import tensorflow',
  }
  return {name: measure(command(code), repeats) for name, code in codes.items()}


def _processor() -> str:
  """The processor's name, as the kernel has it."""
  try:
    with open('/proc/cpuinfo') as file:
      names = [line for line in file if line.startswith('model name')]
    return names[0].partition(':')[2].strip()
  except (OSError, IndexError):
    return platform.processor()
