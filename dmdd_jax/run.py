"""A run: the categories of a config, trained and evaluated; tables, report.

Synopsis:

  table = run.train_run(config, 'runs/mvtec')
  state, results = run.train_and_evaluate(config, 'runs/mvtec/screw')
  results = run.evaluate_workdir('runs/mvtec/screw')
"""

from collections.abc import Callable, Mapping, Sequence, Set
import json
import os
import time
from typing import Any

from absl import logging
import jax
import ml_collections

from dmdd_jax import config as config_lib
from dmdd_jax import evaluate
from dmdd_jax import provenance
from dmdd_jax import storage
from dmdd_jax import trainer as trainer_lib
from dmdd_jax.data import files
from dmdd_jax.data import folder as folder_lib
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import records as records_lib
from dmdd_jax.data import surfaces
from dmdd_jax.launch import groups
from dmdd_jax.launch import lock
from dmdd_jax.launch import preemption
from dmdd_jax.metrics import results as results_lib
from dmdd_jax.models import pretrained
from dmdd_jax.report import archive
from dmdd_jax.report import overlays
from dmdd_jax.report import page
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import predictor as predictor_lib
from dmdd_jax.scoring import trained as trained_lib
from dmdd_jax.training import checkpoint
from dmdd_jax.training import train_state


class IncompleteError(OSError):
  """The results are written, but pictures or other files are not."""


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str,
  profile_steps: str | None = None,
  revision: str | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> tuple[train_state.TrainState, dict[str, Any]]:
  """Trains one category, from its newest checkpoint on, and evaluates it.

  Args:
    config: with one name in `data.category`.
    workdir: the category's folder; gets config.json, checkpoints/,
      results.json, pictures/, what the report needs, and TensorBoard's event
      files.
    profile_steps: 'a:b' traces the steps a to b - 1, counted from 0, into
      plugins/profile/ of the workdir, for TensorBoard.
    revision: `provenance.git_revision()` as the program began; that of now by
      default.
    progress: see `Trainer.run`.

  Returns:
    The final state, and what stands in results.json. Under `incomplete` are
    {file: reason} of pictures and the like that could not be written.

  Raises:
    LockedError: another process trains in the folder.
    ValueError, FileNotFoundError, NonFiniteError: see the modules.
    Preempted: SIGTERM or Ctrl-C came and the state is saved.
  """
  started = time.time()
  profile = trainer_lib.parse_steps(profile_steps)
  revision = revision or provenance.git_revision()
  config_lib.check(config)
  _make_workdir(workdir)
  with preemption.watched(), lock.held(workdir):
    trainer = trainer_lib.Trainer(config, workdir)
    try:
      trainer.run(profile, progress)
      results = _evaluate(
        trainer.predictor,
        trainer.state,
        trainer.meta,
        _untrained(trainer.data.dataset.test, trainer.meta),
        workdir,
        started=started,
        revision=revision,
      )
    finally:
      trainer.close()
  return trainer.state, results


