"""What is refused as an exported file is opened; the loader beside a file."""

import json
import math
import os
import subprocess
import sys

import exported_helpers
import numpy as np
from PIL import Image
import pytest

from dmdd_jax.data import images as images_lib
from dmdd_jax.export import loader
from dmdd_jax.export import onnx_loader
from dmdd_jax.export import write as export_lib
from dmdd_jax.serve import models as serve_models

KINDS = ('onnx', 'stablehlo')


def change(path, function):
  """Lets a function change what a file says of itself."""
  if path.suffix == '.onnx':
    import onnx

    model = onnx.load(path)
    entries = {x.key: x for x in model.metadata_props}
    said = {
      name: entry.value
      if name in onnx_loader._TEXTS
      else onnx_loader._json_or_text(entry.value)
      for name, entry in entries.items()
    }
    function(said)
    del model.metadata_props[:]
    for name, value in said.items():
      text = value if isinstance(value, str) else json.dumps(value)
      model.metadata_props.add(key=name, value=text)
    onnx.save(model, path)
    return
  with np.load(path) as archive:
    arrays = dict(archive)
  said = json.loads(arrays[loader.METADATA].tobytes())
  function(said)
  document = np.frombuffer(json.dumps(said).encode(), np.uint8)
  with open(path, 'wb') as file:
    np.savez(file, **{**arrays, loader.METADATA: document})


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  'field, value, text',
  [
    ('image_threshold', math.inf, 'image_threshold is inf'),
    ('pixel_threshold', -math.inf, 'pixel_threshold is -inf'),
    ('image_threshold', 1e30, r'image_threshold is 1e\+30'),
    ('image_threshold', True, 'image_threshold is True'),
    ('image_threshold', [0.5], r'image_threshold is \[0.5\]'),
    ('pixel_threshold', 'high', "pixel_threshold is 'high'"),
    ('input', {'shape': ['batch', 9, 9, 3]}, '9'),
    ('input', {'shape': ['batch', 8, 8, 4]}, 'input.shape is'),
    ('input', {'shape': ['batch', '8', '8', 3]}, 'input.shape is'),
    ('input', {'shape': ['batch', True, True, 3]}, 'input.shape is'),
    ('input', [8, 8], 'input.shape is None'),
    ('format', 'dmdd_jax onnx 99', "'dmdd_jax onnx 99'"),
    ('image_threshold', None, None),
    ('image_threshold', math.nan, None),
    ('image_threshold', 7, None),
  ],
)
def test_what_a_file_says_of_itself_is_checked(
  kind, field, value, text, tmp_path
):
  path = exported_helpers.write(kind, tmp_path)
  change(path, lambda said: said.update({field: value}))
  if text:
    with pytest.raises(ValueError, match=f'{path.name}.*{text}.*export.py'):
      serve_models.open_model(path)
    return
  model = serve_models.open_model(path)
  expected = 'good' if value == 7 else 'uncalibrated'
  assert model.image_threshold == (7.0 if value == 7 else None)
  assert model.verdict(0.7) == expected


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('field', onnx_loader._NEEDED)
def test_what_a_file_does_not_say_is_named(kind, field, tmp_path):
  if (kind, field) == ('onnx', 'format'):
    pytest.skip('files of the first format do not say it')
  path = exported_helpers.write(kind, tmp_path)
  change(path, lambda said: said.pop(field))
  with pytest.raises(ValueError, match=f'{path.name}.*{field}.*export.py'):
    serve_models.open_model(path)


@pytest.mark.parametrize('kind', KINDS)
def test_a_file_of_the_first_format_opens_with_a_warning(kind, tmp_path):
  path = exported_helpers.write(kind, tmp_path)

  def older(said):
    del said['program_sha256']
    said['format'] = f'dmdd_jax {kind} 1'

  change(path, older)
  with pytest.warns(UserWarning, match="'nut'.*has no checksum"):
    assert serve_models.open_model(path).image_threshold == 0.5


@pytest.mark.parametrize('kind', KINDS)
def test_altered_weights_are_refused(kind, tmp_path):
  path = exported_helpers.write(kind, tmp_path)
  content = path.read_bytes()
  before = np.float32(1 / 255).tobytes()
  if kind == 'onnx':
    assert before in content
    path.write_bytes(content.replace(before, np.float32(0.5).tobytes()))
  else:
    with np.load(path) as archive:
      arrays = dict(archive)
    with open(path, 'wb') as file:
      np.savez(file, **{**arrays, 'gain': np.float32([0.5])})
  with pytest.raises(ValueError, match='weights were changed'):
    serve_models.open_model(path)


def test_a_quantised_file_is_refused(tmp_path):
  path = exported_helpers.write('onnx', tmp_path)
  import onnx

  model = onnx.load(path)
  onnx.save(model, path)  # The same, by another program.
  assert serve_models.open_model(path).category == 'nut'
  model.graph.node.add(op_type='Identity', input=['map'], output=['more'])
  onnx.save(model, path)
  with pytest.raises(ValueError, match='weights were changed'):
    serve_models.open_model(path)


@pytest.mark.parametrize('kind', KINDS)
def test_weights_that_are_not_finite_are_refused(kind, tmp_path, monkeypatch):
  program = exported_helpers.make_program()
  program.weights['gain'][:] = np.nan
  monkeypatch.setattr(exported_helpers, 'make_program', lambda: program)
  path = exported_helpers.write(kind, tmp_path)
  with pytest.raises(ValueError, match='not finite'):
    serve_models.open_model(path)


