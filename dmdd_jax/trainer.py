"""Training of one category: its data, state, step functions and checkpoints.

Synopsis:

  trainer = trainer_lib.Trainer(config, 'runs/mvtec/screw')
  try:
    trainer.run()
  finally:
    trainer.close()
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from typing import Any

from absl import logging
from clu import parameter_overview
import jax
import ml_collections
import numpy as np

from dmdd_jax import config as config_lib
from dmdd_jax import provenance
from dmdd_jax import sharding
from dmdd_jax import storage
from dmdd_jax.data import files
from dmdd_jax.data import folder as folder_lib
from dmdd_jax.data import foreground as foreground_lib
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import records as records_lib
from dmdd_jax.data import textures as textures_lib
from dmdd_jax.data import tiles
from dmdd_jax.data import unseen
from dmdd_jax.launch import preemption
from dmdd_jax.metrics import ranking
from dmdd_jax.metrics import results as results_lib
from dmdd_jax.models import dmdd
from dmdd_jax.models import pretrained
from dmdd_jax.report import overlays
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import position as position_lib
from dmdd_jax.scoring import predictor as predictor_lib
from dmdd_jax.training import checkpoint
from dmdd_jax.training import faults
from dmdd_jax.training import scalars
from dmdd_jax.training import steps
from dmdd_jax.training import train_state

# Validation images per held-out image, and the least number of them.
_VALIDATION_REPEATS, _VALIDATION_MIN = 4, 40


class NonFiniteError(FloatingPointError):
  """The loss or a gradient is not a number; the message names the step."""


@dataclasses.dataclass(frozen=True)
class TrainData:
  """The images and textures of a training; none of them is a test image.

  If images are cut into tiles, N and M count tiles of side S.

  Attributes:
    images: (N, S, S, 3) uint8, trained on.
    held_out: (K, I, I, 3) uint8, whole images, for calibration and validation,
      K >= 0.
    textures: (T, S, S, 3) uint8.
    dataset: the checked records; training reads no image of its test part.
    foreground: (N, S, S, 1) uint8, 1 where anomalies may be; None is anywhere.
    held_out_foreground: (M, S, S, 1) uint8, the same of `held_out`.
    fingerprints: of own images (layout 'folder'), see `folder.fingerprints`.
  """

  images: np.ndarray
  held_out: np.ndarray
  textures: np.ndarray
  dataset: records_lib.Dataset
  foreground: np.ndarray | None = None
  held_out_foreground: np.ndarray | None = None
  fingerprints: Sequence[str] = ()


def load_data(config: ml_collections.ConfigDict) -> TrainData:
  """Lists, checks and decodes a category's training images and textures.

  Raises:
    MissingDataError, DatasetError, BadImageError: see `data.files`.
  """
  data = config.data
  images_lib.allow_pixels(data.max_pixels)
  options = {'white_level': data.white_level}
  dataset = layouts.list_dataset(data)
  good = images_lib.validate(dataset.train, data.on_bad_image, **options)
  # Faults of test images must show now, not after an hour of training.
  if dataset.test:
    test = images_lib.validate(dataset.test, data.on_bad_image, **options)
    dataset = dataclasses.replace(dataset, test=test)
  train, held_out = records_lib.hold_out(good, data, config.seed)
  textures = textures_lib.load(
    data.textures,
    tiles.input_side(data),
    limit=data.max_textures,
    seed=config.seed,
  )
  images, _ = images_lib.load_arrays(train, data.image_size, **options)
  held, _ = images_lib.load_arrays(held_out, data.image_size, **options)
  _warn_of_repeats((*train, *held_out), (*images, *held))
  logging.info(
    '%s: %d images to train on, %d held out, %d to test',
    data.category,
    len(images),
    len(held),
    len(dataset.test),
  )
  if data.tile_size:
    logging.info('each cut into %d tiles', len(tiles.make_grid(data)))
  return TrainData(
    tiles.split(data, images),
    held,
    textures,
    dataset,
    *(_foreground(config, part) for part in (train, held_out)),
    folder_lib.fingerprints(good) if data.name == layouts.FOLDER else (),
  )


def _warn_of_repeats(
  records: Sequence[records_lib.Record], images: Sequence[np.ndarray]
) -> None:
  """Logs which normal images are the same picture, pixel by pixel."""
  first: dict[bytes, str] = {}
  repeats = []
  for record, image in zip(records, images, strict=True):
    digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    known = first.setdefault(digest, record.image)
    if known != record.image:
      repeats.append(f'{record.image} is {known}')
  if repeats:
    logging.warning(
      '%d of %d normal images repeat another one (%s): held-out images that'
      ' were trained on as well make thresholds too low',
      len(repeats),
      len(images),
      files.abbreviate(repeats),
    )


def _foreground(
  config: ml_collections.ConfigDict, records: Sequence[records_lib.Record]
) -> np.ndarray | None:
  """Masks of where anomalies may be painted; None is anywhere."""
  kind = config.synthesis.foreground
  if kind == 'off':
    return None
  masks = foreground_lib.load(
    records,
    config.data.image_size,
    kind,
    white_level=config.data.white_level,
  )
  return tiles.split(config.data, masks)


class Trainer:
  """One category's training: its state, step functions and checkpoints.

  Attributes:
    config: of the category.
    workdir: absolute path of the category's folder.
    mesh: all devices.
    data: see `TrainData`.
    fingerprint: of the teacher's weights.
    state: the training state, replicated over the mesh.
    meta: what stands beside the state in the newest checkpoint.
    predictor: of the config, for calibration and validation.
  """

  def __init__(self, config: ml_collections.ConfigDict, workdir: str):
    """Checks the config, loads the data and resumes a checkpoint, if any.

    Raises:
      ValueError, FileNotFoundError: the config or the data cannot be used.
    """
    config_lib.check(config)
    self.config, self.workdir = config, storage.absolute(workdir)
    self.mesh = sharding.make_mesh()
    for field in ('batch_size', 'microbatch'):
      if rows := config.train[field]:
        sharding.check_batch_size(self.mesh, rows, f'train.{field}')
    self.model = dmdd.from_config(config)
    self.data = load_data(config)
    teacher, self.fingerprint = pretrained.load(
      config.teacher.arch, config.teacher.weights, rng_seed=config.seed
    )
    self.directory = os.path.join(self.workdir, 'checkpoints')
    self.manager = checkpoint.open_manager(
      self.directory, config.train.keep_checkpoints
    )
    try:
      state = train_state.create(
        config, self.model, jax.random.key(config.seed), teacher
      )
      self.state = sharding.replicate(self.mesh, state)
      self.meta: dict[str, Any] = {}
      self._resume()
      if jax.process_index() == 0:
        path = os.path.join(self.workdir, 'config.json')
        storage.write_text(path, results_lib.format_json(config.to_dict()))
      self.step_functions = steps.make_train_steps(
        config, self.model, self.mesh
      )
      self.predictor = predictor_lib.Predictor(config, self.mesh)
      from clu import metric_writers  # TensorFlow takes seconds to import.

      self.writer = metric_writers.MultiWriter(
        [metric_writers.SummaryWriter(self.workdir)]
        if jax.process_index() == 0
        else []
      )
    except BaseException:
      checkpoint.close(self.manager)
      raise
    self._pending: list[tuple[int, dict[str, jax.Array]]] = []
    # Whether any process had a signal, as asked at the step before.
    self._preempted: jax.Array | None = None
    # Images and masks; made at the first validation.
    self._validation: tuple[np.ndarray, np.ndarray] | None = None

  def _resume(self) -> None:
    """Continues from the newest checkpoint, if there is one."""
    if checkpoint.latest_step(self.manager) is None:
      return

    def read(step: int) -> train_state.TrainState:
      self.meta = checkpoint.read_meta(self.manager, step)
      checkpoint.check_config(self.directory, self.meta['config'], self.config)
      check_teacher(self.directory, self.meta, self.config, self.fingerprint)
      return checkpoint.restore(self.manager, self.state, step)

    self.state = checkpoint.read_newest(self.manager, read)
    step = int(self.state.step)
    checkpoint.set_aside(self.manager, step)

  def batches(self, first_step: int, shard: tuple[int, int] | None = None):
    """Yields training batches from `first_step` on, as host arrays.

    Args:
      first_step: the step of the first batch.
      shard: (index, count), which part of the rows; this process's by default.
    """
    from dmdd_jax.data import pipeline  # TensorFlow takes seconds to import.

    config = self.config
    return pipeline.train_dataset(
      self.data.images,
      self.data.textures,
      pipeline.options(config),
      seed=config.seed,
      batch_size=config.train.batch_size,
      total_steps=config.train.total_steps,
      first_step=first_step,
      shard=shard or sharding.shard(self.mesh),
      foreground=self.data.foreground,
    ).as_numpy_iterator()

  def run(
    self,
    profile: range = range(0),
    progress: Callable[[int, int], None] | None = None,
  ) -> None:
    """Takes the remaining steps; saves checkpoints on the way and at the end.

    Args:
      profile: the steps to trace for TensorBoard.
      progress: called after each step with the number of steps taken and that
        of all; the device may still be computing.

    Raises:
      NonFiniteError: a loss, a gradient or the maps are not finite.
      Preempted: SIGTERM or Ctrl-C came, and the state is saved.
      CheckpointError: a checkpoint could not be saved.
    """
    train = self.config.train
    first = int(self.state.step)
    if first >= train.total_steps:
      return
    logging.info(
      'parameters of the student and head\n%s',
      parameter_overview.get_parameter_overview(self.state.params),
    )
    cache = self._teacher_cache(first)
    clock = Clock(first, train.total_steps)
    profile = range(
      max(first, profile.start), min(profile.stop, train.total_steps)
    )
    with preemption.watched(interrupts=True), contextlib.ExitStack() as trace:
      # An error ends the trace too.
      for step, batch in enumerate(self.batches(first), first):
        phase = steps.phase(self.config, step)
        if phase == 'segment':
          cache = None  # Frees its memory: this phase is the last one.
        if profile and step == profile.start:
          trace.enter_context(jax.profiler.trace(self.workdir))
        self._step(step, phase, batch, cache)
        done = step + 1
        if progress is not None:
          progress(done, train.total_steps)
        last = done == train.total_steps
        if profile and done == profile.stop:
          jax.block_until_ready(self.state)
          trace.close()
        if done % train.log_every == 0 or step == first or last:
          self._log(phase, done, clock)
        preempted = self._is_preempted()
        if done % train.checkpoint_every == 0 or last or preempted:
          self._save(done, clock)
        if preempted:
          checkpoint.wait(self.manager)
          saved = f'saved step {done} of {train.total_steps}'
          preemption.leave(f'{saved} in {self.directory}')

  def _step(
    self,
    step: int,
    phase: str,
    batch: Mapping[str, np.ndarray],
    cache: steps.TeacherCache | None,
  ) -> None:
    """Takes a step on this process's rows of a batch."""
    keys = ['image', 'mask']
    if cache is not None:
      keys.append('view')
    if phase != 'segment' and (cache is None or self.config.loss.on_normal):
      keys.append('normal')  # Nearly half of all bytes.
    batch = sharding.to_global(self.mesh, {k: batch[k] for k in keys})
    if cache is not None:
      batch['normal_taps'] = cache(batch.pop('view'))
    self.state, metrics = self.step_functions[phase](self.state, batch)
    self._pending.append((step, metrics))

  def _is_preempted(self) -> bool:
    """Whether SIGTERM or Ctrl-C came to this process or to any other.

    Several processes ask each other over the devices. The answer used here is
    that of the step before: waiting for this step's would be waiting for the
    step itself.
    """
    if jax.process_count() == 1:
      return preemption.received()
    before, self._preempted = self._preempted, preemption.anywhere()
    return before is not None and bool(before)

  def _teacher_cache(self, step: int) -> steps.TeacherCache | None:
    """The teacher's features of all x_n; None if they are not kept or used."""
    config = self.config
    if not config.train.cache_teacher or steps.phase(config, step) == 'segment':
      return None
    from dmdd_jax.data import pipeline  # TensorFlow takes seconds to import.

    views = pipeline.views(self.data.images, pipeline.options(config))
    cache = steps.TeacherCache(
      self.model,
      self.mesh,
      train_state.variables(self.state),
      views,
      config.train.batch_size,
    )
    logging.info(
      "the teacher's features of %d images: %.0f MB on each device",
      len(views),
      cache.nbytes / 1e6,
    )
    return cache

  def _log(self, phase: str, done: int, clock: 'Clock') -> None:
    """Writes the pending steps' mean metrics; stops where one is not finite.

    Raises:
      NonFiniteError: naming the first such step.
    """
    pending, self._pending = jax.device_get(self._pending), []
    for step, metrics in pending:
      for name, value in metrics.items():
        if not np.isfinite(value):
          phase = steps.phase(self.config, step)
          fault = f'{name} is {value} at step {step} ({phase})'
          frozen_at = train_state.frozen_at(self.state)
          state = self.state.replace(step=frozen_at)
          raise self._non_finite(fault, step, phase, state)
    names = pending[-1][1]
    means = {
      name: float(np.mean([m[name] for _, m in pending if name in m]))
      for name in names
    }
    rate, line = clock.tick(done)
    figures = ', '.join(f'{name} {value:.4g}' for name, value in means.items())
    logging.info('%s: %s, %s', line, phase, figures)
    self._write_scalars(
      done,
      {f'train/{k}': v for k, v in means.items()} | {'steps_per_s': rate},
    )

  def _write_scalars(self, done: int, values: Mapping[str, float]) -> None:
    """Writes them for TensorBoard, and to scalars.jsonl for the report."""
    self.writer.write_scalars(done, values)
    if jax.process_index() == 0:
      scalars.append(self.workdir, done, values)

  def _non_finite(
    self, fault: str, step: int, phase: str, state: train_state.TrainState
  ) -> NonFiniteError:
    """Keeps the step's batch and `state` in WORKDIR/fault.

    Returns:
      The error to raise: the fault, what is kept on disk, and what to do.
    """
    last = checkpoint.latest_step(self.manager)
    kept = f'The last checkpoint, of step {last}, is kept in {self.directory}.'
    if last is None:
      kept = 'There is no checkpoint yet.'
    batch = None
    if jax.process_index() == 0:
      batch = next(self.batches(step, shard=(0, 1)))
      batch = {k: batch[k] for k in ('image', 'normal', 'mask')}
    meta = {'config': self.config.to_dict(), 'phase': phase, 'found': fault}
    try:
      faults.save(self.workdir, step, state, meta, batch)
      kept += (
        ' To see what broke: python tools/replay_batch.py --workdir'
        f' {self.workdir}.'
      )
    except (OSError, ValueError) as error:  # The loss is what must be raised.
      logging.error('the batch and the state could not be saved: %s', error)
    return NonFiniteError(
      f'{fault}. {kept} Lower config.train.student.learning_rate or'
      ' .head.learning_rate, or set their clip_norm.'
    )

  def _save(self, done: int, clock: 'Clock') -> None:
    """Calibrates, validates and saves; stops where a number is not finite.

    Raises:
      NonFiniteError: naming the step.
    """
    phase = steps.phase(self.config, done - 1)
    if self._pending:
      self._log(phase, done, clock)
    self.state = position_lib.learn_positions(
      self.predictor, self.state, self.data.images
    )
    calibration = calibration_lib.calibrate(
      self.predictor, self.state, self.data.held_out, self.data.images
    )
    # The last update can spoil the weights, though its own loss was finite.
    weights = jax.device_get((self.state.params, self.state.batch_stats))
    numbers = [*jax.tree.leaves(weights), *vars(calibration.fusion).values()]
    if not all(np.all(np.isfinite(number)) for number in numbers):
      fault = f'the maps are not finite after step {done - 1}'
      raise self._non_finite(fault, done - 1, phase, self.state)
    scores = self.validate(calibration, done)
    trained_on = {*self.meta.get('trained_on', ()), *self.data.fingerprints}
    self.meta = {
      'config': json.loads(json.dumps(self.config.to_dict())),
      'teacher_fingerprint': self.fingerprint,
      'calibration': calibration.to_dict(),
      'validation': scores,
      'command': provenance.command(),
      'versions': provenance.versions(),
      'trained_on': sorted(trained_on),
    }
    checkpoint.save(self.manager, done, self.state, self.meta)

  def validate(
    self, calibration: calibration_lib.Calibration, done: int
  ) -> dict[str, float]:
    """AUROCs and pixel AP on held-out normals with synthetic anomalies.

    The pairs are the same at every call of a run; TensorBoard shows the first
    with their maps. No decision depends on these figures: training always ends
    at its last step.

    Args:
      calibration: of the state.
      done: steps taken.

    Returns:
      {name: figure}, fractions in [0, 1]; empty if no image is held out.
    """
    if not len(self.data.held_out):
      return {}
    if self._validation is None:
      self._validation = unseen.pairs(
        tiles.split(self.config.data, self.data.held_out),
        seed=self.config.seed + 1,
        count=max(
          _VALIDATION_MIN, _VALIDATION_REPEATS * len(self.data.held_out)
        ),
        foreground=self.data.held_out_foreground,
      )
    images, masks = self._validation
    prediction = predictor_lib.predict_images(
      self.predictor, self.state, calibration.fusion, images
    )
    scores = {}
    labels = masks.any(axis=(1, 2))
    if labels.any() and not labels.all():
      auroc = ranking.ranking(prediction.image_score, labels)[0]
      scores['image_auroc'] = round(float(auroc), 5)
    for prefix, maps in (
      ('', prediction.map),
      ('maps_mean_', prediction.maps_mean),
    ):
      auroc, ap, *_ = ranking.ranking(np.ravel(maps), np.ravel(masks))
      scores[f'{prefix}pixel_auroc'] = round(float(auroc), 5)
      scores[f'{prefix}pixel_ap'] = round(float(ap), 5)
    self._write_scalars(done, {f'validation/{k}': v for k, v in scores.items()})
    pairs = overlays.pair_strips(images, masks, prediction.map, calibration)
    self.writer.write_images(done, {'validation/image_mask_map': pairs})
    logging.info('validation at step %d: %s', done, scores)
    return scores

  def close(self) -> None:
    """Waits for the save in progress and ends all threads."""
    try:
      self.writer.close()
    finally:
      checkpoint.close(self.manager)


