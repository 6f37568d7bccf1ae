"""The suites of the benchmark: input, train, predict, metrics, start-up.

Synopsis:

  report = suites.run('metrics', suites.Options())
"""

from collections.abc import Callable
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from dmdd_jax.benchmark import measure


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


def run(suite: str, options: Options) -> dict[str, Any]:
  """Runs a suite.

  Returns:
    {'suite', 'options', 'environment', 'figures': [fields of `Figure`],
    'table': Markdown}

  Raises:
    ValueError: unknown suite.
  """
  if suite not in SUITES:
    raise ValueError(f'unknown suite {suite!r}; choose one of {tuple(SUITES)}')
  environment = measure.environment()
  figures = SUITES[suite](options)
  return {
    'suite': suite,
    'options': dataclasses.asdict(options),
    'environment': environment,
    'figures': [dataclasses.asdict(figure) for figure in figures],
    'table': measure.format_table(figures),
  }


def bench_config(size: int = 256, batch_size: int = 8):
  """A configuration with random weights and generated surfaces."""
  from configs import default

  config = default.get_config()
  config.teacher.weights = 'random'
  config.data.image_size = size
  config.train.batch_size = batch_size
  return config


def _images(size: int, count: int = 32) -> tuple[np.ndarray, np.ndarray]:
  """Surfaces (N, S, S, 3) and procedural textures, uint8."""
  from dmdd_jax.data import surfaces
  from dmdd_jax.data import textures as textures_lib

  images = [surfaces.surface(str(i), size)[0] for i in range(count)]
  return np.stack(images), textures_lib.procedural_textures(count, size)


def _dataset(config, steps: int):
  """An iterator over the batches of the real pipeline."""
  from dmdd_jax.data import pipeline

  images, textures = _images(config.data.image_size)
  return pipeline.train_dataset(
    images,
    textures,
    pipeline.options(config),
    seed=0,
    batch_size=config.train.batch_size,
    total_steps=steps,
  ).as_numpy_iterator()


# --- input -------------------------------------------------------------------


def _input(options: Options) -> list[measure.Figure]:
  """Pairs synthesised per second, against NumPy and OpenCV one by one."""
  size, batches, rows = options.size, 6, 32
  config = bench_config(size, batch_size=rows)
  iterator = _dataset(config, batches * (options.repeats + 1))

  def ours():
    for _ in range(batches):
      next(iterator)

  images, textures = _images(size)

  def theirs():
    rng = np.random.default_rng(0)
    for image in images:
      numpy_pair(image, textures, rng)

  mine = measure.measure(ours, options.repeats)
  usual = measure.measure(theirs, options.repeats)
  # Read: image and texture in bytes. Written: image, normal, mask in floats.
  moved = size * size * (2 * 3 + 4 * (3 + 3 + 1))
  pairs = batches * rows
  return [
    measure.rate(
      f'pairs of {size} x {size}',
      'pairs/s',
      pairs,
      mine,
      baseline=len(images) / usual.median,
      baseline_is='NumPy and OpenCV, pair by pair on one core',
      limit=measure.copy_bandwidth() / moved,
      limit_is='its bytes copied by one core',
    ),
    measure.Figure(
      'processor time of a pair',
      'ms',
      1e3 * mine.processor / pairs,
      baseline=1e3 * usual.processor / len(images),
      baseline_is='the same',
    ),
  ]


