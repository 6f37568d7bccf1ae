"""Checkpoints and exported files of earlier commits give the same numbers.

The archives were written by tools/make_checkpoint_fixture.py at the commits
of their names' dates. Nothing here trains: what loads today must score as it
did on the day it was saved.
"""

import os
import shutil

import numpy as np
import pytest

import dmdd_jax
from dmdd_jax.export import loader
from dmdd_jax.export import onnx_loader
from dmdd_jax.models import resnet

ARCHIVES = os.path.join(os.path.dirname(__file__), 'data', 'checkpoints')
NAMES = ('2026-11-22-encoder', '2026-11-28-encoder', '2026-11-28-reverse')
# Processors round differently; a changed formula changes far more.
TOLERANCE = {'rtol': 2e-4, 'atol': 2e-4}


@pytest.fixture(scope='module', autouse=True)
def four_channels():
  """The network of the archives under the name that their configs have."""
  with pytest.MonkeyPatch.context() as patch:
    spec = resnet.Spec((1, 1, 1, 1), bottleneck=False, channels=4)
    patch.setitem(resnet.SPECS, 'resnet18', spec)
    yield


def _unpack(name, folder):
  shutil.unpack_archive(os.path.join(ARCHIVES, f'{name}.zip'), folder)
  with np.load(folder / 'expected.npz') as expected:
    return dict(expected)


@pytest.mark.parametrize('name', NAMES)
def test_a_checkpoint_gives_the_scores_and_maps_of_its_day(name, tmp_path):
  expected = _unpack(name, tmp_path)
  results = dmdd_jax.load(tmp_path / 'run')(list(expected['images']))
  scores = [result.score for result in results]
  np.testing.assert_allclose(scores, expected['scores'], **TOLERANCE)
  maps = np.stack([result.map for result in results])
  np.testing.assert_allclose(maps, expected['maps'], **TOLERANCE)


@pytest.mark.parametrize('loader', (loader, onnx_loader))
def test_an_exported_file_gives_the_scores_and_maps_of_its_day(
  loader, tmp_path
):
  if loader is onnx_loader:
    pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
  expected = _unpack('2026-11-28-encoder', tmp_path)
  name = 'onnx' if loader is onnx_loader else 'stablehlo'
  scores, maps = loader.load(tmp_path / f'model.{name}')(expected['images'])
  np.testing.assert_allclose(scores, expected['scores'], **TOLERANCE)
  np.testing.assert_allclose(maps, expected['maps'], **TOLERANCE)
