"""The report: what is in it, what cannot get into it, and a real browser."""

import base64
import csv
import io
import json
import math
import os
import re
import xml.etree.ElementTree
import zipfile

import numpy as np
from PIL import Image
import pytest
from sklearn import metrics as sklearn_metrics

from dmdd_jax import storage
from dmdd_jax.data import records as records_lib
from dmdd_jax.metrics import ranking
from dmdd_jax.metrics import region
from dmdd_jax.metrics import results as results_lib
from dmdd_jax.metrics import store as store_lib
from dmdd_jax.report import archive as archive_lib
from dmdd_jax.report import category as category_lib
from dmdd_jax.report import charts
from dmdd_jax.report import page as page_lib
from dmdd_jax.report import published
from dmdd_jax.report import sections
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import scalars

SIDE = 32
NASTY = '</script><img src=x onerror="document.title=\'broken\'">&{{title}}.png'


def make_category(folder, name='toy', good=4, defective=4, **changes):
  """Writes a category's results: the score of image i of a label is i + 1.

  The threshold is 2.5: good images 3, 4, ... are false alarms, defective images
  1 and 2 are missed.
  """
  rng = np.random.default_rng(0)
  records, scores = [], []
  picture = rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
  thumbnail = archive_lib.encode_image(picture)
  with store_lib.MapStore() as store:
    for label, count in ((0, good), (1, defective)):
      kind = ('good', 'scratch')[label]
      for i in range(count):
        path = f'/data/{name}/test/{kind}/{i:04d}.png'
        records.append(
          records_lib.Record(path, path if label else None, label, kind)
        )
        scores.append(1.0 + i * 4 / max(good, defective))
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[8:16, 8:24] = label
        noise = rng.random((SIDE, SIDE), np.float32)
        store.append(noise + mask * np.float32(2), mask)
    for index, path in changes.pop('paths', {}).items():
      records[index] = records_lib.Record(
        path, None, records[index].label, records[index].defect
      )
    scores = np.array(scores, np.float32)
    labels = np.array([record.label for record in records])
    calibration = calibration_lib.Calibration(
      score_lib.Fusion(), *(changes.pop('threshold', 2.5),) * 2, 1.0, 4
    )
    metrics = results_lib.compute(store, None, scores, labels)
    metrics |= {'maps_mean': {}, 'at_threshold': {}, 'category': name}
    metrics |= {'calibration': calibration.to_dict(), 'step': 7, **changes}
    storage.write_text(
      os.path.join(folder, 'results.json'), results_lib.format_json(metrics)
    )
    archive_lib.write(
      folder,
      '/data',
      records,
      {'map': scores, 'maps_mean': scores[::-1]},
      store,
      [thumbnail] * len(records),
      calibration,
    )
  return metrics


def _text(path):
  with open(path, encoding='utf-8') as file:
    return file.read()


def test_scores_csv_has_a_row_per_image(tmp_path):
  make_category(tmp_path)
  rows = list(csv.DictReader(io.StringIO(_text(tmp_path / 'scores.csv'))))
  assert len(rows) == 8 and tuple(rows[0]) == archive_lib.FIELDS
  assert rows[0] == {
    'file': 'toy/test/good/0000.png',
    'defect': 'good',
    'label': '0',
    'score': '1.0',
    'maps_mean_score': '4.0',
    'verdict': 'good',
  }
  assert [row['verdict'] for row in rows[4:]] == ['good'] * 2 + [
    'defective'
  ] * 2


def test_the_archive_reads_back(tmp_path):
  make_category(tmp_path)
  archive = archive_lib.open_archive(tmp_path)
  image, shades = (Image.open(io.BytesIO(d)) for d in archive.read(5))
  archive.close()
  assert image.size == shades.size == (SIDE, SIDE)
  low, high = archive.colors
  # The defect lies at 2 to 3, the rest at 0 to 1: bright against dark.
  values = low + np.asarray(shades.convert('L')) / 255.0 * (high - low)
  assert values[9:15, 9:23].min() > 1.5 > 1.2 > values[20:].max()
  # The prediction is the part of the defect at or above 2.5.
  assert 0.3 < archive.items[5]['overlap'] < 0.7
  assert archive.items[0]['overlap'] is None and archive.items[0]['truth'] == ''


