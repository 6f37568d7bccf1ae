"""dmdd_jax.metrics in an environment that has numpy and scipy alone."""

import os
import pathlib
import pkgutil
import subprocess
import sys

import numpy
import program_helpers
import pytest
import scipy

from dmdd_jax import metrics

MODULES = sorted(
  module.name
  for module in pkgutil.walk_packages(metrics.__path__, 'dmdd_jax.metrics.')
)
# Prints the packages that were imported and are not Python's own.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from scipy import ndimage
before = set(sys.modules)
import {modules}
from dmdd_jax.metrics import results
import numpy as np
rng = np.random.default_rng(0)
maps = rng.random((6, 20, 20))
masks = np.zeros(maps.shape, int)
masks[3:, 5:9, 5:9] = 1
table = results.compute(maps, masks, rng.random(6), [0, 0, 0, 1, 1, 1])
assert '| nut |' in results.format_table({{'nut': table}})
known = {{'dmdd_jax', *sys.stdlib_module_names}}
added = set(sys.modules) - before
print(*sorted(name for name in added if name.split('.')[0] not in known))
"""


@pytest.fixture
def alone(tmp_path):
  """A folder of packages: numpy, scipy, and dmdd_jax as it lies here."""
  for package in (numpy, scipy):
    folder = pathlib.Path(package.__file__).parent
    for path in folder.parent.glob(f'{folder.name}*'):
      if path.name in (folder.name, f'{folder.name}.libs'):
        (tmp_path / path.name).symlink_to(path)
  source = os.path.join(program_helpers.REPOSITORY, 'dmdd_jax')
  (tmp_path / 'dmdd_jax').symlink_to(source)
  return tmp_path


def _run(program, folder):
  """Runs a program without site-packages; returns what it printed."""
  process = subprocess.run(
    [sys.executable, '-I', '-S', '-c', program, str(folder)],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert process.returncode == 0, process.stdout
  return process.stdout.split()


def test_metrics_need_numpy_and_scipy_alone(alone):
  """And no more of scipy than ndimage loads: scipy.stats doubles the time."""
  added = _run(PROGRAM.format(modules=', '.join(MODULES)), alone)
  assert {name.split('.')[0] for name in added} <= {'numpy', 'scipy'}
  assert not {'scipy.stats', 'scipy.optimize', 'numpy.testing'} & set(added)


def test_the_environment_has_nothing_else(alone):
  """What the test above relies on."""
  program = PROGRAM.format(modules='dmdd_jax.storage')
  with pytest.raises(AssertionError, match='No module named'):
    _run(program, alone)


def test_type_checkers_see_the_annotations():
  assert (pathlib.Path(metrics.__file__).parents[1] / 'py.typed').exists()
