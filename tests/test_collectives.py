"""What devices send each other, read from programs compiled for eight of them.

Rows stay where they are: a step only adds up sums over the devices. So are the
kernels that Muon iterates on one device each: the others add zeros.
"""

import program_helpers
import pytest

EIGHT_DEVICES = """
import json
import jax
import model_helpers
import numpy as np
import optax
from dmdd_jax import plan, sharding
from dmdd_jax.models import dmdd, resnet
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import muon, steps, train_state

resnet.SPECS['resnet18'] = resnet.Spec((1, 1, 1, 1), False, channels=4)
mesh, found = sharding.make_mesh(), {}

def lowered(phase, **changes):
  config = model_helpers.tiny_config(train__batch_size=16, **changes)
  model = dmdd.from_config(config)
  state = jax.eval_shape(
    lambda: train_state.create(config, model, jax.random.key(0))
  )
  batch = {
    name: jax.ShapeDtypeStruct((16, 32, 32, channels), np.float32)
    for name, channels in (('image', 3), ('normal', 3), ('mask', 1))
  }
  if phase != 'predict':
    return steps.make_train_steps(config, model, mesh)[phase].lower(
      state, batch
    )
  predict = score_lib.make_predict_step(config, model, mesh)
  return predict.lower(
    train_state.variables(state), score_lib.Fusion(), batch['image']
  )

for name, phase, changes in (
  ('distill', 'distill', {'train__student__kind': 'muon'}),
  ('segment', 'segment', {}),
  ('parts', 'joint', {'train__microbatch': 8, 'loss__on_normal': True}),
  ('predict', 'predict', {}),
):
  text = lowered(phase, **changes).compile().as_text()
  found[name] = plan.collectives(text)

config = model_helpers.tiny_config()
model = dmdd.from_config(config)
variables = train_state.variables(model_helpers.make_state(config, model))
images = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)
caches = [
  steps.TeacherCache(
    model, mesh, sharding.replicate(mesh, variables), images, batch_size=8
  )
  for mesh in (sharding.make_mesh(jax.devices()[:1]), mesh)
]
rows = sharding.to_global(mesh, {'rows': np.arange(8, dtype=np.int32)})['rows']
text = caches[1]._look_up.lower(caches[1].taps, rows).compile().as_text()
found['look up'] = plan.collectives(text)
found['cache'] = max(
  float(np.max(np.abs(np.subtract(one, eight))) / np.max(np.abs(one)))
  for one, eight in zip(caches[0].taps, caches[1].taps)
)

# Muon alone: the same gradients, iterated by one device and by eight.
rng = np.random.default_rng(0)
shapes = [(3, 3, 8, 16)] * 3 + [(3, 3, 16, 32), (1, 1, 8, 32), (1, 1, 64, 16)]
shapes += [(3, 3, 32, 32), (7, 7, 3, 8), (3, 3, 4, 4), (1, 1, 5, 7), (16,)]
params = {str(i): np.float32(rng.normal(size=s)) for i, s in enumerate(shapes)}
grads = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), params)
everywhere, results = sharding.replicated(mesh), []
for shared in (None, mesh):
  optimizer = muon.muon(0.02, optax.adamw(5e-3), 0.1, shared)
  update = jax.jit(
    optimizer.update, in_shardings=everywhere, out_shardings=everywhere
  )
  state = optimizer.init(params)
  for _ in range(3):
    updates, state = update(grads, state, params)
  results.append((updates, state))
found['muon'] = max(
  float(np.linalg.norm(np.subtract(x, y)) / max(np.linalg.norm(x), 1e-30))
  for x, y in zip(*map(jax.tree.leaves, results), strict=True)
)
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def compiled():
  """{program: {kind: (count, bytes)}}, and how far results are apart."""
  # Nothing large runs, so there is nothing to gain from optimised code.
  return program_helpers.run_on_eight_devices(
    EIGHT_DEVICES, '--xla_backend_optimization_level=0'
  )


# Of the tiny student: nine batch norms in its encoder, six where it decouples.
STUDENT_NORMS = 15
# Sums of `loss.focus` over three levels of two branches.
FOCUS_SUMS = 6


# Batch norm's sums, forward and back, those of the loss, and one more of the
# gradients. XLA puts together the sums that do not wait for each other.
STUDENT_SUMS = 2 * STUDENT_NORMS + FOCUS_SUMS + 1


@pytest.mark.parametrize(
  'name, most',
  [
    ('distill', STUDENT_SUMS + 1),  # And Muon's kernels.
    ('segment', 8),
    ('parts', STUDENT_SUMS + 8),
  ],
)
def test_a_step_adds_up_and_sends_nothing_else(compiled, name, most):
  assert set(compiled[name]) == {'all-reduce'}
  assert compiled[name]['all-reduce'][0] <= most


@pytest.mark.parametrize('name', ['predict', 'look up'])
def test_prediction_and_the_teachers_cache_send_nothing(compiled, name):
  assert compiled[name] == {}


def test_the_teachers_cache_is_that_of_one_device(compiled):
  assert compiled['cache'] < 1e-6


def test_muon_over_eight_devices_is_muon_on_each(compiled):
  assert compiled['muon'] < 1e-6
