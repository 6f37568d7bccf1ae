"""Maps and scores of other programs, evaluated where and as they lie."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import layout_helpers
import numpy as np
from PIL import Image
import program_helpers
import pytest
from sklearn import metrics as sklearn_metrics
import tifffile

from configs import default
from dmdd_jax import evaluate_maps
from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import maps as maps_lib
from dmdd_jax.data import scores as scores_lib
from dmdd_jax.metrics import region
from dmdd_jax.metrics import results
from dmdd_jax.metrics import spro as spro_lib

TOOL = os.path.join(program_helpers.REPOSITORY, 'tools/evaluate_maps.py')
TREES = {
  'mvtec_ad': lambda root: (layout_helpers.mvtec(root), 'nut')[1],
  **{
    name: lambda root, make=make: make(root)[0]
    for name, make in layout_helpers.SETS.items()
  },
}


def _make(root, layout):
  """A fake tree without its training images; its fields and test images."""
  root.mkdir()
  category = TREES[layout](root)
  data = {'name': layout, 'root': str(root), 'category': category}
  for path in (root / category / 'train', root / 'train'):
    shutil.rmtree(path, ignore_errors=True)
  fields = {**default.get_config().data, **data}
  return data, layouts.list_dataset(fields, with_train=False).test


def _maps(records, seed=0, dtype=np.float32):
  """Maps that know a little of the masks; {image: (H, W)}."""
  rng = np.random.default_rng(seed)
  maps = {}
  for record in records:
    mask = images_lib.native_mask(record)
    maps[record.image] = (rng.random(mask.shape) + 0.3 * mask).astype(dtype)
  return maps


def _write(folder, data, maps, suffix='.tiff'):
  """Writes maps where the images lie in the data set."""
  for image, values in maps.items():
    name = pathlib.Path(os.path.relpath(image, data['root']))
    path = folder / name.with_suffix(suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.save if suffix == '.npy' else tifffile.imwrite)(path, values)


def _expected(records, maps, scores=None, top=100):
  """The figures by `metrics.results` of arrays, scores by definition."""
  arrays = [maps[r.image].astype(float) for r in records]
  masks = [images_lib.native_mask(r) for r in records]
  if scores is None:
    scores = [np.sort(a.ravel())[-top:].mean() for a in arrays]
  labels = [r.label for r in records]
  return results.compute(arrays, masks, scores, labels)


def _same(metrics, expected):
  for name in results.METRICS:
    np.testing.assert_allclose(
      np.array(metrics[name], float), expected[name], rtol=1e-12, err_msg=name
    )


@pytest.mark.parametrize('layout', TREES)
@pytest.mark.parametrize('suffix', ['.tiff', '.npy'])
def test_every_layout_without_its_training_images(tmp_path, layout, suffix):
  data, records = _make(tmp_path / 'data', layout)
  maps = _maps(records)
  _write(tmp_path / 'maps', data, maps, suffix)
  found = evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), data)
  assert list(found) == [data['category']]
  _same(found[data['category']].metrics, _expected(records, maps))
  assert found[data['category']].metrics['image_score'] == 'top100'
  assert 'unused_maps' not in found[data['category']].metrics


# The conventions of three other programs, without renaming a file.


def _run(output, *arguments):
  """Runs the program; returns its results.json and what it logged."""
  process = subprocess.run(
    [sys.executable, TOOL, f'--output={output}', *arguments],
    env=program_helpers.environment(output),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert process.returncode == 0, process.stdout
  return json.loads((output / 'results.json').read_text()), process.stdout


@pytest.mark.parametrize('inside', ['', 'anomaly_images'])
def test_what_is_sent_to_mvtecs_server(tmp_path, inside):
  """float16 TIFF below anomaly_images, as its dataset class names them."""
  data, records = _make(tmp_path / 'data', 'mvtec_ad_2')
  maps = _maps(records, dtype=np.float16)
  folder = tmp_path / 'submission'
  _write(folder / 'anomaly_images', data, maps)
  # These have no truth, and are no maps too many.
  private = folder / 'anomaly_images/can/test_private/000_regular.tiff'
  private.parent.mkdir()
  tifffile.imwrite(private, np.zeros((12, 16), np.float16))
  masks = folder / 'anomaly_images_thresholded/can/test_private'
  layout_helpers.save(masks / '000_regular.png', layout_helpers.mask())
  found, log = _run(
    tmp_path / 'output',
    f'--maps={folder / inside}',
    f'--data={tmp_path / "data"}',
    '--layout=mvtec_ad_2',
    '--score=max',
  )
  _same(found['can'], _expected(records, maps, top=1))
  assert found['can']['image_score'] == 'max'
  assert 'not used' not in log


@pytest.mark.parametrize('inside', ['', 'anomaly_maps/mvtec_ad'])
def test_the_tree_of_efficientad(tmp_path, inside):
  """output/1/anomaly_maps/mvtec_ad/CATEGORY/test/DEFECT/ID.tiff, float32."""
  data, records = _make(tmp_path / 'data', 'mvtec_ad')
  maps = _maps(records)
  run = tmp_path / 'output/1'
  _write(run / 'anomaly_maps/mvtec_ad', data, maps)
  (run / 'trainings/mvtec_ad/nut').mkdir(parents=True)
  found, _ = _run(
    tmp_path / 'results', f'--maps={run / inside}', f'--data={data["root"]}'
  )
  _same(found['nut'], _expected(records, maps))


@pytest.mark.parametrize(
  'name',
  [
    lambda record, root: record.image,
    lambda record, root: os.path.relpath(record.image, root),
    lambda record, root: '/home/you/mvtec' + record.image[len(root) :],
    lambda record, root: os.path.join(record.defect, _name(record)),
    lambda record, root: (
      f'C:\\data\\nut\\test\\{record.defect}\\{_name(record)}'
    ),
    lambda record, root: os.path.splitext(record.image)[0] + '.tiff',
    lambda record, root: os.path.splitext(record.image)[0],
  ],
)
def test_scores_by_any_name_of_their_image(tmp_path, name):
  data, records = _make(tmp_path / 'data', 'mvtec_ad')
  rows = [
    (name(record, data['root']), score)
    for record, score in zip(records, SCORES, strict=True)
  ]
  values, unused = scores_lib.match_scores(
    [(file.replace('\\', '/'), score) for file, score in rows],
    data['root'],
    records,
  )
  assert values == SCORES and not unused


def test_a_csv_of_scores_from_anywhere(tmp_path):
  """No maps: image metrics alone, beside scikit-learn's."""
  data, records = _make(tmp_path / 'data', 'mvtec_ad')
  _write_scores(tmp_path / 'scores.csv', records)
  found, _ = _run(
    tmp_path / 'output',
    f'--scores={tmp_path / "scores.csv"}',
    f'--data={data["root"]}',
  )
  labels = [record.label for record in records]
  assert found['nut']['image_auroc'] == pytest.approx(
    sklearn_metrics.roc_auc_score(labels, SCORES)
  )
  assert found['nut']['image_ap'] == pytest.approx(
    sklearn_metrics.average_precision_score(labels, SCORES)
  )
  assert found['nut']['image_score'] == 'csv'
  assert found['nut']['au_pro'] is None
  assert found['nut']['undefined']['au_pro'] == 'no maps'
  assert not (tmp_path / 'output/defects.csv').exists()