def numpy_pair(
  image: np.ndarray, textures: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """One Perlin-texture pair the usual way: the input suite's baseline."""
  import cv2

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
  center = ((size - 1) / 2, (size - 1) / 2)
  turn = cv2.getRotationMatrix2D(center, rng.uniform(-90, 90), 1.0)
  noise = cv2.warpAffine(np.sqrt(2) * noise, turn, (size, size))
  mask = (noise > 0.5)[..., None].astype(np.float32)
  texture = textures[rng.integers(len(textures))].astype(np.float32) / 255
  normal = image.astype(np.float32) / 255
  opacity = rng.uniform(0, 0.8)
  blend = (1 - opacity) * texture + opacity * normal
  return normal * (1 - mask) + blend * mask, mask


# --- train -------------------------------------------------------------------


def _train_cases() -> list[tuple[str, int, str]]:
  """(teacher, batch size, type) to measure on this machine's device."""
  import jax

  if jax.default_backend() == 'cpu':
    return [('resnet18', 8, 'float32')]
  return [
    (arch, batch_size, dtype)
    for arch in ('resnet18', 'wide_resnet50_2')
    for batch_size in (16, 32, 64)
    for dtype in ('float32', 'tf32', 'bfloat16')
  ]


def _train(options: Options) -> list[measure.Figure]:
  """A step of each phase beside its FLOPs, its input and PyTorch's step."""
  import jax

  figures = []
  for arch, batch_size, dtype in _train_cases():
    # What JAX calls TF32 on an NVIDIA GPU; elsewhere it is float32.
    precision = {'tf32': 'tensorfloat32', 'float32': 'float32'}.get(dtype)
    with jax.default_matmul_precision(precision or 'default'):
      bench = TrainBench(options, arch, batch_size, dtype)
      figures += bench.figures()
  return figures


class TrainBench:
  """One configuration's steps, and what each is compared with.

  Loss and optimiser are those of the peer in tools/peers.
  """

  def __init__(
    self,
    options: Options,
    arch: str = 'resnet18',
    batch_size: int = 8,
    dtype: str = 'float32',
    devices: int | None = None,
    optimizer: str = 'adam',
  ):
    import jax

    from dmdd_jax import sharding
    from dmdd_jax.models import dmdd
    from dmdd_jax.training import steps
    from dmdd_jax.training import train_state

    self.options, self.arch, self.dtype = options, arch, dtype
    self.config = bench_config(options.size, batch_size)
    self.config.teacher.arch = arch
    self.config.train.student.kind = optimizer
    self.config.loss.focus = 0.0
    self.config.dtype = 'float32' if dtype == 'tf32' else dtype
    self.mesh = sharding.make_mesh(jax.devices()[:devices])
    self.model = dmdd.from_config(self.config)
    self.state = train_state.create(self.config, self.model, jax.random.key(0))
    self.steps = steps.make_train_steps(self.config, self.model, self.mesh)
    self.name = f'{arch}, {batch_size} pairs of {options.size}, {dtype}'

  def compile(self, phase: str, batch) -> tuple[Callable, float, float]:
    """A step that keeps its own state; its FLOPs and bytes of memory."""
    import jax

    from dmdd_jax import sharding

    lowered = self.steps[phase].lower(self.state, batch)
    compiled = lowered.compile()
    state = sharding.replicate(self.mesh, jax.tree.map(np.copy, self.state))
    holder = [state]

    def step(batch=batch):
      holder[0], metrics = compiled(holder[0], batch)
      jax.block_until_ready(metrics)

    memory = compiled.memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return step, compiled.cost_analysis()['flops'], used

  def figures(self) -> list[measure.Figure]:
    """Of this configuration."""
    from dmdd_jax import sharding

    config, repeats = self.config, self.options.repeats
    iterator = _dataset(config, 4 * (repeats + 3))

    def load():
      rows = next(iterator)
      keys = ('image', 'normal', 'mask')
      return sharding.to_global(self.mesh, {key: rows[key] for key in keys})

    constant, peak = load(), measure.matmul_peak(config.dtype)
    count, figures = config.train.batch_size, []
    peer = self._torch(constant)
    for phase in ('distill', 'segment'):
      step, flops, used = self.compile(phase, constant)
      alone = measure.measure(step, repeats)
      fed = measure.measure(lambda step=step: step(load()), repeats)
      name = f'{phase}, {self.name}'
      compared = {}
      if phase == 'distill' and peer:
        compared = {'baseline': count / peer, 'baseline_is': 'PyTorch'}
      figures += [
        measure.rate(
          name,
          'pairs/s',
          count,
          alone,
          limit=count * peak / flops,
          limit_is='its FLOPs at the rate of a matrix product',
          **compared,
        ),
        measure.rate(
          f'{name}, fed by the pipeline',
          'pairs/s',
          count,
          fed,
          baseline=count / alone.median,
          baseline_is='constant batch',
        ),
        measure.Figure(f'{name}, memory', 'MB', used / 1e6),
      ]
      if phase == 'distill':
        figures += [self._cached(constant, alone), self._muon(constant, alone)]
    return figures

  def _muon(self, batch, alone: measure.Seconds) -> measure.Figure:
    """The distillation step with Muon in the place of Adam."""
    count = self.config.train.batch_size
    bench = TrainBench(
      self.options, self.arch, count, self.dtype, optimizer='muon'
    )
    step, _, _ = bench.compile('distill', batch)
    return measure.rate(
      f'distill, {self.name}, Muon',
      'pairs/s',
      count,
      measure.measure(step, self.options.repeats),
      baseline=count / alone.median,
      baseline_is='Adam',
    )

  def _cached(self, batch, alone: measure.Seconds) -> measure.Figure:
    """The distillation step with the teacher's features of x_n at hand."""
    import jax

    from dmdd_jax.training import steps
    from dmdd_jax.training import train_state

    images = np.uint8(np.round(255.0 * np.asarray(batch['normal'])))
    cache = steps.TeacherCache(
      self.model,
      self.mesh,
      train_state.variables(self.state),
      images,
      len(images),
    )
    rows = np.arange(len(images), dtype=np.int32)
    kept = {key: batch[key] for key in ('image', 'mask')}
    kept['normal_taps'] = jax.block_until_ready(cache(rows))
    step, _, _ = self.compile('distill', kept)
    return measure.rate(
      f'distill, {self.name}, train.cache_teacher',
      'pairs/s',
      len(images),
      measure.measure(step, self.options.repeats),
      baseline=len(images) / alone.median,
      baseline_is='without',
    )

  def _torch(self, batch) -> float | None:
    """Median seconds of PyTorch's step on the same batch, if it is at hand."""
    python = self.options.torch_python or sys.executable
    if not self.options.torch_python and not importlib.util.find_spec('torch'):
      return None
    script = os.path.join(_ROOT, 'tools', 'peers', 'torch_step.py')
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, 'batch.npz')
      np.savez(path, **{key: np.asarray(batch[key]) for key in batch})
      command = [python, script, '--data', path, '--arch', self.arch]
      command += ['--dtype', self.dtype, '--repeats', str(self.options.repeats)]
      seconds = []
      for more in ([], ['--compile']):
        done = subprocess.run(
          [*command, *more], check=False, stdout=subprocess.PIPE
        )
        # torch.compile needs a compiler, which not every machine has.
        if done.returncode == 0:
          found = json.loads(done.stdout)
          self._check_peer(found['parameters'])
          seconds.append(float(np.median(found['seconds'])))
    return min(seconds, default=None)

  def _check_peer(self, parameters: int) -> None:
    """Raises RuntimeError if PyTorch trained another network."""
    import jax

    ours = sum(x.size for x in jax.tree.leaves(self.state.params['student']))
    if parameters != ours:
      raise RuntimeError(
        f'tools/peers/torch_step.py has {parameters} parameters, we {ours}'
      )


