"""The code blocks of README.md, docs/tour.md and docs/api.md run as written.

Each document's blocks run in order, in one folder of their own, on small
generated images under the paths that the documents name. The programs are the
real ones; the network is small, and trainings get the budget in SMALL, those
of `dmdd_jax.train` by SMALL_TRAIN.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import program_helpers
import pytest

from dmdd_jax.data import surfaces

DOCUMENTS = ('README.md', 'docs/tour.md', 'docs/api.md')
# Commands that a test cannot run, and why.
NOT_RUN = {
  r'python3 -m venv ': 'makes an environment; .ci/run does',
  r'\S*python -m pip install ': 'installs packages; .ci/run does',
  r'\S*python -m pytest': 'runs this test; .ci/run does',
  r'\S*python tools/reproduce\.py ': 'trains a real network; see test_api',
  r'\S*python tools/serve\.py ': 'serves until it is stopped; see test_serve',
  r'.* --watch\b': 'watches until it is stopped; see test_watch',
}
# Commands that run here.
RUN = r'(\.venv/bin/)?python (-m dmdd_jax\.main|tools/\w+\.py|-c) '
# What every command that trains gets appended.
SMALL = [
  *('data.image_size=32', 'data.tile_size=0', 'teacher.weights=random'),
  *('student.trunk=encoder', 'train.student.kind=adam', 'head.width=4'),
  *('train.batch_size=2', 'train.total_steps=2', 'train.distill_steps=1'),
  *('train.checkpoint_every=2', 'eval.batch_size=4', 'eval.pictures=1'),
]
# Goes before Python that trains. `minutes` is so short that steps are measured,
# and the fewest are picked.
SMALL_TRAIN = f"""
import ast
import dmdd_jax
from dmdd_jax import api

def train(*arguments, minutes=None, config=None, **fields):
  small = dict(field.split('=') for field in {SMALL!r})
  for name, value in small.items():
    try:
      small[name] = ast.literal_eval(value)
    except ValueError:
      pass
  if minutes is not None:
    minutes = 1e-4
    del small['train.total_steps'], small['train.distill_steps']
  config = (config or {{}}) | small
  return api.train(*arguments, minutes=minutes, config=config, **fields)

dmdd_jax.train = train
"""
HELP = (
  'tests/test_documents.py does not know this. If a test can run it, extend'
  ' RUN (and the images that `folder` writes); if not, add it to NOT_RUN with'
  ' the reason'
)


def blocks(name):
  """[(language, text)] of a document's fenced blocks, in order."""
  with open(os.path.join(program_helpers.REPOSITORY, name)) as file:
    return re.findall(r'^```(\w*)\n(.*?)^```', file.read(), re.M | re.S)


def commands(text):
  """The commands of a shell block, those joined by && one by one."""
  lines = text.replace('\\\n', ' ').splitlines()
  lines = [line for line in lines if line and not line.startswith('#')]
  return [command for line in lines for command in line.split(' && ')]


def runs(command):
  """Whether a command runs here; one of no rule fails the test."""
  if any(re.match(pattern, command) for pattern in NOT_RUN):
    return False
  assert re.match(RUN, command), f'{command!r}: {HELP}'
  return True


@pytest.mark.parametrize('name', DOCUMENTS)
def test_every_block_is_run_or_listed(name):
  for language, text in blocks(name):
    assert language in ('sh', 'python', ''), f'{language!r} in {name}: {HELP}'
    if language == 'sh':
      assert [runs(command) for command in commands(text)]


def arguments(command):
  """The words of a command that runs, with the small budget."""
  words = shlex.split(command)[1:]
  if '--config' not in words:
    return words
  small = SMALL
  if 'data.tile_size' in command:
    small = [*SMALL, 'data.image_size=64', 'data.tile_size=32']
  return [*words, *(f'--config.{field}' for field in small)]


@pytest.fixture
def folder(tmp_path):
  """A folder like a checkout, with images where the documents have them."""
  for name in ('configs', 'tools'):
    os.symlink(os.path.join(program_helpers.REPOSITORY, name), tmp_path / name)
  surface = surfaces.write_surfaces(
    tmp_path / 'made', size=64, train=12, test_good=3, per_defect=2
  )
  surface = tmp_path / 'made' / os.path.basename(surface)
  for target, source in {
    'data/mvtec/screw': '.',
    'data/dtd/images/woven': 'train/good',
    'parts/good': 'train/good',
    'parts/bad': 'test/scratch',
    'parts/masks': 'ground_truth/scratch',
    'parts/test': 'test',
    'parts/ground_truth': 'ground_truth',
  }.items():
    shutil.copytree(surface / source, tmp_path / target)
  (tmp_path / 'new').mkdir()
  for name in 'ab':
    pixels = np.random.default_rng(0).integers(256, size=(40, 50, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f'new/{name}.png')
  return tmp_path


@pytest.mark.parametrize('name', DOCUMENTS)
def test_blocks_run_as_written(name, folder, cache):
  for package in ('onnx', 'onnxruntime'):
    pytest.importorskip(package, reason=f'{package} is not installed')
  program = os.path.join(os.path.dirname(__file__), 'small_program.py')
  environment = program_helpers.environment(cache) | {
    'JAX_PLATFORMS': 'cpu',
    # The loader that an export writes beside its file.
    'PYTHONPATH': os.pathsep.join([program_helpers.REPOSITORY, str(folder)]),
    'XLA_FLAGS': '--xla_backend_optimization_level=0'
    ' --xla_llvm_disable_expensive_passes=true',
  }
  for language, text in blocks(name):
    if language == 'python':
      trains = 'dmdd_jax.train(' in text
      todo = [['-c', SMALL_TRAIN + text if trains else text]]
    elif language == 'sh':
      todo = [arguments(c) for c in commands(text) if runs(c)]
    else:
      continue  # Output, not code.
    for words in todo:
      process = subprocess.run(
        [sys.executable, program, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
      )
      log = f'{name}: {words}\n{process.stdout}'
      assert process.returncode == 0, log
