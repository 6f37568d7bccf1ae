"""Files and bodies that are built to take long, or much memory."""

import base64
import io
import json
import struct
import sys
import tempfile
import zlib

import numpy as np
from PIL import Image
import pytest
import serve_helpers

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import limits as structure
from dmdd_jax.serve import decoding
from dmdd_jax.serve import limits as limits_lib
from dmdd_jax.serve import worker

httpx = serve_helpers.httpx
FORM = 'multipart/form-data; boundary=b'


def encoded(image, kind='PNG', **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def form(content, name='image'):
  head = f'Content-Disposition: form-data; name="{name}"; filename="x"'
  return b'--b\r\n' + head.encode() + b'\r\n\r\n' + content + b'\r\n--b--\r\n'


def many_scans(side, repeats):
  """A progressive JPEG whose last scan comes again and again."""
  picture = Image.new('RGB', (side, side), (90, 80, 70))
  content = encoded(picture, 'JPEG', progressive=True)
  last = content[content.rindex(b'\xff\xda') : -2]
  return content[:-2] + last * repeats + b'\xff\xd9'


def narrow_png(height):
  """A PNG, one pixel wide."""
  header = struct.pack('>IIBBBBB', 1, height, 8, 0, 0, 0, 0)
  chunks = (
    (b'IHDR', header),
    (b'IDAT', zlib.compress(bytes(2 * height), 1)),
    (b'IEND', b''),
  )
  content = b'\x89PNG\r\n\x1a\n'
  for name, data in chunks:
    check = struct.pack('>I', zlib.crc32(name + data))
    content += struct.pack('>I', len(data)) + name + data + check
  return content


ATTACKS = {
  'scans': (lambda: many_scans(64, 700), 'more than 32 scans'),
  'narrow': (lambda: narrow_png(1_000_000), 'a side may have 100000'),
}


@pytest.mark.parametrize('name', ATTACKS)
def test_the_structure_is_refused_before_decoding(name, tmp_path, monkeypatch):
  make, text = ATTACKS[name]
  content = make()
  path = tmp_path / 'attack.img'
  path.write_bytes(content)
  monkeypatch.setattr(  # Decodes.
    images_lib, '_to_rgb', lambda *args, **options: 1 / 0
  )
  # Of --mode predict, and of the server.
  with pytest.raises(files.BadImageError, match=f'attack.img.*{text}'):
    images_lib.read_image(path, None)
  with pytest.raises(images_lib.ImageTooLargeError, match=text):
    images_lib.decode_image(content, 10**8)


@pytest.mark.parametrize(
  'mode, options',
  [
    ('L', {}),
    ('RGB', {}),
    ('RGB', {'progressive': True}),
    ('CMYK', {'progressive': True}),
    ('RGB', {'restart_marker_rows': 1, 'exif': b'Exif\0\0' + b'\xff\xda' * 99}),
  ],
)
def test_ordinary_jpegs_are_read(mode, options):
  noise = np.random.default_rng(0).integers(0, 256, (70, 90, 4), np.uint8)
  picture = Image.fromarray(noise, 'RGBA' if mode != 'CMYK' else 'CMYK')
  content = encoded(picture.convert('RGB').convert(mode), 'JPEG', **options)
  assert images_lib.decode_image(content, 10**6).shape == (70, 90, 3)
  # The decoder itself sees as many.
  expected = {('RGB', True): 10, ('CMYK', True): 18}
  key = (mode, bool(options.get('progressive')))
  assert structure.count_scans(content, 99) == expected.get(key, 1)


@pytest.fixture
def decoders():
  """Makes decoders with limits; their children end with the test."""
  made = []

  def make(count=1, **limits):
    made.append(decoding.Decoders(count, limits_lib.Limits(**limits)))
    return made[-1]

  yield make
  for item in made:
    item.close()


def test_what_takes_long_is_ended_and_the_next_is_decoded(decoders):
  decoder = decoders(decode_seconds=0.3)
  small = encoded(Image.new('RGB', (30, 20), (9, 9, 9)))
  # The time of a process's start does not count.
  assert decoder.decode(FORM, form(small), 16).pixels[0, 0].tolist() == [9] * 3
  with pytest.raises(worker.Refusal, match='more than 0.3 s') as refusal:
    decoder.decode(FORM, form(many_scans(7000, 20)), 16)
  assert refusal.value.status == 413
  image = decoder.decode(FORM, form(small), 16)
  assert (image.height, image.width) == (20, 30)
  assert image.pixels.shape == (16, 16, 3)


@pytest.mark.skipif(
  sys.platform != 'linux', reason='only Linux limits what is used'
)
def test_what_takes_much_memory_is_refused(decoders):
  decoder = decoders(decode_memory=2**29)
  with pytest.raises(worker.Refusal, match='of memory at most') as refusal:
    decoder.decode(FORM, form(encoded(Image.new('RGBA', (7000, 7000)))), 16)
  assert refusal.value.status == 413
  small = encoded(Image.new('RGB', (30, 20)))
  assert decoder.decode(FORM, form(small), 16).width == 30


def test_a_decoder_that_crashes_is_replaced(decoders):
  decoder = decoders()
  decoder._children[0].kill()
  small = form(encoded(Image.new('RGB', (30, 20))))
  with pytest.raises(worker.Refusal, match='ended the process') as refusal:
    decoder.decode(FORM, small, 16)
  assert refusal.value.status == 415
  assert decoder.decode(FORM, small, 16).width == 30


def test_decoders_end_with_the_server(decoders):
  decoder = decoders(2)
  decoder.close()
  assert all(child.wait(timeout=60) for child in decoder._children)


@pytest.mark.parametrize(
  'kind, body, text',
  [
    ('application/json', b'[' * 2**24, 'no JSON'),
    ('application/json', b'{"a":' * 2**20, 'no JSON'),
    ('application/json', b'[%s1]' % (b'1,' * 2**22), 'the body must be'),
    (
      'application/json',
      b'{%s"a":1}' % b''.join(b'"%d":1,' % i for i in range(2**20)),
      'the body must be',
    ),
    (FORM, b'--b\r\n\r\n\r\n' * 100 + b'--b--\r\n', 'more than 8 parts'),
    (FORM, form(b'x' * 9, name='other'), 'no file named "image"'),
    (FORM, form(b'\r\n--' * 2**20), 'none of PNG'),
  ],
  ids=['brackets', 'nested', 'items', 'keys', 'parts', 'name', 'boundaries'],
)
def test_bodies_are_parsed_beside_the_server(kind, body, text, monkeypatch):
  """The loop that answers all others parses none of it."""

  loads = json.loads

  def here(text, *arguments):
    assert len(text) < 1000 and not arguments, 'parsed in the server'
    return loads(text)

  with serve_helpers.serving() as address:
    monkeypatch.setattr(json, 'loads', here)
    monkeypatch.setattr(worker, 'image_of_body', here)
    answer = httpx.post(
      f'{address}/v1/inspect',
      content=body,
      headers={'content-type': kind},
      timeout=120,
    )
    monkeypatch.undo()
  assert answer.status_code in (400, 415), answer.text
  assert text in answer.json()['detail']


def test_nothing_is_written_to_a_full_folder_of_temporary_files(monkeypatch):
  def full(*unused_arguments, **unused_options):
    raise OSError(28, 'No space left on device')

  noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
  for name in ('TemporaryFile', 'SpooledTemporaryFile', 'mkstemp'):
    monkeypatch.setattr(tempfile, name, full)
  monkeypatch.setenv('TMPDIR', '/nowhere')
  with serve_helpers.serving() as address:
    answer = serve_helpers.post(address, encoded(Image.fromarray(noise)))
  assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
  'write',
  [
    base64.b64encode,
    base64.encodebytes,
    lambda content: b'data:image/png;base64,' + base64.b64encode(content),
    lambda content: base64.encodebytes(content).replace(b'\n', b'\r\n'),
  ],
  ids=['plain', 'lines', 'data URL', 'CRLF'],
)
def test_spellings_of_base64(write):
  content = encoded(Image.new('RGB', (30, 20)))
  body = json.dumps({'image': write(content).decode()}).encode()
  assert worker.image_of_body('application/json', body, 10**6) == content


