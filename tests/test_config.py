"""Every impossible field is refused at once, by its name."""

import math
import re

import ml_collections
import pytest

from configs import ablation
from configs import default
from dmdd_jax import config as config_lib
from dmdd_jax import run as run_lib

NAN, INF = math.nan, math.inf
NO_CHOICE = ('nonsense', '', None, 3)
NO_FLAG = ('yes', None, 1, 0.0)
NO_SHARE = (-0.01, 1.01, NAN, INF, 'half', None, True)
NOT_POSITIVE = (0.0, -1.0, NAN, INF, '1', None, True)
NEGATIVE = (-1e-6, NAN, INF, '1', None, True)
NO_COUNT = (0, -1, 1.5, NAN, '1', None, True)
NO_COUNT_OR_ZERO = (-1, 1.5, NAN, '1', None, True)
NO_TEXT = (None, 3, False)
NO_DEGREES = (-1.0, 361.0, NAN, INF, '90', True)
OPTIMIZER = {
  'kind': ('lion', *NO_CHOICE),
  'learning_rate': NOT_POSITIVE,
  'muon_learning_rate': NOT_POSITIVE,
  'warmup_fraction': NO_SHARE,
  'schedule': ('step', *NO_CHOICE),
  'b1': (1.0, *NO_SHARE),
  'b2': (1.0, *NO_SHARE),
  'weight_decay': NEGATIVE,
  'clip_norm': NEGATIVE,
}
IMPOSSIBLE = {
  'seed': (-1, 2**63 - 1, 0.5, NAN, 'one', None, True),
  'dtype': ('float16', *NO_CHOICE),
  'data.name': ('mvtec', *NO_CHOICE),
  'data.test_fraction': (0.0, 0.51, *NO_SHARE),
  'data.test_seed': (0.5, NAN, 'one', None, True),
  'data.generate': ('wood', None, 3),
  'data.max_textures': NO_COUNT_OR_ZERO,
  'data.image_size': (31, 0, -32, 100, 256.0, NAN, None),
  'data.tile_size': (-32, 16, 48, 288, 32.0, NAN, None),
  'data.tile_overlap': (0.76, *NO_SHARE),
  'data.max_pixels': (178_956_969, *NO_COUNT),
  'data.white_level': (65536, *NO_COUNT_OR_ZERO),
  'data.on_bad_image': ('ignore', *NO_CHOICE),
  'data.holdout_fraction': (0.51, *NO_SHARE),
  'data.holdout_min': NO_COUNT_OR_ZERO,
  'synthesis.threshold': (-1.01, 1.01, NAN, INF, '0', True),
  'synthesis.rotation_degrees': NO_DEGREES,
  'synthesis.opacity_max': NO_SHARE,
  'synthesis.clean_share': NO_SHARE,
  'synthesis.region_share': NO_SHARE,
  'synthesis.region_area_min': (0.5, *NO_SHARE),
  'synthesis.region_area_max': (0.01, *NO_SHARE),
  'synthesis.self_share': NO_SHARE,
  'synthesis.min_contrast': NO_SHARE,
  'synthesis.rotate_90': NO_FLAG,
  'synthesis.rotate_degrees': NO_DEGREES,
  'synthesis.lighting': NO_SHARE,
  'synthesis.foreground': ('canny', *NO_CHOICE),
  'synthesis.texture_augment': NO_FLAG,
  'teacher.arch': ('resnet19', *NO_CHOICE),
  'student.trunk': ('decoder', *NO_CHOICE),
  'student.levels': (0, 4, 2.0, None),
  'student.context': (1, 3, -2, 2.0, None),
  'student.context_width': (0, -1, 1.5, None),
  'student.extra_convs': NO_COUNT_OR_ZERO,
  'student.stop_abnormality_gradient': NO_FLAG,
  'student.remat': NO_FLAG,
  'head.kind': ('unet', *NO_CHOICE),
  'head.input': ('map', *NO_CHOICE),
  'head.width': NO_COUNT,
  'head.dilations': ((), (1, 6, 6), ('3', 'x'), (0, 6), (1.0,), (True,), 3, ''),
  'head.channel_attention': NO_FLAG,
  'head.spatial_attention': NO_FLAG,
  'head.maps_weight': NEGATIVE,
  'head.score_weight': NEGATIVE,
  'head.normality_share': NO_SHARE,
  'head.untrained_maps': NO_FLAG,
  'head.context_share': NO_SHARE,
  'head.context_fusion': ('max', *NO_CHOICE),
  'head.position_bias': NO_FLAG,
  'head.border': (4, *NO_COUNT_OR_ZERO),
  'loss.ngm_weight': NEGATIVE,
  'loss.aim_weight': NEGATIVE,
  'loss.focus': (4.01, *NEGATIVE),
  'loss.ngm_flat': NO_FLAG,
  'loss.ngm_normal_only': NO_FLAG,
  'loss.on_normal': NO_FLAG,
  'loss.aim': ('push', *NO_CHOICE),
  'loss.aim_margin': NOT_POSITIVE,
  'loss.aim_target': ('both', *NO_CHOICE),
  'loss.segmentation': ('l2', *NO_CHOICE),
  'train.batch_size': NO_COUNT,
  'train.microbatch': (5, 64, *NO_COUNT_OR_ZERO),
  'train.total_steps': (3999, *NO_COUNT),
  'train.distill_steps': (5001, *NO_COUNT_OR_ZERO),
  'train.joint': NO_FLAG,
  **{f'train.student.{name}': values for name, values in OPTIMIZER.items()},
  **{f'train.head.{name}': values for name, values in OPTIMIZER.items()},
  'train.cache_teacher': NO_FLAG,
  'train.log_every': NO_COUNT,
  'train.checkpoint_every': NO_COUNT,
  'train.keep_checkpoints': NO_COUNT,
  'calibration.image_fpr': (1.0, *NO_SHARE),
  'calibration.training_images': NO_COUNT_OR_ZERO,
  'calibration.pixel_fpr': (1.0, *NO_SHARE),
  'eval.batch_size': NO_COUNT,
  'eval.score_top_pixels': NO_COUNT,
  'eval.smoothing_sigma': NEGATIVE,
  'eval.resolutions': ((), ('full',), ('model', 'model'), 'model', None),
  'eval.intervals': NO_FLAG,
  'eval.pictures': NO_COUNT_OR_ZERO,
  'mesh.category_groups': NO_COUNT,
}
# Paths and names: what is wrong with them, the file system says.
FREE = (
  *('data.root', 'data.normal', 'data.defect', 'data.masks'),
  *('data.test_normal', 'data.category', 'data.textures', 'teacher.weights'),
)
# Two possible fields that exclude each other.
CONFLICTS = (
  {'data.tile_size': 64, 'data.image_size': 48},
  {'synthesis.region_area_min': 0.3, 'synthesis.region_area_max': 0.2},
  {'loss.ngm_weight': 0.0, 'loss.aim_weight': 0.0},
  {'loss.ngm_flat': True, 'loss.ngm_normal_only': True},
  {'head.maps_weight': 0.0, 'head.score_weight': 0.0},
  {'train.total_steps': 9, 'train.distill_steps': 10},
  {'train.batch_size': 8, 'train.microbatch': 3},
  {'train.cache_teacher': True, 'synthesis.rotate_degrees': 5.0},
  {'train.cache_teacher': True, 'synthesis.lighting': 0.1},
)


