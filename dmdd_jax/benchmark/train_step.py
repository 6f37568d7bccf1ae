"""The suite `train`: a step of each phase beside its limits and PyTorch."""

from collections.abc import Callable
import importlib.util
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

from dmdd_jax.benchmark import common
from dmdd_jax.benchmark import measure


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


def run(options: measure.Options) -> list[measure.Figure]:
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
    options: measure.Options,
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
    self.config = common.bench_config(options.size, batch_size)
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
    iterator = common.dataset(config, 4 * (repeats + 3))

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
    script = os.path.join(measure.ROOT, 'tools', 'peers', 'torch_step.py')
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
          report = json.loads(done.stdout)
          self._check_peer(report['parameters'])
          seconds.append(float(np.median(report['seconds'])))
    return min(seconds, default=None)

  def _check_peer(self, parameters: int) -> None:
    """Raises RuntimeError if PyTorch trained another network."""
    import jax

    ours = sum(x.size for x in jax.tree.leaves(self.state.params['student']))
    if parameters != ours:
      raise RuntimeError(
        f'tools/peers/torch_step.py has {parameters} parameters, we {ours}'
      )
