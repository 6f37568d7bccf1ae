"""Exported files: equal to the checkpoint, refused if not, read by little."""

import json
import os
import subprocess
import sys

import model_helpers
import numpy as np
from PIL import Image
import program_helpers
import pytest

from dmdd_jax.export import loader
from dmdd_jax.export import program as program_lib
from dmdd_jax.export import write as export_lib
from dmdd_jax.models import dmdd
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.scoring import trained as trained_lib
from dmdd_jax.serve import models as serve_models

pytestmark = pytest.mark.usefixtures('compiled_once')

FUSION = score_lib.Fusion(0.1, 0.3, 0.2, 0.4, 1.0, 1.0, 0.2)


def make_trained(threshold=0.5, **changes):
  """What `trained_lib.load_workdir` returns, with weights of numpy."""
  config = model_helpers.tiny_config(eval__batch_size=3, **changes)
  state = model_helpers.make_state(config, dmdd.from_config(config))
  calibration = calibration_lib.Calibration(
    FUSION, threshold, threshold, 1.0, 4
  )
  return config, state, calibration, {'teacher_fingerprint': 'none'}


def make_images(folder, count=3):
  """Images of several sizes; returns the folder."""
  rng = np.random.default_rng(0)
  os.makedirs(folder, exist_ok=True)
  for index in range(count):
    shape = (24 + 17 * index, 50 - 9 * index, 3)
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(
      os.path.join(folder, f'{index}.png')
    )
  return os.fspath(folder)


@pytest.fixture
def trained(monkeypatch):
  """Makes `load_workdir` find a model of some config."""

  def set_up(**changes):
    found = make_trained(**changes)
    monkeypatch.setattr(trained_lib, 'load_workdir', lambda *_: found)

  return set_up


@pytest.fixture(scope='module')
def stablehlo(tmp_path_factory):
  """(file, its metadata, folder of images)."""
  folder = tmp_path_factory.mktemp('stablehlo')
  images = make_images(folder / 'images')
  path = folder / 'model.dmdd'
  with pytest.MonkeyPatch.context() as patch:
    found = make_trained()
    patch.setattr(trained_lib, 'load_workdir', lambda *_: found)
    metadata = export_lib.export('unused', 'stablehlo', path, images)
  return path, metadata, images


def test_the_file_equals_the_checkpoint_and_says_what_it_is(stablehlo):
  path, metadata, _ = stablehlo
  assert metadata['verified']['images'] == 3
  assert metadata['verified']['largest_map_difference'] < export_lib.TOLERANCE
  found = loader.load(path).metadata
  assert found['verified'] == metadata['verified']
  assert found['platforms'] == ['cpu', 'cuda', 'tpu']
  assert found['input']['shape'] == ['batch', 32, 32, 3]
  assert found['image_threshold'] == 0.5 and found['arch'] == 'resnet18'


def _run(code):
  """What a process of its own prints."""
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, 'PYTHONPATH': program_helpers.REPOSITORY},
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_the_loader_needs_jax_and_numpy_alone(stablehlo):
  path, _, images = stablehlo
  code = f"""
import sys

class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in (
      'absl', 'clu', 'cv2', 'etils', 'flax', 'ml_collections', 'onnx', 'optax',
      'orbax', 'PIL', 'tensorflow', 'tensorflow_datasets',
    ):
      raise ImportError('blocked: ' + name)

sys.meta_path.insert(0, Blocked())
import json
import numpy as np
from dmdd_jax import exported

model = exported.load({os.fspath(path)!r})
scores, maps = model(np.full((2, 32, 32, 3), 90, np.uint8))
print(json.dumps([scores.tolist(), maps.shape, model.verdict(scores[0])]))
"""
  scores, shape, verdict = json.loads(_run(code))
  assert scores[0] == pytest.approx(scores[1], rel=1e-5)
  assert shape == [2, 32, 32] and verdict in ('good', 'defective')


def test_a_file_that_differs_is_not_written(trained, tmp_path, monkeypatch):
  trained()
  images = make_images(tmp_path / 'images', 1)
  right = loader.Model.__call__

  def wrong(self, pictures):
    scores, maps = right(self, pictures)
    return scores, maps + np.float32(1e-2)

  monkeypatch.setattr(loader.Model, '__call__', wrong)
  (tmp_path / 'model.dmdd').write_text('older')
  with pytest.raises(program_lib.ExportError, match='the map of image 0'):
    export_lib.export('unused', 'stablehlo', tmp_path / 'model.dmdd', images)
  assert (tmp_path / 'model.dmdd').read_text() == 'older'
  assert sorted(os.listdir(tmp_path)) == ['images', 'model.dmdd']


