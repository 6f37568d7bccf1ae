"""File names and which files a program looks at."""

import io
import os
import socket

import numpy as np
from PIL import Image
import pytest

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import textures

LATIN = os.fsdecode(b'caf\xe9.png')  # A name that is not UTF-8.


def save(path, kind='PNG', side=8, **options):
  """Writes an image in one of Pillow's formats, whatever the name says."""
  path.parent.mkdir(parents=True, exist_ok=True)
  content = io.BytesIO()
  pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
  Image.fromarray(pixels).save(content, kind, **options)
  path.write_bytes(content.getvalue())
  return str(path)


def names(listing, root):
  """The images of a listing, relative to a folder."""
  return [os.path.relpath(path, root) for path in listing.images]


def test_a_printable_name_is_valid_utf8():
  for name, shown in {
    b'caf\xc3\xa9 \xe6\x97\xa5.png': 'caf\u00e9 \u65e5.png',
    b'caf\xe9.png': 'caf\ufffd.png',
    b'a\nb\x1b[31m.png': 'a\ufffdb\ufffd[31m.png',
  }.items():
    assert files.printable(os.fsdecode(name)) == shown
    shown.encode()


def test_absolute_expands_the_home(monkeypatch):
  monkeypatch.setenv('HOME', '/home/ada')
  assert files.absolute('~/x') == '/home/ada/x'


@pytest.mark.parametrize(
  'kind', [k for k in images_lib._formats() if k not in ('TGA', 'DIB')]
)
@pytest.mark.parametrize('name', ['part', 'part.0417', 'part.bak'])
def test_content_decides_where_the_suffix_says_nothing(tmp_path, kind, name):
  path = save(tmp_path / name, kind)
  assert files.is_image(path)
  assert images_lib.read_image(path, None).shape == (8, 8, 3)
  (tmp_path / 'notes').write_text('P1 is a part, BM another. II*')
  assert files.list_inputs(tmp_path).images == (path,)


@pytest.mark.parametrize('mode', ['1', 'L', 'I;16'])
def test_netpbm_of_any_kind_is_an_image_by_content(tmp_path, mode):
  content = io.BytesIO()
  Image.new(mode, (3, 2)).save(content, 'PPM')
  path = tmp_path / 'part'
  path.write_bytes(content.getvalue())
  assert files.is_image(str(path))
  head, rest = content.getvalue().split(b'\n', 1)
  path.write_bytes(head + b'\n# made by a camera\n' + rest)
  assert files.is_image(str(path))


def test_the_suffixes_of_common_formats_are_listed_in_any_case(tmp_path):
  made = [
    save(tmp_path / 'a.GIF', 'GIF'),
    save(tmp_path / 'b.jfif', 'JPEG'),
    save(tmp_path / 'c.ppm', 'PPM'),
    save(tmp_path / 'd.jp2', 'JPEG2000'),
    save(tmp_path / 'e', 'PNG'),
  ]
  assert list(files.list_inputs(tmp_path).images) == made
  assert list(files.images(str(tmp_path))) == made
  assert list(textures.list_textures(tmp_path)) == made
  every = os.path.join(tmp_path, '*')
  assert list(files.list_inputs(every).images) == made


def test_what_is_no_image_is_counted_and_named(tmp_path, warnings):
  save(tmp_path / 'a.png')
  save(tmp_path / '.b.png')
  (tmp_path / 'labels.json').write_text('{}')
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'readme').write_text('P5 was here')
  (tmp_path / 'empty').touch()
  for pattern in (tmp_path, tmp_path / '**'):
    listing = files.list_inputs(pattern)
    assert names(listing, tmp_path) == ['a.png']
    assert names(_only(listing.others), tmp_path) == [
      '.b.png',
      'empty',
      'labels.json',
      'sub/readme',
    ]
    assert '4 no images or hidden' in warnings[-1]
    assert 'labels.json' in warnings[-1]
  warnings.clear()
  files.images_below(str(tmp_path))
  files.images(str(tmp_path))
  assert '4 no images or hidden' in warnings[0] and 'empty' in warnings[0]
  assert '2 files are no images' in warnings[1]


def _only(paths):
  return files.Listing(tuple(paths), (), (), {})