@pytest.mark.parametrize('image', ['data:image/png,x', 'data:;base64', 'AA'])
def test_what_is_not_base64(image):
  body = json.dumps({'image': image}).encode()
  with pytest.raises(worker.Refusal, match='base64') as refusal:
    worker.image_of_body('application/json', body, 10**6)
  assert refusal.value.status == 400


@pytest.mark.parametrize(
  'kind, mode',
  [
    ('BMP', 'RGB'),
    ('TIFF', 'RGBA'),
  ],
)
def test_20_megapixels_are_taken_in_large_formats(kind, mode, decoders):
  """The default limits, and the two formats that take most bytes."""
  rng = np.random.default_rng(0)
  rows = rng.integers(0, 256, (500, 5000, 4), np.uint8)
  noise = np.tile(rows, (8, 1, 1))
  picture = Image.fromarray(noise[..., :3])
  if mode == 'RGBA':
    picture = Image.fromarray(noise)
  content = encoded(picture, kind)
  image = decoders(decode_seconds=120).decode(FORM, form(content), 32)
  assert (image.height, image.width) == (4000, 5000)


def test_many_large_bodies_do_not_fill_the_memory():
  limits = limits_lib.Limits(held=2**16)
  content = encoded(Image.new('RGB', (30, 20))) + bytes(2**17)
  with serve_helpers.serving(limits=limits) as address:
    answer = serve_helpers.post(address, content)
    assert answer.status_code == 503 and '65536' in answer.json()['detail']
    small = encoded(Image.new('RGB', (30, 20)))
    for _ in range(3):
      assert serve_helpers.post(address, small).status_code == 200