def _config(**changes):
  """The default config with {field: value} of any type."""
  tree = default.get_config().to_dict()
  for field, value in changes.items():
    *path, name = field.split('.')
    part = tree
    for key in path:
      part = part[key]
    part[name] = value
  return ml_collections.ConfigDict(tree)


def _refusal(config):
  with pytest.raises(ValueError) as error:
    config_lib.check(config)
  return str(error.value)


def test_every_field_is_here_and_has_a_rule():
  fields = config_lib.flatten(default.get_config().to_dict()).keys()
  assert {*IMPOSSIBLE, *FREE} == fields
  assert config_lib.RULES.keys() == fields


def test_the_defaults_are_possible():
  config_lib.check(default.get_config())


@pytest.mark.parametrize('field', IMPOSSIBLE)
def test_an_impossible_value_names_its_field_and_what_is_allowed(field):
  for value in IMPOSSIBLE[field]:
    (line,) = _refusal(_config(**{field: value})).splitlines()
    assert re.search(rf'\bconfig\.{re.escape(field)}\b', line), line
    assert repr(value) in line, line
    assert 'must' in line


@pytest.mark.parametrize('field', FREE)
def test_a_path_or_name_is_any_text(field):
  config_lib.check(_config(**{field: 'any text'}))
  for value in NO_TEXT:
    assert f'config.{field} is {value!r}' in _refusal(_config(**{field: value}))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('seed', 2**63 - 2),
    ('data.test_fraction', 0.5),
    ('data.max_textures', 0),
    ('data.tile_size', 256),
    ('data.tile_overlap', 0.75),
    ('data.holdout_fraction', 0),
    ('synthesis.lighting', 1.0),
    ('head.border', 3),
    ('head.dilations', [1, 2]),
    ('loss.focus', 4),
    ('train.microbatch', 16),
    ('train.distill_steps', 5000),
    ('train.head.b1', 0.0),
    ('calibration.image_fpr', 0.0),
    ('eval.resolutions', ['native', 'model']),
  ],
)
def test_the_ends_of_a_range_are_possible(field, value):
  config_lib.check(_config(**{field: value}))


@pytest.mark.parametrize('changes', CONFLICTS)
def test_fields_that_exclude_each_other_are_both_named(changes):
  message = _refusal(_config(**changes))
  for field in changes:
    assert f'config.{field}' in message


