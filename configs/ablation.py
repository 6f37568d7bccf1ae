"""Comparisons on a small budget: `configs/ablation.py:COMPARISON/VARIANT`.

It is configs/mvtec_cpu.py at 128 x 128 with fewer steps. A run takes minutes on
one core: enough to rank variants, not to quote figures.
`tools/ablate.py` runs comparisons over categories and seeds and writes their
tables into docs/experiments/.
A variant names the fields in which it differs from the base. `{}` is the base,
which is trained once for all comparisons.
"""

import ml_collections

from configs import mvtec
from configs import mvtec_cpu

# The budget that all variants share, on top of configs/mvtec_cpu.py.
BUDGET = {
  'data.image_size': 128,
  'train.batch_size': 8,
  'train.total_steps': 200,
  'train.distill_steps': 150,
  'train.checkpoint_every': 200,
  'train.keep_checkpoints': 1,
  'eval.pictures': 0,
}

COMPARISONS = {
  'trunk': {
    'encoder': {},
    'reverse': {'student.trunk': 'reverse'},
    'encoder_adam': {'train.student.kind': 'adam'},
    'reverse_adam': {
      'student.trunk': 'reverse',
      'train.student.kind': 'adam',
    },
    'encoder_decoder': {'student.trunk': 'encoder_decoder'},
    'encoder_decoder_adam': {
      'student.trunk': 'encoder_decoder',
      'train.student.kind': 'adam',
    },
  },
  # A second trunk that sees the whole image, and how its maps count.
  'context': {
    'none': {},
    'half': {'student.context': 2},
    'half_of_512': {'student.context': 2, 'student.context_width': 512},
    'quarter': {'student.context': 4},
    'half_mean': {'student.context': 2, 'head.context_fusion': 'mean'},
    'half_share_075': {'student.context': 2, 'head.context_share': 0.75},
  },
  'losses': {
    'ngm_and_aim': {},
    'ngm_alone': {'loss.aim_weight': 0.0},
    'aim_alone': {'loss.ngm_weight': 0.0},
  },
  # Does the choice made on screw at 256 pixels hold for other categories?
  'learning': {
    'focus_and_muon': {},
    'no_focus': {'loss.focus': 0.0},
    'adam': {'train.student.kind': 'adam'},
  },
  'precision': {
    'float32': {},
    'bfloat16': {'dtype': 'bfloat16'},
  },
  'ngm': {
    'default': {},
    'focus_2': {'loss.focus': 2.0},
    'normal_only': {'loss.ngm_normal_only': True},
    'flat': {'loss.ngm_flat': True},
  },
  'aim': {
    'match_mask': {},
    'margin': {'loss.aim': 'margin'},
    'target_normal': {'loss.aim_target': 'normal'},
    'weight_03': {'loss.aim_weight': 0.3},
    'stopped_gradient': {'student.stop_abnormality_gradient': True},
    'deeper_branches': {'student.extra_convs': 1},
  },
  # The variants that were ahead of the base in 'ngm' and 'aim', for more seeds.
  'leads': {
    'default': {},
    'focus_2': {'loss.focus': 2.0},
    'deeper_branches': {'student.extra_convs': 1},
    'both': {'loss.focus': 2.0, 'student.extra_convs': 1},
  },
  'head': {
    'multi_perception': {},
    'no_channel_attention': {'head.channel_attention': False},
    'no_spatial_attention': {'head.spatial_attention': False},
    'feature_products': {'head.input': 'products'},
    'destseg': {'head.kind': 'destseg'},
    'head_alone': {'head.maps_weight': 0.0},
    'score_of_the_final_map': {'head.score_weight': 1.0},
    'score_of_the_distance': {'head.score_weight': 0.0},
    'border_as_it_is': {'head.border': 0},
    'positions_as_they_are': {'head.position_bias': False},
    'plain_mean_of_branches': {'head.normality_share': 0.5},
  },
  'synthesis': {
    'default': {},
    'no_clean_pairs': {'synthesis.clean_share': 0.0},
    'no_large_regions': {'synthesis.region_share': 0.0},
    'textures_only': {'synthesis.self_share': 0.0},
    'texture_augment': {'synthesis.texture_augment': True},
    'opacity_05': {'synthesis.opacity_max': 0.5},
    'lighting_01': {'synthesis.lighting': 0.1},
    'only_textures_and_blobs': {
      'synthesis.self_share': 0.0,
      'synthesis.region_share': 0.0,
    },
  },
  # Fields that configs/mvtec.py sets for screw; run them on this category only.
  'screw': {
    'on_the_object': {},
    'no_foreground': {'per_category.screw.synthesis.foreground': 'off'},
    'turned': {
      'synthesis.rotate_90': True,
      'synthesis.rotate_degrees': 5.0,
    },
  },
  'optimiser': {
    'muon_0.02': {},
    'muon_0.05': {'train.student.muon_learning_rate': 0.05},
    'muon_0.01': {'train.student.muon_learning_rate': 0.01},
    'adam_2e-3': {
      'train.student.kind': 'adam',
      'train.student.learning_rate': 2e-3,
    },
    # The same number of pairs, in twice the steps.
    'batch_4': {
      'train.batch_size': 4,
      'train.total_steps': 400,
      'train.distill_steps': 300,
    },
    'no_clipping': {'train.student.clip_norm': 0.0},
    'constant_rate': {'train.student.schedule': 'constant'},
    'joint': {'train.joint': True},
    'sgd_0.4': {
      'train.student.kind': 'sgd',
      'train.student.learning_rate': 0.4,
      'train.student.b1': 0.9,
    },
  },
  # Fields of `eval` alone: the base's checkpoints are evaluated again.
  'score': {
    'mean_of_100': {},
    'maximum': {'eval.score_top_pixels': 1},
    'mean_of_25': {'eval.score_top_pixels': 25},
    'smoothed_2': {'eval.smoothing_sigma': 2.0},
    'smoothed_4': {'eval.smoothing_sigma': 4.0},
  },
}


def get_config(name: str = 'trunk/encoder') -> ml_collections.ConfigDict:
  """Returns the configuration of 'COMPARISON/VARIANT'.

  Raises:
    ValueError: an unknown name; the message lists the known ones.
  """
  comparison, _, variant = name.partition('/')
  changes = COMPARISONS.get(comparison, {}).get(variant)
  if changes is None:
    names = [f'{c}/{v}' for c, row in COMPARISONS.items() for v in row]
    raise ValueError(
      f'unknown comparison {name!r}; choose one of {", ".join(names)}'
    )
  config = mvtec_cpu.get_config('screw')
  for texture in mvtec.TEXTURES:  # The variant sets the optimiser, not the row.
    del config.per_category[texture]['train']
  for field, value in {**BUDGET, **changes}.items():
    *path, last = field.split('.')
    part = config
    for key in path:
      part = part[key]
    part[last] = value
  return config
