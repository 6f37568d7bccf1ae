"""The suite `startup`: seconds from a command to its first step."""

from collections.abc import Callable
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from dmdd_jax.benchmark import measure


def run(options: measure.Options) -> list[measure.Figure]:
  """Seconds from a command to its end or to its first step."""
  from dmdd_jax.data import surfaces

  imports = {
    name: measure.measure(_python('-c', f'import {name}'), options.repeats)
    for name in ('jax', 'dmdd_jax', 'dmdd_jax.trainer', 'tensorflow')
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
  floor = imports['dmdd_jax.trainer'].median + imports['tensorflow'].median
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


def first_step(folder: str, options: measure.Options) -> float:
  """Seconds from the command to the log line of the first training step.

  Args:
    folder: keeps the generated images and the compilation cache.
    options: of the benchmark.
  """
  cache = os.path.join(folder, 'compiled')
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, '-m', 'dmdd_jax.main', '--config']
    command += [os.path.join(measure.ROOT, 'configs', 'demo.py')]
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
      command,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
      cwd=measure.ROOT,
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
