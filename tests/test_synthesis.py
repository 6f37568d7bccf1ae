"""Synthetic anomalies against their definitions, pixel by pixel."""

import math

import numpy as np
import pytest
from scipy import ndimage
from scipy import stats
import synthesis_helpers
import tensorflow as tf

from configs import default
from dmdd_jax.data import synthesis

SIZE = 32


def _options(**changes):
  """Perlin blobs alone, filled with textures, however faint."""
  return synthesis_helpers.perlin_options(**{'min_contrast': 0.0, **changes})


def _defaults(**changes):
  """The options of the default configuration."""
  fields = default.get_config().synthesis.to_dict()
  return synthesis.Options(**{'image_size': SIZE, **fields, **changes})


def _draws(examples, epochs=0, seed=0):
  examples = np.atleast_1d(np.asarray(examples, np.int64))
  epochs = np.broadcast_to(np.asarray(epochs, np.int64), examples.shape)
  return synthesis.draw(seed, tf.constant(examples), tf.constant(epochs))


def _random_bytes(count, size=SIZE, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, size, size, 3), np.uint8)


def _normals(count, size=SIZE, seed=1):
  return np.float32(_random_bytes(count, size, seed)) / np.float32(255)


def _pairs(normal, textures, options, seed=0):
  draws = _draws(np.arange(len(normal)), seed=seed)
  pair = synthesis.synthesize(
    tf.constant(normal), tf.constant(textures), draws, options
  )
  return [part.numpy() for part in pair]


# Random numbers.


def test_threefry_gives_the_published_known_answers():
  """The vectors of Random123's kat_vectors for threefry2x32, 20 rounds."""
  ones = 0xFFFFFFFF
  cases = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
    (
      (0x13198A2E, 0x03707344),
      (0x243F6A88, 0x85A308D3),
      (0xC4923A9C, 0x483DF7A0),
    ),
  ]
  for key, counter, expected in cases:
    key, counter = (
      tuple(tf.constant([word], tf.uint32) for word in words)
      for words in (key, counter)
    )
    found = synthesis.threefry(key, counter)
    assert tuple(int(word[0]) for word in found) == expected


def test_draws_are_uniform_and_independent():
  count = 300
  first = _draws(np.arange(count))
  others = [_draws(np.arange(count), epochs=1), _draws(range(count), seed=1)]
  for name, numbers in first.items():
    numbers = numbers.numpy()
    assert numbers.shape[0] == count and numbers.dtype == np.float32
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    # A fixed seed: this either always passes or never.
    assert stats.kstest(numbers.ravel(), 'uniform').pvalue > 1e-3, name
    for other in others:
      other = other[name].numpy()
      assert np.mean(other == numbers) < 1e-3
      assert abs(np.corrcoef(numbers.ravel(), other.ravel())[0, 1]) < 0.15
  columns = np.concatenate([first[name].numpy() for name in first], axis=1)
  correlations = np.corrcoef(columns[:, :60].T) - np.eye(60)
  assert np.abs(correlations).max() < 0.3
  assert len(np.unique(columns.ravel())) > 0.98 * columns.size


def test_an_example_depends_on_its_own_key_alone():
  """Not on the batch it is in, its place there, or the batch's size."""
  options = _defaults(rotate_90=True, rotate_degrees=5.0, lighting=0.2)
  normal, textures = _normals(8), _random_bytes(3)

  def run(rows):
    draws = _draws(rows, epochs=3, seed=5)
    turned = synthesis.augment(tf.constant(normal[rows]), draws, options)
    turned = synthesis.light(turned, draws, options)
    pair = synthesis.synthesize(turned, tf.constant(textures), draws, options)
    return [turned.numpy(), *(part.numpy() for part in pair)]

  whole = run(np.arange(8))
  for rows in ([3], [7, 0, 3], [5, 5, 1, 2, 6, 4]):
    for part, expected in zip(run(np.array(rows)), whole, strict=True):
      np.testing.assert_array_equal(part, expected[rows])


def test_lighting_multiplies_by_at_most_its_factor_either_way():
  images = np.linspace(0.0, 1.0, 64 * 16 * 16 * 3, dtype=np.float32)
  images = images.reshape(64, 16, 16, 3)
  draws = _draws(np.arange(64))
  found = synthesis.light(images, draws, _options(lighting=0.25)).numpy()
  middle = slice(8, 40)  # Nothing to divide by before, cut off at white after.
  factors = found[middle] / images[middle]
  np.testing.assert_allclose(np.ptp(factors, axis=(1, 2, 3)), 0.0, atol=1e-6)
  factors = factors[:, 0, 0, 0]
  assert 0.75 <= factors.min() < 0.8 and 1.2 < factors.max() <= 1.25
  assert np.sum(factors < 1.0) in range(8, 25)
  assert found.max() == 1.0 and found.min() == 0.0
  assert synthesis.light(images, draws, _options()) is images


