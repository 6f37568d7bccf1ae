"""`dmdd_jax.train` and what it returns, beside the command line."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import jax
from matplotlib import figure
from matplotlib import text as text_lib
import numpy as np
import program_helpers
import pytest

import dmdd_jax
from dmdd_jax import api
from dmdd_jax import budget
from dmdd_jax import reproduce
from dmdd_jax import trainer as trainer_lib
from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.export import write as export_lib
from dmdd_jax.scoring import trained as trained_lib

pytestmark = pytest.mark.usefixtures('four_channels', 'compiled_once')

FIELDS = {
  'data.image_size': 32,
  'data.holdout_min': 2,
  'teacher.weights': 'random',
  'student.trunk': 'encoder',
  'head.width': 4,
  'head.dilations': (1, 2),
  'train.student.kind': 'adam',
  'train.batch_size': 4,
  'train.checkpoint_every': 2,
  'train.log_every': 2,
  'train.keep_checkpoints': 3,
  'eval.batch_size': 4,
  'eval.pictures': 1,
}
STEPS = {'train__total_steps': 6, 'train__distill_steps': 4}


@pytest.fixture(scope='module')
def surface(tmp_path_factory):
  """The folder of generated images, in MVTec AD's layout."""
  return program_helpers.write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def good(surface):
  return os.path.join(surface, 'train', 'good')


