"""What a configuration may hold, and what older ones mean.

`check` runs before anything is loaded and names every impossible field.
`upgrade` reads the config of an older checkpoint, so that everything after it
can rely on all fields being there. Every field stands in configs/default.py.

Synopsis:

  config_lib.check(config)
  config = config_lib.upgrade(meta['config'])
"""

from collections.abc import Callable, Iterator, Mapping
import math
import os
from typing import Any, NamedTuple

import ml_collections

from dmdd_jax.data import folder
from dmdd_jax.data import foreground
from dmdd_jax.data import images
from dmdd_jax.data import layouts
from dmdd_jax.data import tiles
from dmdd_jax.models import dmdd
from dmdd_jax.models import resnet
from dmdd_jax.models import segmentation
from dmdd_jax.models import student

AIM_KINDS = ('match_mask', 'margin')
AIM_TARGETS = ('image', 'normal')
SEGMENTATION_LOSSES = ('focal_l1', 'focal_dice')
OPTIMIZERS = ('muon', 'adam', 'sgd')
SCHEDULES = ('cosine', 'constant')
RESOLUTIONS = ('model', 'native')
ON_BAD_IMAGE = ('error', 'skip')
GENERATED = ('', 'surface')


class Rule(NamedTuple):
  """What a field may be.

  Attributes:
    allowed: in words, to follow 'must be'.
    fits: whether a value is allowed; it never raises.
  """

  allowed: str
  fits: Callable[[Any], bool]


def _choice(*values: str | int) -> Rule:
  """One of these values, and of its type: 2.0 is not 2."""
  return Rule(
    f'one of {", ".join(map(repr, values))}',
    lambda v: v in values and type(v) in map(type, values),
  )


def _boolean() -> Rule:
  return Rule('True or False', lambda v: isinstance(v, bool))


def _text() -> Rule:
  return Rule('text', lambda v: isinstance(v, str))


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _integer(low: float = -math.inf, high: float = math.inf) -> Rule:
  """An integer in [low, high]; infinite where a bound is not given."""
  allowed = 'an integer'
  if high < math.inf:
    allowed += f' in [{low}, {high}]'
  elif low > -math.inf:
    allowed += f' >= {low}'
  return Rule(allowed, lambda v: _is_integer(v) and low <= v <= high)