# Perlin noise.


def _perlin_pixel(y, x, gradients):
  """Perlin noise at a position in cells; gradients[i, j] is (y, x)."""

  def fade(t):
    return 6 * t**5 - 15 * t**4 + 10 * t**3

  row, column = int(math.floor(y)), int(math.floor(x))
  v, u = y - row, x - column
  corners = {}
  for i in (0, 1):
    for j in (0, 1):
      gy, gx = gradients[row + i, column + j]
      corners[i, j] = gy * (v - i) + gx * (u - j)
  top = corners[0, 0] + fade(u) * (corners[0, 1] - corners[0, 0])
  bottom = corners[1, 0] + fade(u) * (corners[1, 1] - corners[1, 0])
  return math.sqrt(2) * (top + fade(v) * (bottom - top))


def test_noise_is_perlins_pixel_by_pixel():
  count = 8
  draws = _draws(np.arange(count))
  found = synthesis.perlin_noise(draws, SIZE).numpy()
  cells = 2 ** np.int64(draws['scale'].numpy() * 6)
  angles = 2 * np.pi * np.float64(draws['angles'].numpy()).reshape(-1, 33, 33)
  assert set(cells.ravel()) >= {1, 32}  # Both ends of 2**U{0..5} are tried.
  for index in range(count):
    gradients = np.stack([np.sin(angles[index]), np.cos(angles[index])], -1)
    per_y, per_x = cells[index] / SIZE
    expected = [
      [_perlin_pixel(y * per_y, x * per_x, gradients) for x in range(SIZE)]
      for y in range(SIZE)
    ]
    np.testing.assert_allclose(found[index], expected, atol=2e-5)


def test_grid_sizes_are_equally_likely():
  draws = _draws(np.arange(1200))
  levels = np.int64(draws['scale'].numpy() * synthesis.LEVELS)
  for axis in (0, 1):
    counts = np.bincount(levels[:, axis], minlength=6)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3


def test_empty_masks_and_covered_area_are_as_the_design_has_them():
  """4.5 % empty; the others cover 5 % of the image, 5-95 %: 2-9 %."""
  options = _options(image_size=256)
  areas = []
  for start in range(0, 768, 64):
    mask = synthesis.perlin_mask(_draws(np.arange(start, start + 64)), options)
    areas.append(mask.numpy().mean(axis=(1, 2, 3)))
  areas = np.concatenate(areas)
  empty = areas == 0.0
  assert abs(empty.mean() - 0.045) < 0.02  # 2.7 standard deviations.
  areas = areas[~empty]
  assert abs(areas.mean() - 0.05) < 0.006
  low, high = np.quantile(areas, (0.05, 0.95))
  assert abs(low - 0.02) < 0.008 and abs(high - 0.09) < 0.015


def test_the_noise_is_rotated_as_far_as_it_is_told():
  draws = _draws(np.arange(40))
  noise = synthesis.perlin_noise(draws, 64).numpy()
  still = synthesis.perlin_mask(
    draws, _options(image_size=64, rotation_degrees=0.0)
  )
  np.testing.assert_array_equal(still[..., 0], noise > 0.5)
  turned = synthesis.perlin_mask(draws, _options(image_size=64)).numpy()
  y, x = np.mgrid[:64, :64] - 31.5
  inner = np.hypot(y, x) < 30
  for index in range(40):
    degrees = 90 * (2 * draws['rotation'].numpy()[index, 0] - 1)
    expected = ndimage.rotate(noise[index], degrees, reshape=False, order=1)
    # The two differ in how they see the image's very edge.
    ignored = ~inner | (np.abs(expected - 0.5) < 1e-3)
    assert ((turned[index, ..., 0] == (expected > 0.5)) | ignored).all()


# Large regions.