def test_archives_with_the_former_name_of_the_prediction(tmp_path):
  make_category(tmp_path)
  path = tmp_path / 'report_data.zip'
  with zipfile.ZipFile(path) as old:
    members = {name: old.read(name) for name in old.namelist()}
  text = members['report.json'].decode()
  members['report.json'] = text.replace('"prediction":', '"found":')
  assert members['report.json'] != text
  with zipfile.ZipFile(path, 'w') as new:
    for name, data in members.items():
      new.writestr(name, data)
  archive = archive_lib.open_archive(tmp_path)
  archive.close()
  assert archive.items == json.loads(text)['items']


def test_an_outline_encloses_the_area():
  mask = np.zeros((64, 64), np.uint8)
  mask[16:32, 8:40] = 1
  mask[0:8, 56:64] = 1  # In a corner: closed along the borders.
  points = [
    np.cumsum(np.array(re.findall(r'-?\d+', part), int).reshape(-1, 2), axis=0)
    for part in archive_lib.outline(mask, 0.5).split('M')[1:]
  ]
  areas = sorted(
    abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 / 64
    for x, y in (p.T for p in points)
  )
  # Corners are cut by the contour: half a pixel each.
  assert areas == pytest.approx([8 * 8, 16 * 32], abs=2.5)
  assert all(p.min() >= 0 and p.max() <= 512 for p in points)


def test_no_outline_where_nothing_or_everything_is_predicted():
  ones = np.ones((8, 8), np.float32)
  assert archive_lib.outline(ones, 2.0) == ''
  assert archive_lib.outline(ones, math.nan) == ''
  assert archive_lib.outline(ones, 0.5) == 'M0 0h512v512h-512z'


def test_small_defects_survive_the_thumbnail(tmp_path):
  with store_lib.MapStore() as store:
    mask = np.zeros((1024, 1024), np.uint8)
    mask[701, 333] = 1
    store.append(mask.astype(np.float32), mask)
    record = records_lib.Record('/d/a.png', '/d/m.png', 1, 'dot')
    one = np.ones(1, np.float32)
    calibration = calibration_lib.uncalibrated(_fusion_config())
    archive_lib.write(
      tmp_path,
      '',
      [record],
      {'map': one, 'maps_mean': one},
      store,
      [archive_lib.encode_image(np.zeros((1024, 512, 3), np.uint8))],
      calibration,
    )
  archive = archive_lib.open_archive(tmp_path)
  assert Image.open(io.BytesIO(archive.read(0)[0])).size == (128, 256)
  archive.close()
  assert archive.items[0]['truth'] and archive.items[0]['prediction'] is None
  assert archive.items[0]['file'] == 'a.png'


def _fusion_config():
  from configs import default

  return default.get_config()


def test_the_curves_have_the_exact_areas():
  rng = np.random.default_rng(1)
  maps = np.round(rng.normal(size=(6, 20, 20)), 1).astype(np.float32)
  masks = np.zeros(maps.shape, np.uint8)
  masks[3:, 4:9, 4:12] = 1
  maps += masks
  roc, pro = region.curves(maps, masks, points=10**7)
  area = np.trapezoid(roc[1], roc[0])
  assert area == pytest.approx(ranking.auroc(maps, masks), abs=1e-12)
  exact = region.au_pro(maps, masks, limits=(1.0,))[0]
  assert np.trapezoid(pro[1], pro[0]) == pytest.approx(exact, abs=1e-12)
  thin, _ = region.curves(maps, masks, points=50)
  assert len(thin[0]) <= 52 < len(roc[0])
  assert np.trapezoid(thin[1], thin[0]) == pytest.approx(area, abs=0.02)


def test_roc_curve_agrees_with_scikit_learn():
  rng = np.random.default_rng(2)
  labels = rng.integers(2, size=60)
  scores = np.round(rng.normal(size=60) + labels, 1)
  fpr, tpr, _ = sklearn_metrics.roc_curve(
    labels, scores, drop_intermediate=False
  )
  curve = ranking.roc_curve(scores, labels)
  np.testing.assert_allclose(curve, (fpr, tpr))
  with pytest.raises(ValueError, match='both labels'):
    ranking.roc_curve(scores, np.ones(60, int))


def _log(folder, points):
  for step, value in points:
    scalars.append(folder, step, {'train/loss': value})


