"""Whole runs: what one leaves, resuming, refusing, evaluating again."""

import csv
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import program_helpers
import pytest

from dmdd_jax import run as run_lib
from dmdd_jax import trainer as trainer_lib
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import position as position_lib
from dmdd_jax.scoring import predictor as predictor_lib
from dmdd_jax.scoring import trained as trained_lib
from dmdd_jax.training import checkpoint
from dmdd_jax.training import faults
from dmdd_jax.training import scalars

pytestmark = pytest.mark.usefixtures('compiled_once')

METRICS = (
  'image_auroc',
  'image_ap',
  'image_f1_max',
  'pixel_auroc',
  'pixel_ap',
  'pixel_f1_max',
  'au_pro',
)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A folder of data of two categories, and the teacher's weights."""
  folder = tmp_path_factory.mktemp('files')
  surface = program_helpers.write_data(folder / 'data')
  shutil.copytree(surface, folder / 'data' / 'twin')
  program_helpers.write_weights(folder / 'teacher.npz')
  return folder


@pytest.fixture(scope='module')
def make_config(files):
  def make(**changes):
    config = program_helpers.tiny_run(
      files / 'data',
      teacher__weights=str(files / 'teacher.npz'),
      data__category='surface,twin',
      **changes,
    )
    config.per_category.twin = {'synthesis': {'clean_share': 0.5}}
    return config

  return make


