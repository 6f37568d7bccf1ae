"""Evaluation with a fake model whose right answer is computed by hand."""

import json
import types

import model_helpers
import numpy as np
from PIL import Image
import pytest

from configs import default
from dmdd_jax import evaluate
from dmdd_jax import run as run_lib
from dmdd_jax import sharding
from dmdd_jax.data import batches
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import maps as map_files
from dmdd_jax.models import dmdd
from dmdd_jax.report import archive as archive_lib
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import position as position_lib
from dmdd_jax.scoring import predictor as predictor_lib
from dmdd_jax.scoring import score as score_lib

SIZE = 32


class FakePredictor:
  """Says that red is anomalous: the map is the red channel over 255."""

  def __init__(self, config):
    self.config = config
    self.seen = []

  def over_records(self, state, fusion, records):
    del state, fusion
    for batch in batches.eval_batches(records, SIZE, 3):
      count = int(batch['_mask'].sum())
      batch = {key: rows[:count] for key, rows in batch.items()}
      maps = batch['image'][..., 0].astype(np.float32) / 255.0
      self.seen.append(count)
      prediction = score_lib.Prediction(
        map=maps,
        image_score=maps.max(axis=(1, 2)),
        maps_mean=1.0 - maps,
        maps_mean_score=(1.0 - maps).max(axis=(1, 2)),
        distance=maps,
        probability=maps,
      )
      yield batch, prediction


@pytest.fixture
def records(tmp_path):
  """Three good black images, two with a red square that the mask covers."""
  for folder in ('train/good', 'test/good', 'test/red', 'ground_truth/red'):
    (tmp_path / 'toy' / folder).mkdir(parents=True)
  black = np.zeros((2 * SIZE, 2 * SIZE, 3), np.uint8)
  Image.fromarray(black).save(tmp_path / 'toy/train/good/0.png')
  for index in range(3):
    Image.fromarray(black).save(tmp_path / f'toy/test/good/{index}.png')
  mask = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
  mask[8:24, 16:40] = 255
  for index in range(2):
    red = black.copy()
    red[..., 0] = mask
    Image.fromarray(red).save(tmp_path / f'toy/test/red/{index}.png')
    Image.fromarray(mask).save(tmp_path / f'toy/ground_truth/red/{index}.png')
  return layouts.list_mvtec(str(tmp_path), 'toy').test


def _config(**options):
  config = default.get_config()
  config.data.image_size = SIZE
  config.data.category = 'toy'
  config.eval.update(options)
  return config


def _calibration(threshold=0.5):
  return calibration_lib.Calibration(
    score_lib.Fusion(), threshold, threshold, 1.0, 4
  )


def _evaluation(predictor, records, threshold=0.5):
  calibration = _calibration(threshold)
  return evaluate.evaluate(predictor, None, calibration, records)


def _metrics(predictor, records, threshold=0.5):
  with _evaluation(predictor, records, threshold) as evaluation:
    return evaluation.metrics


def _run(predictor, records, output):
  """Evaluates and writes as a run does."""
  meta = {
    'calibration': _calibration().to_dict(),
    'validation': {},
    'teacher_fingerprint': 'none',
  }
  state = types.SimpleNamespace(step=1)
  return run_lib._evaluate(
    predictor, state, meta, records, str(output), started=0.0, revision=None
  )


def test_every_image_counts_once_and_the_oracle_is_perfect(records):
  predictor = FakePredictor(_config())
  metrics = _metrics(predictor, records)
  assert sum(predictor.seen) == len(records) == 5
  for name in ('image_auroc', 'image_ap', 'pixel_auroc', 'pixel_ap', 'au_pro'):
    assert metrics[name] == 1.0
    assert metrics['resolution'] == 'model'
  # The control is the map upside down: it is as wrong as it can be.
  assert metrics['maps_mean']['pixel_auroc'] == 0.0
  assert metrics['maps_mean']['image_auroc'] == pytest.approx(0.5)