@pytest.mark.parametrize('content', [b'', b'text', b'\x00' * 99, b'\xff' * 99])
def test_what_is_no_onnx_file_has_no_digest_or_one_error(content, tmp_path):
  path = tmp_path / 'x.onnx'
  path.write_bytes(content)
  with pytest.raises(onnx_loader.OnnxFileError, match='x.onnx'):
    onnx_loader.load(path)


def test_onnxruntime_gets_the_processors_of_this_process(tmp_path, monkeypatch):
  path = exported_helpers.write('onnx', tmp_path)
  import onnxruntime

  given, session = [], onnxruntime.InferenceSession
  monkeypatch.setattr(
    onnxruntime,
    'InferenceSession',
    lambda content, options, **rest: (
      given.append(options) or session(content, options, **rest)
    ),
  )
  monkeypatch.setattr(onnx_loader, 'processors', lambda: 1)
  onnx_loader.load(path)
  (options,) = given
  assert options.intra_op_num_threads == 1
  spinning = 'session.intra_op.allow_spinning'
  assert options.get_session_config_entry(spinning) == '0'


@pytest.mark.skipif(
  not hasattr(os, 'sched_setaffinity'), reason='this system has no affinity'
)
def test_processors_are_those_of_the_affinity():
  allowed = os.sched_getaffinity(0)
  assert onnx_loader.processors() == len(allowed)
  try:
    os.sched_setaffinity(0, {min(allowed)})
    assert onnx_loader.processors() == 1
  finally:
    os.sched_setaffinity(0, allowed)


def _pictures(folder):
  """{name: file} of every kind that programs decode differently."""
  rng = np.random.default_rng(0)
  grey = rng.integers(0, 256, (20, 30), np.uint8)
  colour = rng.integers(0, 256, (20, 30, 4), np.uint8)
  rgb = Image.fromarray(colour[..., :3])
  deep = Image.fromarray(rng.integers(0, 65536, (20, 30), np.uint16))
  turned = Image.Exif()
  turned[0x0112] = 6
  palette = rgb.quantize(16)
  pictures = {
    'plain.png': (rgb, {}),
    'grey.png': (Image.fromarray(grey), {}),
    '16bit.png': (deep, {}),
    '16bit.tiff': (deep, {}),
    'alpha.png': (Image.fromarray(colour), {}),
    'grey_alpha.png': (Image.fromarray(colour[..., :2].copy(), 'LA'), {}),
    'alpha.webp': (Image.fromarray(colour), {'lossless': True}),
    'palette.png': (palette, {}),
    'palette_clear.png': (palette, {'transparency': 3}),
    'rgb_clear.png': (rgb, {'transparency': tuple(colour[0, 0, :3].tolist())}),
    'bits.png': (Image.fromarray(grey > 99), {}),
    'exif.jpg': (rgb, {'exif': turned}),
    'exif.png': (rgb, {'exif': turned}),
    'cmyk.jpg': (rgb.convert('CMYK'), {}),
    'cmyk.tiff': (rgb.convert('CMYK'), {}),
    'frames.tiff': (
      rgb,
      {'save_all': True, 'append_images': [Image.new('RGB', (30, 20))]},
    ),
  }
  for name, (picture, options) in pictures.items():
    picture.save(folder / name, **options)
  return {name: folder / name for name in pictures}


def test_the_loader_reads_every_file_as_predict_does(tmp_path):
  for name, path in _pictures(tmp_path).items():
    expected = images_lib.read_image(path, None)
    np.testing.assert_array_equal(onnx_loader.read_image(path), expected, name)
  assert images_lib.read_image(tmp_path / 'exif.jpg', None).shape == (30, 20, 3)
  clear = images_lib.read_image(tmp_path / 'palette_clear.png', None)
  opaque = images_lib.read_image(tmp_path / 'palette.png', None)
  assert (clear != opaque).any()


def test_neither_reads_32_bits(tmp_path):
  path = tmp_path / 'float.tiff'
  Image.fromarray(np.zeros((4, 5), np.float32)).save(path)
  for read in (
    lambda x: images_lib.read_image(x, None),
    onnx_loader.read_image,
  ):
    with pytest.raises(ValueError, match='float.tiff.*32-bit'):
      read(path)


def test_the_file_beside_the_export_needs_three_packages(tmp_path):
  """What README.md shows, with the pixels that predict prepares."""
  path = exported_helpers.write('onnx', tmp_path)
  export_lib.copy_loader(str(path))
  pictures = _pictures(tmp_path)
  code = f"""
import sys

class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in ('absl', 'cv2', 'dmdd_jax', 'jax', 'onnx'):
      raise ImportError('blocked: ' + name)

sys.meta_path.insert(0, Blocked())
import json
import dmdd_onnx

model = dmdd_onnx.load('model.onnx')
results = model.inspect({[str(x) for x in pictures.values()]!r})
print(json.dumps([[x.score, x.verdict, x.map.tolist()] for x in results]))
"""
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  results = json.loads(done.stdout)
  assert len(results) == len(pictures)
  side = exported_helpers.SIDE
  for (score, verdict, values), file in zip(results, pictures.values()):
    prepared = images_lib.read_image(file, side)
    expected = prepared.astype(np.float32).mean(-1) / 255
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert score == pytest.approx(expected.max(), abs=1e-5)
    assert verdict == ('defective' if score >= 0.5 else 'good')
