"""Whole runs that are small enough for tests."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache
import model_helpers
import numpy as np
import pytest

from dmdd_jax.data import surfaces
from dmdd_jax.models import pretrained
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import steps

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TESTS = os.path.dirname(os.path.abspath(__file__))
SIZE = 32


def write_data(root, seed=0):
  """ROOT/surface: 8 images to train on, 3 good and 4 defective to test."""
  return surfaces.write_surfaces(
    root, size=SIZE, train=8, test_good=3, per_defect=1, seed=seed
  )


def tiny_run(root, **changes):
  """Six steps, four of them of the student, a checkpoint every two."""
  return model_helpers.tiny_config(
    **{
      'data__root': str(root),
      'data__category': surfaces.CATEGORY,
      'data__holdout_min': 2,
      'eval__batch_size': 4,
      'eval__pictures': 1,
      'train__total_steps': 6,
      'train__distill_steps': 4,
      'train__checkpoint_every': 2,
      'train__log_every': 2,
      'train__keep_checkpoints': 3,
      **changes,
    }
  )


def unpack_checkpoint(name, folder):
  """Unpacks tests/data/checkpoints/NAME.zip; its network: `four_channels`."""
  tests = os.path.dirname(os.path.abspath(__file__))
  archive = os.path.join(tests, 'data', 'checkpoints', f'{name}.zip')
  shutil.unpack_archive(archive, folder)


def write_weights(path, seed=0):
  """A ResNet-18 with torchvision's names and weights nobody trained."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, shape in pretrained.torch_shapes('resnet18').items():
    if len(shape) == 4:
      scale = np.sqrt(2 / np.prod(shape[1:]))
      tensors[name] = scale * rng.standard_normal(shape, np.float32)
    else:
      tensors[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
  np.savez(path, **tensors)
  return str(path)


@contextlib.contextmanager
def compiled_once(folder):
  """Traces and compiles each program once for all runs of a module.

  What is compiled is kept in a folder, for other processes too; and runs whose
  configs differ in nothing that a step reads share the traced functions.
  """
  options = {
    'jax_compilation_cache_dir': str(folder),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
  }
  before = {name: getattr(jax.config, name) for name in options}
  with pytest.MonkeyPatch.context() as patch:
    for module, name in (
      (steps, 'make_train_steps'),
      (score_lib, 'make_predict_step'),
    ):
      patch.setattr(module, name, _shared(getattr(module, name)))
    try:
      for name, value in options.items():
        jax.config.update(name, value)
      jax_cache.reset_cache()
      yield
    finally:
      for name, value in before.items():
        jax.config.update(name, value)
      jax_cache.reset_cache()


def _shared(make):
  """A factory of steps that makes each only once."""
  made = {}

  def shared(config, *arguments):
    parts = {
      name: json.dumps(config[name].to_dict())
      for name in ('eval', 'head', 'loss', 'student', 'train')
    }
    key = (*parts.values(), config.dtype, config.teacher.arch)
    if key not in made:
      made[key] = make(config, *arguments)
    return made[key]

  return shared


def environment(cache):
  """Of a process that finds this checkout, and what was compiled before."""
  return {
    **os.environ,
    'PYTHONPATH': REPOSITORY,
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def run_on_eight_devices(code, flags=''):
  """Runs a program on eight CPU devices; what its last line has as JSON."""
  tests = os.path.dirname(os.path.abspath(__file__))
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count=8 {flags}',
      'PYTHONPATH': os.pathsep.join([REPOSITORY, tests]),
    },
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def start_main(arguments, cache, devices=1, die=None):
  """Starts tests/killed_main.py, by itself or as one of several processes."""
  tests = os.path.dirname(os.path.abspath(__file__))
  variables = environment(cache)
  variables['PYTHONPATH'] = os.pathsep.join([REPOSITORY, tests])
  variables['JAX_PLATFORMS'] = 'cpu'
  # Compiling costs more than all that is computed.
  variables['XLA_FLAGS'] = (
    f'--xla_force_host_platform_device_count={devices}'
    ' --xla_backend_optimization_level=0'
    ' --xla_llvm_disable_expensive_passes=true'
  )
  if die is not None:
    variables['DIE'] = die
  config = os.path.join(tests, 'tiny_run.py')
  return subprocess.Popen(
    [sys.executable, os.path.join(tests, 'killed_main.py')]
    + ['--config', config, *arguments],
    env=variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def start_processes(arguments, cache, die=(None, None)):
  """Starts several that find each other; each dies as its own `die` says."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  joined = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={len(die)}']
  return [
    start_main([*arguments, *joined, f'--process_id={index}'], cache, die=how)
    for index, how in enumerate(die)
  ]


def wait_for(condition, seconds=60.0):
  """Polls until a function returns true; fails after the deadline."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, f'not within {seconds} s'
    time.sleep(0.1)


def finish(*processes):
  """Waits for processes: their exit statuses and what they said."""
  said = [process.communicate(timeout=900)[0] for process in processes]
  return [process.returncode for process in processes], said