@pytest.fixture(scope='module')
def finished(make_config, tmp_path_factory):
  """The folder of a finished run over two categories."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  run_lib.run_categories(make_config(), str(workdir))
  return workdir


@pytest.fixture(scope='module')
def single(make_config):
  """The config of the first category."""
  return run_lib.for_category(make_config(), 'surface')


def _read(path):
  """Strict JSON: NaN and Infinity, which only Python reads, are an error."""

  def refuse(constant):
    raise AssertionError(f'{path} holds {constant}')

  with open(path) as file:
    return json.load(file, parse_constant=refuse)


def _image_auroc(results):
  """As tables have it: per cent, with its interval."""
  low, high = results['confidence']['image_auroc']
  value = 100 * results['image_auroc']
  return f'{value:.2f} [{100 * low:.2f}, {100 * high:.2f}]'


def _measured(results):
  """The part of results.json that a second run must give again."""
  names = [
    *('maps_mean', 'at_threshold', 'undefined', 'validation', 'calibration'),
    *('step', 'seed', 'category', 'teacher_fingerprint', 'config'),
  ]
  return {
    key: value
    for key, value in results.items()
    if key in names or key.startswith(('image_', 'pixel_', 'au_pro'))
  }


def _snapshot(folder):
  return {
    path: (path.stat().st_mtime_ns, path.read_bytes())
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def _assert_same_state(workdir, expected):
  found = trained_lib.load_workdir(workdir)[1]
  assert int(found.step) == 6
  jax.tree.map(
    np.testing.assert_array_equal, found, trained_lib.load_workdir(expected)[1]
  )


def _stop(monkeypatch, step, action):
  """Calls `action(batch)` before a step; returns where trainings began."""
  original, begun = trainer_lib.Trainer.batches, []

  def batches(self, first_step, shard=None):
    begun.append(first_step)
    found = original(self, first_step, shard)
    for number, batch in enumerate(found, first_step):
      yield action(batch) if number == step else batch

  monkeypatch.setattr(trainer_lib.Trainer, 'batches', batches)
  return begun


# What a run leaves.


def test_a_category_has_its_files(finished, make_config):
  for name in ('surface', 'twin'):
    folder = finished / name
    config = run_lib.for_category(make_config(), name)
    assert _read(folder / 'config.json') == json.loads(config.to_json())
    steps = sorted(os.listdir(folder / 'checkpoints'))
    assert steps == ['2', '4', '6']
    events = list(folder.glob('events.out.tfevents.*'))
    assert len(events) == 1 and events[0].stat().st_size > 1000
    curves = scalars.read(folder)
    assert curves['train/loss'][0][-1] == 6
    assert curves['validation/pixel_auroc'][0] == [2, 4, 6]
    pictures = list((folder / 'pictures').glob('*.png'))
    assert len(pictures) == 4  # Lowest and highest score of either label.
    for picture in pictures:
      with Image.open(picture) as image:
        assert np.asarray(image.convert('L')).std() > 5


def test_a_categorys_results_are_fractions(finished, make_config):
  for name in ('surface', 'twin'):
    results = _read(finished / name / 'results.json')
    for part in (results, results['maps_mean']):
      for key in METRICS:
        assert 0.0 <= part[key] <= 1.0, key
    assert results['maps_mean']['pixel_auroc'] != results['pixel_auroc']
    assert results['category'] == name
    assert results['step'] == 6 and results['seed'] == 0
    assert results['teacher_fingerprint'].startswith('sha256:')
    config = run_lib.for_category(make_config(), name)
    assert results['config'] == json.loads(config.to_json())
  shares = [
    _read(finished / name / 'config.json')['synthesis']['clean_share']
    for name in ('surface', 'twin')
  ]
  assert shares == [0.1, 0.5]  # per_category


def test_the_tables_over_categories_hold_the_categories(finished):
  rows = {
    name: _read(finished / name / 'results.json')
    for name in ('surface', 'twin')
  }
  table = _read(finished / 'results.json')
  with open(finished / 'results.csv', newline='') as file:
    lines = {line['category']: line for line in csv.DictReader(file)}
  markdown = (finished / 'results.md').read_text().splitlines()
  assert list(table) == list(lines) == ['surface', 'twin', 'mean']
  assert [line.split('|')[1].strip() for line in markdown] == [
    'category',
    '---',
    *lines,
  ]
  for key in METRICS:
    mean = np.mean([rows[name][key] for name in rows])
    assert table['mean'][key] == pytest.approx(mean)
    for name in rows:
      assert table[name][key] == rows[name][key]
      assert table[name]['maps_mean'][key] == rows[name]['maps_mean'][key]
      assert float(lines[name][key]) == rows[name][key]
    assert f'{100 * mean:.2f}' in markdown[-1]


def test_training_changed_what_it_should_and_the_teacher_never(
  finished, make_config, single
):
  """Student in the first four steps alone, head in the last two alone."""
  states = [
    trained_lib.load_workdir(finished / 'surface', step)[1]
    for step in (2, 4, 6)
  ]

  def same(part, a, b):
    return all(
      np.array_equal(x, y)
      for x, y in zip(jax.tree.leaves(a[part]), jax.tree.leaves(b[part]))
    )

  for kind in ('params', 'batch_stats', 'opt_state'):
    two, four, six = (getattr(state, kind) for state in states)
    assert not same('student', two, four) and same('head', two, four)
    assert same('student', four, six) and not same('head', four, six)
  teacher, fingerprint = trainer_lib.pretrained.load(
    'resnet18', single.teacher.weights
  )
  for state in states:
    jax.tree.map(np.testing.assert_array_equal, state.teacher, teacher)
  results = _read(finished / 'surface' / 'results.json')
  assert results['teacher_fingerprint'] == fingerprint


def test_each_checkpoint_is_calibrated_with_its_own_positions(finished):
  folder = finished / 'surface'
  means = []
  for step in (2, 6):
    config, state, calibration, _ = trained_lib.load_workdir(folder, step)
    means.append(np.asarray(state.batch_stats['position']['bias']))
    data = trainer_lib.load_data(config)
    predictor = predictor_lib.Predictor(config)
    learned = position_lib.learn_positions(predictor, state, data.images)
    np.testing.assert_allclose(
      learned.batch_stats['position']['bias'], means[-1], atol=1e-6
    )
    again = calibration_lib.calibrate(
      predictor, state, data.held_out, data.images
    )
    np.testing.assert_allclose(
      again.image_threshold, calibration.image_threshold, rtol=1e-4
    )
  assert means[0].any() and not np.array_equal(*means)


# Doing it again.


def test_a_finished_category_is_skipped(finished, make_config, monkeypatch):
  def fail(*_):
    raise AssertionError('trained again')

  monkeypatch.setattr(run_lib, 'train_and_evaluate', fail)
  before = {name: _snapshot(finished / name) for name in ('surface', 'twin')}
  tables = {
    name: (finished / name).read_text()
    for name in ('results.json', 'results.csv', 'results.md')
  }
  # What is only logged, read or shown may differ.
  config = make_config(train__log_every=1, eval__pictures=2)
  assert run_lib.run_categories(config, str(finished)) == tables['results.md']
  for name, text in tables.items():
    assert (finished / name).read_text() == text
  for name, files in before.items():
    assert _snapshot(finished / name) == files


def test_an_interrupted_run_ends_as_if_it_had_not_been(
  finished, make_config, single, tmp_path, monkeypatch
):
  """Stopped in both phases; bitwise the same weights, the same results."""
  workdir = str(tmp_path / 'run')

  def interrupt(_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    begun = _stop(patch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
      run_lib.train_and_evaluate(single, workdir)
    assert begun == [0]
  assert os.listdir(f'{workdir}/checkpoints') == ['2']

  def spoil(batch):
    return {**batch, 'image': np.full_like(batch['image'], np.nan)}

  with monkeypatch.context() as patch:
    begun = _stop(patch, 5, spoil)
    with pytest.raises(trainer_lib.NonFiniteError) as error:
      run_lib.train_and_evaluate(single, workdir)
    assert begun == [2, 5]  # The second time for the batch that is kept.
  # The step is named, and what was kept; replayed, it breaks again.
  assert f'tools/replay_batch.py --workdir {workdir}.' in str(error.value)
  replayed = faults.replay(workdir).splitlines()
  assert replayed[0].startswith('step 5 (segment): ')
  assert replayed[1] == 'batch: 1 of 3 arrays are not finite: image'
  assert replayed[2].startswith('state: all of ')
  assert 'segmentation nan' in replayed[-1]
  assert 'is nan at step 5 (segment)' in str(error.value)
  assert f'of step 4, is kept in {workdir}/checkpoints' in str(error.value)
  assert 'config.train.student.learning_rate' in str(error.value)
  assert sorted(os.listdir(f'{workdir}/checkpoints')) == ['2', '4']
  assert not os.path.exists(f'{workdir}/results.json')
  # The same teacher from another place is the same teacher.
  moved = run_lib.for_category(make_config(), 'surface')
  moved.teacher.weights = str(tmp_path / 'moved.npz')
  shutil.copy(single.teacher.weights, moved.teacher.weights)
  moved.data.root = str(tmp_path / 'moved')
  shutil.copytree(single.data.root, moved.data.root)
  begun = _stop(monkeypatch, None, None)
  state, summary = run_lib.train_and_evaluate(moved, workdir)
  assert begun == [4] and int(state.step) == 6
  _assert_same_state(workdir, finished / 'surface')
  found, expected = (
    _measured(_read(os.path.join(folder, 'results.json')))
    for folder in (workdir, finished / 'surface')
  )
  for part in (found, expected):
    config = part.pop('config')
    config['data'].pop('root'), config['teacher'].pop('weights')
  assert found == expected
  assert summary['pixel_auroc'] == expected['pixel_auroc']


def test_a_trained_run_without_results_is_only_evaluated(
  finished, single, tmp_path, monkeypatch
):
  workdir = tmp_path / 'run'
  shutil.copytree(finished / 'surface', workdir)
  os.remove(workdir / 'results.json')
  begun = _stop(monkeypatch, None, None)
  run_lib.train_and_evaluate(single, str(workdir))
  assert begun == []
  assert _measured(_read(workdir / 'results.json')) == _measured(
    _read(finished / 'surface' / 'results.json')
  )


# Refusing.


def test_a_run_of_another_config_is_refused_by_field(
  finished, make_config, tmp_path
):
  """Finished or not, and nothing of it is touched."""
  unfinished = tmp_path / 'run'
  shutil.copytree(finished, unfinished)
  os.remove(unfinished / 'surface' / 'results.json')
  config = make_config(
    train__batch_size=2, loss__aim_weight=0.5, train__log_every=3, seed=1
  )
  for workdir in (finished, unfinished):
    before = _snapshot(workdir)
    with pytest.raises(checkpoint.CheckpointError) as error:
      run_lib.run_categories(config, str(workdir))
    message = str(error.value)
    assert 'train.batch_size: 4 in the checkpoint, 2 now' in message
    assert 'loss.aim_weight: 1.0 in the checkpoint, 0.5 now' in message
    assert 'seed: 0 in the checkpoint, 1 now' in message
    assert 'log_every' not in message and '--workdir' in message
    assert _snapshot(workdir) == before


def test_another_teacher_is_refused(finished, make_config, tmp_path):
  weights = program_helpers.write_weights(tmp_path / 'other.npz', seed=1)
  config = make_config()
  config.teacher.weights = weights
  unfinished = tmp_path / 'run'
  shutil.copytree(finished, unfinished)
  os.remove(unfinished / 'surface' / 'results.json')
  for workdir in (finished, unfinished):
    with pytest.raises(checkpoint.CheckpointError) as error:
      run_lib.run_categories(config, str(workdir))
    message = str(error.value)
    assert message.count('sha256:') == 2 and weights in message


# Losses that are not finite.


def test_a_rate_that_spoils_the_weights_leaves_no_checkpoint(
  make_config, tmp_path
):
  """The loss of the step itself is finite; a save looks at the weights."""
  config = make_config(
    train__student__learning_rate=1e38,
    train__checkpoint_every=1,
    train__log_every=1,
  )
  with pytest.raises(trainer_lib.NonFiniteError, match='after step 0') as error:
    run_lib.train_and_evaluate(
      run_lib.for_category(config, 'surface'), str(tmp_path)
    )
  assert 'no checkpoint yet' in str(error.value)
  assert os.listdir(tmp_path / 'checkpoints') == []


# Evaluating again, and the command line.


def _main(arguments, cwd, cache):
  return subprocess.run(
    [sys.executable, '-m', 'dmdd_jax.main', *arguments],
    cwd=cwd,
    env=program_helpers.environment(cache),
    capture_output=True,
    text=True,
  )


def test_a_workdir_alone_is_evaluated_elsewhere(
  finished, files, tmp_path, cache
):
  """Copied to another place, with neither the first one nor the teacher."""
  away = tmp_path / 'away'
  expected = {
    name: _measured(_read(finished / name / 'results.json'))
    for name in ('surface', 'twin')
  }
  shutil.copytree(finished, tmp_path / 'copy')
  for path in (tmp_path / 'copy').rglob('results.*'):
    os.remove(path)
  for hidden in (finished, files / 'teacher.npz'):
    os.rename(hidden, f'{hidden}.hidden')
  try:
    os.rename(tmp_path / 'copy', away)
    done = _main(['--mode', 'evaluate', '--workdir', 'away'], tmp_path, cache)
  finally:
    for hidden in (finished, files / 'teacher.npz'):
      os.rename(f'{hidden}.hidden', hidden)
  assert done.returncode == 0, done.stderr
  assert 'tensorflow' not in done.stderr.lower()  # It is not even imported.
  table = _read(away / 'results.json')
  for name, results in expected.items():
    again = _read(away / name / 'results.json')
    assert _measured(again) == results
    assert table[name]['pixel_auroc'] == results['pixel_auroc']
    assert list((away / name / 'pictures').glob('*.png'))
    assert f'| {name} | {_image_auroc(again)} |' in done.stdout


def test_data_that_moved_are_evaluated_where_they_are(
  finished, files, tmp_path
):
  """And an older checkpoint is not the newest; both leave the run alone."""
  before = _snapshot(finished)
  shutil.copytree(files / 'data', tmp_path / 'data')
  os.rename(files / 'data', files / 'hidden')
  folder, found = finished / 'surface', {}
  try:
    with pytest.raises(FileNotFoundError, match='data'):
      run_lib.evaluate_workdir(folder, tmp_path / 'out')
    for step in (4, 6):
      found[step] = run_lib.evaluate_workdir(
        folder,
        tmp_path / 'out',
        changes={'data.root': str(tmp_path / 'data'), 'eval.pictures': 0},
        step=step,
      )
  finally:
    os.rename(files / 'hidden', files / 'data')
  expected = _read(folder / 'results.json')
  assert all(found[6][key] == expected[key] for key in METRICS)
  assert any(found[4][key] != expected[key] for key in METRICS)
  assert found[4]['step'] == 4
  assert _read(tmp_path / 'out' / 'results.json')['step'] == 6
  with pytest.raises(checkpoint.CheckpointError, match=r'step 3 .*\[2, 4, 6\]'):
    run_lib.evaluate_workdir(folder, tmp_path / 'out', step=3)
  assert _snapshot(finished) == before


def test_a_folder_without_checkpoints_says_so(tmp_path):
  with pytest.raises(checkpoint.CheckpointError, match='--mode train'):
    run_lib.evaluate_run(tmp_path)


def test_the_demo_command_runs_to_its_tables(tmp_path, cache):
  """`main --config configs/demo.py`, with less of everything."""
  changes = {
    'data.image_size': 32,
    'head.width': 4,
    'head.dilations': '(1, 2)',
    'train.batch_size': 4,
    'train.total_steps': 2,
    'train.distill_steps': 1,
    'eval.pictures': 1,
    'eval.batch_size': 4,
  }
  path = os.path.join(program_helpers.REPOSITORY, 'configs', 'demo.py')
  overrides = [f'--config.{name}={value}' for name, value in changes.items()]
  done = _main(['--config', path, *overrides], tmp_path, cache)
  assert done.returncode == 0, done.stderr
  folder = tmp_path / 'runs' / 'demo'
  results = _read(folder / 'surface' / 'results.json')
  assert f'| surface | {_image_auroc(results)} |' in done.stdout
  assert 'results: runs/demo/results.md' in done.stdout
  assert list(folder.glob('*/pictures/*.png'))
  # Progress with the phase, the rate and the time left; the parameters.
  assert 'step 2/2' in done.stderr and 'steps/s, 0:00:00 left' in done.stderr
  assert 'distill' in done.stderr and 'segment' in done.stderr
  assert 'Total: ' in done.stderr
  # No texture folder is given: the log says what is used instead.
  assert 'procedural textures' in done.stderr
