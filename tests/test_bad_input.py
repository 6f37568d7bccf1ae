"""What a user can get wrong ends in one clear line, or in what is asked for.

The command lines run in processes forked from one that has imported the
program: the same as `python -m dmdd_jax.main`, without six seconds each.
"""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import program_helpers
import pytest

from configs import mvtec
from dmdd_jax import run as run_lib
from dmdd_jax import trainer as trainer_lib

pytestmark = pytest.mark.usefixtures('compiled_once')

# Runs {name: arguments} from stdin, each in a fork; prints {name: [status,
# stdout, stderr]}.
_FORKS = """
import json, os, runpy, sys, tempfile
import jax, absl.app, ml_collections.config_flags
from dmdd_jax import evaluate, train
outcomes = {}
for name, arguments in json.load(sys.stdin).items():
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    child = os.fork()
    if not child:
      os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
      sys.argv = ['dmdd_jax/main.py', *arguments]
      code = 70
      try:
        runpy.run_module('dmdd_jax.main', run_name='__main__')
        code = 0
      except SystemExit as end:
        if isinstance(end.code, str):
          print(end.code, file=sys.stderr)
        code = 1 if isinstance(end.code, str) else end.code or 0
      except BaseException:
        import traceback
        traceback.print_exc()
      finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    texts = []
    for file in (out, err):
      file.seek(0)
      texts.append(file.read().decode())
    outcomes[name] = [os.waitstatus_to_exitcode(status), *texts]
print(json.dumps(outcomes))
"""


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """A folder with the category `surface`, nothing wrong with it."""
  root = tmp_path_factory.mktemp('good')
  program_helpers.write_data(root)
  return root


def _remove_good(folder):
  shutil.rmtree(folder / 'train' / 'good')


def _empty_good(folder):
  for path in (folder / 'train' / 'good').glob('*'):
    path.unlink()


def _cut(path, size):
  path.write_bytes(path.read_bytes()[:size])


def _resize_mask(folder):
  mask = Image.fromarray(np.zeros((16, 24), np.uint8))
  mask.save(folder / 'ground_truth' / 'stain' / '000_mask.png')


TRAIN_IMAGE = 'train/good/003.png'
TEST_IMAGE = 'test/stain/000.png'
MASK = 'ground_truth/stain/000_mask.png'
SKIP = '--config.data.on_bad_image=skip'
# {name: (what is done to a copy of the category, what the error must hold)}.
DAMAGES = {
  'no_train_good': (_remove_good, ('train/good', '--config.data.root')),
  'no_image_in_train_good': (_empty_good, ('train/good', '--config.data.root')),
  'corrupt_image': (
    lambda folder: (folder / TRAIN_IMAGE).write_bytes(b'no image at all'),
    (TRAIN_IMAGE, SKIP),
  ),
  'truncated_image': (
    lambda folder: _cut(folder / TRAIN_IMAGE, 900),
    (TRAIN_IMAGE, SKIP),
  ),
  'empty_image': (
    lambda folder: _cut(folder / TRAIN_IMAGE, 0),
    (TRAIN_IMAGE, SKIP),
  ),
  'truncated_test_image': (
    lambda folder: _cut(folder / TEST_IMAGE, 900),
    (TEST_IMAGE, SKIP),
  ),
  'mask_of_another_size': (_resize_mask, (MASK, '24x16', '32x32', SKIP)),
  'mask_missing': (
    lambda folder: (folder / MASK).unlink(),
    (TEST_IMAGE, '000_mask.png', 'Add the masks'),
  ),
}

