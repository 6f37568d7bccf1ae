"""The one entry point, the store, the intervals and the tables."""

import csv
import json
import os
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from dmdd_jax import storage
from dmdd_jax.metrics import aupimo as aupimo_lib
from dmdd_jax.metrics import ranking
from dmdd_jax.metrics import region
from dmdd_jax.metrics import results


def _case(seed=0, images=10, side=32, levels=None):
  """(maps, masks, scores, labels): rectangles raised in noisy maps."""
  rng = np.random.default_rng(seed)
  labels = (np.arange(images) >= images * 2 // 5).astype(int)
  masks = np.zeros((images, side, side), np.uint8)
  for mask in masks[images * 2 // 5 :]:
    for _ in range(2):
      y, x = rng.integers(0, side * 3 // 4, 2)
      mask[y : y + rng.integers(1, side // 4), x : x + side // 6] = 1
  maps = rng.normal(size=masks.shape) + 1.5 * masks
  maps = np.round(maps * levels) if levels else maps
  maps = maps.astype(np.float32)
  return maps, masks, rng.normal(size=images) + 0.7 * labels, labels


def _assert_same(found, expected, tolerance=1e-12):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    if isinstance(value, dict):
      _assert_same(found[name], value, tolerance)
    elif value is None or isinstance(value, str):
      assert found[name] == value
    else:
      np.testing.assert_allclose(
        found[name], value, rtol=0, atol=tolerance, err_msg=name
      )


def test_every_metric_from_its_source():
  maps, masks, scores, labels = _case(side=160, images=8)
  found = results.compute(maps, masks, scores, labels)
  truth, flat = masks.ravel(), maps.ravel()
  assert list(found)[: len(results.METRICS)] == list(results.METRICS)
  assert all(type(found[name]) is float for name in results.METRICS)
  expected = {
    'image_auroc': sklearn_metrics.roc_auc_score(labels, scores),
    'image_ap': sklearn_metrics.average_precision_score(labels, scores),
    'image_f1_max': sklearn_metrics.f1_score(
      labels, scores >= found['image_f1_max_threshold']
    ),
    'pixel_auroc': sklearn_metrics.roc_auc_score(truth, flat),
    'pixel_ap': sklearn_metrics.average_precision_score(truth, flat),
    'pixel_f1_max': sklearn_metrics.f1_score(
      truth, flat >= found['pixel_f1_max_threshold']
    ),
    'au_pro': region.au_pro(maps, masks)[0],
    'au_pro_005': region.au_pro(maps, masks)[1],
    'aupimo': np.nanmean(aupimo_lib.aupimo(maps, masks)),
    'pro_per_image': np.nanmean(region.pro_per_image(maps, masks)),
  }
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, abs=1e-12), name


def test_no_images():
  found = results.compute([], [], [], [])
  assert found['undefined']['image_auroc'] == 'no images'
  assert set(found['undefined']) == set(results.METRICS)


def test_image_order_and_native_sizes():
  maps, masks, scores, labels = _case(1)
  rng = np.random.default_rng(0)
  maps = [m[: rng.integers(26, 33), : rng.integers(26, 33)] for m in maps]
  masks = [k[: m.shape[0], : m.shape[1]] for k, m in zip(masks, maps)]
  expected = results.compute(maps, masks, scores, labels)
  order = rng.permutation(len(maps))
  moved = results.compute(
    [maps[k] for k in order],
    [masks[k] for k in order],
    scores[order],
    labels[order],
  )
  _assert_same(moved, expected)


def test_monotone_transform():
  maps, masks, scores, labels = _case(2, levels=20)
  expected = results.compute(maps, masks, scores, labels, extra=('aupimo',))
  maps = np.arctan(maps.astype(np.float64) / 40)
  found = results.compute(maps, masks, scores, labels, extra=('aupimo',))
  threshold = np.arctan(expected.pop('pixel_f1_max_threshold') / 40)
  assert found.pop('pixel_f1_max_threshold') == pytest.approx(threshold)
  _assert_same(found, expected)


@pytest.mark.parametrize(
  'kind, reason',
  [('good', 'no defective images'), ('defective', 'no good images')],
)
def test_one_class_is_nan_with_a_reason(kind, reason):
  maps, masks, scores, labels = _case(3)
  keep = labels == (kind == 'defective')
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    found = results.compute(maps[keep], masks[keep], scores[keep], labels[keep])
  undefined = found['undefined']
  assert undefined['image_auroc'] == reason
  for name in results.METRICS:
    assert np.isnan(found[name]) == (name in undefined), name
  assert found['confidence']['image_auroc'] is None
  assert found['no_interval']['image_auroc'] == reason
  if kind == 'good':
    assert set(undefined) == set(results.METRICS)
    assert undefined['au_pro'] == 'no defect pixels in the masks'
  else:
    assert 'normal images' in undefined['aupimo']
    alone = region.au_pro(maps[keep], masks[keep])[0]
    assert found['au_pro'] == pytest.approx(alone, rel=1e-13)


def test_all_defect_pixels_and_no_masks():
  maps, masks, scores, labels = _case(4)
  found = results.compute(
    maps[labels == 1], masks[labels == 1] | 1, *2 * [labels[labels == 1]]
  )
  assert found['undefined']['pixel_ap'] == 'no anomaly-free pixels in the masks'
  assert np.isnan(found['pixel_ap']) and np.isnan(found['pro_per_image'])
  found = results.compute(maps, None, scores, labels)
  assert found['undefined']['au_pro_005'] == 'no masks'
  assert 0 < found['image_auroc'] < 1
  assert found['confidence']['image_auroc'][0] < found['image_auroc']
  found = results.compute(None, None, scores, labels)
  assert found['undefined']['pixel_auroc'] == 'no maps'


def test_defective_image_with_an_empty_mask_is_allowed():
  maps, masks, scores, labels = _case(5)
  masks[-1] = 0
  found = results.compute(maps, masks, scores, labels)
  assert found['au_pro'] == region.au_pro(maps, masks)[0]


def test_limits_and_extra_are_choosable():
  case = _case(6)
  found = results.compute(*case, pro_limits=(0.1, 1), extra=())
  assert 'aupimo' not in found and 'au_pro' not in found
  expected = region.au_pro(*case[:2], limits=(0.1, 1))
  assert [found['au_pro_01'], found['au_pro_1']] == expected


def test_bad_input_is_named():
  maps, masks, scores, labels = _case(7)

  def message(*args, **kwargs):
    with pytest.raises(ValueError) as error:
      results.compute(*args, **kwargs)
    return str(error.value)

  broken = maps.copy()
  broken[3, 2, 2] = np.nan
  assert 'map of image 3' in message(broken, masks, scores, labels)
  assert 'map of image 3' in message(broken, None, scores, labels)
  broken = scores.copy()
  broken[4] = np.inf
  assert 'score of image 4 is inf' in message(maps, masks, broken, labels)
  found = message(list(maps), [*masks[:9], masks[9][:, :5]], scores, labels)
  assert 'image 9' in found and '(32, 32)' in found and '(32, 5)' in found
  assert '(9,)' in message(maps, masks, scores[:9], labels)
  assert '9 maps and 10 labels' in message(maps[:9], masks, scores, labels)
  assert 'image 5 has label 0 (good) but' in message(
    maps, masks, scores, np.where(np.arange(10) == 5, 0, labels)
  )
  assert 'label of image 0 is 2' in message(maps, masks, scores, labels + 2)
  assert "'pro'" in message(maps, masks, scores, labels, extra=('pro',))
  assert '1.5' in message(maps, masks, scores, labels, pro_limits=(1.5,))


@pytest.mark.parametrize('limit_bytes', [0, 30_000, 2**30])
def test_store_gives_the_same_numbers(tmp_path, limit_bytes):
  maps, masks, scores, labels = _case(8, side=130, levels=50)
  expected = results.compute(maps, masks, scores, labels)
  with results.MapStore(limit_bytes, directory=tmp_path) as store:
    for anomaly_map, mask in zip(maps.astype(np.float64), masks, strict=True):
      store.append(anomaly_map, mask)
    assert store.spilled == (limit_bytes < 2**30)
    assert len(store) == len(maps)
    for index, (anomaly_map, mask) in enumerate(store):
      np.testing.assert_array_equal(anomaly_map, maps[index])
      np.testing.assert_array_equal(mask, masks[index])
    found = results.compute(store, None, scores, labels)
    _assert_same(found, expected)
    threshold = expected['pixel_f1_max_threshold']
    assert results.precision_recall_f1(
      store, None, threshold
    ) == results.precision_recall_f1(maps, masks, threshold)
  assert not os.listdir(tmp_path)


def test_store_keeps_native_sizes_and_names_bad_input(tmp_path):
  store = results.MapStore(0, tmp_path)
  store.append(np.ones((3, 5)), np.zeros((3, 5)))
  store.append(np.full((2, 2), 7), np.ones((2, 2), bool))
  assert store.maps[1].tolist() == [[7, 7], [7, 7]]
  assert store.masks[0].shape == (3, 5)
  with pytest.raises(ValueError, match='map of image 2 holds 4 values'):
    store.append(np.full((2, 2), 1e300), np.zeros((2, 2)))
  with pytest.raises(ValueError, match=r'image 2: .*\(2, 2\).*\(2, 3\)'):
    store.append(np.ones((2, 2)), np.zeros((2, 3)))
  with pytest.raises(ValueError, match='masks=None'):
    results.compute(store, [None] * 2, [0, 1], [0, 1])
  assert len(store) == 2
  store.close()


def test_peak_memory():
  """Under three times the maps in memory; far below them when spilled."""
  maps, masks, scores, labels = _case(9, images=60, side=256)
  with results.MapStore(0) as store:
    for pair in zip(maps, masks, strict=True):
      store.append(*pair)
    tracemalloc.start()
    try:
      results.compute(maps, masks, scores, labels)
      # The masks are the caller's too: a quarter of the maps.
      assert tracemalloc.get_traced_memory()[1] < 1.75 * maps.nbytes
      tracemalloc.reset_peak()
      pixels = region.prepare(store, None)
      read = lambda k: (pixels.read(k), pixels.read_hits(k)[0], None)  # noqa: E731
      blocks = ranking.steps(read, pixels.sizes, 2**14)
      assert sum(block.hits.sum() for block in blocks) == masks.sum()
      assert tracemalloc.get_traced_memory()[1] < 0.5 * maps.nbytes
    finally:
      tracemalloc.stop()


def test_precision_recall_f1():
  scores, labels = [0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1]
  assert results.precision_recall_f1(scores, labels, 0.4) == {
    'precision': 2 / 3,
    'recall': 1.0,
    'f1': 0.8,
  }
  nothing = results.precision_recall_f1(scores, labels, 0.9)
  assert np.isnan(nothing['precision'])
  assert (nothing['recall'], nothing['f1']) == (0, 0)
  good = results.precision_recall_f1(scores, [0] * 4, 0.9)
  assert np.isnan(list(good.values())).all()
  # A float32 score just below a float64 threshold does not reach it.
  below = np.array([0.1], np.float32)
  threshold = float(below[0]) + 1e-12
  assert results.precision_recall_f1(below, [1], threshold)['recall'] == 0
  lists = (
    [np.ones((2, 3)), np.zeros((1, 2))],
    [np.ones((2, 3)), np.ones((1, 2))],
  )
  assert results.precision_recall_f1(*lists, 1)['recall'] == 0.75
  with pytest.raises(ValueError, match='4 scores and 3 labels'):
    results.precision_recall_f1(scores, labels[:3], 0.5)


def test_tables(tmp_path):
  rows = {
    'screw': {
      'image_auroc': 0.98765,
      'pixel_auroc': np.float64(0.5),
      'au_pro': float('nan'),
      'image_f1_max_threshold': 3.25,
      'undefined': {'au_pro': 'no defect pixels in the masks'},
      'confidence': {'image_auroc': [0.9, 1.0], 'image_f1_max': None},
      'maps_mean': {'pixel_auroc': 0.25, 'au_pro': 0.5},
      'images': 40,
      'resolution': 'native',
    },
    'tooth|brush': {
      'pixel_auroc': 1.0,
      'image_auroc': 0.5,
      'au_pro': 0.75,
      'image_f1_max_threshold': 1.0,
      'maps_mean': {'pixel_auroc': 0.75, 'au_pro': 0.5},
      'images': 12,
      'resolution': 'native',
    },
  }
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'results.json').write_text('old')
  tables = results.format_tables(rows)
  storage.write_texts(tmp_path / 'out', tables)
  text = tables['results.md']
  assert sorted(os.listdir(tmp_path / 'out')) == [
    'results.csv',
    'results.json',
    'results.md',
  ]
  document = json.loads((tmp_path / 'out' / 'results.json').read_text())
  assert list(document) == ['screw', 'tooth|brush', 'mean']
  assert document['screw']['au_pro'] is None
  assert document['screw']['undefined'] == rows['screw']['undefined']
  assert document['screw']['confidence'] == {
    'image_auroc': [0.9, 1.0],
    'image_f1_max': None,
  }
  assert document['mean'] == {
    'image_auroc': (0.98765 + 0.5) / 2,
    'pixel_auroc': 0.75,
    'au_pro': None,
    'maps_mean': {'pixel_auroc': 0.5, 'au_pro': 0.5},
  }
  table = list(csv.reader((tmp_path / 'out' / 'results.csv').open()))
  assert table[0] == [
    'category',
    'image_auroc',
    'image_f1_max_threshold',
    'pixel_auroc',
    'au_pro',
    'maps_mean/pixel_auroc',
    'maps_mean/au_pro',
    'images',
    'resolution',
    'image_auroc_low',
    'image_auroc_high',
  ]
  assert table[1][1:5] == ['0.98765', '3.25', '0.5', '']
  assert table[3][:5] == ['mean', '0.743825', '', '0.75', '']
  assert text == (tmp_path / 'out' / 'results.md').read_text()
  lines = text.splitlines()
  # The text shows metrics alone; thresholds and settings are in the files.
  assert lines[2] == (
    '| screw | 98.77 [90.00, 100.00] | 50.00 |  | 25.00 | 50.00 |'
  )
  assert lines[3] == (
    '| tooth\\|brush | 50.00 | 100.00 | 75.00 | 75.00 | 50.00 |'
  )
  assert lines[4] == '| mean | 74.38 | 75.00 |  | 50.00 | 50.00 |'
  assert results.format_table(rows).splitlines()[:4] == lines[:4]


def test_tables_take_what_compute_returns():
  rows = {'a': results.compute(*_case(12)), 'b': results.compute(*_case(13))}
  document = json.loads(results.format_tables(rows)['results.json'])
  for name in ('image_auroc', 'pixel_ap', 'au_pro', 'pro_per_image'):
    assert document['a'][name] == rows['a'][name]
    mean = (rows['a'][name] + rows['b'][name]) / 2
    assert document['mean'][name] == pytest.approx(mean)


def test_tables_refuse_what_they_cannot_show():
  with pytest.raises(ValueError, match="named 'mean'"):
    results.format_tables({'mean': {}})
  with pytest.raises(ValueError, match='no rows'):
    results.format_tables({})


def test_the_metrics_need_numpy_and_scipy_alone():
  code = """
import sys
for name in ('absl', 'clu', 'etils', 'flax', 'jax', 'sklearn', 'tensorflow'):
  sys.modules[name] = None  # An import of it raises ImportError.
import numpy as np
from dmdd_jax.metrics import results
masks = np.eye(4, dtype=int)[None].repeat(2, 0) * [[[0]], [[1]]]
metrics = results.compute(masks + 0.5, masks, [0.0, 1.0], [0, 1])
print(results.format_tables({'a': metrics})['results.md'].splitlines()[-1])
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('| mean | 100.00 ')