# --- metrics -----------------------------------------------------------------


def _metrics(options: Options) -> list[measure.Figure]:
  """All pixel metrics and AU-PRO, against scikit-learn and 200 thresholds."""
  sizes = (options.size,) if options.size < 256 else (options.size, 900)
  return [figure for size in sizes for figure in _metrics_at(size, options)]


def _metrics_at(size: int, options: Options) -> list[measure.Figure]:
  """The figures of 100 maps of one size."""
  from sklearn import metrics as sklearn_metrics

  from dmdd_jax.metrics import results

  maps, masks = fake_test_set(100, size)
  scores, labels = maps.max(axis=(1, 2)), masks.max(axis=(1, 2))

  def ours():
    return results.compute(maps, masks, scores, labels, extra=())

  times = options.repeats if size <= 256 else 2
  mine = measure.measure(ours, times)
  theirs = measure.measure(
    lambda: sklearn_metrics.roc_auc_score(masks.ravel(), maps.ravel()), 1, 0
  )
  loop = measure.measure(lambda: pro_200_thresholds(maps, masks), 1, 0)
  sort = measure.measure(lambda: np.sort(maps, axis=None), times)
  name = f'100 maps of {size} x {size}'
  return [
    measure.duration(
      f'{name}, all pixel metrics',
      mine,
      baseline=theirs.median,
      baseline_is="scikit-learn's pixel AUROC alone",
      limit=sort.median,
      limit_is="NumPy's sort of all scores",
    ),
    measure.duration(
      f'{name}, the same, both AU-PRO',
      mine,
      baseline=loop.median,
      baseline_is='AU-PRO by 200 thresholds',
    ),
    measure.Figure(
      f'{name}, peak memory',
      'MB',
      (maps.nbytes + measure.peak_memory(ours)) / 1e6,
      limit=maps.nbytes / 1e6,
      limit_is='the maps',
    ),
  ]


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


