"""Training and prediction steps: who changes, who must not, and by how much.

Losses and predictions are checked on a fake model whose right answer numpy
computes; the real one is compiled once per phase for the whole module.
"""

import functools
import types

import jax
import jax.numpy as jnp
import model_helpers
import numpy as np
import optax
import pytest
from scipy import ndimage

from dmdd_jax import sharding
from dmdd_jax.models import dmdd
from dmdd_jax.models import resnet
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import losses
from dmdd_jax.training import steps
from dmdd_jax.training import train_state


def numpy_distance(a, b):
  """1 - cos per position in float64."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return 1.0 - np.sum(a * b, axis=-1) / norms


# --- phases ------------------------------------------------------------------


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({}, 'distill distill segment segment'),
    ({'train__joint': True}, 'joint joint joint joint'),
    ({'head__kind': 'none'}, 'distill distill distill distill'),
    (
      {'head__kind': 'none', 'train__joint': True},
      'distill distill distill distill',
    ),
    ({'train__distill_steps': 0}, 'segment segment segment segment'),
    ({'train__distill_steps': 40}, 'distill distill distill distill'),
  ],
)
def test_phase(changes, expected):
  config = model_helpers.tiny_config(**changes)
  found = [steps.phase(config, step) for step in (0, 19, 20, 39)]
  assert ' '.join(found) == expected


# --- the distillation loss, on hand-made features ----------------------------


@pytest.fixture(scope='module')
def features():
  """Features of two levels and the mask of 8 x 8 images, drawn at random."""
  rng = np.random.default_rng(0)

  def draw():
    shapes = ((2, 4, 4, 3), (2, 2, 2, 5))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]

  mask = np.zeros((2, 8, 8, 1), np.float32)
  mask[0, 2:5, 1:4] = 1.0
  return types.SimpleNamespace(
    normality=draw(), abnormality=draw(), image=draw(), normal=draw(), mask=mask
  )


def cell_means(mask, side):
  """(B, 8, 8, 1) -> (B, side, side) area averages."""
  cells = mask.reshape(len(mask), side, 8 // side, side, 8 // side)
  return cells.mean(axis=(2, 4))


def distillation(features, **options):
  config = model_helpers.tiny_config(
    **{f'loss__{name}': value for name, value in options.items()}
  )
  loss, terms = steps.distillation_loss(
    config,
    features.normality,
    features.abnormality,
    features.image,
    features.normal,
    jnp.asarray(features.mask),
  )
  return float(loss), {name: float(value) for name, value in terms.items()}


def focused(distance, focus, weight=1.0):
  """The mean in which each counts by its own value to the power `focus`."""
  weight = weight * distance**focus
  return np.sum(distance * weight) / np.sum(weight)


@pytest.mark.parametrize('focus', [0.0, 1.0, 2.0])
def test_ngm_fits_the_normal_image_and_aim_leaves_the_anomalous_one(
  features, focus
):
  ngm = sum(
    focused(numpy_distance(n, t), focus)
    for n, t in zip(features.normality, features.normal)
  )
  masks = [cell_means(features.mask, side) for side in (4, 2)]

  def aim(target):
    return sum(
      focused(np.abs(numpy_distance(a, t) - m), focus)
      for a, t, m in zip(features.abnormality, target, masks)
    )

  loss, terms = distillation(features, focus=focus)
  np.testing.assert_allclose(terms['ngm'], ngm, rtol=1e-5)
  np.testing.assert_allclose(terms['aim'], aim(features.image), rtol=1e-5)
  np.testing.assert_allclose(loss, ngm + aim(features.image), rtol=1e-5)
  _, terms = distillation(features, focus=focus, aim_target='normal')
  np.testing.assert_allclose(terms['aim'], aim(features.normal), rtol=1e-5)


def test_distillation_weights_and_switches(features):
  _, terms = distillation(features)
  loss, weighted = distillation(features, ngm_weight=2.0, aim_weight=0.25)
  assert weighted == terms
  np.testing.assert_allclose(
    loss, 2.0 * terms['ngm'] + 0.25 * terms['aim'], rtol=1e-6
  )
  assert distillation(features, aim_weight=0.0)[1] == {'ngm': terms['ngm']}
  assert distillation(features, ngm_weight=0.0)[1] == {'aim': terms['aim']}


@pytest.mark.parametrize('focus', [0.0, 1.0])
def test_ngm_normal_only_uses_the_masks_of_its_levels(features, focus):
  expected = 0.0
  for side, n, t in zip((4, 2), features.normality, features.normal):
    weight = 1.0 - cell_means(features.mask, side)
    expected += focused(numpy_distance(n, t), focus, weight)
  _, terms = distillation(features, focus=focus, ngm_normal_only=True)
  np.testing.assert_allclose(terms['ngm'], expected, rtol=1e-5)


def test_aim_options_reach_the_loss(features):
  expected = 0.0
  for side, a, t in zip((4, 2), features.abnormality, features.image):
    mask = cell_means(features.mask, side)
    hinge = mask * np.maximum(0.0, 1.5 - numpy_distance(a, t))
    expected += np.sum(hinge) / max(np.sum(mask), 1.0)
  _, terms = distillation(features, aim='margin', aim_margin=1.5)
  np.testing.assert_allclose(terms['aim'], expected, rtol=1e-5)


def test_unknown_loss_options_are_refused(features):
  with pytest.raises(ValueError, match='match_mask'):
    distillation(features, aim='push')
  with pytest.raises(ValueError, match='flat'):
    distillation(features, ngm_flat=True, ngm_normal_only=True)


def block_means(images):
  """(B, 8, 8, 3) -> (B, 2, 2, 3)."""
  return images.reshape(-1, 2, 4, 2, 4, 3).mean(axis=(2, 4))


class FakeModel:
  """Taps are block means; N turns their channels round, A by one place.

  The head's logit tells the three apart: 1 N_0 + 2 A_0 + 4 T_0. Each trained
  part has one weight; the student's changes no cosine.
  """

  def apply(self, variables, *inputs, method, mutable=None):
    if method == 'teach':
      return (block_means(inputs[0]),)
    # Statistics are updated where a part is trained, and only there.
    assert (inputs[-1] is True) == (mutable == ['batch_stats'])
    return getattr(self, method)(variables, mutable, *inputs)

  def study(self, variables, mutable, images, taps, train=False):
    blocks = block_means(images) * variables['params']['student']['weight']
    features = ((blocks[..., ::-1],), (jnp.roll(blocks, 1, axis=-1),))
    if not mutable:
      return features
    found = {'rows': jnp.float32(len(blocks)), 'gap': mean_gap(taps[0], blocks)}
    return features, {'batch_stats': {'student': found, 'head': None}}

  def segment(self, variables, mutable, normality, abnormality, taps, train):
    weighed = normality[0] + 2.0 * abnormality[0] + 4.0 * taps[0]
    logit = variables['params']['head']['weight'] * weighed[..., 0]
    found = {'rows': jnp.float32(len(logit))}
    output = dmdd.Output(None, None, None, logit)
    return output, {'batch_stats': {'student': None, 'head': found}}


def mean_gap(a, b):
  """The student must be shown the taps of its own images: 0."""
  return jnp.mean(jnp.abs(a - b))


def fake_step(parts, batch, microbatch=0, **options):
  """One step of the fake model: the new state and the metrics."""
  config = model_helpers.tiny_config(
    train__microbatch=microbatch,
    loss__focus=0.0,
    **{f'loss__{name}': value for name, value in options.items()},
  )
  zero = jnp.float32(0.0)
  optimizers = {part: optax.sgd(0.5) for part in ('student', 'head')}
  params = {part: {'weight': jnp.float32(1.0)} for part in optimizers}
  state = train_state.TrainState(
    step=jnp.int32(0),
    params=params,
    batch_stats={
      'student': {'rows': zero, 'gap': zero},
      'head': {'rows': zero},
    },
    opt_state={
      part: optimizers[part].init(params[part]) for part in optimizers
    },
    teacher={'params': {}, 'batch_stats': {}},
  )

  @jax.jit
  def step(state, batch):
    return steps.train_step(
      config, FakeModel(), optimizers, parts, state, batch
    )

  return step(state, batch)


@pytest.mark.parametrize('on_normal', [False, True])
@pytest.mark.parametrize('aim_target', ['image', 'normal'])
def test_who_is_compared_with_whom(on_normal, aim_target):
  """x_a's features with the teacher's of x_n, and x_n's with x_n's own."""
  batch = model_helpers.make_batch(size=8, batch=3)
  state, metrics = fake_step(
    ('student',), batch, on_normal=on_normal, aim_target=aim_target
  )
  teacher = {name: block_means(batch[name]) for name in ('image', 'normal')}
  mask = {'image': cell_means(batch['mask'], 2), 'normal': np.zeros((3, 2, 2))}
  ngm, aim = [], []
  for name in ('image', 'normal') if on_normal else ('image',):
    normality = teacher[name][..., ::-1]
    abnormality = np.roll(teacher[name], 1, axis=-1)
    target = teacher[name if aim_target == 'image' else 'normal']
    ngm.append(np.mean(numpy_distance(normality, teacher['normal'])))
    distance = numpy_distance(abnormality, target)
    aim.append(np.mean(np.abs(distance - mask[name])))
  np.testing.assert_allclose(metrics['ngm'], np.mean(ngm), rtol=1e-4)
  np.testing.assert_allclose(metrics['aim'], np.mean(aim), rtol=1e-4)
  assert state.batch_stats['student']['rows'] == 3 * (1 + on_normal)
  np.testing.assert_allclose(state.batch_stats['student']['gap'], 0, atol=1e-6)


@pytest.mark.parametrize(
  'parts, on_normal',
  [
    (('head',), False),
    (('student', 'head'), False),
    (('student', 'head'), True),
  ],
)
def test_the_head_is_trained_on_the_anomalous_image(parts, on_normal):
  batch = model_helpers.make_batch(size=8, batch=3)
  state, metrics = fake_step(parts, batch, on_normal=on_normal)
  blocks = block_means(batch['image'])
  logit = blocks[..., 2] + 2.0 * blocks[..., 2] + 4.0 * blocks[..., 0]
  target = cell_means(batch['mask'], 2)
  expected, gradient = jax.value_and_grad(
    lambda weight: losses.segmentation(weight * logit, target)
  )(1.0)
  np.testing.assert_allclose(metrics['segmentation'], expected, rtol=1e-5)
  np.testing.assert_allclose(
    state.params['head']['weight'], 1.0 - 0.5 * gradient, rtol=1e-5
  )
  assert state.batch_stats['head']['rows'] == 3
  if parts == ('head',):
    assert state.params['student']['weight'] == 1.0
    assert metrics['loss'] == metrics['segmentation']


def test_parts_make_the_update_of_the_whole_batch():
  """Rows that differ, in three parts; the statistics are the last part's."""
  batch = model_helpers.make_batch(size=8, batch=6)
  whole, expected = fake_step(('student', 'head'), batch)
  state, metrics = fake_step(('student', 'head'), batch, microbatch=2)
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
  found, weight = (s.params['head']['weight'] for s in (state, whole))
  assert abs(weight - 1.0) > 1e-4
  np.testing.assert_allclose(found - 1.0, weight - 1.0, rtol=1e-5)
  for part in ('student', 'head'):
    assert whole.batch_stats[part]['rows'] == 6
    assert state.batch_stats[part]['rows'] == 2
  np.testing.assert_allclose(state.batch_stats['student']['gap'], 0, atol=1e-6)
  assert state.step == 1