def test_training_curves_of_a_run_that_resumed(tmp_path):
  assert scalars.read(tmp_path) == {}
  _log(tmp_path, [(1, 9.0), (2, 8.0), (3, 7.5)])
  scalars.append(tmp_path, 2, {'validation/image_auroc': np.float32(0.5)})
  _log(tmp_path, [(2, 7.0), (3, 6.0)])
  curves = {
    'train/loss': ([1, 2, 3], [9.0, 7.0, 6.0]),
    'validation/image_auroc': ([2], [0.5]),
  }
  assert scalars.read(tmp_path) == curves
  with open(tmp_path / 'scalars.jsonl', 'a') as file:
    file.write('{"step": 4, "train/lo')  # As a killed run leaves it.
  assert scalars.read(tmp_path) == curves


def test_scalars_are_json_whatever_the_numbers(tmp_path):
  _log(tmp_path, [(1, math.nan), (2, math.inf), (3, np.float32(0.25))])
  lines = _text(tmp_path / 'scalars.jsonl').splitlines()
  assert [json.loads(line) for line in lines] == [
    {'step': 1, 'train/loss': None},
    {'step': 2, 'train/loss': None},
    {'step': 3, 'train/loss': 0.25},
  ]
  steps, values = scalars.read(tmp_path)['train/loss']
  assert steps == [1, 2, 3] and np.isnan(values[:2]).all()
  make_category(tmp_path)
  page = _text(page_lib.write(tmp_path))
  assert 'Training losses' in page and 'nan' not in page.split('<script')[0]


def test_a_run_without_scalars_has_no_training_curves(tmp_path):
  make_category(tmp_path)
  page = _text(page_lib.write(tmp_path))
  assert 'The training curves are missing' in page
  _log(tmp_path, [(1, 2.0)])
  assert 'The training curves are missing' not in _text(
    page_lib.write(tmp_path)
  )


def _ticks(low, high, **options):
  chart = charts.lines(
    't',
    [charts.Line('l', [0, 1], [low, high])],
    x_label='',
    y_label='',
    **options,
  )
  return re.findall(r'class="end">([^<]*)<', chart)


def test_ticks_are_few_round_and_inside():
  assert _ticks(0, 1) == ['0', '0.2', '0.4', '0.6', '0.8', '1']
  assert _ticks(-0.6, 0.6) == ['-0.6', '-0.4', '-0.2', '0', '0.2', '0.4', '0.6']
  assert _ticks(0.03, 40, log=True) == ['0.1', '1', '10']
  assert _ticks(1, 20, log=True) == ['1', '2', '5', '10', '20']
  # No power of ten lies inside: the axis has labels all the same.
  assert {'2.5', '3', '3.5', '4'} <= set(_ticks(2.1, 4.1, log=True))


def test_charts_are_well_formed_and_escaped():
  line = charts.Line('<a & "b">', [1, 2, 3], [0.5, 0.0, 2.0])
  for chart in (
    charts.lines('a<b', [line], x_label='<x>', y_label='&', log=True),
    charts.lines('one', [charts.Line('p', [5], [5])], x_label='', y_label=''),
    charts.histogram(
      'h', [('<g>', [1.0, 1.0]), ('d', [])], x_label='s', threshold=math.nan
    ),
  ):
    xml.etree.ElementTree.fromstring(chart)
    assert '<a &' not in chart and '<g>' not in chart
    assert 'nan' not in chart and 'inf' not in chart


def test_bars_of_the_histogram_count_every_image():
  chart = charts.histogram(
    'h', [('good', [0.0, 0.0, 1.0]), ('bad', [5.0])], x_label='s', threshold=3.0
  )
  heights = [float(h) for h in re.findall(r'height="([\d.]+)"', chart)]
  assert len(heights) == 3
  assert max(heights) == pytest.approx(2 * min(heights), abs=0.2)
  assert 'threshold 3' in chart


