"""Whole programs on a folder of awkward names."""

import csv
import json
import os
import subprocess
import sys

import layout_helpers
import program_helpers
import pytest

from dmdd_jax import evaluate_maps
from dmdd_jax import predict
from dmdd_jax import run as run_lib
from dmdd_jax.data import check
from dmdd_jax.data import files
from dmdd_jax.data import layouts
from dmdd_jax.data import maps as map_files
from dmdd_jax.export import write as export_lib
from dmdd_jax.report import archive

pytestmark = pytest.mark.usefixtures('compiled_once', 'four_channels')

LATIN = os.fsdecode(b'caf\xe9')  # A name that is not UTF-8.
# Equal stems in two folders, and in one with two suffixes.
GOOD = ('day1/000.png', 'day2/000.png', f'day2/{LATIN}.png', 'a[0] $x^2$.png')
BAD = ('dent/000.png', 'dent/000.tif', f'{LATIN}/000.png', 'dent/\n.png')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """~/parts: good, more (for the test), bad and masks, with files beside."""
  root = tmp_path_factory.mktemp('home') / 'parts'
  for index, name in enumerate(GOOD):
    for offset, folder in enumerate(('good', 'more')):
      picture = layout_helpers.picture(32, 32, seed=10 * offset + index)
      layout_helpers.save(root / folder / name, picture)
  for index, name in enumerate(BAD):
    picture = layout_helpers.picture(32, 32, seed=50 + index)
    layout_helpers.save(root / 'bad' / name, picture)
    layout_helpers.save(root / 'masks' / name, layout_helpers.mask(32, 32))
  layout_helpers.save(root / 'good/part.gif', layout_helpers.picture(seed=90))
  os.rename(root / 'good/part.gif', root / 'good/part')
  (root / 'good/notes.txt').write_text('x')
  os.symlink('..', root / 'good/day1/loop')
  return root


@pytest.fixture(scope='module')
def workdir(data, tmp_path_factory):
  """A run trained on it, by way of ~."""
  folder = str(tmp_path_factory.mktemp('run') / 'run')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('HOME', str(data.parent))
    config = program_helpers.tiny_run(
      '~/parts',
      data__name='folder',
      data__category='folder',
      data__normal='good',
      data__defect='~/parts/bad',
      data__masks='masks',
      data__test_normal='more/**/*.png',
      data__textures='~/parts/more',
    )
    run_lib.run_categories(config, folder)
  return os.path.join(folder, 'folder')


def test_training_and_evaluation_lose_no_name(workdir, data):
  rows = archive.read_scores(workdir)
  expected = [f'more/{n}' for n in GOOD] + [f'bad/{n}' for n in BAD]
  assert sorted(row['file'] for row in rows) == sorted(expected)
  with open(os.path.join(workdir, 'scores.csv'), 'rb') as file:
    assert b'more/day2/caf\xe9.png' in file.read()
  assert os.listdir(os.path.join(workdir, 'pictures'))
  run = os.path.dirname(workdir)
  with open(os.path.join(run, 'report.html'), encoding='utf-8') as file:
    assert 'day2/caf' in file.read()


def test_maps_of_equal_stems_are_all_there(
  workdir, tmp_path, monkeypatch, data
):
  monkeypatch.setenv('HOME', str(data.parent))
  out, maps = str(tmp_path / 'out'), str(tmp_path / 'maps')
  run_lib.evaluate_run(workdir, out, maps=maps)
  found = [path for _, _, names in os.walk(maps) for path in names]
  assert len(found) == len(GOOD) + len(BAD)
  assert os.path.isfile(os.path.join(maps, 'folder/test/good/day1/000.tiff'))
  assert os.path.isfile(os.path.join(maps, 'folder/test/good/day2/000.tiff'))
  assert os.path.isfile(os.path.join(maps, 'folder/test/dent/000.tif.tiff'))
  assert os.path.isfile(os.path.join(maps, f'folder/test/{LATIN}/000.tiff'))