def _name(record):
  return os.path.basename(record.image)


# Of the 5 test images of the tree 'nut'.
SCORES = [0.9, 0.2, 0.3, 0.8, 0.25]


def _write_scores(path, records, scores=SCORES, columns='file,score,verdict'):
  lines = [columns]
  for record, score in zip(records, scores, strict=True):
    lines.append(
      f'/home/you/nut/test/{record.defect}/{_name(record)},{score},-'
    )
  path.write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(lines).encode())


def _read(path):
  with open(path, newline='') as file:
    return list(csv.DictReader(file))


def test_scores_of_a_csv_beside_maps_and_the_rows(tmp_path):
  data, records = _make(tmp_path / 'data', 'mvtec_ad')
  maps = _maps(records)
  _write(tmp_path / 'maps', data, maps)
  _write_scores(tmp_path / 'scores.csv', records)
  evaluated = evaluate_maps.evaluate_maps(
    str(tmp_path / 'maps'),
    data,
    scores_file=str(tmp_path / 'scores.csv'),
    pro_limits=(0.3, 0.1),
  )
  found = evaluated['nut'].metrics
  expected = _expected(records, maps, SCORES)
  for name in ('image_auroc', 'pixel_ap', 'au_pro', 'pro_per_image'):
    assert found[name] == pytest.approx(expected[name])
  masks = [images_lib.native_mask(record) for record in records]
  (at_a_tenth,) = region.au_pro(list(maps.values()), masks, (0.1,))
  assert found['au_pro_01'] == pytest.approx(at_a_tenth)
  texts = evaluate_maps.tables(evaluated)
  assert 'Image score: csv.' in texts['results.md']
  assert '| au_pro_01 |' in texts['results.md']
  for name in ('images.csv', 'defects.csv'):
    (tmp_path / name).write_text(texts[name])
  rows = _read(tmp_path / 'images.csv')
  assert [row['file'] for row in rows] == [
    os.path.relpath(record.image, data['root']) for record in records
  ]
  assert [float(row['score']) for row in rows] == SCORES
  assert {row['category'] for row in rows} == {'nut'}
  for record, row in zip(records, rows, strict=True):
    assert float(row['highest']) == maps[record.image].max()
    assert (row['pro_per_image'] != '') == bool(record.label)
  defects = _read(tmp_path / 'defects.csv')
  assert len(defects) == 3 and {row['area'] for row in defects} == {'30'}
  assert defects[0]['file'] == 'nut/test/dent/000.PNG'
  assert np.mean([float(row['au_pro']) for row in defects]) == pytest.approx(
    found['au_pro']
  )


