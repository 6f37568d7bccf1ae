"""The configuration files: complete, commented, and every field read."""

import ast
import glob
import importlib
import json
import os
import sys

import ml_collections
import program_helpers
import pytest

from configs import default
from configs import mvtec
from configs import mvtec_cpu
from dmdd_jax import config as config_lib
from dmdd_jax import run as run_lib
from dmdd_jax.models import dmdd
from dmdd_jax.training import checkpoint

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = sorted(
  os.path.splitext(os.path.basename(path))[0]
  for path in glob.glob(os.path.join(REPOSITORY, 'configs', '[!_]*.py'))
)
# The 15 of Bergmann et al., CVPR 2019.
MVTEC_AD = [
  *('bottle', 'cable', 'capsule', 'carpet', 'grid', 'hazelnut', 'leather'),
  *('metal_nut', 'pill', 'screw', 'tile', 'toothbrush', 'transistor'),
  *('wood', 'zipper'),
]


def _flatten(tree, prefix=''):
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def _fields(config):
  """All fields but `per_category`, whose keys are names of categories."""
  tree = {k: v for k, v in config.to_dict().items() if k != 'per_category'}
  return _flatten(tree)


# Files.


def test_the_files_the_readme_names_are_there():
  assert {'default', 'mvtec', 'demo'} <= set(FILES)


@pytest.mark.parametrize('name', FILES)
def test_a_file_loads_and_has_the_default_fields(name):
  config = importlib.import_module(f'configs.{name}').get_config()
  assert isinstance(config, ml_collections.ConfigDict)
  expected = _fields(default.get_config())
  found = _fields(config)
  assert found.keys() == expected.keys()
  for field, value in found.items():
    assert isinstance(value, type(expected[field])), field
  config_lib.check(config)


@pytest.mark.parametrize('name', FILES)
def test_a_file_survives_json(name):
  """A checkpoint holds it as JSON and is compared with the file again."""
  config = importlib.import_module(f'configs.{name}').get_config()
  found = json.loads(json.dumps(config.to_dict(), allow_nan=False))
  checkpoint.check_config('here', found, config)
  again = ml_collections.ConfigDict(found)
  assert dmdd.from_config(again) == dmdd.from_config(config)


def test_the_names_others_rely_on():
  config = default.get_config()
  for field in (
    'seed',
    'dtype',
    'data.root',
    'data.textures',
    'data.image_size',
    'teacher.arch',
    'teacher.weights',
    'student.trunk',
    'train.batch_size',
    'train.total_steps',
    'train.distill_steps',
  ):
    assert field in _fields(config), field


def test_every_call_makes_a_new_config():
  default.get_config().train.student.learning_rate = 7.0
  assert default.get_config().train.student.learning_rate != 7.0
  mvtec.get_config().per_category.screw.synthesis.foreground = 'off'
  assert mvtec.get_config().per_category.screw.synthesis.foreground == 'otsu'


# Every field is commented and read.


def _field_lines(source):
  """Line numbers of the assignments to a field, but for sub-configs."""
  lines = []
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Assign):
      continue
    target, value = node.targets[0], node.value
    is_part = (
      isinstance(value, ast.Call)
      and isinstance(value.func, ast.Name)
      and not value.args
    )
    if isinstance(target, ast.Attribute) and not is_part:
      lines.append((node.lineno, ast.unparse(target)))
  return sorted(lines)


def test_every_field_is_commented():
  """A comment stands above it, or above a field on the line before."""
  with open(default.__file__) as file:
    source = file.read()
  lines, fields = source.splitlines(), _field_lines(source)
  assert len(fields) > 50
  numbers = {number for number, _ in fields}
  for number, name in fields:
    above = number - 1
    while above in numbers:
      above -= 1
    assert lines[above - 1].strip().startswith('#'), f'{name}, line {number}'


# Fields that a training of images in MVTec AD's layout does not read.
ELSEWHERE = {
  *('data.normal', 'data.defect', 'data.masks', 'data.test_normal'),  # folder
  *('data.test_fraction', 'data.test_seed'),  # Layouts without a split.
  *('data.generate', 'mesh.category_groups'),  # train_run, before training.
  # Of Muon, and the test trains by Adam.
  *(f'train.{part}.muon_learning_rate' for part in ('student', 'head')),
}


def _record_reads(monkeypatch):
  """The set that gets (fields of a part, field) when the program reads one.

  Whole copies (`to_dict`) do not count, nor does `config.check`.
  """
  read = set()
  original = ml_collections.ConfigDict.__getitem__

  def getitem(self, key):
    frame = sys._getframe(1)
    while frame.f_code.co_name in ('__getattr__', '__getitem__'):
      frame = frame.f_back
    module = frame.f_globals['__name__']
    if module.startswith('dmdd_jax.') and module != 'dmdd_jax.config':
      read.add((frozenset(self.keys()), key))
    return original(self, key)

  monkeypatch.setattr(ml_collections.ConfigDict, '__getitem__', getitem)
  return read