# {name: (arguments, what the error must hold)}, {folder} being a temporary one;
# the arguments come after those of a run that has no fault.
DATA = {
  'data_root_missing': (
    ['--config.data.root=/nowhere/at/all'],
    ('/nowhere/at/all', '--config.data.root'),
  ),
  'data_root_not_given': (['--config.data.root='], ('--config.data.root',)),
  'data_root_a_file': (
    ['--config.data.root={folder}/a_file'],
    ('{folder}/a_file', '--config.data.root'),
  ),
  'category_not_given': (
    ['--config.data.category='],
    ('--config.data.category',),
  ),
  'category_missing': (
    ['--config.data.category=screw'],
    ("'screw'", 'categories there are: surface'),
  ),
  'textures_missing': (
    ['--config.data.textures=/nowhere/dtd'],
    ('/nowhere/dtd', '--config.data.textures'),
  ),
  'generate_something_else': (
    ['--config.data.generate=wood'],
    ('config.data.generate', 'wood', 'surface'),
  ),
  'workdir_below_a_file': (
    ['--workdir={folder}/a_file/work'],
    ('{folder}/a_file/work', '--workdir'),
  ),
  'workdir_a_file': (
    ['--workdir={folder}/a_file'],
    ('{folder}/a_file', '--workdir'),
  ),
  'evaluate_nothing': (
    ['--mode=evaluate', '--workdir={folder}/nothing'],
    ('{folder}/nothing', '--mode train'),
  ),
}
WEIGHTS = (
  *('gone.safetensors', 'damaged.safetensors', 'short.npz', 'other.npz'),
  'model.pth',
)
CONFIGS = {
  'unknown_override': (
    ['--config.train.batchsize=3'],
    ('--config.train.batchsize', "'batch_size'", 'checkpoint_every'),
  ),
  'unknown_part': (
    ['--config.trian.batch_size=3'],
    ('--config.trian', "'train'", 'synthesis'),
  ),
  'override_of_a_value': (['--config.seed.first=3'], ('--config.seed.first',)),
  'override_in_two_words': (
    ['--config.train.stepz', '3'],
    ('--config.train.stepz', 'total_steps'),
  ),
  'integer_expected': (
    ['--config.train.batch_size=many'],
    ('--config.train.batch_size=many',),
  ),
  'number_expected': (
    ['--config.loss.aim_weight=much'],
    ('--config.loss.aim_weight=much',),
  ),
  'bool_expected': (
    ['--config.synthesis.rotate_90=maybe'],
    ('--config.synthesis.rotate_90=maybe',),
  ),
  'integers_expected': (
    ['--config.head.dilations=3x'],
    ('config.head.dilations', 'positive integers'),
  ),
  'config_file_missing': (
    ['--config=configs/nowhere.py'],
    ('configs/nowhere.py', '--config'),
  ),
  'unknown_category': (
    ['--config=configs/mvtec.py:screw,nut'],
    ('nut', *mvtec.CATEGORIES),
  ),
  'unknown_flag': (['--wrokdir=x'], ('wrokdir', 'workdir')),
  'unknown_mode': (['--mode=fly'], ('--mode=fly', 'evaluate')),
  'kept_features_of_turned_images': (
    [
      '--config.train.cache_teacher=True',
      '--config.synthesis.rotate_degrees=5.0',
    ],
    ('config.train.cache_teacher', 'rotate_degrees is 5.0', 'False'),
  ),
  'kept_features_of_lit_images': (
    [
      '--config.train.cache_teacher=True',
      '--config.synthesis.lighting=0.1',
    ],
    ('config.train.cache_teacher', 'lighting is 0.1', 'False'),
  ),
  'unknown_trunk': (
    ['--config.student.trunk=tree'],
    ('config.student.trunk', 'tree', 'encoder_decoder'),
  ),
  'unknown_arch': (
    ['--config.teacher.arch=resnet19'],
    ('config.teacher.arch', 'resnet19', 'wide_resnet50_2'),
  ),
  'unknown_on_bad_image': (
    ['--config.data.on_bad_image=ignore'],
    ('on_bad_image', 'ignore', 'skip'),
  ),
  'image_size_of_no_multiple': (
    ['--config.data.image_size=100'],
    ('config.data.image_size', '32'),
  ),
  'share_out_of_range': (
    ['--config.synthesis.clean_share=7'],
    ('config.synthesis.clean_share', '7'),
  ),
  'steps_out_of_range': (
    ['--config.train.distill_steps=7000'],
    ('config.train.distill_steps', '7000', '5000'),
  ),
}
CASES = {
  **DATA,
  **CONFIGS,
  **{
    name: (['--config.data.root={folder}/' + name], texts)
    for name, (_, texts) in DAMAGES.items()
  },
  **{
    f'weights_{name}': (
      ['--config.teacher.weights={folder}/' + name],
      ('{folder}/' + name, '--config.teacher.weights'),
    )
    for name in WEIGHTS
  },
}


def _write_files(folder, good):
  """What the cases name below {folder}."""
  (folder / 'a_file').write_text('')
  for name, (damage, _) in DAMAGES.items():
    shutil.copytree(good, folder / name)
    damage(folder / name / 'surface')
  (folder / 'damaged.safetensors').write_bytes(b'\xff' * 100)
  (folder / 'model.pth').write_bytes(b'x')
  for name in ('other.npz', 'short.npz'):
    np.savez(folder / name, **{'conv1.weight': np.ones((64, 3, 7, 7))})
  _cut(folder / 'short.npz', 5000)