def test_the_page_says_what_is_on_disk(tmp_path):
  make_category(tmp_path / 'screw', 'screw')
  make_category(tmp_path / 'mine', 'mine', good=6)
  _log(tmp_path / 'screw', [(1, 9.0), (2, 8.0)])
  path = page_lib.write(tmp_path)
  assert path == str(tmp_path / 'report.html')
  page = _text(path)
  assert (
    page.count('<details class="category"') == 2
    and '{{' not in page.split('<script>')[0]
  )
  for title in (
    'Image scores',
    'ROC of the images',
    'ROC of the pixels',
    'PRO',
  ):
    assert page.count(f'<figcaption>{title}') == 2
  assert page.count('<figcaption>Training losses') == 1
  for anchor in published.ANCHORS:
    assert anchor.name in page and anchor.differs in page
  assert '98.85' in page and '96.13' in page
  # Their figures of screw, and no mean of ours over two categories.
  own = re.search(r'<tr class="own">(.*?)</tr>', page, re.DOTALL)[1]
  assert own.count('class="none"') == 3 and page.count('>99.5<') == 1
  # 2 of 4 defective missed, 2 of 4 good alarm; of mine 4 of 6 by the scale.
  row, _ = re.findall(  # Of the results, and of the verdicts.
    r'<tr><th scope="row">screw</th>(.*?)</tr>', page, re.DOTALL
  )
  assert re.findall(r'<td>(\d+)</td>', row)[:4] == ['4', '4', '2', '2']
  assert not re.search(r'(?:src|href)="(?!#|data:)', page)


def test_asked_and_seen_false_alarms_stand_side_by_side(tmp_path):
  at_threshold = {
    'image_false_positive_rate_asked': 0.01,
    'image_false_positive_rate': 0.5,
    'confidence': {'image_false_positive_rate': [0.15, 0.85]},
    'warnings': ['2 of 4 good images are called defective'],
  }
  make_category(tmp_path / 'screw', 'screw', at_threshold=at_threshold)
  make_category(tmp_path / 'before', 'before')  # Older results say less.
  page = _text(page_lib.write(tmp_path))
  section = page.split('id="verdicts"')[1].split('</section>')[0]
  rows = re.findall(r'<tr><th scope="row">.*?</tr>', section, re.DOTALL)
  texts = [re.sub('<[^>]*>', ' ', row).split() for row in rows]
  before, screw = (' '.join(text) for text in texts)
  assert screw.startswith('screw 2.5 4 1.00 50.00 15.00 to 85.00 2 of 4 50.00')
  assert screw.endswith('2 of 4 2 of 4 good images are called defective')
  assert before == 'before 2.5 4 – 50.00 2 of 4 50.00 2 of 4'


def test_no_table_beside_others_where_nobody_published(tmp_path):
  make_category(tmp_path / 'mine', 'mine')
  page = _text(page_lib.write(tmp_path))
  assert 'id="anchors"' not in page and 'href="#anchors"' not in page


def test_a_mean_stands_beside_theirs_where_all_were_run():
  metrics = {'image_auroc': 0.5, 'pixel_auroc': 0.25, 'au_pro': 0.75}
  categories = [
    category_lib.Category(name, {**metrics, 'category': name}, [], None, {})
    for name in published.MVTEC_AD
  ]
  table = sections.anchors_table(categories)
  assert table['blocks'] == ['screw', 'toothbrush', published.MEAN]
  own, theirs = table['rows'][:2]
  assert own['figures'] == [0.5, 0.25, 0.75] * 3
  assert theirs['figures'] == [None] * 7 + [0.9885, 0.9613]
  # One category fewer, and there is no mean of ours.
  own = sections.anchors_table(categories[1:])['rows'][0]
  assert own['figures'][-3:] == [None] * 3


def test_names_cannot_break_out(tmp_path):
  make_category(tmp_path / 'a', '<b>&"name"</b>', paths={0: f'/data/a/{NASTY}'})
  page = _text(page_lib.write(tmp_path))
  assert '<b>&"name"' not in page and '<img src=x' not in page
  assert '</script><img' not in page
  data = re.search(r'id="gallery-data">(.*?)</script>', page)[1]
  assert json.loads(data)['items'][0]['file'] == f'a/{NASTY}'


def test_images_in_the_page_are_those_on_disk(tmp_path):
  make_category(tmp_path, good=30, defective=30)  # Two chunks.
  page = _text(page_lib.write(tmp_path))
  chunks = re.findall(r'id="chunk-\d">(.*?)</script>', page, re.DOTALL)
  lines = '\n'.join(chunks).split('\n')
  assert len(chunks) == 2 and len(lines) == 60
  archive = archive_lib.open_archive(tmp_path)
  for index in (0, 41, 59):
    image, shades, prediction, truth = lines[index].split('|')
    assert (base64.b64decode(image), base64.b64decode(shades)) == (
      archive.read(index)
    )
    assert prediction == archive.items[index]['prediction']
    assert truth == archive.items[index]['truth']
  archive.close()