@pytest.mark.parametrize('microbatch', [0, 2])
def test_a_loss_that_is_not_finite_freezes_the_state(microbatch):
  batch = model_helpers.make_batch(size=8, batch=4)
  batch['image'][1, 2, 3] = np.nan
  state, metrics = fake_step(('student', 'head'), batch, microbatch)
  assert np.isnan(metrics['loss'])
  assert train_state.frozen_at(state) == 0
  assert state.params['head']['weight'] == 1.0
  assert state.batch_stats['head']['rows'] == 0


# --- the real model ----------------------------------------------------------


class Programme:
  """One configuration's jitted steps, and states on the device."""

  def __init__(self):
    self.config = model_helpers.tiny_config(
      teacher__arch='resnet10',
      train__student__learning_rate=2e-3,
      train__head__learning_rate=1e-2,
      train__student__warmup_fraction=0.0,
      train__head__warmup_fraction=0.0,
    )
    self.mesh = sharding.make_mesh(jax.devices()[:1])
    self.model = dmdd.from_config(self.config)
    self.steps = steps.make_train_steps(self.config, self.model, self.mesh)
    self.host_state = model_helpers.make_state(self.config, self.model)
    self.batch = model_helpers.make_batch()

  def fresh_state(self):
    copied = jax.tree.map(np.copy, self.host_state)
    return sharding.replicate(self.mesh, copied)

  def run(self, phase, count, batch=None):
    """The state after so many steps on one batch, and all metrics."""
    state, found = self.fresh_state(), []
    batch = sharding.to_global(self.mesh, batch or self.batch)
    for _ in range(count):
      state, metrics = self.steps[phase](state, batch)
      found.append(jax.device_get(metrics))
    return jax.device_get(state), found