@pytest.fixture(scope='module')
def inspector(good, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'parts'
  return dmdd_jax.train(good, workdir, config=FIELDS, progress=False, **STEPS)


def _run(words, cache):
  """Runs `python -m dmdd_jax.main ...` with the small network: its log."""
  program = os.path.join(os.path.dirname(__file__), 'small_program.py')
  process = subprocess.run(
    [sys.executable, program, *words[1:]],
    env=program_helpers.environment(cache) | {'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert process.returncode == 0, process.stdout
  return process.stdout


def _results(workdir):
  with open(os.path.join(workdir, 'folder', 'results.json')) as file:
    return json.load(file)


def _assert_same_state(folder, other):
  states = [trained_lib.load_workdir(f)[1] for f in (folder, other)]
  assert int(states[0].step) == 6
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_either_goes_on_where_the_other_stopped(
  good, surface, inspector, cache, tmp_path, monkeypatch
):
  """From Python, stopped at step 3, and on from the command line; and back."""
  from_python, again = str(tmp_path / 'python'), str(tmp_path / 'again')
  test = {
    'data__test_normal': os.path.join(surface, 'test', 'good'),
    'data__defect': os.path.join(surface, 'test', 'scratch'),
    'data__masks': os.path.join(surface, 'ground_truth', 'scratch'),
  }
  options = {'config': FIELDS, 'progress': False, **STEPS, **test}

  def stop(self, first, original=trainer_lib.Trainer.batches):
    for step, batch in enumerate(original(self, first), first):
      if step == 3:
        raise KeyboardInterrupt
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(trainer_lib.Trainer, 'batches', stop)
    with pytest.raises(KeyboardInterrupt):
      dmdd_jax.train(good, from_python, **options)
  config = api._configure(
    {k.replace('__', '.'): v for k, v in {**STEPS, **test}.items()}
    | FIELDS
    | {'data.normal': good},
    from_python,
  )
  log = _run(shlex.split(api.command_line(config, from_python)), cache)
  assert 'restored step 2' in log
  # The test images take no part in the training.
  _assert_same_state(from_python, inspector.folder)

  # The command in the results, run again, is a training from a shell alone.
  before = _results(from_python)
  assert before['command'] == before['training_command']
  after = reproduce.rerun(before, again)
  assert after['image_auroc'] is not None
  assert reproduce.differences(before, after) == {}
  # Now as if it had been stopped after step 2.
  os.remove(os.path.join(again, 'folder', 'results.json'))
  for step in ('4', '6'):
    shutil.rmtree(os.path.join(again, 'folder', 'checkpoints', step))
  assert dmdd_jax.train(good, again, **options).step == 6
  _assert_same_state(again, inspector.folder)
  assert reproduce.differences(before, _results(again)) == {}


def test_a_finished_training_is_loaded(good, inspector, monkeypatch):
  monkeypatch.setattr(trainer_lib, 'Trainer', None)
  again = dmdd_jax.train(
    good, inspector.workdir, config=FIELDS, progress=False, **STEPS
  )
  paths = [os.path.join(good, '000.png')]
  assert again(paths)[0].score == inspector(paths)[0].score
  assert dmdd_jax.load(inspector.workdir).folder == inspector.folder
  results = _results(inspector.workdir)
  assert results['command'].startswith('python -m dmdd_jax.main --config ')
  assert f'--workdir {inspector.workdir}' in results['command']


def test_images_in_any_form_have_the_same_scores(surface, inspector):
  folder = os.path.join(surface, 'test', 'good')
  paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
  arrays = [images_lib.read_image(path, None) for path in paths]
  expected = [inspector([path])[0].score for path in paths]
  for images in (folder, f'{folder}/*.png', paths, arrays, np.stack(arrays)):
    scores = [result.score for result in inspector(images)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
  for image in (paths[0], arrays[0]):  # One image alone.
    [result] = inspector(image)
    assert result.score == expected[0]


def test_a_list_trains_as_its_folder_does(good, inspector, tmp_path):
  paths = [os.path.join(good, name) for name in os.listdir(good)]
  arguments = {'config': FIELDS, 'progress': False, **STEPS}
  listed = dmdd_jax.train(paths, tmp_path / 'run', **arguments)
  _assert_same_state(listed.folder, inspector.folder)
  with pytest.raises(files.DatasetError, match='holds other images'):
    dmdd_jax.train(paths[1:], tmp_path / 'run', **arguments)
  assert dmdd_jax.train(paths[::-1], tmp_path / 'run', **arguments).step == 6


def test_evaluation_of_a_folder_and_of_arrays(surface, inspector, tmp_path):
  test, truth = (os.path.join(surface, n) for n in ('test', 'ground_truth'))
  run = _results(inspector.workdir)
  metrics = inspector.evaluate(test, truth)
  assert metrics['image_auroc'] == metrics['image_auroc']  # Not NaN.
  # The run's own results stay.
  assert _results(inspector.workdir) == run
  report = os.path.join(inspector.folder, 'evaluation', 'report.html')
  assert inspector.report() == report and os.path.exists(report)
  assert "evaluate('" in metrics['command']
  assert metrics['training_command'] == run['command']

  def read(kind):
    paths = files.images(os.path.join(test, kind))
    masks = [
      os.path.join(truth, kind, f'{files.stem(path)}_mask.png')
      for path in paths
    ]
    images = [images_lib.read_image(path, None) for path in paths]
    if kind == 'good':
      return images, None
    return images, [images_lib.read_image(m, None)[..., 0] for m in masks]

  kinds = {kind: read(kind) for kind in files.folders(test)}
  again = inspector.evaluate(
    {kind: images for kind, (images, _) in kinds.items()},
    {kind: masks for kind, (_, masks) in kinds.items() if masks},
    output=tmp_path / 'out',
  )
  assert reproduce.differences(metrics, again) == {}
  assert os.path.dirname(inspector.report()) == str(tmp_path / 'out')
  smoothed = inspector.evaluate(
    test, truth, output=tmp_path / 'smooth', smoothing_sigma=4.0
  )
  assert smoothed['pixel_auroc'] != metrics['pixel_auroc']


def test_the_runs_own_test_and_report(inspector):
  dmdd_jax.load(inspector.folder).report()
  again = dmdd_jax.load(inspector.workdir)
  metrics = again.evaluate()
  assert np.isnan(metrics['image_auroc'])  # The run has no test images.
  assert again.report() == os.path.join(inspector.workdir, 'report.html')
  command = f'--mode evaluate --workdir {inspector.folder}'
  assert _results(inspector.workdir)['command'].endswith(command)


def test_a_figure_of_a_file_or_an_array(surface, inspector):
  path = os.path.join(surface, 'test', 'dent', '000.png')
  grey = images_lib.read_image(path, None)[..., 0]
  for image, name in ((path, '000.png'), (grey, 'array')):
    picture = inspector.show(image)
    assert isinstance(picture, figure.Figure)
    words = [text.get_text() for text in picture.findobj(text_lib.Text)]
    [result] = inspector(image)
    assert name in ' '.join(words)
    assert f'score {result.score:.2f}, {result.verdict}' in ' '.join(words)


@pytest.mark.parametrize(
  'name, file_format', [('a.onnx', 'onnx'), ('a.dmdd', 'stablehlo')]
)
def test_the_suffix_says_what_is_exported(
  inspector, monkeypatch, tmp_path, name, file_format
):
  monkeypatch.setattr(export_lib, 'export', lambda *arguments: arguments)
  path = str(tmp_path / name)
  expected = (inspector.folder, file_format, path, None, 6)
  assert inspector.export(tmp_path / name) == expected


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'train__batchsize': 4}, "'batchsize'. Did you mean 'batch_size'"),
    ({'config': {'train': {'steps': 4}}}, "there is no field 'steps'"),
    ({'train__batch_size': 'four'}, "config.train.batch_size is 'four'"),
    ({'train__batch_size': 0}, 'config.train.batch_size is 0; it must be'),
    ({'minutes': 1, 'train__total_steps': 4}, 'minutes picks config.train.tot'),
    ({'minutes': 0}, 'minutes is 0; it must be'),
    ({'data__category': 'a,b'}, 'one category in one process'),
  ],
)
def test_what_cannot_be_trained_is_named(good, tmp_path, changes, message):
  with pytest.raises(ValueError) as error:
    dmdd_jax.train(good, tmp_path / 'run', **changes)
  assert message in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='config.data.normal'):
    dmdd_jax.train(tmp_path / 'none', tmp_path / 'run', config=FIELDS)