def test_an_inspection_names_what_it_does_not_read(workdir, data, tmp_path):
  new = tmp_path / 'new'
  for index, name in enumerate(GOOD):
    layout_helpers.save(new / name, layout_helpers.picture(seed=index))
  os.symlink('gone.png', new / 'dangling.png')
  os.symlink('..', new / 'day1/loop')
  (new / 'photo.heic').write_bytes(b'x')
  (new / 'labels.csv').write_text('x')
  out = new / 'out'
  for _ in range(2):  # The second time its own pictures lie in the input.
    summary = predict.predict(workdir, str(new), str(out), resume=False)
    assert summary['images'] == len(GOOD)
    names = [os.path.relpath(path, new) for path in summary['failed']]
    assert sorted(names) == ['dangling.png', 'photo.heic']
    assert not summary['incomplete']
  with open(
    summary['table'], encoding='utf-8', errors='surrogateescape', newline=''
  ) as file:
    rows = [os.path.relpath(row['file'], new) for row in csv.DictReader(file)]
  assert sorted(rows) == sorted(GOOD)
  with open(out / 'predictions.json', encoding='utf-8') as file:
    document = json.load(file)
  assert sorted(row['file'] for row in document['predictions']) == sorted(
    str(new / name) for name in GOOD
  )
  assert document['ignored'] == [str(new / 'labels.csv')]
  for kind, suffix in (('maps', 'tiff'), ('overlays', 'png')):
    written = [
      os.path.relpath(os.path.join(folder, name), out / kind)
      for folder, _, names in os.walk(out / kind)
      for name in names
    ]
    assert sorted(written) == sorted(f'{name}.{suffix}' for name in GOOD)


def test_the_program_as_users_run_it(workdir, data, tmp_path, cache):
  """~ and a list in flags; the status is 1 where an image was not read."""
  home = tmp_path / 'home'
  layout_helpers.save(home / 'new/a.png', layout_helpers.picture())
  layout_helpers.save(home / f'new/{LATIN}.png', layout_helpers.picture())
  lines = [b'new/a.png', b'new/caf\xe9.png', b'new/gone.png']
  (home / 'list.txt').write_bytes(b'\n'.join(lines))
  process = subprocess.run(
    [
      *(
        sys.executable,
        os.path.join(program_helpers.TESTS, 'small_program.py'),
      ),
      *('-m', 'dmdd_jax.main', '--mode=predict', f'--workdir={workdir}'),
      *('--input=~/list.txt', f'--output=~/{LATIN} out', '--maps=none'),
    ],
    cwd=tmp_path,
    env=program_helpers.environment(cache) | {'HOME': str(home)},
    capture_output=True,
    check=False,
  )
  assert process.returncode == 1, process.stderr
  table = home / f'{LATIN} out' / 'predictions.csv'
  assert os.fsencode(table) in process.stdout
  assert len(table.read_bytes().splitlines()) == 3
  assert b'gone.png' in process.stderr
  assert b'2 images' in process.stderr and b'1 could not be' in process.stderr
  assert os.listdir(tmp_path) == ['home']


def test_export_compares_on_any_of_them(workdir, data, tmp_path):
  output = tmp_path / 'x.dmdd'
  metadata = export_lib.export(
    workdir, 'stablehlo', output, images=str(data / 'good')
  )
  assert metadata['verified']['images'] == len(GOOD) + 1
  with pytest.raises(files.MissingDataError, match='--images='):
    export_lib.export(workdir, 'stablehlo', output, images=str(tmp_path))


def test_names_in_mvtecs_layout(tmp_path):
  root = layout_helpers.mvtec(tmp_path / 'data')
  for folder, name in (('train/good', LATIN), ('test/dent', f'{LATIN} 2')):
    picture = layout_helpers.picture(seed=70 + len(name))
    layout_helpers.save(root / 'nut' / folder / f'{name}.png', picture)
  mask = root / 'nut' / f'ground_truth/dent/{LATIN} 2_mask.png'
  layout_helpers.save(mask, layout_helpers.mask())
  (root / 'nut/train/good/notes').write_text('x')
  os.symlink('gone', root / 'nut/train/good/dangling')
  report = check.check_category(root, 'nut')
  (fault,) = report.faults
  assert 'dangling: no such file' in fault
  assert [os.path.basename(path) for path in report.ignored] == ['notes']
  os.unlink(root / 'nut/train/good/dangling')
  maps = tmp_path / 'maps'
  records = layouts.list_mvtec(root, 'nut').test
  for stem in map_files.map_paths(maps, 'nut', records):
    map_files.write_map(f'{stem}.tiff', layout_helpers.mask() / 255.0)
  data = {'name': 'mvtec_ad', 'root': str(root)}
  rows = evaluate_maps.evaluate_maps(str(maps), data)
  assert rows['nut'].metrics['pixel_auroc'] is not None