# Precision.


def test_half_precision_maps_keep_their_distinct_scores(tmp_path):
  """In float16 the means of the highest pixels of these maps would tie."""
  data, records = _make(tmp_path / 'data', 'mvtec_ad')
  maps = {}
  for rank, record in enumerate(records):
    values = np.full((12, 16), 1024, np.float16)
    values.ravel()[:rank] += 1  # The next float16.
    maps[record.image] = values
  _write(tmp_path / 'maps', data, maps, '.npy')
  found = evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), data)['nut']
  scores = [row['score'] for row in found.images]
  assert scores == [1024 + rank / 100 for rank in range(5)]
  _same(found.metrics, _expected(records, maps))


def test_double_precision_maps_are_not_rounded(tmp_path):
  data, records = _make(tmp_path / 'data', 'mvtec_ad')
  maps = _maps(records, dtype=np.float64)
  maps = {image: 1 + 1e-12 * values for image, values in maps.items()}
  _write(tmp_path / 'maps', data, maps)
  found = evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), data)['nut']
  _same(found.metrics, _expected(records, maps))
  assert found.metrics['pixel_auroc'] > 0.6  # 0.5 in float32.


# What is refused, by name.


@pytest.fixture
def nut(tmp_path):
  """Fields, test images and maps, written to tmp_path / 'maps'."""
  data, records = _make(tmp_path / 'data', 'mvtec_ad')
  maps = _maps(records)
  _write(tmp_path / 'maps', data, maps)
  return data, records, maps


def test_maps_of_another_size(tmp_path, nut):
  data, records, maps = nut
  half = {image: values[::2, ::2] for image, values in maps.items()}
  half[records[0].image] = maps[records[0].image]
  _write(tmp_path / 'maps', data, half)
  with pytest.raises(
    maps_lib.BadMapError, match=r'good/000\.tiff is 6 x 8 .* 12 x 16'
  ):
    evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), data)
  evaluated = evaluate_maps.evaluate_maps(
    str(tmp_path / 'maps'), data, resize=True
  )
  found = evaluated['nut'].metrics
  assert found['maps_resized'] == 4
  scores = [
    np.sort(half[r.image].ravel())[-100:].mean(dtype=float) for r in records
  ]
  fitted = {i: maps_lib.resize_map(v, (12, 16)) for i, v in half.items()}
  _same(found, _expected(records, fitted, scores))
  text = evaluate_maps.tables(evaluated)['results.md']
  assert '4 maps were resized to the size of their image.' in text


@pytest.mark.parametrize('resize', [False, True])
def test_transposed_maps(tmp_path, nut, resize):
  data, _, maps = nut
  _write(tmp_path / 'maps', data, {i: v.T for i, v in maps.items()})
  with pytest.raises(maps_lib.BadMapError, match='transposed'):
    evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), data, resize=resize)