@pytest.mark.parametrize(
  'name, content',
  [
    ('a.heic', b'x'),
    ('a', b'\0\0\0\x1cftypheic\0\0\0\0'),
    ('a', b'8BPS\0\1'),
    ('a', b'\x76\x2f\x31\x01'),
    ('IM-0001', b'\0' * 128 + b'DICM'),
    ('a', b'P7\nWIDTH 4\n'),
    ('a.pcx', b'x'),
    ('a.JLS', b'x'),
    ('a.NEF', None),
  ],
)
def test_an_image_that_cannot_be_read_is_listed_and_refused(
  tmp_path, name, content
):
  path = save(tmp_path / name, 'TIFF')  # Pillow would read a raw's preview.
  if content is not None:
    (tmp_path / name).write_bytes(content)
  assert files.list_inputs(tmp_path).images == (path,)
  with pytest.raises(files.BadImageError, match='is not read|not an image'):
    images_lib.read_image(path, None)


def test_eps_starts_no_program(tmp_path):
  path = tmp_path / 'a.png'
  Image.new('RGB', (4, 4)).save(path, 'EPS')
  with pytest.raises(files.BadImageError, match='not an image'):
    images_lib.read_image(path, None)


def test_a_link_to_a_missing_file_is_an_image_that_cannot_be_read(tmp_path):
  save(tmp_path / 'a.png')
  os.symlink('missing.png', tmp_path / 'b.png')
  os.symlink('missing', tmp_path / 'c')
  os.symlink('d.png', tmp_path / 'd.png')  # A link to itself.
  expected = ['a.png', 'b.png', 'c', 'd.png']
  for pattern in (tmp_path, tmp_path / '*', tmp_path / '**' / '*'):
    assert names(files.list_inputs(pattern), tmp_path) == expected
  alone = files.list_inputs(tmp_path / 'b.png')
  assert names(alone, tmp_path) == ['b.png']
  for name in expected[1:]:
    with pytest.raises(files.BadImageError, match=name):
      images_lib.read_image(tmp_path / name, None)


def test_link_loops_are_visited_once(tmp_path):
  save(tmp_path / 'part' / 'a.png')
  for index in range(3):  # Three would be 3 ** 40 paths.
    os.symlink('..', tmp_path / 'part' / f'0loop{index}')
  os.symlink('part', tmp_path / '0alias')
  patterns = ['', '*', '**', '**/*', '**/*.png', 'part/**/*.png', '**/part/**']
  for pattern in patterns:
    listing = files.list_inputs(os.path.join(tmp_path, pattern))
    assert names(listing, tmp_path) == ['part/a.png'], pattern
  assert files.images_below(str(tmp_path)) == (str(tmp_path / 'part/a.png'),)


def test_pipes_and_sockets_are_no_images(tmp_path):
  save(tmp_path / 'a.png')
  os.mkfifo(tmp_path / 'b.png')
  os.mkfifo(tmp_path / 'c')
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(os.path.relpath(tmp_path / 'd.png'))
    listing = files.list_inputs(tmp_path)
  assert names(listing, tmp_path) == ['a.png']
  assert len(listing.others) == 3


