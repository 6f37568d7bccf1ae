"""Foreground masks: found, cached, turned with their image, and respected."""

import concurrent.futures
import multiprocessing
import os

import numpy as np
from PIL import Image
import pytest
import synthesis_helpers

from configs import default
from configs import folder as folder_config
from configs import mvtec
from dmdd_jax.data import foreground
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import pipeline
from dmdd_jax.data import records
from dmdd_jax.data import unseen

DATA = os.environ.get('DMDD_TEST_DATA')
needs_data = pytest.mark.skipif(
  not DATA, reason='DMDD_TEST_DATA, the folder of real images, is not set'
)
SIZE = 64


def _disc(object_, ground, radius=20, noise=6.0, seed=0):
  """A disc off the centre of one colour on a ground of another, with noise."""
  y, x = np.mgrid[:SIZE, :SIZE]
  inside = (y - 36) ** 2 + (x - 28) ** 2 <= radius**2
  colors = np.where(inside[..., None], object_, ground) * np.ones(3)
  colors += np.random.default_rng(seed).normal(0, noise, colors.shape)
  return np.clip(colors, 0, 255).astype(np.uint8), inside


def _overlap(mask, truth):
  return (mask & truth).sum() / (mask | truth).sum()


@pytest.mark.parametrize('kind', ['otsu', 'grabcut'])
@pytest.mark.parametrize(
  ('object_', 'ground'), [((40, 40, 60), (210, 200, 205)), (220, 30)]
)
def test_a_disc_is_found_dark_or_bright(kind, object_, ground):
  image, truth = _disc(object_, ground)
  mask = foreground.compute(image, kind)
  assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
  assert _overlap(mask > 0, truth) > 0.95


def test_grabcut_sees_a_colour_that_brightness_hardly_does():
  """Red on blue: 15 of 255 brighter under noise of 8, but far in colour."""
  image, truth = _disc((130, 60, 50), (50, 60, 130), noise=8.0)
  otsu, grabcut = (
    foreground.compute(image, kind) > 0 for kind in ('otsu', 'grabcut')
  )
  assert _overlap(grabcut, truth) > 0.95
  assert _overlap(grabcut, truth) > _overlap(otsu, truth)


def test_the_same_image_gives_the_same_mask():
  image, _ = _disc(120, 90, noise=25.0)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    masks = list(
      pool.map(lambda _: foreground.compute(image, 'grabcut'), range(8))
    )
  assert all(np.array_equal(mask, masks[0]) for mask in masks)


@pytest.fixture
def items(tmp_path):
  """Three records of discs."""
  found = []
  for i in range(3):
    path = tmp_path / f'data/{i}.png'
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(_disc(200, 40, radius=12 + 3 * i)[0]).save(path)
    found.append(records.Record(str(path), None, 0, 'good'))
  return found


def test_masks_are_computed_once_for_a_content(items, tmp_path, monkeypatch):
  calls = []
  compute = foreground.compute

  def counting(image, kind):
    calls.append(kind)
    return compute(image, kind)

  monkeypatch.setattr(foreground, 'compute', counting)
  cache = str(tmp_path / 'cache')

  def load(size=SIZE, kind='otsu'):
    calls.clear()
    return foreground.load(items, size, kind, cache)

  first = load()
  assert first.shape == (3, SIZE, SIZE, 1) and len(calls) == 3
  np.testing.assert_array_equal(load(), first)
  assert not calls
  load(size=32)
  load(kind='grabcut')
  assert len(calls) == 3
  # Another content under the same name is another mask.
  Image.fromarray(_disc(200, 40, radius=8)[0]).save(items[1].image)
  second = load()
  assert len(calls) == 1 and second[1].sum() < first[1].sum()
  # A damaged entry is made again.
  for name in os.listdir(cache):
    with open(os.path.join(cache, name), 'wb') as file:
      file.write(b'half')
  np.testing.assert_array_equal(load(), second)
  assert len(calls) == 3


def _load_in_process(arguments):
  return foreground.load(*arguments).sum()


def test_processes_can_prepare_the_same_images_at_once(items, tmp_path):
  arguments = (items, SIZE, 'otsu', str(tmp_path / 'cache'))
  context = multiprocessing.get_context('spawn')
  with context.Pool(2) as pool:
    sums = pool.map(_load_in_process, [arguments] * 4)
  assert len(set(sums)) == 1
  names = os.listdir(tmp_path / 'cache')
  assert len(names) == 3 and all(name.endswith('.png') for name in names)


def test_read_only_data_and_a_cache_that_cannot_be_written(
  items, tmp_path, warnings
):
  before = sorted(os.listdir(tmp_path / 'data'))
  kept = foreground.load(items, SIZE, 'otsu', str(tmp_path / 'cache'))
  assert not warnings and sorted(os.listdir(tmp_path / 'data')) == before
  (tmp_path / 'file').write_text('no folder')
  again = foreground.load(items, SIZE, 'otsu', str(tmp_path / 'file/cache'))
  np.testing.assert_array_equal(again, kept)
  assert 'cannot be kept' in warnings[0]
  assert 'XDG_CACHE_HOME' in warnings[0]