@pytest.fixture(scope='module')
def programme():
  """With one block per stage: half of what there is to compile."""
  small = resnet.Spec((1, 1, 1, 1), bottleneck=False)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(resnet.SPECS, 'resnet10', small)
    yield Programme()


@pytest.fixture(scope='module')
def distilled(programme):
  return programme.run('distill', 10)


@pytest.fixture(scope='module')
def segmented(programme):
  return programme.run('segment', 10)


def check_only(programme, state, trained):
  """Every leaf of the trained parts changed, no bit of the others did."""
  before = programme.host_state
  assert all(model_helpers.leaves_equal(state.teacher, before.teacher))
  for part in ('student', 'head'):
    for name in ('params', 'batch_stats', 'opt_state'):
      same = model_helpers.leaves_equal(
        getattr(state, name)[part], getattr(before, name)[part]
      )
      if part in trained:
        assert not any(same), (part, name)
      else:
        assert all(same), (part, name)


def test_distilling_changes_the_student_alone(programme, distilled):
  state, metrics = distilled
  check_only(programme, state, {'student'})
  assert state.step == 10 and state.step.dtype == np.int32
  assert set(metrics[0]) == {'loss', 'ngm', 'aim', 'gradient_norm'}
  for found in metrics:
    np.testing.assert_allclose(
      found['loss'], found['ngm'] + found['aim'], rtol=1e-6
    )