@pytest.mark.usefixtures('small_network')
def test_a_training_reads_every_field(tmp_path, monkeypatch):
  program_helpers.write_data(tmp_path)
  config = program_helpers.tiny_run(
    tmp_path,
    train__total_steps=2,
    train__distill_steps=1,
    synthesis__foreground='otsu',
  )
  read = _record_reads(monkeypatch)
  run_lib.train_and_evaluate(config, str(tmp_path / 'run'))
  unread = set()
  for field in _fields(config):
    part, _, name = field.rpartition('.')
    keys = config
    for key in part.split('.') if part else ():
      keys = keys[key]
    if (frozenset(keys.keys()), name) not in read:
      unread.add(field)
  assert unread == ELSEWHERE


# MVTec AD.


TEXTURES = {'carpet', 'grid', 'leather', 'tile', 'wood'}


@pytest.mark.parametrize(
  'module, object_trunk', [(mvtec, 'reverse'), (mvtec_cpu, 'encoder')]
)
def test_textures_are_learned_by_the_encoder_and_adam(module, object_trunk):
  config = module.get_config()
  for name in MVTEC_AD:
    single = run_lib.for_category(config, name)
    expected = (object_trunk, 'muon')
    if name in TEXTURES:
      expected = ('encoder', 'adam')
    assert (single.student.trunk, single.train.student.kind) == expected


def test_a_flag_of_the_small_budget_changes_the_trunk_of_all():
  config = mvtec_cpu.get_config()
  config.student.trunk = 'reverse'
  trunks = {run_lib.for_category(config, n).student.trunk for n in MVTEC_AD}
  assert trunks == {'reverse'}


def test_the_categories_are_mvtec_ads():
  assert sorted(mvtec.CATEGORIES) == sorted(MVTEC_AD)
  assert run_lib.categories(mvtec.get_config()) == tuple(MVTEC_AD)


def test_one_category_or_a_comma_list():
  assert mvtec.get_config('screw').data.category == 'screw'
  config = mvtec.get_config(' screw, toothbrush,')
  assert run_lib.categories(config) == ('screw', 'toothbrush')


def test_an_unknown_category_lists_all_of_them():
  with pytest.raises(ValueError) as error:
    mvtec.get_config('screw,nut,bolt')
  message = str(error.value)
  assert 'nut' in message and 'bolt' in message
  assert all(name in message for name in MVTEC_AD)


def test_no_category_says_how_to_name_one():
  config = default.get_config()
  config.data.category = ' , '
  with pytest.raises(ValueError, match=r'--config\.data\.category'):
    run_lib.categories(config)


# Per category.


def test_a_categorys_row_is_applied_and_nothing_else():
  config = mvtec.get_config('screw,leather')
  config.seed = 5
  before = config.to_json()
  screw = run_lib.for_category(config, 'screw')
  leather = run_lib.for_category(config, 'leather')
  assert config.to_json() == before
  rows = (
    {'synthesis.foreground': 'otsu'},
    {'student.trunk': 'encoder', 'train.student.kind': 'adam'},
  )
  for single, name, row in zip((screw, leather), ('screw', 'leather'), rows):
    assert single.data.category == name
    assert 'per_category' not in single
    expected = {**_fields(config), 'data.category': name, **row}
    assert _fields(single) == expected
  assert config.synthesis.foreground == 'off'
  assert config.train.student.kind == 'muon'


def test_an_override_of_a_row_counts():
  config = mvtec.get_config('screw')
  config.per_category.screw.synthesis.foreground = 'off'
  assert run_lib.for_category(config, 'screw').synthesis.foreground == 'off'


def test_a_category_without_a_row_is_the_config_itself():
  config = default.get_config()
  assert _fields(run_lib.for_category(config, 'mine')) == {
    **_fields(config),
    'data.category': 'mine',
  }


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'synthesis': {'rotate_80': True}}, r'per_category\.mine.*rotate_80'),
    ({'synthesys': {'rotate_90': True}}, r'per_category\.mine.*synthesys'),
    ({'synthesis': {'rotate_90': 'yes'}}, r'per_category\.mine.*bool'),
  ],
)
def test_a_row_that_does_not_fit_is_named(row, message):
  config = default.get_config()
  config.per_category.mine = row
  with pytest.raises(ValueError, match=message):
    run_lib.for_category(config, 'mine')
