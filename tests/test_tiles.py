"""Tiles of large images: their places, their blending, prediction by them."""

import json
import pathlib
import tracemalloc

import jax
import model_helpers
import numpy as np
from PIL import Image
import program_helpers
import pytest
from scipy import ndimage

from dmdd_jax import predict
from dmdd_jax import run as run_lib
from dmdd_jax import trainer as trainer_lib
from dmdd_jax.data import maps as map_files
from dmdd_jax.data import tiles
from dmdd_jax.models import dmdd
from dmdd_jax.report import archive
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import predictor as predictor_lib
from dmdd_jax.scoring import score as score_lib

pytestmark = pytest.mark.usefixtures('compiled_once')


def _data(size, tile=32, overlap=0.25):
  return {'image_size': size, 'tile_size': tile, 'tile_overlap': overlap}


def _blend(grid, parts):
  whole = np.zeros(grid.shape, np.float32)
  for tile, part in enumerate(parts):
    grid.add(whole, tile, part)
  return whole


SHAPES = [(32, 32), (33, 97), (64, 64), (100, 32), (131, 250)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('overlap', [0.0, 0.1, 0.25, 0.5, 0.75])
def test_tiles_cover_the_image_and_share_what_was_asked_for(shape, overlap):
  grid = tiles.Grid(shape, 32, overlap)
  times = np.zeros(shape, int)
  for tile in range(len(grid)):
    grid.cut(times, tile)[...] += 1
  assert times.min() >= 1
  for axis, length in enumerate(shape):
    starts = sorted({corner[axis] for corner in grid.corners})
    assert starts[0] == 0 and starts[-1] == length - 32
    assert all(32 - step >= overlap * 32 for step in np.diff(starts))
    # One tile fewer would not do.
    if len(starts) > 1:
      assert 32 + (len(starts) - 2) * (1 - overlap) * 32 < length


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('overlap', [0.0, 0.1, 0.25, 0.5, 0.75])
def test_what_tiles_agree_on_comes_out_as_it_is(shape, overlap):
  grid = tiles.Grid(shape, 32, overlap)
  whole = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  for image in (np.full(shape, 7.0, np.float32), whole):
    parts = [grid.cut(image, tile) for tile in range(len(grid))]
    np.testing.assert_allclose(_blend(grid, parts), image, rtol=1e-6, atol=1e-6)


def test_one_tile_is_the_image_exactly():
  image = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
  np.testing.assert_array_equal(
    _blend(tiles.Grid((32, 32), 32, 0.25), [image]), image
  )


def test_tiles_that_disagree_meet_without_a_seam():
  """Neighbours say 0 and 1: no step is larger than a smooth fade makes it."""
  grid = tiles.Grid((64, 640), 64, 0.25)
  parts = [np.full((64, 64), tile % 2, np.float32) for tile in range(len(grid))]
  steps_ = np.abs(np.diff(_blend(grid, parts), axis=1))
  # Sixteen shared pixels or more: a straight fade would step by 1 / 16.
  assert steps_.max() < 2 / 16
  hard = tiles.Grid((64, 640), 64, 0.0)
  parts = parts[: len(hard)]
  assert np.abs(np.diff(_blend(hard, parts), axis=1)).max() == 1.0


def test_split_orders_tiles_by_image():
  images = np.random.default_rng(0).integers(0, 256, (3, 80, 80, 3), np.uint8)
  data = _data(80)
  grid = tiles.make_grid(data)
  found = tiles.split(data, images)
  assert found.shape == (3 * len(grid), 32, 32, 3)
  for index, part in enumerate(found):
    image, tile = divmod(index, len(grid))
    np.testing.assert_array_equal(part, grid.cut(images[image], tile))
  assert tiles.split(_data(80, tile=0), images) is images


# Prediction: a real, tiny model.


@pytest.fixture(scope='module')
def state():
  config = _config(32, tile=0)
  return model_helpers.make_state(config, dmdd.from_config(config))


def _config(size, tile=32, **changes):
  return model_helpers.tiny_config(
    data__image_size=size, data__tile_size=tile, eval__batch_size=4, **changes
  )


FUSION = score_lib.Fusion(0.1, 0.3, 0.2, 0.5, 1.0, 0.7, 0.2)


def _images(count, size):
  rng = np.random.default_rng(size)
  return rng.integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture
def seen(monkeypatch):
  """The jitted functions of tiles made, and the shapes they were given."""
  make, functions, shapes = score_lib.make_measure_step, [], []

  def recording(*arguments):
    function = make(*arguments)
    functions.append(function)

    def call(variables, images):
      shapes.append(images.shape)
      return function(variables, images)

    return call

  monkeypatch.setattr(score_lib, 'make_measure_step', recording)
  return functions, shapes


@pytest.mark.parametrize('sigma', [0.0, 1.5])
def test_a_tile_that_is_the_image_changes_nothing(state, sigma):
  whole = predictor_lib.Predictor(_config(32, 0, eval__smoothing_sigma=sigma))
  tiled = predictor_lib.Predictor(_config(96, 32, eval__smoothing_sigma=sigma))
  images = _images(3, 32)
  expected, found = (p(state, FUSION, images) for p in (whole, tiled))
  for name in (
    'map',
    'maps_mean',
    'probability',
    'image_score',
    'maps_mean_score',
  ):
    a, b = getattr(expected, name), getattr(found, name)
    assert a.shape == b.shape and b.dtype == np.float32
    np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-6)


def test_one_program_sees_tiles_alone_whatever_the_image(state, seen):
  functions, shapes = seen
  predictor = predictor_lib.Predictor(_config(200))
  for size in (32, 75, 200):
    images = _images(predictor.images_at_once((size, size)), size)
    found = predictor(state, FUSION, images)
    assert found.map.shape == images.shape[:3]
  assert len(functions) == 1 and set(shapes) == {(4, 32, 32, 3)}