def test_the_cache_is_the_users(items, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
  foreground.load(items, SIZE, 'otsu')
  assert len(os.listdir(tmp_path / 'home/dmdd_jax/foreground')) == 3


def test_an_unknown_kind_names_its_field(items):
  with pytest.raises(ValueError, match=r'synthesis\.foreground.*grabcut'):
    foreground.load(items, SIZE, 'canny')


# In the pipeline.


def _batches(inside, **fields):
  options = synthesis_helpers.perlin_options(
    **{'image_size': SIZE, 'region_share': 0.5, 'min_contrast': 0.0, **fields}
  )
  rng = np.random.default_rng(0)
  images = np.zeros((4, SIZE, SIZE, 3), np.uint8)
  # The object's pixels alone are bright, so that its turn can be seen.
  if inside is not None:
    images += 200 * inside
  textures = rng.integers(1, 100, (5, SIZE, SIZE, 3), np.uint8)
  dataset = pipeline.train_dataset(
    images,
    textures,
    options,
    seed=1,
    batch_size=8,
    total_steps=6,
    foreground=inside,
  )
  return list(dataset.as_numpy_iterator())


def _quarter():
  inside = np.zeros((4, SIZE, SIZE, 1), np.uint8)
  inside[:, 4:30, 6:40] = 1
  return inside


@pytest.mark.parametrize('turn', [False, True])
def test_anomalies_stay_on_the_object_wherever_it_is_turned(turn):
  batches = _batches(_quarter(), foreground='otsu', rotate_90=turn)
  painted, centres = 0, set()
  for batch in batches:
    object_ = batch['normal'][..., :1] > 0.5
    assert not batch['mask'][~object_].any()
    painted += batch['mask'].sum()
    for row in object_[..., 0]:
      y, x = np.argwhere(row).mean(axis=0)
      centres.add((y > 32, x > 32))
  assert painted > 1000
  assert len(centres) == (4 if turn else 1)


def test_the_mask_is_that_without_foreground_where_the_object_is():
  inside = _quarter()
  free = _batches(inside, foreground='off')
  kept = _batches(inside, foreground='otsu')
  for one, other in zip(free, kept):
    np.testing.assert_array_equal(other['mask'], one['mask'] * inside[:1])


@pytest.mark.parametrize('share', [0.0, 0.01, 0.03, 0.97, 0.99, 1.0])
def test_a_foreground_that_failed_is_the_whole_image(
  items, share, tmp_path, monkeypatch
):
  found = np.zeros(SIZE * SIZE, np.uint8)
  found[: int(share * SIZE * SIZE)] = 1
  found = found.reshape(SIZE, SIZE)
  monkeypatch.setattr(foreground, 'compute', lambda image, kind: found)
  failed = min(share, 1.0 - share) < 0.02
  for _ in range(2):  # Computed, and from the cache.
    masks = foreground.load(items, SIZE, 'otsu', str(tmp_path))
    for mask in masks[..., 0]:
      np.testing.assert_array_equal(mask, found | failed)


def test_foregrounds_that_are_missing_are_said():
  with pytest.raises(ValueError, match=r"foreground is 'otsu'.*is None"):
    _batches(None, foreground='otsu')


def test_the_sourced_table_is_applied_by_mvtec_alone():
  rows = mvtec.get_config().per_category
  assert rows.screw.synthesis.foreground == 'otsu'
  assert 'synthesis' not in rows.carpet
  assert default.get_config().synthesis.foreground == 'off'


@needs_data
@pytest.mark.parametrize('kind', ['otsu', 'grabcut'])
def test_the_defects_of_real_screws_lie_on_the_screw(kind):
  """Nearly all of the ground truth, which nobody drew for this."""
  test = layouts.list_mvtec(os.path.join(DATA, 'mvtec'), 'screw').test
  items = [record for record in test if record.label][::6]
  covered, shares = [], []
  for record in items:
    image = images_lib.read_image(record.image, 256)
    truth = images_lib.read_mask(record.mask, 256)[..., 0]
    mask = foreground.compute(image, kind)
    shares.append(mask.mean())
    covered.append((mask & truth).sum() / truth.sum())
  assert 0.02 < np.mean(shares) < 0.35
  assert np.median(covered) > 0.6


def test_a_training_loads_them_for_its_own_and_its_held_out_images(
  tmp_path, monkeypatch
):
  from dmdd_jax import trainer as trainer_lib  # jax takes a second to import.

  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
  for i in range(6):
    path = tmp_path / f'ok/{i}.png'
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(_disc(200, 40, radius=10 + i)[0]).save(path)
  config = folder_config.get_config()
  config.data.normal = str(tmp_path / 'ok')
  config.data.image_size = SIZE
  config.data.holdout_min = 2
  data = trainer_lib.load_data(config)
  assert data.foreground is None and data.held_out_foreground is None
  config.synthesis.foreground = 'otsu'
  config.synthesis.texture_augment = True
  data = trainer_lib.load_data(config)
  assert data.foreground.shape == (4, SIZE, SIZE, 1)
  assert data.held_out_foreground.shape == (2, SIZE, SIZE, 1)
  bright = data.images[..., :1] > 120
  assert _overlap(data.foreground > 0, bright) > 0.95
  images, masks = unseen.pairs(
    data.held_out, seed=1, count=40, foreground=data.held_out_foreground
  )
  assert images.shape == (40, SIZE, SIZE, 3)
  assert masks.any() and not masks[:, :4].any()