def test_tiles_of_an_image_of_any_size_are_possible():
  config_lib.check(_config(**{'data.image_size': 100, 'data.tile_size': 64}))


def test_all_impossible_fields_are_named_at_once():
  message = _refusal(_config(seed=-1, **{'eval.pictures': -1, 'loss.aim': ''}))
  assert len(message.splitlines()) == 3


def test_a_missing_and_an_unknown_field_are_named():
  config = default.get_config()
  del config.loss.focus
  config.head.depth = 3
  message = _refusal(config)
  assert 'config.loss.focus is missing' in message
  assert 'config.head.depth is no field' in message


def test_the_rows_of_categories_are_not_looked_at():
  config = default.get_config()
  config.per_category = {'nut': {'seed': -1}}
  config_lib.check(config)


@pytest.mark.parametrize(
  'name', [f'{c}/{v}' for c, row in ablation.COMPARISONS.items() for v in row]
)
def test_every_comparison_is_possible(name):
  config = ablation.get_config(name)
  config_lib.check(run_lib.for_category(config, 'screw'))


# Before anything is loaded or written.


def test_a_training_begins_with_the_check(tmp_path):
  config = _config(**{'eval.pictures': -1, 'data.category': 'nut'})
  workdir = tmp_path / 'run'
  for run in (run_lib.train_and_evaluate, run_lib.run_categories):
    with pytest.raises(ValueError, match=r'config\.eval\.pictures is -1'):
      run(config, str(workdir))
  assert not workdir.exists()


def test_the_row_of_the_last_category_is_checked_before_the_first(tmp_path):
  config = _config(**{'data.category': 'bolt,nut', 'data.generate': 'surface'})
  config.per_category.nut = {'calibration': {'image_fpr': 2.0}}
  with pytest.raises(ValueError, match=r'config\.calibration\.image_fpr'):
    run_lib.run_categories(config, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def _own(**places):
  """A checkpoint's config of the layout 'folder'."""
  changes = {'name': 'folder', 'category': 'part', 'normal': '/a/good'}
  changes |= {'defect': '/a/bad', **places}
  return _config(**{f'data.{name}': text for name, text in changes.items()})


def test_an_evaluation_takes_places_and_eval_anew():
  stored, given = _own(), _own(masks='/b/truth', normal='')
  given.eval.intervals = False
  given.train.total_steps += 1  # Not set by hand: the checkpoint's holds.
  changes = {
    'data.normal': '/b/good',
    'data.on_bad_image': 'skip',
    'eval.resolutions': ('native',),
    'train.batch_size': stored.train.batch_size,  # As it was.
    'head.dilations': tuple(stored.head.dilations),
    'data.category': 'other,part',
    'per_category.other.seed': 3,
  }
  config = config_lib.for_evaluation(stored, changes, given)
  assert config.data.normal == '/b/good' and config.data.masks == '/b/truth'
  assert config.data.on_bad_image == 'skip'
  assert config.eval.resolutions == ('native',) and not config.eval.intervals
  assert config.train.total_steps == stored.train.total_steps
  assert stored.data.normal == '/a/good'
  # An empty place is a change only where it is set by hand.
  assert not config_lib.for_evaluation(config, {'data.masks': ''}).data.masks


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'train.total_steps': 9}, ('config.train.total_steps = 9', 'no effect')),
    ({'data.category': 'a,b'}, ("config.data.category = 'a,b'", "'part'")),
    ({'per_category.part.seed': 3}, ('config.seed = 3', 'no effect')),
    ({'data.root': '/b'}, ("config.data.root = '/b'", '/a/good', 'absolute')),
    ({'eval.smoothing': 1}, ('config.eval.smoothing is no field',)),
    ({'eval.batch_size': -1}, ('config.eval.batch_size', '-1')),
  ],
)
def test_a_change_without_effect_on_an_evaluation_is_refused(changes, words):
  with pytest.raises(ValueError) as caught:
    config_lib.for_evaluation(_own(), changes)
  assert all(word in str(caught.value) for word in words)


def test_places_of_own_images_have_no_effect_on_other_layouts():
  stored = _config(**{'data.category': 'screw'})
  with pytest.raises(ValueError, match=r'data\.normal.* no effect|no effect'):
    config_lib.for_evaluation(stored, {'data.normal': '/b'})
  config = config_lib.for_evaluation(stored, {'data.root': '/b'})
  assert config.data.root == '/b'


def test_images_that_were_trained_on_are_no_test():
  stored = _own(defect='')
  bad = {'data.defect': '/b/bad'}
  with pytest.raises(ValueError, match=r'set --config\.data\.test_normal'):
    config_lib.for_evaluation(stored, bad)
  config_lib.for_evaluation(stored, {**bad, 'data.test_normal': '/b/good'})