def test_segmenting_changes_the_head_alone(programme, segmented):
  state, metrics = segmented
  check_only(programme, state, {'head'})
  assert state.step == 10
  assert set(metrics[0]) == {'loss', 'segmentation', 'gradient_norm'}


def test_loss_decreases_on_one_batch(distilled, segmented):
  for _, metrics in (distilled, segmented):
    values = [found['loss'] for found in metrics]
    assert np.all(np.isfinite(values))
    assert values[-1] < 0.8 * values[0], values
    assert all(found['gradient_norm'] > 0.0 for found in metrics)


def test_the_same_seed_gives_the_same_bits(programme, distilled):
  again, metrics = programme.run('distill', 10)
  assert all(model_helpers.leaves_equal(again, distilled[0]))
  assert all(model_helpers.leaves_equal(metrics, distilled[1]))


def test_the_state_is_donated(programme):
  state = programme.fresh_state()
  batch = sharding.to_global(programme.mesh, programme.batch)
  new, _ = programme.steps['segment'](state, batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))
  # The same batch again, with the state that came back.
  programme.steps['segment'](new, batch)


def test_nothing_is_computed_for_what_is_frozen(programme):
  """By XLA's count: no gradient of the teacher, nor in the head's phase any of
  the student; a trained part costs three times its forward pass."""

  def flops(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.cost_analysis()['flops']

  model, image = programme.model, programme.batch['image']
  variables = train_state.variables(programme.host_state)
  taps = model.apply(variables, image, method='teach')
  teach = flops(lambda x: model.apply(variables, x, method='teach'), image)
  study = flops(
    lambda x, taps: model.apply(variables, x, taps, method='study'), image, taps
  )
  whole = flops(lambda x: model.apply(variables, x), image)
  state, batch = programme.fresh_state(), programme.batch
  distill, segment = (
    programme.steps[phase].lower(state, batch).compile().cost_analysis()
    for phase in ('distill', 'segment')
  )
  weights = sum(x.size for x in jax.tree.leaves(state.params['student']))
  update = 25 * weights  # Adam, and the choice of the finite state.
  assert distill['flops'] < 2.0 * teach + 3.2 * study + update
  assert segment['flops'] < teach + study + 4.0 * (whole - teach - study)


def test_the_head_does_not_look_at_the_normal_image(programme, segmented):
  batch = {**programme.batch, 'normal': programme.batch['image'][::-1]}
  state, metrics = programme.run('segment', 1, batch)
  assert metrics[0]['loss'] == segmented[1][0]['loss']
  assert all(model_helpers.leaves_equal(metrics[0], segmented[1][0]))
  assert state.step == 1


def test_student_statistics_come_from_the_anomalous_images(programme):
  """Unless `loss.on_normal`: x_n reaches the teacher alone."""
  batch = {**programme.batch, 'normal': programme.batch['normal'][::-1]}
  one, one_metrics = programme.run('distill', 1)
  other, other_metrics = programme.run('distill', 1, batch)
  assert all(model_helpers.leaves_equal(one.batch_stats, other.batch_stats))
  assert one_metrics[0]['ngm'] != other_metrics[0]['ngm']


def test_kept_teacher_features_change_nothing(programme, distilled):
  """Seven images in batches of four, of which a batch takes some."""
  images = np.random.default_rng(1).integers(0, 256, (7, 32, 32, 3), np.uint8)
  rows = np.array([5, 0, 6, 6], np.int32)
  batch = {
    **programme.batch,
    'normal': images[rows].astype(np.float32) / np.float32(255.0),
  }
  expected, expected_metrics = programme.run('distill', 3, batch)
  cache = steps.TeacherCache(
    programme.model,
    programme.mesh,
    train_state.variables(programme.fresh_state()),
    images,
    batch_size=4,
  )
  # Taps of 8, 4 and 2 pixels a side, float32.
  assert cache.nbytes == 7 * 4 * (64 * 64 + 16 * 128 + 4 * 256)
  found = sharding.to_global(programme.mesh, {'rows': rows})['rows']
  del batch['normal']
  batch['normal_taps'] = cache(found)
  state, metrics = programme.fresh_state(), []
  for _ in range(3):
    state, terms = programme.steps['distill'](state, batch)
    metrics.append(jax.device_get(terms))
  for one, other in zip(metrics, expected_metrics, strict=True):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one, other
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    jax.device_get(state.batch_stats),
    expected.batch_stats,
  )