def test_what_a_threshold_costs(records):
  predictor = FakePredictor(_config())
  at = _metrics(predictor, records, 0.5)['at_threshold']
  assert at['image_precision'] == at['image_recall'] == at['pixel_f1'] == 1.0
  assert at['image_false_positive_rate'] == 0.0
  # At 0 every image and every pixel is called defective.
  at = _metrics(predictor, records, 0.0)['at_threshold']
  assert at['image_precision'] == pytest.approx(2 / 5)
  assert at['image_false_positive_rate'] == 1.0
  assert at['image_false_positive_rate_asked'] == 0.01
  low, high = at['confidence']['image_false_positive_rate']
  assert 0.2 < low < high == 1.0
  assert 'good images are called defective' in at['warnings'][0]
  share = 2 * 16 * 24 / (5 * 64 * 64)
  assert at['pixel_precision'] == pytest.approx(share)


def test_native_resolution_uses_each_masks_own_size(records, tmp_path):
  predictor = FakePredictor(_config(resolutions=('native', 'model')))
  with _evaluation(predictor, records) as evaluation:
    evaluate.write_maps(tmp_path / 'maps', evaluation)
  metrics = evaluation.metrics
  assert metrics['resolution'] == 'native'
  # The square's edges fall between pixels of the map: still ranked rightly.
  assert metrics['pixel_auroc'] == metrics['model']['pixel_auroc'] == 1.0
  stem = map_files.map_paths(tmp_path / 'maps', 'toy', records)[-1]
  native = map_files.read_map(f'{stem}.tiff')
  assert native.shape == (2 * SIZE, 2 * SIZE)
  # Half way up the blurred edge the map has the mask's area.
  assert np.count_nonzero(native > 0.5) == pytest.approx(16 * 24, rel=0.05)


def test_maps_are_written_as_they_were_scored(records, tmp_path):
  predictor = FakePredictor(_config())
  with _evaluation(predictor, records) as evaluation:
    evaluate.write_maps(tmp_path / 'maps', evaluation)
  stems = map_files.map_paths(tmp_path / 'maps', 'toy', records)
  for stem, record in zip(stems, records):
    found = map_files.read_map(f'{stem}.tiff')
    image = images_lib.read_image(record.image, SIZE)
    np.testing.assert_array_equal(
      found, image[..., 0].astype(np.float32) / 255.0
    )


def test_pictures_show_the_extremes_of_each_label(records, tmp_path):
  predictor = FakePredictor(_config(pictures=1))
  _run(predictor, records, tmp_path)
  pictures = tmp_path.glob('pictures/*')
  names = sorted(path.name.rsplit('_', 3)[0] for path in pictures)
  assert names == [
    'defect_found',
    'defect_missed',
    'good_alarming',
    'good_clear',
  ]


def test_what_the_report_needs_is_written(records, tmp_path):
  config = _config(resolutions=('native', 'model'))
  config.data.root = str(tmp_path)
  target = tmp_path / 'out'
  written = _run(FakePredictor(config), records, target)
  metrics = _metrics(FakePredictor(config), records)
  np.testing.assert_equal({k: written[k] for k in metrics}, metrics)
  rows = archive_lib.read_scores(target)
  assert [row['file'] for row in rows] == [
    *(f'toy/test/good/{i}.png' for i in range(3)),
    *(f'toy/test/red/{i}.png' for i in range(2)),
  ]
  assert [row['verdict'] for row in rows] == ['good'] * 3 + ['defective'] * 2
  assert [row['maps_mean_score'] for row in rows] == [1.0] * 5
  archive = archive_lib.open_archive(target)
  archive.close()
  assert [item['overlap'] is None for item in archive.items] == [True] * 3 + [
    False
  ] * 2
  assert archive.curves['pro'][1][-1] == 1.0


def test_a_report_that_fails_loses_no_result(records, tmp_path, monkeypatch):
  def fail(*unused_args):
    raise OSError('no space left')

  monkeypatch.setattr(archive_lib, 'write', fail)
  assert _run(FakePredictor(_config()), records, tmp_path)['image_auroc'] == 1.0
  assert (tmp_path / 'results.json').exists()


def _student_alone(**changes):
  config = model_helpers.tiny_config(head__kind='none', **changes)
  model = dmdd.from_config(config)
  return config, model_helpers.make_state(config, model)


