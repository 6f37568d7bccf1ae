"""Training and evaluation batches: every image once, the same bytes always."""

import itertools

import numpy as np
import pytest

from configs import default
from dmdd_jax.data import batches
from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import pipeline
from dmdd_jax.data import records
from dmdd_jax.data import surfaces
from dmdd_jax.data import synthesis

SIZE = 32
KEYS = {'image', 'normal', 'mask', 'label', '_mask', 'view'}


def _bytes(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def _options(**changes):
  config = default.get_config()
  config.data.image_size = SIZE
  config.synthesis.rotate_90 = True
  config.synthesis.update(changes)
  return pipeline.options(config)


def _batches(count=7, options=None, **changes):
  """A list of batches of `count` random images, 4 a step, 5 steps."""
  arguments = {'seed': 3, 'batch_size': 4, 'total_steps': 5, **changes}
  dataset = pipeline.train_dataset(
    _bytes(count), _bytes(3, seed=1), options or _options(), **arguments
  )
  return list(dataset.as_numpy_iterator())


def _assert_equal(found, expected):
  assert len(found) == len(expected)
  for a, b in zip(found, expected):
    assert a.keys() == b.keys() == KEYS
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def _orders(count, epochs, seed=0, batch_size=4):
  """The examples in the order of training, (epochs, count)."""
  steps = -(-count * epochs // batch_size)
  images = np.zeros((count, SIZE, SIZE, 3), np.uint8)
  images[:, 0, 0, 0] = np.arange(count)
  found = pipeline.train_dataset(
    images,
    _bytes(1),
    _options(clean_share=1.0, rotate_90=False),
    seed=seed,
    batch_size=batch_size,
    total_steps=steps,
  ).as_numpy_iterator()
  order = np.concatenate([batch['normal'][:, 0, 0, 0] for batch in found])
  order = np.rint(order * 255).astype(int)[: count * epochs]
  return order.reshape(epochs, count)


@pytest.fixture(scope='module')
def expected():
  return _batches(threads=1)


# Training.


def test_a_batch_is_what_it_says(expected):
  for batch in expected:
    assert batch.keys() == KEYS
    for key in ('image', 'normal'):
      assert batch[key].shape == (4, SIZE, SIZE, 3)
      assert batch[key].dtype == np.float32
      assert batch[key].min() >= 0.0 and batch[key].max() <= 1.0
    assert batch['mask'].shape == (4, SIZE, SIZE, 1)
    change = np.any(batch['image'] != batch['normal'], axis=-1, keepdims=True)
    np.testing.assert_array_equal(batch['mask'], np.float32(change))
    np.testing.assert_array_equal(batch['label'], change.any(axis=(1, 2, 3)))
    np.testing.assert_array_equal(batch['_mask'], np.ones(4, np.float32))


def test_every_normal_is_a_turned_training_image(expected):
  images = _bytes(7) / np.float32(255)
  for picture in np.concatenate([batch['normal'] for batch in expected]):
    turns = [np.rot90(images, k, (1, 2)) for k in range(4)]
    hits = [np.all(turn == picture, axis=(1, 2, 3)) for turn in turns]
    assert np.sum(hits) == 1


@pytest.mark.parametrize('rotate_90', [True, False])
def test_a_view_is_the_normal_image_to_the_byte(rotate_90):
  options = _options(rotate_90=rotate_90)
  views = pipeline.views(_bytes(7), options)
  assert len(views) == 7 * (4 if rotate_90 else 1) and views.dtype == np.uint8
  seen = set()
  for batch in _batches(options=options):
    expected = views[batch['view']] / np.float32(255)
    np.testing.assert_array_equal(batch['normal'], expected)
    seen |= set(batch['view'])
  assert len(seen) > (10 if rotate_90 else 6)


def test_same_seed_same_bytes_at_any_parallelism(expected):
  for threads in (None, 1, 4):
    _assert_equal(_batches(threads=threads), expected)


@pytest.mark.parametrize('first', [1, 3, 5])
def test_starting_later_is_skipping(expected, first):
  """What a resumed run reads is what the interrupted one would have."""
  _assert_equal(_batches(first_step=first), expected[first:])


def test_more_steps_leave_the_first_ones_as_they_are(expected):
  _assert_equal(_batches(total_steps=8)[:5], expected)


def test_shards_together_are_the_whole_batch(expected):
  parts = [_batches(shard=(index, 4)) for index in range(4)]
  joined = [
    {key: np.concatenate([rows[key] for rows in step]) for key in KEYS}
    for step in zip(*parts)
  ]
  _assert_equal(joined, expected)


def test_another_seed_gives_other_pairs(expected):
  for a, b in zip(_batches(seed=4), expected):
    assert not np.array_equal(a['normal'], b['normal'])
    assert not np.array_equal(a['mask'], b['mask'])


def test_an_example_gets_another_anomaly_in_every_epoch():
  """One image, one a batch: the order cannot differ, the anomaly must."""
  options = _options(rotate_90=False, clean_share=0.0, region_share=1.0)
  found = _batches(1, options, batch_size=1, total_steps=6)
  for a, b in itertools.combinations(found, 2):
    np.testing.assert_array_equal(a['normal'], b['normal'])
    assert not np.array_equal(a['mask'], b['mask'])


@pytest.mark.parametrize(
  ('count', 'batch_size'), [(7, 4), (8, 4), (1, 4), (3, 8)]
)
def test_each_epoch_visits_each_example_once(count, batch_size):
  orders = _orders(count, epochs=5, batch_size=batch_size)
  np.testing.assert_array_equal(
    np.sort(orders), np.tile(np.arange(count), (5, 1))
  )
  if count > 6:
    assert len(np.unique(orders, axis=0)) == 5


def test_the_order_is_shuffled_well():
  """As often as chance has it, about once an epoch, an example keeps its place.

  The same goes for an example that is followed by its neighbour, and for one
  at the same place in two epochs. The shuffle's default of 4 rounds keeps 38 of
  60 examples in their place with seed 0.
  """
  count, epochs = 60, 24
  orders = _orders(count, epochs, batch_size=60)
  in_place = np.mean(np.sum(orders == np.arange(count), axis=1))
  neighbours = np.mean(np.sum(np.diff(orders, axis=1) == 1, axis=1))
  kept = np.mean(np.sum(orders[1:] == orders[:-1], axis=1))
  # Each is a mean of 24 numbers of mean and variance about 1.
  for found in (in_place, neighbours, kept):
    assert abs(found - 1.0) < 4 / np.sqrt(epochs)


def test_another_seed_gives_another_order():
  orders = [_orders(12, 2, seed) for seed in (0, 1)]
  assert not np.array_equal(orders[0], orders[1])


@pytest.mark.parametrize(
  ('images', 'textures', 'message'),
  [
    ((0, SIZE, SIZE, 3), (1, SIZE, SIZE, 3), r'images must be .*\(0, 32'),
    ((2, 64, 64, 3), (1, SIZE, SIZE, 3), r'images must be .*\(2, 64'),
    ((2, SIZE, SIZE, 1), (1, SIZE, SIZE, 3), r'images must be .*32, 1\)'),
    ((2, SIZE, SIZE, 3), (0, SIZE, SIZE, 3), r'textures must be .*\(0, 32'),
    ((2, SIZE, SIZE, 3), (1, 64, 64, 3), r'textures must be .*\(1, 64'),
  ],
)
def test_arrays_that_do_not_fit_are_named(images, textures, message):
  with pytest.raises(ValueError, match=message):
    pipeline.train_dataset(
      np.zeros(images, np.uint8),
      np.zeros(textures, np.uint8),
      _options(),
      seed=0,
      batch_size=2,
      total_steps=1,
    )


def test_a_batch_that_does_not_divide_names_the_field():
  with pytest.raises(ValueError, match=r'config\.train\.batch_size = 4 .* 3 '):
    _batches(shard=(0, 3))


def test_options_are_the_fields_of_the_config():
  config = default.get_config()
  config.data.image_size = 64
  config.synthesis.clean_share = 0.375
  found = pipeline.options(config)
  assert found == synthesis.Options(
    image_size=64, **{**default.get_config().synthesis, 'clean_share': 0.375}
  )


def test_lighting_is_one_factor_an_image():
  plain, lit = (
    _batches(1, _options(lighting=lighting))[0] for lighting in (0.0, 0.2)
  )
  dark = np.abs(plain['normal'] - 0.5) < 0.3
  factor = np.where(dark, lit['normal'] / np.maximum(plain['normal'], 0.1), 0.0)
  highest = factor.max(axis=(1, 2, 3), keepdims=True)
  np.testing.assert_allclose(factor, highest * dark, rtol=1e-5)
  assert np.ptp(highest) > 0.05 and np.all(np.abs(highest - 1.0) <= 0.2)


# Evaluation.


@pytest.fixture(scope='module')
def test_records(tmp_path_factory):
  """3 good and 4 defective images of 48 pixels."""
  root = tmp_path_factory.mktemp('data')
  surfaces.write_surfaces(root, size=48, train=1, test_good=3, per_defect=1)
  return layouts.list_mvtec(root, surfaces.CATEGORY).test


@pytest.mark.parametrize('batch_size', [1, 2, 3, 7, 8])
def test_every_record_counts_once_and_padding_is_marked(
  test_records, batch_size
):
  found = list(batches.eval_batches(test_records, SIZE, batch_size))
  assert len(found) == -(-7 // batch_size)
  for batch in found:
    assert {key: value.shape for key, value in batch.items()} == {
      'image': (batch_size, SIZE, SIZE, 3),
      'mask': (batch_size, SIZE, SIZE, 1),
      'label': (batch_size,),
      '_mask': (batch_size,),
    }
    padding = batch['_mask'] == 0
    assert not any(batch[key][padding].any() for key in batch)
  joined = {
    key: np.concatenate([batch[key] for batch in found]) for key in found[0]
  }
  np.testing.assert_array_equal(
    joined['_mask'], np.arange(len(joined['_mask'])) < 7
  )
  for row, record in enumerate(test_records):
    image = images_lib.read_image(record.image, SIZE)
    np.testing.assert_array_equal(joined['image'][row], image)
    mask = np.zeros((SIZE, SIZE, 1), np.uint8)
    if record.mask is not None:
      mask = images_lib.read_mask(record.mask, SIZE)
    np.testing.assert_array_equal(joined['mask'][row], mask)
    assert joined['label'][row] == record.label
  assert joined['label'].sum() == 4


def test_no_records_are_no_batches():
  assert list(batches.eval_batches((), SIZE, 4)) == []


def test_a_reader_that_stops_early_leaves_nothing_running(test_records):
  found = batches.eval_batches(test_records, SIZE, 2)
  assert next(found)['image'].shape[0] == 2
  found.close()


def test_an_unreadable_image_is_named_by_the_batch(test_records, tmp_path):
  missing = records.Record(str(tmp_path / 'gone.png'), None, 0, 'good')
  rows = (*test_records[:3], missing)
  with pytest.raises(files.BadImageError, match=r'gone\.png'):
    list(batches.eval_batches(rows, SIZE, 2))