def _number(interval: str) -> Rule:
  """A finite number in an interval as mathematics writes it, say '(0, 0.5]'."""
  low, high = map(float, interval[1:-1].split(','))

  def fits(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      return False
    above = value > low if interval[0] == '(' else value >= low
    below = value < high if interval[-1] == ')' else value <= high
    return above and below  # False for NaN.

  return Rule(f'a number in {interval}', fits)


def _are_dilations(value: Any) -> bool:
  if not isinstance(value, (list, tuple)) or not value:
    return False
  each = all(_is_integer(dilation) and dilation > 0 for dilation in value)
  return each and len(set(value)) == len(value)


def _are_resolutions(value: Any) -> bool:
  if not isinstance(value, (list, tuple)) or not value:
    return False
  known = all(name in RESOLUTIONS for name in value)
  return known and len(set(value)) == len(value)


def _optimizer(part: str) -> dict[str, Rule]:
  rules = {
    'kind': _choice(*OPTIMIZERS),
    'learning_rate': _number('(0, inf)'),
    'muon_learning_rate': _number('(0, inf)'),
    'warmup_fraction': _number('[0, 1]'),
    'schedule': _choice(*SCHEDULES),
    'b1': _number('[0, 1)'),
    'b2': _number('[0, 1)'),
    'weight_decay': _number('[0, inf)'),
    'clip_norm': _number('[0, inf)'),
  }
  return {f'train.{part}.{name}': rule for name, rule in rules.items()}


# Every field but `per_category`, in the order of configs/default.py.
RULES: Mapping[str, Rule] = {
  # NumPy's generators take none below 0; another seed is one more than this.
  'seed': _integer(0, 2**63 - 2),
  'dtype': _choice(*dmdd.DTYPES),
  'data.name': _choice(*layouts.NAMES),
  'data.root': _text(),
  'data.normal': _text(),
  'data.defect': _text(),
  'data.masks': _text(),
  'data.test_normal': _text(),
  'data.test_fraction': _number('(0, 0.5]'),
  'data.test_seed': _integer(),
  'data.generate': _choice(*GENERATED),
  'data.category': _text(),
  'data.textures': _text(),
  'data.max_textures': _integer(0),
  'data.image_size': _integer(32),
  'data.tile_size': _integer(0),
  'data.tile_overlap': _number(f'[0, {tiles.MAX_OVERLAP}]'),
  'data.max_pixels': _integer(images.MAX_PIXELS),
  'data.white_level': _integer(0, 65535),
  'data.on_bad_image': _choice(*ON_BAD_IMAGE),
  'data.holdout_fraction': _number('[0, 0.5]'),
  'data.holdout_min': _integer(0),
  'synthesis.threshold': _number('[-1, 1]'),
  'synthesis.rotation_degrees': _number('[0, 360]'),
  'synthesis.opacity_max': _number('[0, 1]'),
  'synthesis.clean_share': _number('[0, 1]'),
  'synthesis.region_share': _number('[0, 1]'),
  'synthesis.region_area_min': _number('[0, 1]'),
  'synthesis.region_area_max': _number('[0, 1]'),
  'synthesis.self_share': _number('[0, 1]'),
  'synthesis.min_contrast': _number('[0, 1]'),
  'synthesis.rotate_90': _boolean(),
  'synthesis.rotate_degrees': _number('[0, 360]'),
  'synthesis.lighting': _number('[0, 1]'),
  'synthesis.foreground': _choice(*foreground.KINDS),
  'synthesis.texture_augment': _boolean(),
  'teacher.arch': _choice(*resnet.SPECS),
  'teacher.weights': _text(),
  'student.trunk': _choice(*student.TRUNKS),
  'student.levels': _choice(1, 2, 3),
  'student.context': _choice(*student.CONTEXTS),
  'student.context_width': _integer(1),
  'student.extra_convs': _integer(0),
  'student.stop_abnormality_gradient': _boolean(),
  'student.remat': _boolean(),
  'head.kind': _choice(*segmentation.KINDS),
  'head.input': _choice(*dmdd.HEAD_INPUTS),
  'head.width': _integer(1),
  'head.dilations': Rule('different positive integers', _are_dilations),
  'head.channel_attention': _boolean(),
  'head.spatial_attention': _boolean(),
  'head.maps_weight': _number('[0, inf)'),
  'head.score_weight': _number('[0, inf)'),
  'head.normality_share': _number('[0, 1]'),
  'head.untrained_maps': _boolean(),
  'head.context_share': _number('[0, 1]'),
  'head.context_fusion': _choice(*dmdd.FUSIONS),
  'head.position_bias': _boolean(),
  'head.border': _integer(0, dmdd.MAX_BORDER),
  'loss.ngm_weight': _number('[0, inf)'),
  'loss.aim_weight': _number('[0, inf)'),
  # Beyond 4, float32 has no numbers for the weights.
  'loss.focus': _number('[0, 4]'),
  'loss.ngm_flat': _boolean(),
  'loss.ngm_normal_only': _boolean(),
  'loss.on_normal': _boolean(),
  'loss.aim': _choice(*AIM_KINDS),
  'loss.aim_margin': _number('(0, inf)'),
  'loss.aim_target': _choice(*AIM_TARGETS),
  'loss.segmentation': _choice(*SEGMENTATION_LOSSES),
  'train.batch_size': _integer(1),
  'train.microbatch': _integer(0),
  'train.total_steps': _integer(1),
  'train.distill_steps': _integer(0),
  'train.joint': _boolean(),
  **_optimizer('student'),
  **_optimizer('head'),
  'train.cache_teacher': _boolean(),
  'train.log_every': _integer(1),
  'train.checkpoint_every': _integer(1),
  'train.keep_checkpoints': _integer(1),
  'calibration.image_fpr': _number('[0, 1)'),
  'calibration.training_images': _integer(0),
  'calibration.pixel_fpr': _number('[0, 1)'),
  'eval.batch_size': _integer(1),
  'eval.score_top_pixels': _integer(1),
  'eval.smoothing_sigma': _number('[0, inf)'),
  'eval.resolutions': Rule(
    f'at least one of {", ".join(map(repr, RESOLUTIONS))}, each once',
    _are_resolutions,
  ),
  'eval.intervals': _boolean(),
  'eval.pictures': _integer(0),
  'mesh.category_groups': _integer(1),
}


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses a config that no training or evaluation can follow.

  What depends on the devices, or on what lies on the disk, is not checked here.

  Args:
    config: of one category; `per_category`, if it is there, is not looked at.

  Raises:
    ValueError: one line for each impossible field, with its name, its value
      and what is allowed.
  """
  fields = flatten(
    {k: v for k, v in config.to_dict().items() if k != 'per_category'}
  )
  faults = [
    f'config.{field} is {fields[field]!r}; it must be {rule.allowed}'
    for field, rule in RULES.items()
    if field in fields and not rule.fits(fields[field])
  ]
  faults += [
    f'config.{name} is missing' for name in RULES if name not in fields
  ]
  faults += [
    f'config.{name} is no field; the fields stand in configs/default.py'
    for name in fields
    if name not in RULES
  ]
  # Each of these relies on its fields being possible.
  faults = faults or [*_conflicts(config)]
  if faults:
    raise ValueError('\n'.join(faults))


def _conflicts(config: ml_collections.ConfigDict) -> Iterator[str]:
  """What is wrong with fields that are possible one by one."""
  data, synthesis, loss = config.data, config.synthesis, config.loss
  train, head = config.train, config.head
  if data.tile_size and (
    data.tile_size % 32 or data.tile_size > data.image_size
  ):
    yield (
      f'config.data.tile_size is {data.tile_size}; it must be a multiple of 32'
      f' up to config.data.image_size = {data.image_size}, or 0 (no tiles)'
    )
  if not data.tile_size and data.image_size % 32:
    yield (
      f'config.data.image_size is {data.image_size}; it must be a multiple of'
      ' 32, unless config.data.tile_size cuts images into tiles'
    )
  if synthesis.region_area_min > synthesis.region_area_max:
    yield (
      f'config.synthesis.region_area_min is {synthesis.region_area_min}; it'
      ' must be at most config.synthesis.region_area_max ='
      f' {synthesis.region_area_max}'
    )
  if not loss.ngm_weight and not loss.aim_weight:
    yield (
      'config.loss.ngm_weight and config.loss.aim_weight are both 0; one of'
      ' them must be above 0, to train the student by'
    )
  if loss.ngm_flat and loss.ngm_normal_only:
    yield (
      'config.loss.ngm_flat and config.loss.ngm_normal_only are both True; one'
      ' of them must be False: one cosine of a whole image has no positions to'
      ' leave out'
    )
  if head.kind != 'none' and not head.maps_weight and not head.score_weight:
    yield (
      'config.head.maps_weight and config.head.score_weight are both 0; one of'
      ' them must be above 0, or every image scores 0'
    )
  if train.distill_steps > train.total_steps:
    yield (
      f'config.train.distill_steps is {train.distill_steps}; it must be at most'
      f' config.train.total_steps = {train.total_steps}'
    )
  if train.microbatch and train.batch_size % train.microbatch:
    yield (
      f'config.train.microbatch is {train.microbatch}; it must divide'
      f' config.train.batch_size = {train.batch_size}, or be 0'
    )
  for field in ('rotate_degrees', 'lighting'):
    if train.cache_teacher and synthesis[field]:
      yield (
        'config.train.cache_teacher is True; it must be False, as'
        f' config.synthesis.{field} is {synthesis[field]}: the features kept'
        ' are those of images turned by quarters at most'
      )


# What the absence of a field meant in the checkpoints that lack it. All
# checkpoints have the fields that are not listed.
_ABSENT: Mapping[str, Any] = {
  'calibration.training_images': 0,
  'data.name': layouts.MVTEC_AD,
  'data.normal': '',
  'data.defect': '',
  'data.masks': '',
  'data.test_normal': '',
  'data.test_fraction': 0.2,
  'data.test_seed': 0,
  'data.tile_size': 0,
  'data.tile_overlap': 0.0,
  'data.max_pixels': images.MAX_PIXELS,
  'data.white_level': 0,
  'synthesis.lighting': 0.0,
  'synthesis.foreground': 'off',
  'synthesis.texture_augment': False,
  'student.remat': False,
  'head.score_weight': 1.0,
  'head.normality_share': 0.5,
  'student.levels': 3,
  'student.context': 0,
  'student.context_width': 512,
  'head.context_share': 0.5,
  'head.context_fusion': 'mean',
  'head.position_bias': False,
  'head.border': 0,
  'loss.focus': 0.0,
  'train.microbatch': 0,
  'train.cache_teacher': False,
  # It was a number of resamples, 0 by default; reading it changes nothing.
  'eval.intervals': True,
  # There was no Muon, and other optimisers do not read it.
  'train.student.muon_learning_rate': 0.02,
  'train.head.muon_learning_rate': 0.02,
  'mesh.category_groups': 1,
}


def upgrade(stored: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The config of a checkpoint, or of its results, as the code now reads it.

  Args:
    stored: nested dicts, as they were saved by this or an earlier commit.

  Returns:
    A config of its own with every field; one that `stored` lacks says what its
    absence meant then.
  """
  fields = flatten(stored)
  absent = {k: v for k, v in _ABSENT.items() if k not in fields}
  if 'head.untrained_maps' not in fields:
    # Before `loss.focus`, a branch whose loss had no weight had maps too.
    weights = [fields.get(f'loss.{name}_weight') for name in ('ngm', 'aim')]
    absent['head.untrained_maps'] = 'loss.focus' in absent and 0 in weights
  config = ml_collections.ConfigDict(stored)
  # Its resamples; intervals are now on or off.
  if 'bootstrap' in config.get('eval', {}):
    del config.eval.bootstrap
  for field, value in absent.items():
    *path, name = field.split('.')
    part = config
    for key in path:
      if key not in part:
        part[key] = ml_collections.ConfigDict()
      part = part[key]
    part[name] = value
  return config


# What of `data` names places, and can change where data have moved.
_PLACES = (
  'data.root',
  'data.normal',
  'data.defect',
  'data.masks',
  'data.test_normal',
)
# What of it says whether a file is refused, and not what is in it.
_READING = ('data.on_bad_image', 'data.max_pixels')


def for_evaluation(
  stored: ml_collections.ConfigDict,
  changes: Mapping[str, Any],
  given: ml_collections.ConfigDict | None = None,
) -> ml_collections.ConfigDict:
  """The config of a checkpoint, with what an evaluation may change of it.

  These are the paths of `data`, how its files are read, and `eval`. Any other
  field can be in `changes` if it has the checkpoint's value.

  Args:
    stored: the checkpoint's config, upgraded.
    changes: {'data.normal': 'new/good', ...}, what the user has set by hand.
    given: a config of the same category. Its `eval`, and its paths that are not
      empty, count as changes, where these say nothing else.

  Raises:
    ValueError: a change has no effect, is impossible, or would test on images
      that were trained on; the message names the field.
  """
  before = as_json(stored.to_dict())
  category, is_folder = stored.data.category, stored.data.name == layouts.FOLDER
  places = _PLACES if is_folder else _PLACES[:1]
  wanted, useless = {}, []
  if given is not None:
    wanted = {
      field: value
      for field, value in as_json(given.to_dict()).items()
      if field.startswith('eval.') or (field in places and value)
    }
  for field, value in as_json(changes).items():
    if field.startswith('per_category.'):
      row = f'per_category.{category}.'
      if not field.startswith(row):
        continue
      field = field.removeprefix(row)
    if field in (*places, *_READING) or field.startswith('eval.'):
      wanted[field] = value
    elif field == 'data.category':
      if category not in [name.strip() for name in value.split(',')]:
        useless.append(f'config.{field} = {value!r}: here is {category!r}')
    elif field not in before or before[field] != value:
      known = before.get(field, '(absent)')
      useless.append(f'config.{field} = {value!r}: it is {known!r}')
  if useless:
    raise ValueError(
      f'evaluating the checkpoint of {category!r}, these settings have no'
      f' effect:\n  {chr(10).join(useless)}\nLeave them out. An evaluation can'
      f' change {", ".join((*places, *_READING))} and eval.'
    )
  config = ml_collections.ConfigDict(stored.to_dict())
  for field, value in wanted.items():
    part, name = field.split('.')
    config[part][name] = value
  if wanted:
    check(config)
  if is_folder:
    _check_moved(stored.data, config.data)
  return config


def _check_moved(
  before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
) -> None:
  """Refuses places of own images that cannot be meant; see `for_evaluation`."""
  fields = [field.removeprefix('data.') for field in _PLACES[1:]]
  paths = [now[field] for field in fields if now[field]]
  if now.root != before.root and all(os.path.isabs(path) for path in paths):
    raise ValueError(
      f'config.data.root = {now.root!r} has no effect: '
      + ', '.join(f'{f} = {now[f]!r}' for f in fields if now[f])
      + ' are absolute. Set them instead, say --config.data.normal=NEW'
    )
  if folder.keeps_test(now) and not folder.keeps_test(before):
    raise ValueError(
      'all images of config.data.normal were trained on, and none was kept for'
      ' the test: set --config.data.test_normal to good images that were not'
      ' trained on'
    )


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def as_json(tree: Mapping[str, Any]) -> dict[str, Any]:
  """`flatten`, with lists for tuples: JSON has no tuples."""
  return {
    field: list(value) if isinstance(value, tuple) else value
    for field, value in flatten(tree).items()
  }