def test_maps_are_the_blend_of_what_each_tile_says(state):
  predictor = predictor_lib.Predictor(_config(75))
  alone = predictor_lib.Predictor(_config(32, 0))
  images = _images(2, 75)
  found = predictor_lib.predict_images(predictor, state, FUSION, images)
  grid = tiles.Grid((75, 75), 32, 0.25)
  for n, image in enumerate(images):
    parts = np.stack([grid.cut(image, tile) for tile in range(len(grid))])
    said = predictor_lib.predict_images(alone, state, FUSION, parts)
    for name in ('map', 'maps_mean', 'distance', 'probability'):
      np.testing.assert_allclose(
        getattr(found, name)[n],
        _blend(grid, getattr(said, name)),
        rtol=1e-4,
        atol=1e-5,
      )
    scored = FUSION.score_map(found.probability[n], found.distance[n])
    top = map_files.top_mean(scored, 100)
    assert found.image_score[n] == pytest.approx(top, rel=1e-6)
    assert found.image_score[n] != pytest.approx(
      map_files.top_mean(found.map[n], 100), rel=1e-2
    )


def test_memory_is_that_of_the_maps_and_a_batch_of_tiles(state, seen):
  _, shapes = seen
  predictor = predictor_lib.Predictor(_config(512, data__tile_overlap=0.0))
  image = _images(1, 512)
  predictor(state, FUSION, image[:, :32, :32])
  tracemalloc.start()
  found = predictor(state, FUSION, image)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # Three maps and what fusing and scoring them takes; tiles are small beside.
  assert peak < 8 * found.map.nbytes
  assert max(np.prod(shape) for shape in shapes) == 4 * 32 * 32 * 3


def test_an_inspector_takes_any_size(state, seen):
  _, shapes = seen
  calibration = calibration_lib.Calibration(FUSION, 0.5, 0.5, 1.0, 4)
  inspector = predict.Inspector(_config(96), state, calibration)
  rng = np.random.default_rng(0)
  sizes = [(40, 200), (300, 90), (20, 20), (96, 96)]
  images = [rng.integers(0, 256, (*s, 3), np.uint8) for s in sizes]
  together = inspector(images)
  assert [result.map.shape for result in together] == sizes
  for image, result in zip(images, together):
    (alone,) = inspector([image])
    assert alone.score == pytest.approx(result.score, rel=1e-4)
    np.testing.assert_allclose(alone.map, result.map, rtol=1e-3, atol=1e-4)
  assert set(shapes) == {(4, 32, 32, 3)}


def test_a_run_on_tiles_from_training_to_prediction(tmp_path):
  """Trains on 72 pixels by tiles of 32, evaluates again and predicts."""
  folder = pathlib.Path(program_helpers.write_data(tmp_path / 'data'))
  for path in folder.rglob('*.png'):
    picture = Image.open(path)
    picture.resize((90, 72), Image.Resampling.NEAREST).save(path)
  config = program_helpers.tiny_run(
    tmp_path / 'data',
    data__image_size=72,
    data__tile_size=32,
    teacher__weights=program_helpers.write_weights(tmp_path / 'teacher.npz'),
    train__total_steps=2,
    train__distill_steps=1,
  )
  del config.per_category
  workdir = tmp_path / 'run'
  data = trainer_lib.load_data(config)
  assert data.images.shape == (6 * 9, 32, 32, 3)
  assert data.held_out.shape == (2, 72, 72, 3)
  assert data.textures.shape[1:] == (32, 32, 3)
  _, summary = run_lib.train_and_evaluate(config, str(workdir))
  again = run_lib.evaluate_workdir(str(workdir), tmp_path / 'again')
  image = next((folder / 'test/good').iterdir())
  output = tmp_path / 'out'
  predict.predict(str(workdir), str(image), str(output))
  for name in ('image_auroc', 'pixel_auroc', 'au_pro'):
    assert again[name] == summary[name]
  document = json.loads((output / 'predictions.json').read_text())
  (row,) = document['predictions']
  assert (row['height'], row['width']) == (72, 90)
  # The same path in evaluation and prediction gives the same score.
  (scored,) = (
    scored
    for scored in archive.read_scores(workdir)
    if image.samefile(tmp_path / 'data' / scored['file'])
  )
  assert row['score'] == pytest.approx(scored['score'], rel=1e-4)


@pytest.mark.parametrize('sigma', [0.0, 1.5])
@pytest.mark.parametrize('top', [1, 100, 10**6])
def test_joined_tiles_are_scored_as_whole_images_are(sigma, top):
  """The same arrays give the same numbers, and those of the definition."""
  rng = np.random.default_rng(0)
  raw = score_lib.Raw(*rng.random((3, 2, 40, 56), np.float32))
  options = _config(32, 0).eval
  options.update({'smoothing_sigma': sigma, 'score_top_pixels': top})
  joined = score_lib.make_score_step(options)(FUSION, raw)
  whole = jax.jit(lambda raw: score_lib.score(options, FUSION, raw))(raw)
  for name, value in vars(joined).items():
    np.testing.assert_allclose(
      value, getattr(whole, name), rtol=1e-5, atol=1e-6
    )
  probability, distance = (
    np.stack([ndimage.gaussian_filter(m, sigma) if sigma else m for m in maps])
    for maps in (raw.probability, raw.distance)
  )
  np.testing.assert_allclose(
    joined.map, FUSION(probability, distance), rtol=1e-4, atol=1e-5
  )
  flat = np.sort(FUSION.score_map(probability, distance).reshape(2, -1))
  np.testing.assert_allclose(
    joined.image_score, flat[:, -top:].mean(axis=1), rtol=1e-4
  )
