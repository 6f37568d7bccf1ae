"""The code of docs/metrics.md runs as it is written."""

import os
import re
import shlex
import subprocess
import sys

import layout_helpers
import numpy as np
import program_helpers
import pytest
import tifffile

from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts


def _blocks(language):
  path = os.path.join(program_helpers.REPOSITORY, 'docs/metrics.md')
  with open(path) as file:
    return re.findall(rf'^```{language}\n(.*?)^```', file.read(), re.M | re.S)


class _Tensor:
  """As much of a PyTorch tensor as the page uses."""

  def __init__(self, values):
    self._values = values

  def __iter__(self):
    return map(_Tensor, self._values)

  def __getitem__(self, index):
    return _Tensor(self._values[index])

  def float(self):
    return _Tensor(self._values.astype(np.float32))

  def cpu(self):
    return self

  def numpy(self):
    return self._values


def test_from_arrays_to_a_table_in_ten_lines(capsys):
  block = _blocks('python')[0]
  names = {}
  exec(block, names)
  assert '| nut |' in capsys.readouterr().out
  assert 0.5 < names['metrics']['au_pro'] < 1
  lines = [line for line in block.splitlines() if line]
  assert len([line for line in lines if 'import' not in line]) <= 10


def test_beside_pytorch_and_the_rows(capsys):
  """A loader of two batches gives what the arrays in one call give."""
  arrays, torch, rows = _blocks('python')
  whole = {}
  exec(arrays, whole)
  maps = whole['maps'][:, np.newaxis]
  masks = whole['masks'][:, np.newaxis] * 255
  batches = [
    (_Tensor(maps[part]), _Tensor(masks[part]))
    for part in (np.s_[:8], np.s_[8:])
  ]
  names = {'loader': batches, 'model': lambda images: images}
  exec(torch, names)
  for name, value in whole['metrics'].items():
    if isinstance(value, float):
      assert names['metrics'][name] == pytest.approx(value, rel=1e-4)
  capsys.readouterr()
  exec(rows, whole)
  assert len(capsys.readouterr().out.splitlines()) == 10 + 20


@pytest.fixture
def checkout(tmp_path):
  """A folder with data sets, maps and scores where the page has them."""
  os.symlink(
    os.path.join(program_helpers.REPOSITORY, 'tools'), tmp_path / 'tools'
  )
  for layout, make, maps in (
    ('mvtec_ad', layout_helpers.mvtec, 'output/1/anomaly_maps/mvtec_ad'),
    (
      'mvtec_ad_2',
      layout_helpers.SETS['mvtec_ad_2'],
      'submission/anomaly_images',
    ),
  ):
    root = tmp_path / 'data' / layout.removesuffix('_ad')
    make(root)
    category = 'nut' if layout == 'mvtec_ad' else 'can'
    data = {'name': layout, 'root': str(root), 'category': category}
    lines = ['file,score']
    for record in layouts.list_dataset(data, with_train=False).test:
      name = os.path.relpath(os.path.splitext(record.image)[0], root)
      values = images_lib.native_mask(record).astype(np.float16)
      path = tmp_path / maps / f'{name}.tiff'
      path.parent.mkdir(parents=True, exist_ok=True)
      tifffile.imwrite(path, values)
      lines.append(f'{name},{record.label}')
    if layout == 'mvtec_ad':
      (tmp_path / 'scores.csv').write_text('\n'.join(lines))
  return tmp_path


def test_the_commands(checkout):
  text = _blocks('sh')[1]
  for command in text.splitlines():
    program, *arguments = shlex.split(command)
    assert program == 'python'
    process = subprocess.run(
      [sys.executable, *arguments],
      cwd=checkout,
      env=program_helpers.environment(checkout),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    assert process.returncode == 0, f'{command}\n{process.stdout}'
    assert '100.00' in process.stdout