def test_parts_that_are_missing_are_left_out(tmp_path):
  make_category(tmp_path)
  os.remove(tmp_path / 'report_data.zip')
  page = _text(page_lib.write(tmp_path))
  assert 'evaluate again' in page and 'Image scores' in page
  assert 'ROC of the pixels' not in page
  os.remove(tmp_path / 'scores.csv')
  assert 'Image scores' not in _text(page_lib.write(tmp_path))


def test_scores_of_another_evaluation_make_no_gallery(tmp_path):
  make_category(tmp_path)
  os.rename(tmp_path / 'report_data.zip', tmp_path / 'old')
  make_category(tmp_path, good=5)
  os.rename(tmp_path / 'old', tmp_path / 'report_data.zip')
  assert '"items":[]' in _text(page_lib.write(tmp_path))


def test_faults_are_named_and_never_lose_results(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'holds no results\.json'):
    page_lib.write(tmp_path)
  make_category(tmp_path)
  (tmp_path / 'report_data.zip').write_text('no zip')
  with pytest.raises(ValueError, match=r'report_data\.zip cannot be read'):
    page_lib.write(tmp_path)
  (reason,) = page_lib.try_write(tmp_path, [tmp_path]).values()
  assert 'cannot be read' in reason
  (tmp_path / 'scores.csv').write_text('a,b\n1,2\n')
  with pytest.raises(ValueError, match=r'scores\.csv is no table'):
    page_lib.write(tmp_path)


def test_without_thresholds_there_are_no_verdicts(tmp_path):
  make_category(tmp_path, threshold=math.nan)
  rows = archive_lib.read_scores(tmp_path)
  assert {row['verdict'] for row in rows} == {'uncalibrated'}
  page = _text(page_lib.write(tmp_path))
  assert 'NaN' not in page and '"threshold":null' in page
  assert 'false alarms</dt>' in page or '<dt>missed' not in page


# In a browser.


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  make_category(folder / 'a', 'a')
  make_category(folder / 'b', 'b', paths={0: f'/data/b/{NASTY}'})
  return page_lib.write(folder)


@pytest.fixture
def open_page(browser, request):
  """Opens a file; at the end nothing may be in the console."""
  faults, pages = [], []

  def opened(path, width=1200, height=900, **options):
    page = browser.new_page(
      viewport={'width': width, 'height': height}, **options
    )
    page.set_default_timeout(20000)
    pages.append(page)
    page.on('console', lambda message: faults.append(message.text))
    page.on('pageerror', lambda error: faults.append(str(error)))
    page.on(
      'request',
      lambda r: (
        r.url.startswith(('file:', 'data:', 'blob:')) or faults.append(r.url)
      ),
    )
    page.goto(f'file://{path}')
    page.evaluate("document.querySelector('#gallery').scrollIntoView()")
    return page

  yield opened
  for page in pages:
    page.close()
  assert not faults


def _expect(locator):
  """Waits. The page's policy forbids wait_for_function, which polls by eval."""
  from playwright.sync_api import expect

  return expect(locator)


def _wait_for_texts(page, selector, texts):
  """Cards are filled as they come into view, a moment after a click."""
  _expect(page.locator(selector)).to_have_text(texts, timeout=30_000)


def _wait_for_focus(page, name):
  """A dialog gives the focus back a moment after it is closed."""
  starts = re.compile(f'^{re.escape(name)}')
  _expect(page.locator(':focus')).to_have_attribute(
    'aria-label', starts, timeout=30_000
  )


def _wait_for_count(page, selector, count):
  _expect(page.locator(selector)).to_have_count(count, timeout=30_000)


def _names(page):
  return page.eval_on_selector_all(
    '#cards li', 'all => all.map(x => x.ariaLabel.split(",")[0])'
  )


def _scores(page):
  return page.eval_on_selector_all(
    '#cards li',
    'all => all.map(x => Number(/score ([^,]+)/.exec(x.ariaLabel)[1]))',
  )


