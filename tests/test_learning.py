"""A short training must learn to see defects that it could not see before."""

import model_helpers

from dmdd_jax import evaluate
from dmdd_jax import trainer as trainer_lib
from dmdd_jax.data import surfaces
from dmdd_jax.scoring import calibration as calibration_lib

SIZE = 64
# AUROC of images and pixels. Measured on 2026-11-28 with one CPU device, seeds
# 0 and 1, 45 s of processor time each:
#   untrained  image .663 .660   pixel .502 .507
#   trained    image .844 .854   pixel .909 .933
FLOORS = (0.75, 0.85)


def _measure(trainer):
  """Image and pixel AUROC of a trainer's state, calibrated as it stands."""
  calibration = calibration_lib.calibrate(
    trainer.predictor, trainer.state, trainer.data.held_out
  )
  with evaluate.evaluate(
    trainer.predictor, trainer.state, calibration, trainer.data.dataset.test
  ) as evaluation:
    return [evaluation.metrics[f'{n}_auroc'] for n in ('image', 'pixel')]


def figures(root, seed=0):
  """[image AUROC, pixel AUROC] before, and the same after a training."""
  surfaces.write_surfaces(root / 'data', size=SIZE, train=40)
  config = model_helpers.tiny_config(
    seed=seed,
    data__root=str(root / 'data'),
    data__category=surfaces.CATEGORY,
    data__image_size=SIZE,
    head__width=16,
    head__score_weight=1.0,
    train__batch_size=8,
    train__total_steps=120,
    train__distill_steps=80,
    train__checkpoint_every=120,
    train__log_every=40,
  )
  trainer = trainer_lib.Trainer(config, str(root / 'run'))
  try:
    before = _measure(trainer)
    trainer.run()
    return before, _measure(trainer)
  finally:
    trainer.close()


def test_a_short_training_learns(tmp_path):
  before, after = figures(tmp_path)
  for untrained, floor, trained in zip(before, FLOORS, after, strict=True):
    assert untrained < floor < trained, (before, after)