def test_order_of_rows_does_not_matter(programme, distilled):
  batch = {name: rows[::-1] for name, rows in programme.batch.items()}
  _, metrics = programme.run('distill', 1, batch)
  for name, value in metrics[0].items():
    np.testing.assert_allclose(value, distilled[1][0][name], rtol=1e-4)


# --- fusion, scores, smoothing -----------------------------------------------


def test_fusion_by_hand():
  fusion = score_lib.Fusion(
    head_center=1.0,
    head_scale=2.0,
    maps_center=0.1,
    maps_scale=0.2,
    head_weight=3.0,
    maps_weight=0.5,
    score_head_weight=2.0,
  )
  # 3 * (5 - 1) / 2 + .5 * (.5 - .1) / .2, and 2 * ... of the score.
  assert fusion(np.array(5.0), np.array(0.5)) == pytest.approx(7.0)
  assert fusion.score_map(np.array(5.0), np.array(0.5)) == pytest.approx(5.0)
  assert score_lib.Fusion()(np.array(5.0), np.array(0.5)) == 5.0


def test_image_score_is_the_mean_of_the_highest():
  maps = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
  for top in (1, 4, 35):
    expected = np.sort(maps.reshape(3, -1), axis=1)[:, -top:].mean(axis=1)
    np.testing.assert_allclose(
      score_lib.image_score(jnp.asarray(maps), top), expected, rtol=1e-5
    )
  # Fewer pixels than asked for: the mean of all.
  np.testing.assert_allclose(
    score_lib.image_score(jnp.asarray(maps), 100),
    maps.mean(axis=(1, 2)),
    atol=1e-6,
  )


@pytest.mark.parametrize(
  'shape, sigma',
  [((2, 20, 24), 1.0), ((1, 16, 9), 0.4), ((1, 5, 30), 2.0), ((1, 8, 8), 4.0)],
)
def test_smooth_equals_scipy(shape, sigma):
  """Kernels wider than the map too."""
  maps = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  expected = [
    ndimage.gaussian_filter(
      m.astype(np.float64), sigma, mode='reflect', truncate=4.0
    )
    for m in maps
  ]
  found = score_lib.smooth(jnp.asarray(maps), sigma)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_smooth_by_nothing():
  maps = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4)))
  np.testing.assert_array_equal(score_lib.smooth(maps, 0.0), maps)


# --- prediction --------------------------------------------------------------


class FakePredictor:
  """Logit: the red channel, mean of the maps: the green one, distance: the blue
  one, at every second pixel."""

  def apply(self, variables, images):
    maps_mean, distance = images[:, ::2, ::2, 1], images[:, ::2, ::2, 2]
    logit = variables['scale'] * images[:, ::2, ::2, 0]
    return dmdd.Output(maps_mean[..., None], maps_mean, distance, logit)


