"""Batches over devices: what does not divide, and eight against one."""

import types

import program_helpers
import pytest

from dmdd_jax import sharding


def fake_mesh(size):
  return types.SimpleNamespace(size=size)


@pytest.mark.parametrize('batch_size', [12, 4, 0, -8])
def test_a_batch_that_does_not_divide_is_refused(batch_size):
  with pytest.raises(
    ValueError,
    match=rf'config\.train\.batch_size = {batch_size} .*8 devices.*of 8',
  ):
    sharding.check_batch_size(fake_mesh(8), batch_size, 'train.batch_size')


def test_a_batch_that_divides_is_accepted():
  for size, batch_size in ((1, 1), (1, 7), (8, 8), (8, 24)):
    sharding.check_batch_size(fake_mesh(size), batch_size, 'train.batch_size')


# Trains on one device and on eight of the host, and says how far apart they
# end. The margin and normal-only losses are sums over sums, which a mean of
# the devices' own quotients would not equal; neither would their statistics.
EIGHT_DEVICES = """
import json
import jax
import numpy as np
import model_helpers
from dmdd_jax import sharding
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import steps, train_state
from dmdd_jax.models import dmdd, resnet

resnet.SPECS['resnet18'] = resnet.Spec((1, 1, 1, 1), bottleneck=False)
config = model_helpers.tiny_config(
  train__joint=True, loss__ngm_normal_only=True, loss__aim='margin',
  train__student__learning_rate=1e-3, train__head__learning_rate=1e-3,
)
for part in (config.train.student, config.train.head):
  part.kind = 'sgd'
model = dmdd.from_config(config)
batch = model_helpers.make_batch(batch=8)
images = (batch['image'] * 255).astype(np.uint8)

def train(devices):
  mesh = sharding.make_mesh(devices)
  state = sharding.replicate(mesh, model_helpers.make_state(config, model))
  step = steps.make_train_steps(config, model, mesh)['joint']
  rows = sharding.to_global(mesh, batch)
  metrics = []
  for _ in range(5):
    state, found = step(state, rows)
    metrics.append(jax.device_get(found))
  predict = score_lib.make_predict_step(config, model, mesh)
  prediction = predict(
    train_state.variables(state), score_lib.Fusion(maps_weight=1.0),
    sharding.to_global(mesh, {'image': images})['image'],
  )
  return metrics, state, prediction, rows

one, eight = train(jax.devices()[:1]), train(jax.devices())

def gap(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(
    float(np.linalg.norm(np.subtract(x, y)) / np.linalg.norm(x))
    for x, y in pairs
  )

def same(a, b):
  return all(model_helpers.leaves_equal(jax.device_get(a), b))

start = model_helpers.make_state(config, model)
states = (start, one[1], eight[1])
bias = [jax.device_get(s.batch_stats.pop('position')) for s in states]
try:
  sharding.check_batch_size(sharding.make_mesh(), 12, 'train.batch_size')
except ValueError as error:
  refused = str(error)
print(json.dumps({
  'devices': len(jax.devices()),
  'rows': [s.data.shape[0] for s in eight[3]['image'].addressable_shards],
  'metrics': gap(one[0], eight[0]),
  'params': gap(one[1].params, eight[1].params),
  'batch_stats': gap(one[1].batch_stats, eight[1].batch_stats),
  'prediction': gap(one[2], eight[2]),
  'terms': sorted(one[0][0]),
  'sums': [
    float(m['loss'] - m['ngm'] - m['aim'] - m['segmentation']) for m in one[0]
  ],
  'moved': gap(start.params, eight[1].params),
  'teacher_kept': same(eight[1].teacher, start.teacher),
  'unmoved': sum(
    sum(model_helpers.leaves_equal(
      jax.device_get(getattr(eight[1], name)), getattr(start, name)
    ))
    for name in ('params', 'batch_stats', 'opt_state')
  ),
  'bias_kept': same(bias[0], bias[1]) and same(bias[0], bias[2]),
  'refused': refused,
}))
"""


@pytest.fixture(scope='module')
def found():
  """What the joint training on one and on eight devices says of itself."""
  return program_helpers.run_on_eight_devices(EIGHT_DEVICES)


def test_eight_devices_train_as_one_does(found):
  assert found['devices'] == 8 and found['rows'] == [1] * 8
  for name in ('metrics', 'params', 'batch_stats', 'prediction'):
    assert found[name] < 1e-5, found
  # The five steps went somewhere.
  assert found['moved'] > 1e-3, found


def test_eight_devices_refuse_a_batch_of_twelve(found):
  assert '12' in found['refused'] and '8 devices' in found['refused']


def test_joint_training_changes_student_and_head_and_no_teacher(found):
  assert found['teacher_kept'] and found['unmoved'] == 0
  assert found['bias_kept']
  assert found['terms'] == [
    'aim',
    'gradient_norm',
    'loss',
    'ngm',
    'segmentation',
  ]
  assert max(map(abs, found['sums'])) < 1e-5
