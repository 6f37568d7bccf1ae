"""The training state: what changes, what is frozen, and the optimisers.

Synopsis:

  optimizers = train_state.make_optimizers(config)
  state = train_state.create(config, model, teacher_variables, rng)
  variables = train_state.variables(state)  # for model.apply
"""

from collections.abc import Mapping
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from dmdd_jax.data import tiles
from dmdd_jax.models import dmdd
from dmdd_jax.training import muon


@struct.dataclass
class TrainState:
  """Everything that a checkpoint holds of a training.

  Attributes:
    step: steps taken, int32 scalar; of a frozen state negative, see `freeze`.
    params: trained parameters under 'student' and 'head'.
    batch_stats: their batch-norm statistics, and 'position', see
      `dmdd.PositionBias`.
    opt_state: one optimiser state per part.
    teacher: the frozen teacher's 'params' and 'batch_stats'.
  """

  step: jax.Array
  params: Mapping[str, Any]
  batch_stats: Mapping[str, Any]
  opt_state: Mapping[str, Any]
  teacher: Mapping[str, Any]


def freeze(state: TrainState) -> TrainState:
  """Marks a state as broken at its step; one that is marked stays as it is.

  The mark is a negative `step`, so that it takes no field of its own in a
  checkpoint. Under jit too.
  """
  return state.replace(step=jnp.minimum(state.step, -1 - state.step))


def frozen_at(state: TrainState) -> jax.Array:
  """The step at which `freeze` marked a state, int32; negative if unmarked."""
  return -1 - state.step


def make_optimizer(
  options: ml_collections.ConfigDict,
  steps: int,
  mesh: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformation:
  """Builds the optimiser of one part.

  Args:
    options: `config.train.student` or `config.train.head`.
    steps: updates the part will see; its schedule ends there.
    mesh: the devices that share Muon's work; None repeats it on each.
  """
  rate = _schedule(options, options.learning_rate, steps)
  if options.kind == 'muon':
    update = muon.muon(
      _schedule(options, options.muon_learning_rate, steps),
      optax.adamw(
        rate, b1=options.b1, b2=options.b2, weight_decay=0.0, nesterov=True
      ),
      options.weight_decay,
      mesh,
    )
  elif options.kind == 'sgd':
    update = optax.sgd(rate, momentum=options.b1)
    if options.weight_decay:
      decay = optax.add_decayed_weights(options.weight_decay)
      update = optax.chain(decay, update)
  else:
    update = optax.adamw(
      rate, b1=options.b1, b2=options.b2, weight_decay=options.weight_decay
    )
  if options.clip_norm > 0.0:
    clip = optax.clip_by_global_norm(options.clip_norm)
    update = optax.chain(clip, update)
  return update


def _schedule(
  options: ml_collections.ConfigDict, peak: float, steps: int
) -> optax.Schedule:
  """Linear warm-up to `peak`, then the schedule `options.schedule`."""
  steps = max(steps, 1)
  warmup = int(options.warmup_fraction * steps)
  if options.schedule == 'cosine':
    main = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
  else:
    main = optax.constant_schedule(peak)
  ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup, 1))
  return optax.join_schedules([ramp, main], [warmup])


def make_optimizers(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None
) -> dict[str, optax.GradientTransformation]:
  """The optimisers of the student and, unless it is 'none', of the head.

  Args:
    config: of both.
    mesh: see `make_optimizer`.
  """
  train = config.train
  student_steps = train.distill_steps
  head_steps = train.total_steps - train.distill_steps
  if config.head.kind == 'none':
    student_steps = train.total_steps
  elif train.joint:
    student_steps = head_steps = train.total_steps
  optimizers = {'student': make_optimizer(train.student, student_steps, mesh)}
  if config.head.kind != 'none':
    optimizers['head'] = make_optimizer(train.head, head_steps, mesh)
  return optimizers


def create(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  rng: jax.Array,
  teacher: Mapping[str, Any] | None = None,
) -> TrainState:
  """Initialises student and head; the teacher is taken as it is.

  Args:
    config: of the model and its optimisers.
    model: from the same config.
    rng: a key.
    teacher: 'params' and 'batch_stats' of the teacher; None leaves it at its
      random initialisation (for shapes, and for tests).
  """
  initial = dmdd.init(model, rng, tiles.input_side(config.data))
  optimizers = make_optimizers(config)
  if teacher is None:
    teacher = {key: initial[key]['teacher'] for key in initial}
  params = {part: initial['params'][part] for part in optimizers}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats={
      part: initial['batch_stats'][part]
      for part in (*optimizers, 'position')
      if part in initial['batch_stats']
    },
    opt_state={p: optimizers[p].init(params[p]) for p in optimizers},
    teacher=jax.tree.map(jnp.asarray, dict(teacher)),
  )


def variables(state: TrainState) -> dict[str, Any]:
  """The variables that `DMDD.apply` takes."""
  return {
    'params': {**state.params, 'teacher': state.teacher['params']},
    'batch_stats': {
      **state.batch_stats,
      'teacher': state.teacher['batch_stats'],
    },
  }
