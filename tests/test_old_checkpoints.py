"""Checkpoints and exported files of earlier commits give the same numbers.

The archives were written by tools/make_checkpoint_fixture.py at the commits
of their names' dates. Nothing here trains: what loads today must score as it
did on the day it was saved.
"""

import json

import numpy as np
import program_helpers
import pytest

from configs import default
import dmdd_jax
from dmdd_jax import config as config_lib
from dmdd_jax.export import loader
from dmdd_jax.export import onnx_loader
from dmdd_jax.training import checkpoint

pytestmark = pytest.mark.usefixtures('four_channels')

NAMES = ('2026-11-22-encoder', '2026-11-28-encoder', '2026-11-28-reverse')
# Processors round differently; a changed formula changes far more.
TOLERANCE = {'rtol': 2e-4, 'atol': 2e-4}


def _unpack(name, folder):
  program_helpers.unpack_checkpoint(name, folder)
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


# Their configs.


def _stored(name, folder):
  """The config of an archive, as its commit wrote it."""
  _unpack(name, folder)
  return json.loads((folder / 'run' / 'config.json').read_text())


@pytest.mark.parametrize('name', NAMES)
def test_an_upgraded_config_has_every_field_and_is_possible(name, tmp_path):
  stored = _stored(name, tmp_path)
  before = json.dumps(stored)
  config = config_lib.upgrade(stored)
  config_lib.check(config)
  fields = config_lib.flatten(config.to_dict())
  assert fields.keys() == config_lib.RULES.keys()
  kept = config_lib.flatten(stored)
  del kept['eval.bootstrap']  # Intervals now need no resamples.
  assert kept.items() <= fields.items()
  assert json.dumps(stored) == before


def test_an_upgraded_config_says_what_its_code_did(tmp_path):
  """The fields that came between the two dates, as they then were."""
  config = config_lib.upgrade(_stored(NAMES[0], tmp_path))
  assert config.head.border == 0
  assert config.head.normality_share == 0.5
  assert config.head.score_weight == 1.0
  assert config.head.position_bias is False
  assert config.loss.focus == 0.0
  assert config.head.untrained_maps is False  # Both branches are trained.


def test_a_branch_without_a_loss_had_maps_before_there_was_a_focus(tmp_path):
  stored = _stored(NAMES[0], tmp_path)
  stored['loss']['aim_weight'] = 0.0
  assert config_lib.upgrade(stored).head.untrained_maps
  stored['loss']['focus'] = 0.0
  assert not config_lib.upgrade(stored).head.untrained_maps


def test_an_older_run_goes_on_with_the_same_config_alone(tmp_path):
  """Equal to what the absent fields meant, it is accepted; else refused."""
  stored = _stored(NAMES[0], tmp_path)
  now = config_lib.upgrade(stored)
  checkpoint.check_config('here', stored, now)
  absent = (
    ('head.border', 2),
    ('head.normality_share', 0.9),
    ('head.position_bias', True),
    ('head.score_weight', 0.25),
    ('head.untrained_maps', True),
    ('loss.focus', 1.0),
  )
  for field, value in absent:
    other = now.copy_and_resolve_references()
    other.update_from_flattened_dict({field: value})
    with pytest.raises(checkpoint.CheckpointError, match=field) as error:
      checkpoint.check_config('here', stored, other)
    assert str(error.value).count('in the checkpoint') == 1
  # No Muon reads its rate, and the groups of devices are free.
  now.train.student.muon_learning_rate = 0.1
  now.mesh.category_groups = 2
  checkpoint.check_config('here', stored, now)


def test_the_first_configs_are_upgraded_too():
  """What the fields meant that are younger than all archives."""
  config = default.get_config()
  stored = config.to_dict()
  for field, value in (
    ('data.tile_size', 0),
    ('data.tile_overlap', 0.0),
    ('train.microbatch', 0),
    ('train.cache_teacher', False),
    ('student.remat', False),
    ('synthesis.lighting', 0.0),
  ):
    *path, name = field.split('.')
    part = stored
    for key in path:
      part = part[key]
    del part[name]
    upgraded = config_lib.flatten(config_lib.upgrade(stored).to_dict())
    assert upgraded[field] == value
  checkpoint.check_config('here', stored, config)
  config.train.microbatch = 2
  with pytest.raises(checkpoint.CheckpointError, match=r'train\.microbatch'):
    checkpoint.check_config('here', stored, config)
