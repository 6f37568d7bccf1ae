"""A checkpoint whose metadata were changed is one clear error."""

import json
import math

import program_helpers
import pytest

from dmdd_jax.scoring import trained as trained_lib
from dmdd_jax.training import checkpoint

pytestmark = pytest.mark.usefixtures('four_channels')


@pytest.mark.parametrize(
  'change, text',
  [
    (lambda meta: meta.pop('calibration'), 'calibration'),
    (lambda meta: meta.pop('config'), 'config'),
    (lambda meta: meta.update(config={'student': 3}), 'metadata'),
    (lambda meta: meta['calibration'].pop('fusion'), 'fusion'),
    (lambda meta: meta.update(calibration=[1]), 'metadata'),
    (
      lambda meta: meta['calibration'].update(image_threshold=math.inf),
      'image_threshold is inf',
    ),
    (
      lambda meta: meta['calibration'].update(image_threshold=1e30),
      r'image_threshold is 1e\+30',
    ),
    (
      lambda meta: meta['calibration'].update(pixel_threshold='9'),
      "pixel_threshold is '9', not a number",
    ),
    (
      lambda meta: meta['calibration'].update(image_scale=math.nan),
      'image_scale is nan',
    ),
    (
      lambda meta: meta['calibration']['fusion'].update(head_scale='1'),
      "head_scale is '1'",
    ),
    (lambda meta: meta['calibration'].update(image_threshold=math.nan), None),
  ],
)
def test_metadata_that_were_changed_are_named(change, text, tmp_path):
  program_helpers.unpack_checkpoint('2026-11-28-encoder', tmp_path)
  (path,) = tmp_path.rglob('meta/metadata')
  meta = json.loads(path.read_text())
  change(meta)
  path.write_text(json.dumps(meta))
  workdir = path.parents[3]
  if text:
    with pytest.raises(checkpoint.CheckpointError, match=f'metadata.*{text}'):
      trained_lib.load_workdir(workdir)
    return
  _, _, calibration, _ = trained_lib.load_workdir(workdir)
  assert calibration.verdict(1.0) == 'uncalibrated'