def test_regions_have_the_area_that_was_drawn():
  options = _options(image_size=128, region_area_min=0.02, region_area_max=0.1)
  draws = _draws(np.arange(200))
  shape = draws['shape'].numpy()
  shape[:, 2:4] = 0.5  # In the middle of the image nothing is cut off.
  draws['shape'] = tf.constant(shape)
  mask = synthesis.region_mask(draws, options).numpy()
  areas = mask.mean(axis=(1, 2, 3))
  expected = 0.02 * (0.1 / 0.02) ** shape[:, 0]
  np.testing.assert_allclose(areas, expected, rtol=0.06)
  # Ellipses and rectangles differ in their second moments at equal area and
  # axes: a rectangle fills its corners. Both occur, and are one piece.
  assert 0.35 < np.mean(shape[:, 5] < 0.5) < 0.65
  for index in range(0, 200, 20):
    assert ndimage.label(mask[index, ..., 0])[1] == 1


def test_a_region_is_the_rotated_ellipse_or_rectangle_it_says():
  """Each region against its covariance, that of a body of these axes."""
  options = _options(image_size=128, region_area_min=0.05, region_area_max=0.05)
  draws = _draws(np.arange(60))
  shape = draws['shape'].numpy()
  shape[:, 2:4] = 0.5
  draws['shape'] = tf.constant(shape)
  mask = synthesis.region_mask(draws, options).numpy()[..., 0]
  for index in range(60):
    points = np.argwhere(mask[index]) / 128
    small, large = np.sqrt(np.linalg.eigvalsh(np.cov(points.T)))
    aspect = 3.0 ** abs(2 * shape[index, 1] - 1)
    assert abs(large / small / aspect - 1) < 0.06
    # sigma^2 is a^2 / 4 along an ellipse's half axis a, a^2 / 3 along that of
    # a rectangle; the area is pi a b, or 4 a b.
    is_ellipse = shape[index, 5] < 0.5
    area = small * large * (4 * np.pi if is_ellipse else 12)
    assert abs(area / 0.05 - 1) < 0.06


def test_regions_anywhere_stay_within_the_largest_area():
  options = _options(image_size=64, region_area_min=0.05, region_area_max=0.4)
  mask = synthesis.region_mask(_draws(np.arange(300)), options).numpy()
  areas = mask.mean(axis=(1, 2, 3))
  assert areas.min() > 0 and areas.max() < 0.42
  rows, columns = np.argwhere(mask.any(axis=(0, 3))).T
  assert {0, 63} <= set(rows) and {0, 63} <= set(columns)


@pytest.mark.parametrize('share', [0.0, 0.5, 1.0])
def test_share_of_regions(share):
  """Where a region is drawn the mask is its mask, else the blobs'."""
  count = 200
  options = _options(region_share=share, opacity_max=0.0)
  normal = np.zeros((count, SIZE, SIZE, 3), np.float32)
  _, mask = _pairs(normal, np.full((1, SIZE, SIZE, 3), 255, np.uint8), options)
  draws = _draws(np.arange(count))
  region = synthesis.region_mask(draws, options).numpy()
  blobs = synthesis.perlin_mask(draws, options).numpy()
  is_region = np.array([np.array_equal(a, b) for a, b in zip(mask, region)])
  is_blobs = np.array([np.array_equal(a, b) for a, b in zip(mask, blobs)])
  assert (is_region ^ is_blobs).all()
  assert abs(is_region.mean() - share) <= 3 * math.sqrt(
    share * (1 - share) / count
  )


# Pairs.