def test_wrong_options_of_an_evaluation_are_named(inspector, surface):
  with pytest.raises(ValueError, match='config.eval.bootstraps is no field'):
    inspector.evaluate(os.path.join(surface, 'test'), bootstraps=3)
  with pytest.raises(ValueError, match='masks is given without images'):
    inspector.evaluate(masks=surface)


def test_minutes_pick_the_steps_once(good, tmp_path, monkeypatch, capsys):
  seconds = {'distill': 1.0, 'segment': 1.0}
  monkeypatch.setattr(budget, 'step_seconds', lambda config: seconds)
  # Six steps of a second, .8 of them of the student.
  first = dmdd_jax.train(good, tmp_path / 'run', minutes=0.1, config=FIELDS)
  assert first.step == 6 and first.config.train.distill_steps == 5
  assert '6/6' in capsys.readouterr().err  # The bar.
  # On a faster machine, or with more time, the workdir keeps its steps.
  monkeypatch.setattr(budget, 'step_seconds', None)
  again = dmdd_jax.train(good, tmp_path / 'run', minutes=20, config=FIELDS)
  assert again.step == 6 and capsys.readouterr().err.count('step/s') == 0
  command = _results(tmp_path / 'run')['command']
  assert '--config.train.total_steps=6' in command
  assert '--config.train.distill_steps=5' in command


def test_the_package_is_cheap_to_import():
  code = (
    'import sys, dmdd_jax; print(dmdd_jax.__all__);'
    "sys.exit(bool({'jax', 'tensorflow', 'numpy'} & {*sys.modules}))"
  )
  environment = {**os.environ, 'PYTHONPATH': program_helpers.REPOSITORY}
  subprocess.run([sys.executable, '-c', code], env=environment, check=True)
  with pytest.raises(AttributeError, match="no attribute 'trains'"):
    dmdd_jax.trains  # noqa: B018