@pytest.fixture(scope='module')
def outcomes(good, tmp_path_factory, cache):
  """{name: (exit status, stdout, stderr, texts expected)} of all cases."""
  folder = tmp_path_factory.mktemp('cases')
  _write_files(folder, good)
  sound = [
    '--config=configs/default.py',
    f'--config.data.root={good}',
    '--config.data.category=surface',
    '--config.data.image_size=32',
    '--config.teacher.weights=random',
    f'--workdir={folder}/work',
  ]
  commands = {
    name: sound + [word.format(folder=folder) for word in arguments]
    for name, (arguments, _) in CASES.items()
  }
  done = subprocess.run(
    [sys.executable, '-c', _FORKS],
    input=json.dumps(commands),
    cwd=program_helpers.REPOSITORY,
    env=program_helpers.environment(cache),
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  texts = {
    name: [text.format(folder=folder) for text in texts]
    for name, (_, texts) in CASES.items()
  }
  found = json.loads(done.stdout)
  return {name: (*found[name], texts[name]) for name in CASES}


@pytest.mark.parametrize('name', CASES)
def test_a_fault_is_one_clear_error(outcomes, name):
  """Status 1, and the last thing said is what is wrong and the way out.

  Before it stands at most what the program logs itself: no traceback, nothing
  on stdout, and nothing of TensorFlow's, which greets whoever imports it.
  """
  status, stdout, stderr, texts = outcomes[name]
  before, error, message = stderr.partition('error: ')
  assert error and status == 1, stderr
  for text in texts:
    assert text in message
  assert stdout == '' and 'Traceback' not in stderr
  logged = re.compile(r'[IW]\d{4} [\d:.]+ \d+ (\w+)\.py:\d+\] ')
  for line in before.strip().splitlines():
    assert logged.match(line), line


def test_one_command_line_as_users_run_it(good, tmp_path, cache):
  """The same as in a fork."""
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'dmdd_jax.main', '--config=configs/default.py'),
      *(f'--config.data.root={good}', '--config.data.category=nut'),
      f'--workdir={tmp_path}',
    ],
    cwd=program_helpers.REPOSITORY,
    env=program_helpers.environment(cache),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and done.stdout == ''
  assert done.stderr.splitlines()[-1].startswith('error: Data root')
  assert 'Traceback' not in done.stderr


# What is no error.


def _train(root, workdir, **changes):
  """A run with one checkpoint; returns what stands in results.json."""
  config = program_helpers.tiny_run(
    root, train__checkpoint_every=6, eval__pictures=0, **changes
  )
  run_lib.run_categories(config, str(workdir))
  return json.loads((workdir / 'surface' / 'results.json').read_text())


def test_bad_images_are_skipped_on_request(good, tmp_path, monkeypatch):
  """One in training, one in the test set, one with a mask that does not fit."""
  root = tmp_path / 'data'
  shutil.copytree(good, root)
  _cut(root / 'surface' / TRAIN_IMAGE, 900)
  _cut(root / 'surface' / 'test' / 'dent' / '000.png', 0)
  _resize_mask(root / 'surface')
  seen = {}
  load_data = trainer_lib.load_data

  def look(config):
    seen['data'] = load_data(config)
    return seen['data']

  monkeypatch.setattr(trainer_lib, 'load_data', look)
  results = _train(root, tmp_path / 'run', data__on_bad_image='skip')
  data = seen['data']
  assert len(data.images) + len(data.held_out) == 7
  assert 0.0 <= results['pixel_auroc'] <= 1.0
  assert [record.defect for record in data.dataset.test] == [
    *('good', 'good', 'good', 'scratch', 'thread')
  ]


def test_without_defects_metrics_are_null_with_a_reason(good, tmp_path):
  root = tmp_path / 'data'
  shutil.copytree(good, root)
  for defect in ('scratch', 'stain', 'dent', 'thread'):
    shutil.rmtree(root / 'surface' / 'test' / defect)
  results = _train(root, tmp_path / 'run')
  for part in (results, results['maps_mean']):
    for key in ('image_auroc', 'pixel_auroc', 'au_pro'):
      assert part[key] is None
    assert part['undefined']['image_auroc'] == 'no defective images'
    assert 'no defect pixels' in part['undefined']['pixel_auroc']
  # What needs good images alone is there.
  rate = results['at_threshold']['image_false_positive_rate']
  assert 0.0 <= rate <= 1.0
  table = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert table['mean']['image_auroc'] is None
  assert (tmp_path / 'run' / 'results.csv').exists()


def test_one_training_image_and_nothing_to_test_is_no_crash(good, tmp_path):
  """Nothing can be held out, nothing measured; the reasons are given."""
  root = tmp_path / 'data'
  shutil.copytree(good, root)
  shutil.rmtree(root / 'surface' / 'test')
  for path in sorted((root / 'surface' / 'train' / 'good').glob('*'))[1:]:
    path.unlink()
  results = _train(root, tmp_path / 'run')
  assert results['image_auroc'] is None and results['pixel_auroc'] is None
  assert results['undefined']['image_auroc'] == 'no images'
  assert results['calibration']['images'] == 0
  assert results['at_threshold']['image_threshold'] is None