def test_what_is_unusual_of_a_position_is_taken_from_the_distance():
  config, state = _student_alone(data__image_size=64)
  images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
  predictor = predictor_lib.Predictor(config, batch_size=2)

  def distances(state):
    return predictor_lib.predict_images(
      predictor, state, score_lib.Fusion(), images
    ).distance

  learned = position_lib.learn_positions(predictor, state, images)
  bias = np.asarray(learned.batch_stats['position']['bias'])
  assert bias.shape == (16, 16) and bias.min() == 0.0
  # A fifth of the positions have some: those of the highest mean distance.
  assert 0.15 < np.mean(bias > 0.0) < 0.25
  stats = {**state.batch_stats, 'position': {'bias': np.zeros_like(bias)}}
  before = distances(state.replace(batch_stats=stats)).mean(axis=0)
  before = before.reshape(16, 4, 16, 4).mean(axis=(1, 3))
  assert before[bias > 0.0].mean() > before[bias == 0.0].mean() + bias.mean()
  after = distances(learned).mean(axis=0)
  after = after.reshape(16, 4, 16, 4).mean(axis=(1, 3))
  # But for the resizing from stride 4 and back.
  np.testing.assert_allclose(after, before - bias, atol=0.2 * bias.max())
  # Whatever was known before is replaced, not added to.
  again = position_lib.learn_positions(predictor, learned, images)
  np.testing.assert_allclose(
    again.batch_stats['position']['bias'], bias, atol=1e-6
  )


def test_no_more_images_than_needed_are_looked_at_for_the_positions():
  config, state = _student_alone()
  seen = []

  class Predictor:
    def __init__(self):
      self.config, self.mesh = config, sharding.make_mesh()

    def images_at_once(self, shape):
      assert shape == (32, 32)
      return 50

    def __call__(self, state, fusion, images):
      seen.extend(images[:, 0, 0, 0].tolist())
      zeros = np.zeros(images.shape[:3], np.float32)
      return score_lib.Prediction(*6 * [zeros])

  images = np.arange(200, dtype=np.uint8)[:, None, None, None]
  images = np.broadcast_to(images, (200, 32, 32, 3))
  position_lib.learn_positions(Predictor(), state, images)
  assert len(seen) == len(set(seen)) == 128 and np.ptp(seen) > 190


def test_a_model_without_positions_is_left_as_it_is():
  config, state = _student_alone(head__position_bias=False)
  assert position_lib.learn_positions(None, state, np.zeros(0)) is state
  assert 'position' not in state.batch_stats


def test_undefined_figures_are_null_with_a_reason(records):
  good = [record for record in records if not record.label]
  metrics = _metrics(FakePredictor(_config()), good)
  assert np.isnan(metrics['image_auroc']) and np.isnan(metrics['au_pro'])
  assert 'image_auroc' in metrics['undefined']
  json.dumps(metrics, default=float)


FIGURES = ('precision', 'recall', 'f1')


def test_without_a_threshold_there_are_no_figures_at_it(records):
  metrics = _metrics(FakePredictor(_config()), records, threshold=np.nan)
  at = metrics['at_threshold']
  for name in (
    *(
      f'{level}_{figure}' for level in ('image', 'pixel') for figure in FIGURES
    ),
    'image_threshold',
    'image_false_positive_rate',
  ):
    assert np.isnan(at[name]), name
    assert at['undefined'][name] == 'no threshold: no image was held out'
  assert 'confidence' not in at


def test_each_figure_without_a_value_says_why(records):
  at = _metrics(FakePredictor(_config()), records, 2.0)['at_threshold']
  assert at['undefined'] == {
    f'{level}_precision': f'no {level} reaches the threshold'
    for level in ('image', 'pixel')
  }
  good = [record for record in records if not record.label]
  at = _metrics(FakePredictor(_config()), good, 2.0)['at_threshold']
  nothing = 'no defective images'
  assert at['undefined']['image_recall'] == nothing
  assert at['undefined']['image_f1'].startswith(nothing)
  bad = [record for record in records if record.label]
  at = _metrics(FakePredictor(_config()), bad)['at_threshold']
  assert at['undefined'] == {'image_false_positive_rate': 'no good images'}