def test_maps_of_no_image_are_named_and_kept_out(tmp_path, nut, caplog):
  data, records, maps = nut
  extra = tmp_path / 'maps/nut/test/crack/007.tiff'
  extra.parent.mkdir()
  tifffile.imwrite(extra, np.zeros((12, 16), np.float32))
  found = evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), data)['nut']
  assert found.metrics['unused_maps'] == ['nut/test/crack/007.tiff']
  assert 'crack/007.tiff' in caplog.text
  _same(found.metrics, _expected(records, maps))


def test_a_mask_of_another_size(tmp_path, nut):
  data, *_ = nut
  truth = tmp_path / 'data/nut/ground_truth/scratch/001_mask.png'
  layout_helpers.save(truth, layout_helpers.mask(16, 12))
  with pytest.raises(files.BadImageError, match=r'001_mask\.png.* 16 x 12 '):
    evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), data)


def test_a_turned_image_has_the_size_it_is_seen_in(tmp_path, nut):
  data, records, maps = nut
  exif = Image.Exif()
  exif[0x0112] = 6
  turned = Image.fromarray(layout_helpers.picture(16, 12))
  turned.save(records[-1].image, exif=exif)
  found = evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), data)['nut']
  _same(found.metrics, _expected(records, maps))


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'tiff', 'webp'])
@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_size_by_the_header(tmp_path, suffix, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = tmp_path / f'a.{suffix}'
  Image.fromarray(layout_helpers.picture(12, 16)).save(path, exif=exif)
  shape = images_lib.read_image(path, None).shape
  assert images_lib.native_size(path) == shape[:2]


def test_a_size_of_no_image_is_named(tmp_path):
  with pytest.raises(files.BadImageError, match=r'a\.png: no such file'):
    images_lib.native_size(tmp_path / 'a.png')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'score': 'mean'}, "'mean'; expected max, csv, or top"),
    ({'score': 'top0'}, "'top0'; expected max, csv, or top"),
    ({'score': 'csv'}, 'name a CSV'),
    ({'score': 'max', 'scores_file': 'scores.csv'}, 'name a CSV'),
    ({'pro_limits': (30.0,)}, '30'),
    ({'scores_file': 'nowhere.csv'}, "no file 'nowhere.csv'"),
    ({'categories': ['bolt']}, r'category \(bolt\)'),
  ],
)
def test_options_that_cannot_be(tmp_path, nut, options, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), nut[0], **options)


def test_paths_below_the_home_folder(tmp_path, nut, monkeypatch):
  data, records, _ = nut
  monkeypatch.setenv('HOME', str(tmp_path))
  _write_scores(tmp_path / 'scores.csv', records)
  found = evaluate_maps.evaluate_maps(
    '~/maps', {**data, 'root': '~/data'}, scores_file='~/scores.csv'
  )
  assert [row['score'] for row in found['nut'].images] == SCORES


def test_neither_maps_nor_scores(nut):
  with pytest.raises(ValueError, match='neither maps nor a CSV'):
    evaluate_maps.evaluate_maps('', nut[0])


def test_a_folder_without_maps_says_what_it_looked_for(tmp_path, nut):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(
    maps_lib.BadMapError, match=r'\(nut\) in .*empty, .*anomaly_maps/mvtec_ad'
  ):
    evaluate_maps.evaluate_maps(str(tmp_path / 'empty'), nut[0])
  with pytest.raises(FileNotFoundError, match='nowhere'):
    evaluate_maps.evaluate_maps('nowhere', nut[0])
  with pytest.raises(FileNotFoundError, match='nowhere'):
    evaluate_maps.evaluate_maps(
      str(tmp_path / 'maps'), {**nut[0], 'root': 'nowhere'}
    )


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('path,score\na,1\n', 'columns path, score; expected file and score'),
    ('', r'columns \(none\)'),
    ('file,score\nnut/test/good/000.png,high\n', 'line 2: .*high'),
    ('file,score\nnut/test/good/000.png,nan\n', 'line 2: .*not finite'),
    ('file,score\nnut/test/good/000.png\n', 'line 2: '),
    ('file,score\n000.png,1\n', "'000.png' could be that of 3 images"),
    (
      'file,score\ngood/000.png,1\nnut/test/good/000.png,1\n',
      'good/000.png has two scores',
    ),
    ('file,score\ngood/000.png,1\n', 'no score for 4 of 5 test images'),
    ('file,score\n', 'no score for 5 of 5 test images'),
  ],
)
def test_a_table_of_scores_that_cannot_be_used(tmp_path, nut, text, message):
  path = tmp_path / 'scores.csv'
  path.write_text(text)
  with pytest.raises(scores_lib.BadScoresError, match=message):
    evaluate_maps.evaluate_maps('', nut[0], scores_file=str(path))