def test_a_folder_that_cannot_be_listed_is_a_fault(tmp_path, monkeypatch):
  save(tmp_path / 'a.png')
  (tmp_path / 'lost+found').mkdir()
  scan = os.scandir

  def refuse(path):
    if os.path.basename(path) == 'lost+found':
      raise PermissionError(13, 'Permission denied', path)
    return scan(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  listing = files.list_inputs(tmp_path)
  assert names(listing, tmp_path) == ['a.png']
  assert 'Permission denied' in listing.faults[str(tmp_path / 'lost+found')]
  with pytest.raises(files.DatasetError, match='lost'):
    files.images_below(str(tmp_path))
  with pytest.raises(files.DatasetError, match='lost'):
    files.list_inputs(tmp_path / 'lost+found')


@pytest.mark.parametrize('pattern', ['', '*', '**', '**/*.png'])
def test_the_output_is_never_input(tmp_path, pattern, monkeypatch):
  monkeypatch.chdir(tmp_path)
  save(tmp_path / 'a.png')
  save(tmp_path / 'day1' / 'overlays' / 'b.png')  # The user's own folder.
  # What this run has written, and has no table of yet.
  save(tmp_path / 'out' / 'overlays' / 'a.png.png')
  # What another run wrote.
  save(tmp_path / 'old' / 'maps' / 'a.png.tiff')
  save(tmp_path / 'old' / 'overlays' / 'deep' / 'a.png.png')
  (tmp_path / 'old' / 'predictions.json').write_text('{}')
  save(tmp_path / 'run' / 'pictures' / 'worst.png')
  (tmp_path / 'run' / 'report_data.zip').touch()
  os.symlink('old/overlays', tmp_path / 'recent')
  pattern = os.path.join(tmp_path, pattern)
  expected = ['a.png', 'day1/overlays/b.png']
  if pattern.endswith(('/', '**', '**/*.png')):
    listing = files.list_inputs(pattern, 'out')
    assert names(listing, tmp_path) == expected
    # The output is the input's own folder.
    (tmp_path / 'out').rename(tmp_path / 'gone')
    (tmp_path / 'gone' / 'overlays').rename(tmp_path / 'overlays')
    listing = files.list_inputs(pattern, '.')
  else:
    listing = files.list_inputs(pattern, 'out')
  assert names(listing, tmp_path) == expected
  assert 'written by a run' in listing.skipped()


def test_a_folder_named_pictures_is_input_beside_the_output(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  save(tmp_path / 'pictures' / 'a.png')
  listing = files.list_inputs('pictures', '.')
  assert names(listing, tmp_path) == ['pictures/a.png']


def test_a_run_in_the_training_folder_is_no_training_data(tmp_path):
  path = save(tmp_path / 'good' / 'a.png')
  save(tmp_path / 'good' / 'run' / 'pictures' / 'worst.png')
  (tmp_path / 'good' / 'run' / 'report_data.zip').touch()
  assert files.images_below(str(tmp_path)) == (path,)


def test_what_is_there_goes_before_a_glob(tmp_path):
  folder_path = tmp_path / 'lot [1]*'
  save(folder_path / 'a[0].png')
  save(folder_path / 'a0.png')
  save(tmp_path / 'lot 1x' / 'b.png')
  listing = files.list_inputs(folder_path)
  assert names(listing, folder_path) == ['a0.png', 'a[0].png']
  listing = files.list_inputs(folder_path / 'a[0].png')
  assert names(listing, folder_path) == ['a[0].png']
  listing = files.list_inputs(tmp_path / 'lot [1]x' / '*')
  assert names(listing, tmp_path) == ['lot 1x/b.png']


def test_a_glob_of_folders_searches_them(tmp_path):
  for day in ('day1', 'day2'):
    save(tmp_path / day / 'good' / '000.png')
    save(tmp_path / day / 'bad' / '000.png')
  listing = files.list_inputs(tmp_path / '*' / 'good')
  assert names(listing, tmp_path) == ['day1/good/000.png', 'day2/good/000.png']


def test_relative_globs_keep_their_names(tmp_path, monkeypatch):
  save(tmp_path / 'a' / 'b' / 'c.png')
  monkeypatch.chdir(tmp_path)
  for pattern in ('**/*.png', 'a/**', 'a/**/c.png', '*/b/*', 'a', '**/b'):
    assert files.list_inputs(pattern).images == ('a/b/c.png',), pattern


def test_a_list_of_paths(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  paths = [
    save(tmp_path / 'z.png'),
    save(tmp_path / ' a b [0].png'),
    save(tmp_path / 'home' / 'c.png'),
    save(tmp_path / LATIN),
    save(tmp_path / 'sub' / 'd.png'),
  ]
  (tmp_path / 'broken.doc').write_text('no picture')
  lines = [b'\xef\xbb\xbfz.png', b'', b' a b [0].png', b'~/c.png']
  lines += [b'caf\xe9.png', b'sub', b'z.png', b'gone.png', b'broken.doc', b'']
  (tmp_path / 'list.txt').write_bytes(b'\r\n'.join(lines))
  monkeypatch.chdir('/')
  listing = files.list_inputs(tmp_path / 'list.txt')
  # In its order, each once; what cannot be read is not lost.
  expected = [*paths, str(tmp_path / 'gone.png'), str(tmp_path / 'broken.doc')]
  assert list(listing.images) == expected
  (tmp_path / 'list.txt').write_text('\n\n')
  with pytest.raises(files.MissingDataError, match='list.txt: holds no image'):
    files.list_inputs(tmp_path / 'list.txt')


def test_the_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  path = save(tmp_path / 'new' / 'a.png')
  for pattern in ('~/new', '~/new/*.png', '~/new/a.png'):
    assert files.list_inputs(pattern).images == (path,)


def test_no_input_says_what_was_looked_for(tmp_path):
  (tmp_path / 'notes.txt').write_text('x')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='holds no image') as error:
    files.list_inputs(tmp_path / 'empty', field='--images')
  assert '--images=' in str(error.value) and 'LIST.txt' in str(error.value)
  with pytest.raises(FileNotFoundError, match=r'1 no images .*notes\.txt'):
    files.list_inputs(tmp_path)
  with pytest.raises(FileNotFoundError, match='holds no image'):
    files.list_inputs(tmp_path / 'nothing' / '*.png')