def test_images_are_shown_and_names_stay_text(open_page, site):
  page = open_page(site)
  page.wait_for_selector('#cards .base')
  images = page.locator('.base')
  for index in range(images.count()):
    _expect(images.nth(index)).to_have_js_property(
      'naturalWidth', 32, timeout=30_000
    )
  assert len(_names(page)) == 16
  assert (
    page.title() != 'broken'
    and page.locator('#cards img[onerror]').count() == 0
  )
  page.fill('#search', 'onerror')
  _wait_for_count(page, '#cards li', 1)
  page.wait_for_selector('#cards .caption b')
  assert (
    page.locator('#cards .caption b').inner_text().endswith('&{{title}}.png')
  )


def test_sorting(open_page, site):
  page = open_page(site)
  for order, reverse in (('high', True), ('low', False)):
    page.select_option('#sort', order)
    scores = _scores(page)
    assert scores == sorted(scores, reverse=reverse) and len(set(scores)) > 2
  page.select_option('#sort', 'error')
  # The farthest on the wrong side first: missed at 1, false alarms at 4.
  assert set(_scores(page)[:4]) == {1, 4}
  page.select_option('#sort', 'file')
  assert _names(page) == sorted(_names(page))


def test_filters_for_missed_and_false_alarms(open_page, site):
  page = open_page(site)
  _wait_for_texts(page, '#show output', ['16', '4', '4', '8', '8'])
  page.get_by_text('missed 4').click()
  _wait_for_texts(page, '#cards .badge', ['missed'] * 4)
  assert all('scratch' in name for name in _names(page))
  page.get_by_text('false alarms 4').click()
  _wait_for_texts(page, '#cards .badge', ['false alarm'] * 4)
  page.select_option('#category', label='a')
  _wait_for_texts(page, '#status', ['2 of 16 images.'])
  _wait_for_count(page, '#cards li', 2)


def test_another_threshold_can_be_tried(open_page, site):
  page = open_page(site)
  _expect(page.locator('#trial')).to_be_hidden()
  page.select_option('#category', label='a')
  text = page.locator('#trial-text')
  _expect(text).to_have_text(
    re.compile('threshold 2.5: 2 of 4 defective missed, 2 of 4 good called')
  )
  page.locator('#threshold').fill('0')
  _expect(text).to_have_text(re.compile('0 of 4 defective missed, 4 of 4 good'))
  _expect(text).to_have_text(re.compile("the run's is 2.5"))
  page.get_by_text('false alarms 4').click()
  _wait_for_texts(page, '#cards .badge', ['false alarm'] * 4)
  page.get_by_text("back to the run's").click()
  _wait_for_texts(page, '#cards .badge', ['false alarm'] * 2)
  _expect(page.locator('#trial-reset')).to_be_hidden()


def test_the_gallery_as_csv(open_page, site):
  page = open_page(site)
  page.fill('#search', 'onerror')
  _wait_for_count(page, '#cards li', 1)
  with page.expect_download() as download:
    page.get_by_text('CSV of these images').click()
  with open(download.value.path(), encoding='utf-8', newline='') as file:
    (row,) = csv.DictReader(file)
  assert row['category'] == 'b' and row['verdict'] == 'good'
  assert row['file'].endswith(NASTY) and float(row['threshold']) == 2.5


def _wait_for_opacity(page, selector, opacity):
  first = page.locator(selector).first
  _expect(first).to_have_css('opacity', opacity, timeout=30_000)


def test_the_slider_by_keyboard(open_page, site):
  page = open_page(site)
  page.get_by_text('missed 4').click()
  page.wait_for_selector('#cards .base')
  view = page.locator('#view')
  assert page.locator('#cards .shades[src]').count() == 0  # Not decoded yet.
  page.locator('#csv').focus()
  page.keyboard.press('Tab')
  outline = view.evaluate('x => getComputedStyle(x).outlineStyle')
  assert outline == 'solid'
  layers = ('.shades', 'svg.prediction', 'svg.truth')
  for stop, name in enumerate(('map', 'outline', 'ground truth')):
    page.keyboard.press('ArrowRight')
    assert view.get_attribute('aria-valuetext') == name
    for index, layer in enumerate(layers):
      _wait_for_opacity(page, f'#cards {layer}', str(int(index == stop)))
  _wait_for_count(page, '#cards .shades[src]', 4)
  page.keyboard.press('Shift+ArrowLeft')
  assert (
    view.get_attribute('aria-valuetext') == 'between outline and ground truth'
  )
  page.keyboard.press('1')
  assert view.input_value() == '0'


