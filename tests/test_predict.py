"""Prediction: the API, the command's files, bad input."""

import csv
import os
import threading

import jax
import numpy as np
from PIL import Image
import pytest

from configs import default
from dmdd_jax import predict
from dmdd_jax.data import files
from dmdd_jax.data import maps as map_files
from dmdd_jax.models import dmdd
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import train_state


@pytest.fixture(scope='module')
def inspector():
  config = default.get_config()
  config.data.image_size = 32
  config.eval.batch_size = 3
  config.student.trunk = 'encoder'
  model = dmdd.from_config(config)
  state = train_state.create(config, model, jax.random.key(0))
  fusion = score_lib.Fusion(maps_weight=1.0)
  calibration = calibration_lib.Calibration(fusion, 0.5, 0.5, 1.0, 4)
  return predict.Inspector(config, state, calibration)


def _images(count, shape=(40, 24, 3)):
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, shape, np.uint8) for _ in range(count)]


def test_maps_have_the_images_own_sizes(inspector):
  images = _images(2) + _images(1, (20, 50, 3)) + _images(1, (9, 9))
  results = inspector(images)
  assert [r.map.shape for r in results] == [
    (40, 24),
    (40, 24),
    (20, 50),
    (9, 9),
  ]
  assert all(r.map.dtype == np.float32 for r in results)


def test_a_result_does_not_depend_on_its_batch(inspector):
  images = _images(7)
  together = inspector(images)
  for image, result in zip(images, together):
    alone = inspector([image])[0]
    assert alone.score == pytest.approx(result.score, rel=1e-4)
    np.testing.assert_allclose(alone.map, result.map, rtol=1e-3, atol=1e-4)


def test_the_verdict_is_at_or_above_the_threshold(inspector):
  assert inspector.verdict(0.5) == 'defective'
  assert inspector.verdict(np.nextafter(0.5, 0)) == 'good'
  nothing = calibration_lib.Calibration(
    score_lib.Fusion(), float('nan'), float('nan'), 1.0, 0
  )
  known, inspector.calibration = inspector.calibration, nothing
  try:
    assert inspector.verdict(9.0) == 'uncalibrated'
  finally:
    inspector.calibration = known


def test_the_scaled_score_counts_from_the_threshold():
  found = calibration_lib.Calibration(score_lib.Fusion(), 0.5, 0.5, 0.25, 4)
  assert [found.scaled(x) for x in (0.25, 0.5, 1.5)] == [-1.0, 0.0, 4.0]


def test_threads_get_their_own_answers(inspector):
  images = _images(6)
  expected = [inspector([image])[0].score for image in images]
  found = [None] * len(images)

  def work(index):
    found[index] = inspector([images[index]])[0].score

  threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == expected


def test_a_bad_array_or_file_is_named(inspector, tmp_path):
  with pytest.raises(files.BadImageError, match='float64'):
    inspector([np.zeros((4, 4, 3))])
  (tmp_path / 'broken.png').write_text('no picture')
  with pytest.raises(files.BadImageError, match='broken'):
    inspector([tmp_path / 'broken.png'])


def test_files_in_a_tree(inspector, tmp_path, monkeypatch):
  monkeypatch.setattr(predict, 'load', lambda workdir: inspector)
  folder = tmp_path / 'new parts' / 'ä'
  folder.mkdir(parents=True)
  for index, image in enumerate(_images(4)):
    Image.fromarray(image).save(folder / f'{index}.png')
    Image.fromarray(image).save(tmp_path / 'new parts' / f'{index}.png')
  (folder / 'broken.png').write_text('no picture')
  out = str(tmp_path / 'out')
  summary = predict.predict('unused', str(tmp_path / 'new parts'), out)
  assert summary['images'] == 8
  assert [os.path.basename(f) for f in summary['failed']] == ['broken.png']
  with open(summary['table']) as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 8
  for row in rows:  # The threshold is 0.5, the spread 1.
    assert float(row['scaled']) == float(row['score']) - 0.5
  # The same picture in both folders has the same score, and its own files.
  by_name = {}
  for row in rows:
    by_name.setdefault(os.path.basename(row['file']), set()).add(row['score'])
  assert all(len(scores) == 1 for scores in by_name.values())
  written = map_files.read_map(os.path.join(out, 'maps', 'ä', '2.png.tiff'))
  np.testing.assert_array_equal(written, inspector(_images(4))[2].map)
  assert os.path.isfile(os.path.join(out, 'overlays', '3.png.png'))


def test_an_unknown_format_of_the_maps_is_refused(tmp_path):
  with pytest.raises(ValueError, match='tiff, npy, none'):
    predict.predict('w', str(tmp_path), str(tmp_path), map_format='png')