@pytest.mark.parametrize('min_contrast', [0.0, 0.02, 0.2])
def test_the_mask_is_one_exactly_where_the_image_differs(min_contrast):
  options = _defaults(min_contrast=min_contrast)
  # Textures of few grey levels coincide with the image here and there.
  normal = np.float32(_random_bytes(64) // 64 * 64) / np.float32(255)
  image, mask = _pairs(normal, _random_bytes(5, seed=2) // 64 * 64, options)
  assert image.dtype == mask.dtype == np.float32
  assert mask.shape == (64, SIZE, SIZE, 1)
  assert set(np.unique(mask)) == {0.0, 1.0}
  change = np.abs(image - normal).max(axis=-1)
  np.testing.assert_array_equal(mask[..., 0], change > 0)
  assert change[mask[..., 0] == 1].min() >= min_contrast - 1e-6


def test_opacity_is_uniform_up_to_its_maximum():
  """On black, under white, an anomaly's grey level is 1 - b."""
  normal = np.zeros((400, SIZE, SIZE, 3), np.float32)
  white = np.full((1, SIZE, SIZE, 3), 255, np.uint8)
  image, mask = _pairs(normal, white, _options(opacity_max=0.8))
  opacities = []
  for picture, where in zip(image, mask[..., 0] == 1):
    if where.any():
      levels = np.unique(picture[where])
      assert len(levels) == 1
      opacities.append(1 - levels[0])
  opacities = np.array(opacities)
  assert opacities.min() >= 0 and opacities.max() <= 0.8
  assert stats.kstest(opacities, 'uniform', (0, 0.8)).pvalue > 1e-3


def test_without_opacity_the_filling_is_a_texture_and_every_one_is_used():
  textures = _random_bytes(6, seed=3)
  normal = _normals(120)
  options = _options(opacity_max=0.0, region_share=1.0)
  image, mask = _pairs(normal, textures, options)
  used = []
  for picture, where in zip(image, mask[..., 0] == 1):
    fits = [
      i
      for i in range(6)
      if np.allclose(picture[where], textures[i][where] / 255, atol=1e-6)
    ]
    assert len(fits) == 1
    used += fits
  assert np.bincount(used, minlength=6).min() >= 8


def test_a_filling_from_the_image_itself_is_the_image_moved_far_enough():
  normal = _normals(6)
  options = _options(opacity_max=0.0, region_share=1.0, self_share=1.0)
  image, mask = _pairs(normal, _random_bytes(1, seed=3), options)
  found = set()
  for picture, origin, where in zip(image, normal, mask[..., 0] == 1):
    shifts = [
      (dy, dx)
      for dy in range(SIZE)
      for dx in range(SIZE)
      if np.allclose(
        np.roll(origin, (-dy, -dx), (0, 1))[where], picture[where], atol=1e-6
      )
    ]
    assert len(shifts) == 1
    for shift in shifts[0]:
      assert SIZE // 64 <= min(shift, SIZE - shift) <= SIZE // 2
    found.add(shifts[0])
  assert len(found) > 4


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_share_of_clean_pairs(share):
  count = 400
  normal = _normals(count)
  options = _options(clean_share=share, region_share=1.0)
  image, mask = _pairs(normal, _random_bytes(4, seed=3), options)
  clean = ~mask.any(axis=(1, 2, 3))
  np.testing.assert_array_equal(image[clean], normal[clean])
  assert abs(clean.mean() - share) <= 3 * math.sqrt(share * (1 - share) / count)


def test_values_stay_in_range():
  options = _defaults(rotate_90=True, rotate_degrees=45.0)
  draws = _draws(np.arange(64))
  extreme = np.float32(_random_bytes(64) >= 128)  # 0 and 1 alone.
  turned = synthesis.augment(tf.constant(extreme), draws, options)
  textures = tf.constant((_random_bytes(4, seed=9) >= 128) * np.uint8(255))
  image, _ = synthesis.synthesize(turned, textures, draws, options)
  for values in (turned.numpy(), image.numpy()):
    assert np.isfinite(values).all()
    assert values.min() >= 0.0 and values.max() <= 1.0


# Turning the input.


def test_without_turns_the_input_is_untouched():
  normal = _normals(4)
  found = synthesis.augment(
    tf.constant(normal), _draws(np.arange(4)), _options()
  )
  np.testing.assert_array_equal(found, normal)


@pytest.mark.parametrize('size', [32, 96])
def test_a_quarter_turn_keeps_the_pixels_exactly(size):
  normal = _normals(24, size)
  options = _options(image_size=size, rotate_90=True)
  draws = _draws(np.arange(24))
  found = synthesis.augment(tf.constant(normal), draws, options).numpy()
  turns = []
  for picture, origin in zip(found, normal):
    equal = [np.array_equal(picture, np.rot90(origin, k)) for k in range(4)]
    assert sum(equal) == 1
    turns += [equal.index(True)]
  assert set(turns) == {0, 1, 2, 3}


@pytest.mark.parametrize('rotate_90', [False, True])
def test_a_small_turn_is_a_rotation_about_the_centre(rotate_90):
  smooth = ndimage.gaussian_filter(_normals(16, 64), (0, 3, 3, 0))
  options = _options(image_size=64, rotate_degrees=10.0, rotate_90=rotate_90)
  draws = _draws(np.arange(16))
  found = synthesis.augment(tf.constant(smooth), draws, options).numpy()
  for index, (first, second) in enumerate(draws['turn'].numpy()):
    degrees = 10.0 * (2 * first - 1) + 90 * int(4 * second) * rotate_90
    expected = ndimage.rotate(
      smooth[index], degrees, reshape=False, order=1, mode='mirror'
    )
    inner = np.s_[8:-8, 8:-8]
    np.testing.assert_allclose(found[index][inner], expected[inner], atol=1e-4)
  # Nothing black comes in at the border: it is mirrored.
  assert found.min() >= smooth.min() - 1e-6