def test_cards_and_dialog_by_keyboard(open_page, site):
  page = open_page(site)
  page.select_option('#sort', 'file')
  page.locator('#search').focus()
  for _ in range(3):  # The slider, then the list: one stop for all images.
    page.keyboard.press('Tab')
    if page.evaluate('document.activeElement.tagName') == 'LI':
      break
  page.keyboard.press('ArrowRight')
  page.keyboard.press('ArrowRight')
  names = _names(page)
  _wait_for_focus(page, names[2])
  page.keyboard.press('Enter')
  _wait_for_texts(page, '#dialog-title', [names[2]])
  page.keyboard.press('ArrowRight')
  _wait_for_texts(page, '#dialog-title', [names[3]])
  page.locator('#dialog-view').focus()
  page.keyboard.press('ArrowRight')
  _wait_for_texts(page, '#dialog-title', [names[3]])
  assert page.locator('#dialog-view').get_attribute('aria-valuetext') == 'map'
  page.keyboard.press('Escape')
  page.wait_for_selector('#dialog', state='hidden')
  _wait_for_focus(page, names[3])
  page.keyboard.press('End')
  _wait_for_focus(page, names[-1])


def test_a_phone_needs_no_sideways_scroll(open_page, site):
  page = open_page(site, width=360, height=740)
  page.wait_for_selector('#cards .base')
  assert page.evaluate('document.documentElement.scrollWidth') == 360
  page.locator('#cards li').first.click()
  page.wait_for_selector('#dialog', state='visible')
  box = page.locator('#dialog').bounding_box()
  assert box['x'] >= 0 and box['x'] + box['width'] <= 360
  assert page.locator('#dialog').evaluate('x => x.scrollWidth <= x.clientWidth')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_can_be_read_in_both_schemes(open_page, site, scheme):
  page = open_page(site, color_scheme=scheme)
  colors = page.evaluate(
    '() => { const s = getComputedStyle(document.body);'
    ' return [s.color, s.backgroundColor]; }'
  )
  ink, paper = (
    _luminance([int(v) for v in re.findall(r'\d+', c)[:3]]) for c in colors
  )
  assert (ink > paper) == (scheme == 'dark')
  high, low = max(ink, paper), min(ink, paper)
  assert (high + 0.05) / (low + 0.05) > 7  # WCAG AAA.


def _luminance(rgb):
  values = np.array(rgb) / 255.0
  linear = np.where(
    values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4
  )
  return float(linear @ (0.2126, 0.7152, 0.0722))


def _repeat(folder, times):
  """Makes a category of few images one of many, quickly."""
  rows = archive_lib.read_scores(folder)
  many = [
    {**row, 'file': f'{copy}/{row["file"]}', 'score': row['score'] + copy / 100}
    for copy in range(times)
    for row in rows
  ]
  with open(folder / 'scores.csv', 'w', newline='') as file:
    table = csv.DictWriter(file, archive_lib.FIELDS)
    table.writeheader()
    table.writerows(many)
  with zipfile.ZipFile(folder / 'report_data.zip') as old:
    members = {name: old.read(name) for name in old.namelist()}
  document = json.loads(members.pop('report.json'))
  items = document['items'] * times
  document['items'] = [
    {**item, 'file': row['file']} for item, row in zip(items, many)
  ]
  with zipfile.ZipFile(folder / 'report_data.zip', 'w') as new:
    new.writestr('report.json', json.dumps(document))
    for name, data in members.items():
      kind, number, suffix = re.split('[/.]', name)
      for copy in range(times):
        index = copy * len(rows) + int(number)
        new.writestr(f'{kind}/{index:05d}.{suffix}', data)


def test_two_thousand_images_are_lazy(open_page, tmp_path):
  make_category(tmp_path, good=20, defective=20)
  _repeat(tmp_path, 50)
  page = open_page(page_lib.write(tmp_path))
  page.wait_for_selector('#cards .base')
  assert page.locator('#cards li').count() == 2000
  assert page.locator('#cards .base').count() < 150
  page.locator('#cards li').first.focus()
  page.keyboard.press('End')
  page.wait_for_selector('#cards li:last-child .base')
  assert page.locator('#cards .base').count() < 150
  page.select_option('#sort', 'high')
  scores = _scores(page)
  assert scores == sorted(scores, reverse=True)