class Clock:
  """Step rate and remaining time, for the progress line."""

  def __init__(self, step: int, total: int, now=time.monotonic):
    self._now, self._step, self._total = now, step, total
    self._time = now()

  def tick(self, step: int) -> tuple[float, str]:
    """Steps per second since the last call, and a progress line."""
    now = self._now()
    rate = (step - self._step) / max(now - self._time, 1e-9)
    self._step, self._time = step, now
    remaining = int((self._total - step) / rate) if rate else 0
    minutes, seconds = divmod(remaining, 60)
    hours, minutes = divmod(minutes, 60)
    return rate, (
      f'step {step}/{self._total}, {rate:.2f} steps/s,'
      f' {hours}:{minutes:02d}:{seconds:02d} left'
    )


def parse_steps(text: str | None) -> range:
  """'2:5' -> range(2, 5); None -> an empty range."""
  first, colon, last = (text or '0:0').partition(':')
  if not (colon and first.isdigit() and last.isdigit()):
    raise ValueError(f"--profile_steps={text!r}: use 'a:b', say 10:15")
  steps_ = range(int(first), int(last))
  if text and not steps_:
    raise ValueError(f'--profile_steps={text!r} holds no step')
  return steps_


def check_teacher(
  directory: str,
  stored: Mapping[str, Any],
  config: ml_collections.ConfigDict,
  fingerprint: str,
) -> None:
  """Refuses a checkpoint or results of another teacher than this run's.

  Args:
    directory: of the checkpoint or results, for the message.
    stored: the checkpoint's metadata, or the results.
    config: of this run.
    fingerprint: of this run's teacher.

  Raises:
    CheckpointError: the fingerprints differ.
  """
  if stored['teacher_fingerprint'] != fingerprint:
    raise checkpoint.CheckpointError(
      f'{directory} is of another teacher, {stored["teacher_fingerprint"]};'
      f' config.teacher.weights = {config.teacher.weights!r} is {fingerprint}.'
      ' Use another --workdir, or the same weights to go on.'
    )