def test_a_file_that_is_no_model_is_named(tmp_path, stablehlo):
  path, _, _ = stablehlo
  broken = tmp_path / 'broken.dmdd'
  with pytest.raises(loader.ExportedFileError, match='broken.dmdd'):
    loader.load(broken)
  whole = path.read_bytes()
  for content in (b'', b'text', whole[: len(whole) // 2]):
    broken.write_bytes(content)
    with pytest.raises(loader.ExportedFileError, match='broken.dmdd'):
      loader.load(broken)


def test_an_archive_that_is_no_model_is_named(tmp_path, stablehlo):
  with np.load(stablehlo[0]) as archive:
    arrays = dict(archive)
  right = json.loads(arrays[loader.METADATA].tobytes())
  broken = tmp_path / 'broken.dmdd'
  with open(broken, 'wb') as file:
    np.save(file, np.zeros(3))
  with pytest.raises(loader.ExportedFileError, match='broken.dmdd'):
    loader.load(broken)
  documents = [[], 'text', right | {'format': 'other'}] + [
    {k: v for k, v in right.items() if k != name}
    for name in ('format', 'input', 'category', 'image_threshold')
  ]
  for metadata, function in (
    *((document, arrays[loader.FUNCTION]) for document in documents),
    (right, np.zeros(0, np.uint8)),
    (right, arrays[loader.FUNCTION][:100]),
  ):
    document = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    with open(broken, 'wb') as file:
      np.savez(file, **{loader.METADATA: document, loader.FUNCTION: function})
    with pytest.raises(loader.ExportedFileError, match='broken.dmdd'):
      loader.load(broken)


@pytest.mark.parametrize('score', [np.nan, np.inf, -np.inf])
def test_there_is_no_verdict_on_what_is_no_score(stablehlo, score):
  for judge in (loader.load(stablehlo[0]), make_trained()[2]):
    with pytest.raises(ValueError, match='no verdict'):
      judge.verdict(np.float32(score))


def test_bad_flags_are_named(trained, tmp_path):
  with pytest.raises(ValueError, match='stablehlo, onnx'):
    export_lib.export('unused', 'savedmodel', tmp_path / 'model')
  trained(data__root=str(tmp_path / 'nowhere'))
  with pytest.raises(FileNotFoundError, match='--images'):
    export_lib.export('unused', 'stablehlo', tmp_path / 'model')


def test_tiles_are_refused_before_anything_is_computed(
  trained, tmp_path, monkeypatch
):
  trained(data__image_size=64, data__tile_size=32)
  monkeypatch.delattr(export_lib.predict, 'Inspector')
  with pytest.raises(program_lib.ExportError, match='config.data.tile_size'):
    export_lib.export(
      'unused', 'onnx', tmp_path / 'x', make_images(tmp_path, 1)
    )


def test_a_model_of_tiles_is_served_from_its_folder(trained, tmp_path):
  trained(data__image_size=64, data__tile_size=32)
  model = serve_models.open_model(tmp_path)
  images = np.random.default_rng(3).integers(0, 256, (3, 64, 64, 3), np.uint8)
  scores, maps = model.run(images)
  assert model.image_size == 64
  assert scores.shape == (3,) and maps.shape == (3, 64, 64)
  assert np.isfinite(scores).all() and np.isfinite(maps).all()


def test_few_of_many_images_are_compared(tmp_path):
  folder = make_images(tmp_path, 1)
  for index in range(1, 50):
    (tmp_path / f'{index:02}.png').touch()
  names = [
    os.path.basename(x) for x in export_lib._comparison_files(None, folder)
  ]
  assert len(set(names)) == 8
  assert names[0] == '0.png' and names[-1] == '49.png'


def test_images_of_another_size_are_refused(stablehlo):
  model = loader.load(stablehlo[0])
  for images in (np.zeros((1, 9, 9, 3), np.uint8), np.zeros((1, 32, 32, 3))):
    with pytest.raises(ValueError, match=r'\(N, 32, 32, 3\)'):
      model(images)


def test_stablehlo_with_two_trunks_equals_the_checkpoint(trained, tmp_path):
  trained(student__context=2, student__context_width=64)
  path = tmp_path / 'model.dmdd'
  images = make_images(tmp_path / 'images')
  metadata = export_lib.export('unused', 'stablehlo', path, images)
  assert metadata['verified']['images'] == 3
  assert metadata['verified']['largest_map_difference'] < export_lib.TOLERANCE
  with np.load(path) as archive:
    assert any('context' in name for name in archive.files)
  scores, maps = loader.load(path)(np.full((2, 32, 32, 3), 90, np.uint8))
  assert scores[0] == pytest.approx(scores[1], rel=1e-5)
  assert maps.shape == (2, 32, 32) and np.isfinite(maps).all()


@pytest.mark.parametrize(
  'changes',
  [
    {'student__trunk': 'reverse', 'eval__smoothing_sigma': 1.0},
    {'student__trunk': 'encoder_decoder', 'head__kind': 'destseg'},
    {'head__input': 'products', 'head__border': 2},
    {'head__kind': 'none', 'student__extra_convs': 1, 'student__remat': True},
    {'student__context': 2, 'student__context_width': 64},
  ],
  ids=lambda changes: '-'.join(str(value) for value in changes.values()),
)
def test_onnx_equals_the_checkpoint(trained, tmp_path, changes):
  onnx = pytest.importorskip('onnx', reason='the extra onnx is not installed')
  pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
  trained(**changes)
  path = tmp_path / 'model.onnx'
  images = make_images(tmp_path / 'images')
  metadata = export_lib.export('unused', 'onnx', path, images)
  assert metadata['verified']['images'] == 3
  model = onnx.load(path)
  onnx.checker.check_model(model, full_check=True)
  found = {prop.key: prop.value for prop in model.metadata_props}
  assert json.loads(found['input']) == metadata['input']
  assert float(found['image_threshold']) == 0.5 and found['opset'] == '18'
  pools = [node for node in model.graph.node if node.op_type == 'MaxPool']
  for node in pools:
    pads = {x.name: list(x.ints) for x in node.attribute}['pads']
    assert pads == [1, 1, 1, 1]
  assert pools


@pytest.fixture(scope='module')
def onnx_file(tmp_path_factory):
  """(file, folder of images)."""
  pytest.importorskip('onnx', reason='the extra onnx is not installed')
  pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
  folder = tmp_path_factory.mktemp('onnx')
  images = make_images(folder / 'images')
  with pytest.MonkeyPatch.context() as patch:
    found = make_trained()
    patch.setattr(trained_lib, 'load_workdir', lambda *_: found)
    export_lib.export('unused', 'onnx', folder / 'model.onnx', images)
  return folder / 'model.onnx', images


def test_both_files_can_be_served(stablehlo, onnx_file, monkeypatch):
  rng = np.random.default_rng(2)
  images = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
  scores, maps = loader.load(stablehlo[0])(images)
  seen, call = [], loader.Model.__call__
  monkeypatch.setattr(
    loader.Model,
    '__call__',
    lambda self, images: seen.append(images) or call(self, images),
  )
  assert (onnx_file[0].parent / 'dmdd_onnx.py').exists()
  for path in (stablehlo[0], onnx_file[0]):
    model = serve_models.open_model(path)
    if path == stablehlo[0]:  # Compiled before the first request.
      assert [len(images) for images in seen] == [1, serve_models._BATCH]
    assert (model.image_size, model.image_threshold) == (32, 0.5)
    assert model.category == make_trained()[0].data.category
    found_scores, found_maps = model.run(images)
    np.testing.assert_allclose(found_scores, scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found_maps, maps, rtol=1e-4, atol=1e-4)


def test_a_foreign_onnx_file_is_named(tmp_path):
  pytest.importorskip('onnx', reason='the extra onnx is not installed')
  pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
  from dmdd_jax.export import onnx as onnx_writer
  from dmdd_jax.export import onnx_loader

  path = os.fspath(tmp_path / 'foreign.onnx')
  for outputs, missing in ((('score',), 'map'), (('score', 'map'), 'category')):
    onnx_writer.write(
      path,
      lambda x, names=outputs: dict.fromkeys(names, x.astype(np.float32)),
      (4, 4, 3),
      {},
    )
    with pytest.raises(ValueError, match=f'foreign.onnx.*{missing}.*export.py'):
      onnx_loader.load(path)


def test_an_onnx_file_is_served_without_jax(onnx_file):
  pytest.importorskip('fastapi', reason='the extra serve is not installed')
  code = f"""
import sys

class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in (
      'cv2', 'etils', 'flax', 'jax', 'matplotlib', 'onnx', 'orbax', 'scipy',
      'tensorflow',
    ):
      raise ImportError('blocked: ' + name)

sys.meta_path.insert(0, Blocked())
import numpy as np
from dmdd_jax import cli
from dmdd_jax.serve import models as serve_models

model = serve_models.open_model({os.fspath(onnx_file[0])!r})
print(model.run(np.zeros((2, 32, 32, 3), np.uint8))[1].shape)
"""
  assert _run(code).strip() == '(2, 32, 32)'