# --- start-up ----------------------------------------------------------------


def _startup(options: Options) -> list[measure.Figure]:
  """Seconds from a command to its end or to its first step."""
  from dmdd_jax.data import surfaces

  imports = {
    name: measure.measure(_python('-c', f'import {name}'), options.repeats)
    for name in ('jax', 'dmdd_jax', 'dmdd_jax.train', 'tensorflow')
  }
  bare = measure.measure(_python('-c', 'pass'), options.repeats)
  figures = [
    measure.duration(
      f'import {name}',
      imports[name],
      baseline=bare.median,
      baseline_is='python -c pass',
    )
    for name in imports
  ]
  floor = imports['dmdd_jax.train'].median + imports['tensorflow'].median
  with tempfile.TemporaryDirectory() as folder:
    # As configs/demo.py would, which then finds them there.
    surfaces.write_surfaces(f'{folder}/data', size=options.size, seed=0)
    cold = first_step(folder, options)
    warm = [
      first_step(folder, options) for _ in range(max(1, options.repeats // 2))
    ]
  seconds = measure.Seconds(float(np.median(warm)), min(warm), max(warm), 0.0)
  figures.append(
    measure.duration(
      f'command to first step at {options.size} pixels, compiled before',
      seconds,
      baseline=cold,
      baseline_is='compiled for the first time',
      limit=floor,
      limit_is='its imports',
    )
  )
  return figures


def _python(*arguments: str) -> Callable[[], Any]:
  return lambda: subprocess.run([sys.executable, *arguments], check=True)


def first_step(folder: str, options: Options) -> float:
  """Seconds from the command to the log line of the first training step.

  Args:
    folder: keeps the generated images and the compilation cache.
    options: of the benchmark.
  """
  cache = os.path.join(folder, 'compiled')
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, '-m', 'dmdd_jax.main', '--config']
    command += [os.path.join(_ROOT, 'configs', 'demo.py')]
    command += [f'--workdir={workdir}', '--config.student.trunk=reverse']
    command += [f'--config.data.root={folder}/data']
    command += [f'--config.data.image_size={options.size}']
    environment = {
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    started = time.perf_counter()
    process = subprocess.Popen(
      command, stderr=subprocess.PIPE, text=True, env=environment, cwd=_ROOT
    )
    lines = []
    for line in process.stderr:
      lines.append(line)
      if 'step 1/' in line:
        seconds = time.perf_counter() - started
        process.kill()
        process.wait()
        return seconds
  raise RuntimeError(f'no first step: {"".join(lines[-5:])}')


def _predict(options: Options) -> list[measure.Figure]:
  from dmdd_jax.benchmark import latency

  return latency.run(options)


def _growth(options: Options) -> list[measure.Figure]:
  from dmdd_jax.benchmark import growth

  return growth.run(options)


_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SUITES = {
  'input': _input,
  'train': _train,
  'predict': _predict,
  'metrics': _metrics,
  'startup': _startup,
  'growth': _growth,
}