def bilinear_double(maps):
  """Doubles (B, n, n) by half-pixel centres: weights 3/4 and 1/4."""
  for axis in (1, 2):
    padded = np.concatenate(
      [maps.take([0], axis), maps, maps.take([-1], axis)], axis
    )
    size = maps.shape[axis]
    before = padded.take(range(size), axis)
    after = padded.take(range(2, size + 2), axis)
    pair = [0.75 * maps + 0.25 * before, 0.75 * maps + 0.25 * after]
    shape = list(maps.shape)
    shape[axis] *= 2
    maps = np.stack(pair, axis + 1).reshape(shape)
  return maps


@pytest.mark.parametrize('sigma', [0.0, 1.5])
def test_prediction_of_a_known_model(sigma):
  config = model_helpers.tiny_config(
    eval__score_top_pixels=5, eval__smoothing_sigma=sigma
  )
  images = np.random.default_rng(0).uniform(size=(2, 12, 12, 3)).astype('f')
  fusion = score_lib.Fusion(0.5, 2.0, 0.25, 0.125, 1.0, 0.75, 0.25)
  found = score_lib.make_predict_step(
    config, FakePredictor(), sharding.make_mesh(jax.devices()[:1])
  )({'scale': 10.0}, fusion, images)

  def smoothed(maps):
    maps = bilinear_double(maps.astype(np.float64))
    return np.stack([ndimage.gaussian_filter(m, sigma) for m in maps])

  probability = smoothed(1.0 / (1.0 + np.exp(-10.0 * images[:, ::2, ::2, 0])))
  maps_mean, distance = (smoothed(images[:, ::2, ::2, i]) for i in (1, 2))
  head, maps = (probability - 0.5) / 2.0, (distance - 0.25) / 0.125

  def score(maps):
    return np.sort(maps.reshape(2, -1), axis=1)[:, -5:].mean(axis=1)

  close = {'rtol': 1e-4, 'atol': 1e-5}
  np.testing.assert_allclose(found.probability, probability, **close)
  np.testing.assert_allclose(found.maps_mean, maps_mean, **close)
  np.testing.assert_allclose(found.distance, distance, **close)
  np.testing.assert_allclose(found.map, head + 0.75 * maps, **close)
  scored = score(0.25 * head + 0.75 * maps)
  np.testing.assert_allclose(found.image_score, scored, **close)
  np.testing.assert_allclose(found.maps_mean_score, score(maps_mean), **close)
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype('float32')}


def test_predicting_bytes_equals_predicting_fractions():
  config = model_helpers.tiny_config(eval__score_top_pixels=5)
  images = np.random.default_rng(5).integers(0, 256, (2, 12, 12, 3), np.uint8)
  predict = jax.jit(
    functools.partial(
      score_lib.predict_step,
      FakePredictor(),
      config.eval,
      {'scale': 10.0},
      score_lib.Fusion(maps_weight=1.0),
    )
  )
  found = predict(images)
  expected = predict(images.astype(np.float32) / 255.0)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope='module')
def predict(programme):
  predict = score_lib.make_predict_step(
    programme.config, programme.model, programme.mesh
  )
  variables = train_state.variables(programme.fresh_state())
  fusion = score_lib.Fusion(0.1, 0.5, 0.2, 0.25, 1.0, 1.0)
  return lambda images: jax.device_get(predict(variables, fusion, images))


@pytest.fixture(scope='module')
def pictures():
  rng = np.random.default_rng(5)
  return rng.integers(0, 256, size=(4, 32, 32, 3), dtype=np.uint8)


def test_padding_does_not_change_the_other_rows(predict, pictures):
  full, padded = predict(pictures), pictures.copy()
  assert full.map.shape == (4, 32, 32) and full.image_score.shape == (4,)
  padded[2:] = 0
  found = predict(padded)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(full)):
    np.testing.assert_array_equal(a[:2], b[:2])
  assert np.any(found.image_score[2:] != full.image_score[2:])


def test_a_head_is_trained_from_its_first_step_on():
  config = model_helpers.tiny_config(train__distill_steps=3)
  found = [steps.head_is_trained(config, taken) for taken in range(6)]
  assert found == [False, False, False, False, True, True]
  joint = model_helpers.tiny_config(train__joint=True)
  assert [steps.head_is_trained(joint, n) for n in (0, 1)] == [False, True]
  assert not steps.head_is_trained(
    model_helpers.tiny_config(head__kind='none'), 30
  )
