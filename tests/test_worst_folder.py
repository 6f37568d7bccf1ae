"""The worst files that real folders have, through every program at once.

Each kind has a test of its own elsewhere; here they meet, and nothing may be
lost: every readable image is in every table, every other file is named.
"""

import csv
import json
import os
import shutil

import numpy as np
from PIL import Image
import program_helpers
import pytest

from dmdd_jax import predict
from dmdd_jax import run as run_lib
from dmdd_jax.data import check
from dmdd_jax.data import files
from dmdd_jax.data import surfaces
from dmdd_jax.export import write as export_lib
from dmdd_jax.report import page

pytestmark = pytest.mark.usefixtures('compiled_once')

NAMES = (
  r'b$\frac{1}{2}$.png',
  os.fsdecode(b'caf\xe9.png'),
  'n' * 248 + '.png',  # With the suffix of a map it is too long for a file.
  'line\nbreak, "quoted".png',
  '=SUM(A1).png',
  '検査.png',
  'no_suffix',
)


def _save(folder, seed):
  """One readable image of every bad name and of several formats."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.integers(90, 120, shape, np.uint8)

  paths = []
  for name in NAMES:
    paths.append(os.path.join(folder, name))
    Image.fromarray(draw(32, 32, 3)).save(paths[-1], format='PNG')
  for name, image, kind in (
    ('a.gif', Image.fromarray(draw(32, 32)), 'GIF'),
    ('a.jfif', Image.fromarray(draw(32, 32, 3)), 'JPEG'),
    ('a.ppm', Image.fromarray(draw(32, 32, 3)), 'PPM'),
    ('deep.png', Image.fromarray(draw(32, 32).astype(np.uint16) * 200), 'PNG'),
    ('line.png', Image.fromarray(draw(2, 600, 3)), 'PNG'),
  ):
    paths.append(os.path.join(folder, name))
    image.save(paths[-1], format=kind)
  return paths


def _spoil(folder):
  """Files that cannot be read, a file that is no image, and a link loop."""
  with open(os.path.join(folder, 'cut.png'), 'wb') as file:
    file.write(b'\x89PNG\r\n\x1a\n\0\0')
  os.symlink('nowhere.png', os.path.join(folder, 'gone.png'))
  os.symlink('.', os.path.join(folder, 'loop'))
  with open(os.path.join(folder, 'notes.txt'), 'w') as file:
    file.write('made on Monday')
  return {os.path.join(folder, name) for name in ('cut.png', 'gone.png')}


@pytest.fixture(scope='module')
def worst(tmp_path_factory):
  """The category, its readable test images of the worst kind, its bad files."""
  root = tmp_path_factory.mktemp('worst')
  folder = program_helpers.write_data(root)
  bad, readable = set(), []
  for seed, split in enumerate(('train', 'test')):
    good = os.path.join(folder, split, 'good')
    readable = _save(good, seed)
    bad |= _spoil(good)
  return root, readable, bad


@pytest.fixture(scope='module')
def workdir(worst, tmp_path_factory):
  """A training on it that skips what cannot be read."""
  root, _, _ = worst
  folder = str(tmp_path_factory.mktemp('run'))
  config = program_helpers.tiny_run(
    root, data__on_bad_image='skip', train__checkpoint_every=6
  )
  run_lib.run_categories(config, folder)
  return folder


def test_training_refuses_by_name(worst, tmp_path):
  root, _, bad = worst
  config = program_helpers.tiny_run(root)
  with pytest.raises(files.BadImageError) as caught:
    run_lib.run_categories(config, str(tmp_path))
  assert any(path in str(caught.value) for path in bad)


def test_no_test_image_is_lost(worst, workdir):
  _, readable, _ = worst
  folder = os.path.join(workdir, surfaces.CATEGORY)
  with open(
    os.path.join(folder, 'scores.csv'),
    encoding='utf-8',
    errors='surrogateescape',
    newline='',
  ) as file:
    rows = list(csv.DictReader(file))
  listed = [os.path.basename(row['file']) for row in rows]
  assert len(listed) == len(set(listed)) or len(rows) == 7 + len(readable)
  for path in readable:
    assert os.path.basename(path) in listed
  with open(os.path.join(folder, 'results.json'), 'rb') as file:
    assert json.load(file)['image_auroc'] is not None
  pictures = os.path.join(folder, 'pictures')
  assert any(files_ for _, _, files_ in os.walk(pictures))


def test_the_report_has_them(worst, workdir):
  _, readable, _ = worst
  with open(page.write(workdir), encoding='utf-8') as file:
    text = file.read()
  for name in ('検査.png', 'a.gif', 'no_suffix'):
    assert json.dumps(name)[1:-1] in text or name in text


def test_an_inspection_has_a_row_or_a_reason_for_each(worst, workdir, tmp_path):
  root, readable, bad = worst
  category = os.path.join(workdir, surfaces.CATEGORY)
  good = os.path.join(root, surfaces.CATEGORY, 'test', 'good')
  summary = predict.predict(category, good, tmp_path)
  assert set(summary['failed']) == {x for x in bad if x.startswith(good)}
  assert not summary['incomplete']
  with open(
    summary['table'], encoding='utf-8', errors='surrogateescape', newline=''
  ) as file:
    rows = {row['file']: row for row in csv.DictReader(file)}
  assert set(readable) <= set(rows)
  assert all(np.isfinite(float(row['score'])) for row in rows.values())
  written = [
    sum(len(names) for *_, names in os.walk(os.path.join(tmp_path, kind)))
    for kind in ('maps', 'overlays')
  ]
  assert written == [len(rows)] * 2


def test_check_data_names_the_same_files(worst):
  root, _, bad = worst
  report = check.check_category(root, surfaces.CATEGORY)
  text = check.format_report(report)
  for path in bad:
    assert os.path.basename(path) in text
  assert 'cannot' in text or 'not an image' in text
  assert report.counts['test/good'] >= len(NAMES)


def test_export_compares_on_them(worst, workdir, tmp_path):
  _, readable, _ = worst
  copies = tmp_path / 'images'
  copies.mkdir()
  for path in readable:
    shutil.copy(path, copies)
  metadata = export_lib.export(
    os.path.join(workdir, surfaces.CATEGORY),
    'stablehlo',
    tmp_path / 'model.dmdd',
    str(copies),
  )
  assert metadata['verified']['images'] == 8
