"""Writes tests/data/checkpoints/NAME.zip: what this commit saves and computes.

  python tools/make_checkpoint_fixture.py --name 2026-11-28-encoder

The archive holds the folder of a tiny trained category (`run/`: a network of 4
channels, 64 pixels), its exported files where `--export` asks for them, and
`expected.npz`: images, their scores and maps. tests/test_old_checkpoints.py
loads all of that with the code of today. Run this at the commit whose
checkpoints must stay readable, before anything is moved.
"""

import os
import shutil
import tempfile

from absl import app
from absl import flags
import numpy as np

FLAGS = flags.FLAGS
flags.DEFINE_string('name', None, 'Of the archive.', required=True)
flags.DEFINE_string('trunk', 'encoder', 'config.student.trunk.')
flags.DEFINE_bool('export', True, 'Write StableHLO and ONNX files too.')
_FOLDER = 'tests/data/checkpoints'


def _config(root: str):
  """Sixty steps of the smallest network, with every part of the method."""
  from configs import default

  config = default.get_config()
  config.data.generate = 'surface'
  config.data.root = root
  config.data.category = 'surface'
  config.data.image_size = 64
  config.teacher.weights = 'random'
  config.student.trunk = FLAGS.trunk
  config.head.width = 4
  config.head.dilations = (1, 2)
  config.train.batch_size = 4
  config.train.total_steps = 60
  config.train.distill_steps = 40
  config.train.checkpoint_every = 60
  config.train.keep_checkpoints = 1
  if 'border' in config.head:
    config.head.border = 1
  return config


def main(argv: list[str]) -> None:
  """Trains, exports, predicts and archives."""
  del argv
  from dmdd_jax import predict
  from dmdd_jax import run as run_lib
  from dmdd_jax.export import write as export_lib
  from dmdd_jax.models import resnet

  resnet.SPECS['resnet18'] = resnet.Spec(
    (1, 1, 1, 1), bottleneck=False, channels=4
  )
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    out = os.path.join(folder, 'out')
    config = _config(os.path.join(folder, 'data'))
    run_lib.run_categories(config, os.path.join(folder, 'runs'))
    run = os.path.join(out, 'run')
    for name in ('checkpoints', 'config.json', 'results.json'):
      source = os.path.join(folder, 'runs', 'surface', name)
      target = os.path.join(run, name)
      os.makedirs(run, exist_ok=True)
      copy = shutil.copytree if os.path.isdir(source) else shutil.copy
      copy(source, target)
    if FLAGS.export:
      for file_format in ('stablehlo', 'onnx'):
        path = os.path.join(out, f'model.{file_format}')
        export_lib.export(run, file_format, path)
    smooth = rng.integers(0, 256, (4, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
    noise = rng.integers(-20, 21, (4, 64, 64, 3))
    images = np.clip(smooth // 2 + 64 + noise, 0, 255).astype(np.uint8)
    results = predict.load(run)(list(images))
    np.savez_compressed(
      os.path.join(out, 'expected.npz'),
      images=images,
      scores=np.array([result.score for result in results]),
      maps=np.stack([result.map for result in results]),
    )
    os.makedirs(_FOLDER, exist_ok=True)
    shutil.make_archive(os.path.join(_FOLDER, FLAGS.name), 'zip', out)


if __name__ == '__main__':
  app.run(main)