def categories(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The names in `data.category`, which may be a comma list."""
  names = tuple(n.strip() for n in config.data.category.split(',') if n.strip())
  if not names:
    raise ValueError(
      'no category: set --config.data.category to one, or to a comma list'
    )
  return names


def for_category(
  config: ml_collections.ConfigDict, category: str
) -> ml_collections.ConfigDict:
  """The config of one category: its row of `config.per_category` applied.

  Raises:
    ValueError: the row has a field that the config has not, or of another type.
  """
  single = ml_collections.ConfigDict(config.to_dict())
  single.data.category = category
  changes = single.per_category.get(category, {})
  del single.per_category
  try:
    single.lock().update(changes)
  except (KeyError, TypeError) as error:
    raise ValueError(
      f'config.per_category.{category}: {error.args[0]}'
    ) from error
  return single


def train_run(
  config: ml_collections.ConfigDict,
  workdir: str,
  profile_steps: str | None = None,
  *,
  place: tuple[int, int] = (0, 1),
  group: int | None = None,
) -> str:
  """Trains and evaluates all categories, in groups of devices if asked for.

  With `config.mesh.category_groups` > 1, the first process of a host runs its
  groups, which are processes of the same command, and then writes the tables.

  Args:
    config: see `run_categories`.
    workdir: see `run_categories`.
    profile_steps: see `train_and_evaluate`.
    place: (index, count) of this host, for groups.
    group: the group that this process is; None in the first process.

  Returns:
    The table over the categories, as text.

  Raises:
    ValueError, Preempted: see `run_categories` and `groups.run`.
  """
  count = config.mesh.category_groups
  if count <= 1:
    return run_categories(config, workdir, profile_steps)
  if group is None:
    groups.run(count, workdir, place)
  share = groups.share(count, group, place)
  return run_categories(config, workdir, profile_steps, share)


def run_categories(
  config: ml_collections.ConfigDict,
  workdir: str,
  profile_steps: str | None = None,
  share: tuple[int, int] = (0, 1),
  progress: Callable[[int, int], None] | None = None,
) -> str:
  """Trains and evaluates every category; a finished one is not run again.

  Writes results.json, results.csv and results.md over all of them, after each,
  and report.html at the end.

  Args:
    config: with a name or a comma list in `data.category`.
    workdir: gets a folder per category.
    profile_steps: see `train_and_evaluate`.
    share: (index, count): run every count-th category from that index on. The
      tables are of all that are finished by then, whoever ran them.
    progress: see `Trainer.run`.

  Returns:
    The table over the categories, as text.

  Raises:
    ValueError, FileNotFoundError, NonFiniteError: see the modules.
    IncompleteError: pictures or a report could not be written; all else is.
    Preempted: SIGTERM or Ctrl-C came and the state is saved.
  """
  index, count = share
  names = categories(config)
  for name in names:  # A fault of the last one shows before the first begins.
    config_lib.check(for_category(config, name))
  revision = provenance.git_revision()  # The checkout may change meanwhile.
  mine, rows, table = names[index::count], {}, ''
  missing: dict[str, str] = {}
  with preemption.watched():
    _make_workdir(workdir)
    if jax.process_index() == 0 and mine:
      _generate(config)
    checkpoint.barrier('categories: begin')
    for category in mine:
      single = for_category(config, category)
      directory = os.path.join(workdir, category)
      rows[category] = _run_category(
        single, directory, profile_steps, revision, progress
      )
      missing |= rows[category].get('incomplete', {})
      table = _write_tables(config, rows, workdir)
  if jax.process_index() == 0 and rows:
    folders = [
      os.path.join(workdir, name) for name in _finished(config, rows, workdir)
    ]
    missing |= page.try_write(workdir, folders)
  _check_complete(missing, workdir)
  return table


def _check_complete(missing: Mapping[str, str], output: str) -> None:
  """Raises `IncompleteError` where {file: reason} is not empty."""
  if missing:
    reasons = [f'{name} ({reason})' for name, reason in missing.items()]
    raise IncompleteError(
      f'the results are in {output}, but {len(missing)} files could not be'
      f' written: {files.abbreviate(reasons)}. The same command writes them.'
    )


def _write_tables(
  config: ml_collections.ConfigDict,
  rows: Mapping[str, Mapping[str, Any]],
  workdir: str,
) -> str:
  """The table of what is finished; process 0 writes it."""
  if jax.process_index():
    return results_lib.format_table(rows)
  # Again where another group has ended meanwhile, and may have written before.
  written: Set[str] = set()
  while written != (found := _finished(config, rows, workdir)).keys():
    tables = results_lib.format_tables(found)
    storage.write_texts(workdir, tables)
    written = found.keys()
  return tables['results.md']


def _finished(
  config: ml_collections.ConfigDict,
  rows: Mapping[str, Mapping[str, Any]],
  workdir: str,
) -> dict[str, Mapping[str, Any]]:
  """The results at hand, and those on disk of the config's other categories."""
  found = {}
  for category in categories(config):
    directory = os.path.join(workdir, category)
    row = rows.get(category)
    if row is None:
      row = read_finished(for_category(config, category), directory)
    if row is not None:
      found[category] = row
  return found


def _run_category(
  config: ml_collections.ConfigDict,
  directory: str,
  profile_steps: str | None,
  revision: str | None,
  progress: Callable[[int, int], None] | None,
) -> Mapping[str, Any]:
  """The results of a category, which is trained unless it is finished."""
  if preemption.anywhere():
    preemption.leave('ended before the next category')
  finished = read_finished(config, directory)
  if finished is None or 'incomplete' in finished:
    return train_and_evaluate(
      config, directory, profile_steps, revision, progress
    )[1]
  logging.info('%s is finished (%s): skipped', config.data.category, directory)
  return finished


def _generate(config: ml_collections.ConfigDict) -> None:
  """Writes the data set that `data.generate` names, unless it is there."""
  if config.data.generate == 'surface':
    surfaces.write_surfaces(
      config.data.root, size=config.data.image_size, seed=0
    )


def read_finished(
  config: ml_collections.ConfigDict, directory: str
) -> Mapping[str, Any] | None:
  """The results of a finished run of this config, or None.

  Raises:
    CheckpointError: there are results, but of another config or teacher.
  """
  path = storage.path(os.path.join(directory, 'results.json'))
  if not path.exists():
    return None
  results = json.loads(path.read_text())
  checkpoint.check_config(directory, results['config'], config)
  if results['step'] < config.train.total_steps:
    return None
  arch, weights = config.teacher.arch, config.teacher.weights
  if weights != results['config']['teacher']['weights']:
    _, fingerprint = pretrained.load(arch, weights, rng_seed=config.seed)
    trainer_lib.check_teacher(directory, results, config, fingerprint)
  return results


def _make_workdir(workdir: str) -> None:
  """Creates a folder and proves that it can be written."""
  try:
    folder = storage.path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.write-test-{jax.process_index()}-{os.getpid()}'
    probe.write_text('')
    probe.unlink()
  except Exception as error:  # TensorFlow's, of gs://, are no OSErrors.
    reason = getattr(error, 'strerror', None) or str(error)
    raise ValueError(
      f'cannot write to the workdir {workdir}: {reason}. Choose another'
      ' --workdir.'
    ) from error


def evaluate_workdir(
  workdir: str | os.PathLike,
  output: str | os.PathLike | None = None,
  *,
  changes: Mapping[str, Any] | None = None,
  given: ml_collections.ConfigDict | None = None,
  step: int | None = None,
  maps: str | os.PathLike | None = None,
  recalibrate: bool = False,
  revision: str | None = None,
  records: Sequence[records_lib.Record] | None = None,
) -> dict[str, Any]:
  """Evaluates a category's checkpoint and writes its results and pictures.

  Args:
    workdir: the category's folder.
    output: where to write `results.json`, `pictures/`, `scores.csv` and
      `report_data.zip`; the workdir.
    changes: {'data.root': 'new', 'eval.intervals': False}, see
      `config.for_evaluation`; the data lie where they lay in training by
      default.
    given: a config of the run, whose `eval` and paths count as changes too.
    step: which checkpoint, by default the newest.
    maps: see `evaluate`.
    recalibrate: fit fusion and thresholds again on the images that training
      held out, instead of taking those stored with the checkpoint.
    revision: see `train_and_evaluate`.
    records: the test images; those that the config names by default.

  Returns:
    What stands in `results.json`.
  """
  started = time.time()
  revision = revision or provenance.git_revision()
  stored, state, _, meta = trained_lib.load_workdir(workdir, step)
  if given is not None:
    given = for_category(given, stored.data.category)
  config = config_lib.for_evaluation(stored, changes or {}, given)
  images_lib.allow_pixels(config.data.max_pixels)
  if recalibrate:
    _check_same_split(stored.data, config.data)
  if records is None or recalibrate:
    dataset = layouts.list_dataset(config.data)
  if records is None:
    records = dataset.test
  records = images_lib.validate(
    records,
    config.data.on_bad_image,
    white_level=config.data.white_level,
  )
  records = _untrained(records, meta)
  predictor = predictor_lib.Predictor(config)
  if recalibrate:
    training, held_out = evaluate.training_images(config, dataset)
    calibration = calibration_lib.calibrate(
      predictor, state, held_out, training
    )
    meta = {**meta, 'calibration': calibration.to_dict()}
  else:
    _warn_of_other_scores(meta['config']['eval'], config.eval)
  output = os.fspath(output or workdir)
  return _evaluate(
    predictor,
    state,
    meta,
    records,
    output,
    started=started,
    revision=revision,
    maps=maps,
  )


def _untrained(
  records: Sequence[records_lib.Record], meta: Mapping[str, Any]
) -> tuple[records_lib.Record, ...]:
  """The test images without those that the checkpoint was trained on."""
  trained_on = frozenset(meta.get('trained_on', ()))
  return folder_lib.untrained(records, trained_on) if trained_on else records


def _check_same_split(
  before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
) -> None:
  """Refuses to calibrate on images that training has not held out."""
  if before.name == layouts.FOLDER and (
    folder_lib.keeps_test(before) != folder_lib.keeps_test(now)
  ):
    raise ValueError(
      'data.defect and data.test_normal decide which normal images are held'
      ' out: to recalibrate, set neither where training had none, and leave'
      ' neither out'
    )


def _warn_of_other_scores(
  stored: Mapping[str, Any], options: ml_collections.ConfigDict
) -> None:
  """Logs where `config.eval` changes what the stored thresholds are of."""
  for field in ('smoothing_sigma', 'score_top_pixels'):
    before, now = stored[field], options[field]
    if before != now:
      logging.warning(
        'the thresholds are of eval.%s = %g, the maps and scores now of %g:'
        ' recalibrate to bring them together',
        *(field, before, now),
      )


def _evaluate(
  predictor: predictor_lib.Predictor,
  state: train_state.TrainState,
  meta: Mapping[str, Any],
  records: Sequence[records_lib.Record],
  output: str,
  *,
  started: float,
  revision: str | None,
  maps: str | os.PathLike | None = None,
) -> dict[str, Any]:
  """Evaluates, and writes what there is to write into a category's folder.

  Args:
    predictor: of the config.
    state: the trained state.
    meta: of its checkpoint.
    records: the test images.
    output: gets results.json, pictures/ and what the report needs.
    started: when the work began, `time.time()`.
    revision: of the code, as the work began.
    maps: a folder for the final maps; None writes none.

  Returns:
    What stands in results.json.
  """
  config = predictor.config
  calibration = calibration_lib.from_dict(meta['calibration'])
  writes = jax.process_index() == 0
  encode = archive.encode_image if writes else None
  with evaluate.evaluate(
    predictor, state, calibration, records, encode
  ) as evaluation:
    results = evaluation.metrics
    results['validation'] = meta['validation']
    results |= provenance.describe(
      config,
      meta,
      step=int(state.step),
      seconds=time.time() - started,
      revision=revision,
    )
    if writes:
      path = os.path.join(output, 'results.json')
      # First, so that nothing that comes after can lose them; without the rest
      # they are no finished run, see `_run_category`.
      not_yet = {'pictures': 'the program ended before'}
      text = results_lib.format_json({**results, 'incomplete': not_yet})
      storage.write_text(path, text)
      if failures := _write_pictures(evaluation, output, maps):
        results['incomplete'] = failures
      storage.write_text(path, results_lib.format_json(results))
      logging.info('results in %s', path)
  return results


def _write_pictures(
  evaluation: evaluate.Evaluation,
  output: str,
  maps: str | os.PathLike | None,
) -> dict[str, str]:
  """Writes maps, overlays, and the scores and pictures of the report.

  Returns:
    {file: reason} of what could not be written.
  """
  config, calibration = evaluation.config, evaluation.calibration
  records, scores = evaluation.records, evaluation.scores
  failures = {}
  if maps is not None:
    failures |= evaluate.write_maps(maps, evaluation)
  failures |= overlays.write_overlays(
    os.path.join(output, 'pictures'),
    records,
    evaluation.store.maps,
    scores['map'],
    calibration,
    per_group=config.eval.pictures,
    white_level=config.data.white_level,
  )
  storage.attempt(
    failures,
    os.path.join(output, archive.ARCHIVE),
    archive.write,
    output,
    config.data.root,
    records,
    scores,
    evaluation.store,
    evaluation.thumbnails,
    calibration,
  )
  return failures


def evaluate_run(
  workdir: str | os.PathLike,
  output: str | os.PathLike | None = None,
  **options: Any,
) -> str:
  """Evaluates a category's folder, or every one in the folder of a run.

  Args:
    workdir: a folder that holds `checkpoints/`, or folders that do.
    output: where to write; the workdir.
    **options: of `evaluate_workdir`.

  Returns:
    The table over the categories, as text; for the folder of a run, or another
    output, it is written there as results.json, .csv and .md. A report.html is
    written there too.

  Raises:
    CheckpointError: there is no checkpoint.
    IncompleteError: pictures, maps or a report could not be written.
  """
  workdir = os.fspath(workdir)
  output = os.fspath(output or workdir)
  options = {'revision': provenance.git_revision(), **options}
  folders = trained_lib.trained_folders(workdir)
  own = storage.path(os.path.join(workdir, 'checkpoints'))
  if own.is_dir() or not folders:
    metrics = evaluate_workdir(workdir, output, **options)
    missing = metrics.get('incomplete', {})
    if jax.process_index() == 0:
      missing |= page.try_write(output, [output], [workdir])
    _check_complete(missing, output)
    return results_lib.format_table({metrics['category']: metrics})
  rows, targets = {}, []
  missing = {}
  for folder in folders:
    target = os.path.join(output, os.path.basename(folder))
    metrics = evaluate_workdir(folder, target, **options)
    rows[metrics['category']] = metrics
    missing |= metrics.get('incomplete', {})
    targets.append(target)
  if jax.process_index():
    return results_lib.format_table(rows)
  tables = results_lib.format_tables(rows)
  storage.write_texts(output, tables)
  missing |= page.try_write(output, targets, folders)
  _check_complete(missing, output)
  return tables['results.md']
