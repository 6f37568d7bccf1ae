"""MVTec LOCO: saturation areas as its config means them, sPRO in results."""

import json

import layout_helpers
import numpy as np
from PIL import Image
import pytest

from configs import default
from dmdd_jax import evaluate
from dmdd_jax.data import batches
from dmdd_jax.data import layouts
from dmdd_jax.data import loco
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import score as score_lib

SIZE = 32


def test_saturation_area():
  assert loco.saturation_area(1000, 0.7, relative=True) == 700
  assert loco.saturation_area(999, 0.5, relative=True) == 499
  assert loco.saturation_area(1000, 400, relative=False) == 400
  assert loco.saturation_area(100, 400, relative=False) == 100
  assert loco.saturation_area(1, 0.5, relative=True) == 1


@pytest.fixture
def root(tmp_path):
  """Black images, in the defective ones a red block of 4 x 4 pixels.

  The logical region is twice as large and saturates at half of its area; the
  structural one is of 32 pixels too, and 64 of them would saturate it.
  """
  layout_helpers.SETS['mvtec_loco'](tmp_path)
  pushpins = tmp_path / 'pushpins'
  black = np.zeros((SIZE, SIZE, 3), np.uint8)
  red, mask = black.copy(), black[..., 0].copy()
  red[8:12, 8:12, 0], mask[8:12, 8:16] = 255, 1
  for path in pushpins.glob('*/*/*.png'):
    Image.fromarray(black if path.parent.name == 'good' else red).save(path)
  truth = pushpins / 'ground_truth'
  for path in truth.glob('*/000/001.png'):
    path.unlink()
  for kind, value in (('logical', 255), ('structural', 130)):
    path = truth / f'{kind}_anomalies/000/000.png'
    Image.fromarray(value * mask).save(path)
  config = json.loads((pushpins / 'defects_config.json').read_text())
  config[1]['saturation_threshold'] = 64
  (pushpins / 'defects_config.json').write_text(json.dumps(config))
  return tmp_path


class _Red:
  """Says that red is anomalous, at half of the images' resolution."""

  def __init__(self, config):
    self.config = config

  def over_records(self, state, fusion, records):
    del state, fusion
    for batch in batches.eval_batches(records, self.config.data.image_size, 1):
      maps = batch['image'][..., 0].astype(np.float32) / 255.0
      score = maps.max(axis=(1, 2))
      yield batch, score_lib.Prediction(maps, score, maps, score, maps, maps)


def _evaluate(root, size=SIZE):
  config = default.get_config()
  config.data.name = 'mvtec_loco'
  config.data.root = str(root)
  config.data.category = 'pushpins'
  config.data.image_size = size
  calibration = calibration_lib.Calibration(
    score_lib.Fusion(), 0.5, 0.5, 1.0, 4
  )
  records = layouts.list_dataset(config.data).test
  with evaluate.evaluate(_Red(config), None, calibration, records) as found:
    return found.metrics


def test_spro_by_hand(root):
  found = _evaluate(root)
  # Half of the logical region is enough. Of the structural one half is found
  # before any normal pixel, the rest ties with all of them.
  assert found['spro_logical'] == found['spro_005_logical'] == 1.0
  assert found['spro_structural'] == pytest.approx(0.5 + 0.5 * 0.3 / 2)
  assert found['spro_005_structural'] == pytest.approx(0.5 + 0.5 * 0.05 / 2)
  for name in ('spro', 'spro_005'):
    parts = found[f'{name}_logical'], found[f'{name}_structural']
    assert found[name] == pytest.approx(np.mean(parts))
  # Without saturation half of a region is half of it.
  assert found['au_pro'] == pytest.approx(0.5 + 0.5 * 0.3 / 2)


def test_spro_is_measured_at_the_masks_own_size(root):
  """In pixels of a smaller map the same areas would be other shares."""
  found = _evaluate(root, size=64)
  assert found['spro_logical'] == pytest.approx(1.0, abs=0.01)


def test_without_its_config_spro_is_null_and_says_why(root):
  (root / 'pushpins/defects_config.json').unlink()
  found = _evaluate(root)
  assert (
    np.isnan(found['spro']) and 'defects_config' in (found['undefined']['spro'])
  )
  assert found['image_auroc'] == 1.0


def test_without_logical_anomalies_the_mean_is_null(root):
  for path in (root / 'pushpins/test/logical_anomalies').iterdir():
    path.unlink()
  found = _evaluate(root)
  assert np.isnan(found['spro']) and np.isnan(found['spro_logical'])
  assert found['spro_structural'] == pytest.approx(0.575)
  assert {'spro', 'spro_005', 'spro_logical'} <= set(found['undefined'])


@pytest.mark.parametrize(
  'text', ['[{"pixel_value": 255}]', 'no json', '{"a": 1}']
)
def test_a_config_that_is_none_is_named(root, text):
  (root / 'pushpins/defects_config.json').write_text(text)
  with pytest.raises(ValueError, match='defects_config.json is no list'):
    loco.read_config(str(root), 'pushpins')


@pytest.mark.parametrize('values', [(255, 130), (7,), ()])
def test_a_mask_of_no_kind_is_named(root, values):
  path = root / 'pushpins/ground_truth/logical_anomalies/000/000.png'
  mask = np.zeros((SIZE, SIZE), np.uint8)
  for row, value in enumerate(values):
    mask[row] = value
  Image.fromarray(mask).save(path)
  kinds = loco.read_config(str(root), 'pushpins')
  record = layouts.list_dataset(
    {'name': 'mvtec_loco', 'root': str(root), 'category': 'pushpins'}
  ).test[1]
  with pytest.raises(ValueError, match=r'000\.png: found pixel values'):
    loco.read_regions(record, kinds)