def test_scores_of_no_image_are_named(tmp_path, nut, caplog):
  data, records, _ = nut
  path = tmp_path / 'scores.csv'
  _write_scores(path, records)
  with open(path, 'a') as file:
    file.write('\nbolt/test/good/000.png,0.1,-')
  evaluate_maps.evaluate_maps('', data, scores_file=str(path))
  assert '1 scores belong to no test image' in caplog.text
  assert 'bolt/test/good/000.png' in caplog.text


def test_one_category_of_two_by_what_there_is(tmp_path, nut):
  """A second category without maps and scores is not meant."""
  data, records, _ = nut
  shutil.copytree(tmp_path / 'data/nut', tmp_path / 'data/bolt')
  assert list(evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), data)) == [
    'nut'
  ]
  path = tmp_path / 'scores.csv'
  _write_scores(path, records)
  assert list(evaluate_maps.evaluate_maps('', data, scores_file=str(path))) == [
    'nut'
  ]
  with pytest.raises(scores_lib.BadScoresError, match='images of bolt'):
    evaluate_maps.evaluate_maps(
      '', data, ['bolt', 'nut'], scores_file=str(path)
    )


# Your own folders, and MVTec LOCO.


def test_folders_of_your_own(tmp_path):
  shutil.copytree(
    layout_helpers.mvtec(tmp_path / 'mvtec') / 'nut', tmp_path / 'parts'
  )
  data = {
    'name': 'folder',
    'root': str(tmp_path / 'parts'),
    'test_normal': 'test/good',
    'defect': 'test/scratch',
    'masks': 'ground_truth/scratch',
  }
  records = layouts.list_dataset(
    {**data, 'normal': '', 'category': 'folder'}, with_train=False
  ).test
  assert [record.label for record in records] == [0, 0, 1, 1]
  maps = _maps(records)
  _write(tmp_path / 'maps', data, maps)
  found = evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), data)['folder']
  _same(found.metrics, _expected(records, maps))
  without = evaluate_maps.evaluate_maps(
    str(tmp_path / 'maps'), {**data, 'masks': ''}
  )['folder']
  assert without.metrics['image_auroc'] == found.metrics['image_auroc']
  assert without.metrics['undefined']['au_pro'] == (
    '2 of 2 defective images have no mask'
  )
  assert not without.defects


def test_spro_of_loco(tmp_path):
  data, records = _make(tmp_path / 'data', 'mvtec_loco')
  maps = _maps(records)
  _write(tmp_path / 'maps', data, maps)
  found = evaluate_maps.evaluate_maps(
    str(tmp_path / 'maps'), data, pro_limits=(0.05,)
  )['pushpins'].metrics
  # Of 64 pixels of the first region half are enough, of the second ten.
  bands = np.zeros((2, 12, 16), np.uint8)
  bands[0, :4], bands[1, 8:] = 1, 1
  areas = (32, 10)
  values = []
  for kind in ('logical', 'structural'):
    part = [r for r in records if r.defect in (f'{kind}_anomalies', 'good')]
    regions = [zip(bands, areas) if r.label else () for r in part]
    (value,) = spro_lib.spro(
      [maps[r.image] for r in part], [list(r) for r in regions], (0.05,)
    )
    assert found[f'spro_005_{kind}'] == pytest.approx(value)
    values.append(value)
  assert found['spro_005'] == pytest.approx(np.mean(values))
  assert 'spro' not in found


def test_without_rows_the_figures_are_the_same(tmp_path, nut):
  data, records, maps = nut
  found = evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), data, rows=False)[
    'nut'
  ]
  _same(found.metrics, _expected(records, maps))
  assert not found.defects and 'aupimo' not in found.images[0]
