"""Prediction: the API, the command's files, bad input."""

import csv
import json
import os
import resource
import shutil
import signal
import threading

import jax
import numpy as np
from PIL import Image
import pytest

from configs import default
from dmdd_jax import predict
from dmdd_jax import predictions
from dmdd_jax.data import files
from dmdd_jax.data import maps as map_files
from dmdd_jax.launch import preemption
from dmdd_jax.models import dmdd
from dmdd_jax.report import overlays
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import train_state


@pytest.fixture(scope='module')
def inspector():
  config = default.get_config()
  config.data.image_size = 32
  config.eval.batch_size = 3
  config.student.trunk = 'encoder'
  model = dmdd.from_config(config)
  state = train_state.create(config, model, jax.random.key(0))
  fusion = score_lib.Fusion(maps_weight=1.0)
  calibration = calibration_lib.Calibration(fusion, 0.5, 0.5, 1.0, 4)
  return predict.Inspector(config, state, calibration)


def _images(count, shape=(40, 24, 3)):
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, shape, np.uint8) for _ in range(count)]


def test_maps_have_the_images_own_sizes(inspector):
  images = _images(2) + _images(1, (20, 50, 3)) + _images(1, (9, 9))
  results = inspector(images)
  assert [r.map.shape for r in results] == [
    (40, 24),
    (40, 24),
    (20, 50),
    (9, 9),
  ]
  assert all(r.map.dtype == np.float32 for r in results)


def test_a_result_does_not_depend_on_its_batch(inspector):
  images = _images(7)
  together = inspector(images)
  for image, result in zip(images, together):
    alone = inspector([image])[0]
    assert alone.score == pytest.approx(result.score, rel=1e-4)
    np.testing.assert_allclose(alone.map, result.map, rtol=1e-3, atol=1e-4)


def test_the_verdict_is_at_or_above_the_threshold(inspector):
  assert inspector.verdict(0.5) == 'defective'
  assert inspector.verdict(np.nextafter(0.5, 0)) == 'good'
  nothing = calibration_lib.Calibration(
    score_lib.Fusion(), float('nan'), float('nan'), 1.0, 0
  )
  known, inspector.calibration = inspector.calibration, nothing
  try:
    assert inspector.verdict(9.0) == 'uncalibrated'
  finally:
    inspector.calibration = known


def test_the_scaled_score_counts_from_the_threshold():
  found = calibration_lib.Calibration(score_lib.Fusion(), 0.5, 0.5, 0.25, 4)
  assert [found.scaled(x) for x in (0.25, 0.5, 1.5)] == [-1.0, 0.0, 4.0]


def test_threads_get_their_own_answers(inspector):
  images = _images(6)
  expected = [inspector([image])[0].score for image in images]
  found = [None] * len(images)

  def work(index):
    found[index] = inspector([images[index]])[0].score

  threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == expected


def test_a_bad_array_or_file_is_named(inspector, tmp_path):
  with pytest.raises(files.BadImageError, match='float64'):
    inspector([np.zeros((4, 4, 3))])
  (tmp_path / 'broken.png').write_text('no picture')
  with pytest.raises(files.BadImageError, match='broken'):
    inspector([tmp_path / 'broken.png'])


def test_files_in_a_tree(inspector, tmp_path, monkeypatch):
  monkeypatch.setattr(predict, 'load', lambda workdir: inspector)
  folder = tmp_path / 'new parts' / 'ä'
  folder.mkdir(parents=True)
  for index, image in enumerate(_images(4)):
    Image.fromarray(image).save(folder / f'{index}.png')
    Image.fromarray(image).save(tmp_path / 'new parts' / f'{index}.png')
  (folder / 'broken.png').write_text('no picture')
  out = str(tmp_path / 'out')
  summary = predict.predict('unused', str(tmp_path / 'new parts'), out)
  assert summary['images'] == 8
  assert [os.path.basename(f) for f in summary['failed']] == ['broken.png']
  with open(summary['table']) as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 8
  for row in rows:  # The threshold is 0.5, the spread 1.
    assert float(row['scaled']) == float(row['score']) - 0.5
  # The same picture in both folders has the same score, and its own files.
  by_name = {}
  for row in rows:
    by_name.setdefault(os.path.basename(row['file']), set()).add(row['score'])
  assert all(len(scores) == 1 for scores in by_name.values())
  written = map_files.read_map(os.path.join(out, 'maps', 'ä', '2.png.tiff'))
  np.testing.assert_array_equal(written, inspector(_images(4))[2].map)
  assert os.path.isfile(os.path.join(out, 'overlays', '3.png.png'))


def test_an_unknown_format_of_the_maps_is_refused(tmp_path):
  with pytest.raises(ValueError, match='tiff, npy, none'):
    predict.predict('w', str(tmp_path), str(tmp_path), map_format='png')


@pytest.fixture
def inspect(inspector, tmp_path, monkeypatch):
  """Runs `predict.predict` on tmp_path/new; returns summary and rows."""
  monkeypatch.setattr(predict, 'load', lambda workdir: inspector)
  (tmp_path / 'new').mkdir()

  def run(*arguments, **options):
    summary = predict.predict(
      'unused',
      str(tmp_path / 'new'),
      str(tmp_path / 'out'),
      *arguments,
      **options,
    )
    return summary, _rows(tmp_path)

  return run


def _rows(tmp_path):
  path = tmp_path / 'out' / 'predictions.csv'
  with open(path, errors='surrogateescape', newline='') as file:
    return list(csv.DictReader(file))


def _write(tmp_path, *names):
  for name, image in zip(names, _images(len(names))):
    path = os.path.join(os.fsencode(tmp_path), b'new', os.fsencode(name))
    with open(path, 'wb') as file:
      Image.fromarray(image).save(file, 'PNG')


def _calls(inspector, monkeypatch):
  """The numbers of images that the model gets."""
  calls = []

  def counted(images, original=inspector.inspect):
    calls.append(len(images))
    return original(images)

  monkeypatch.setattr(inspector, 'inspect', counted)
  return calls


def test_worst_names_lose_nothing(inspect, tmp_path):
  names = [
    'b$\\frac$.png',
    '$x^2$.png',
    os.fsdecode(b'caf\xe9.png'),
    'x' * 248 + '.png',
    'x' * 247 + 'y.png',
    '日' * 83 + '.png',
    '部品.png',
    'a\nb.png',
    'a\rb.png',
    'a,"b";.png',
    '-a.png',
    ' .png',
  ]
  _write(tmp_path, *names)
  summary, rows = inspect()
  assert not summary['failed'] and not summary['incomplete']
  assert {os.path.basename(row['file']) for row in rows} == set(names)
  for kind in ('maps', 'overlays'):
    assert len(os.listdir(tmp_path / 'out' / kind)) == len(names)
  document = json.loads((tmp_path / 'out/predictions.json').read_text())
  assert document['finished']
  assert [row['file'] for row in document['predictions']] == [
    row['file'] for row in rows
  ]


def test_a_picture_that_fails_is_named_in_its_row(
  inspect, inspector, tmp_path, monkeypatch
):
  def broken(image, *arguments, original=overlays.overlay, **options):
    if options['name'] == '1.png':
      raise RuntimeError('no ink')
    return original(image, *arguments, **options)

  _write(tmp_path, '0.png', '1.png', '2.png')
  with monkeypatch.context() as patch:
    patch.setattr(overlays, 'overlay', broken)
    summary, rows = inspect()
  target = str(tmp_path / 'out/overlays/1.png.png')
  assert [row['error'] for row in rows] == ['', f'{target}: no ink', '']
  assert list(summary['incomplete'].values()) == [f'{target}: no ink']
  assert all(row['score'] for row in rows)
  # The same command writes what lacks, and nothing else.
  calls = _calls(inspector, monkeypatch)
  summary, rows = inspect()
  assert calls == [1] and os.path.isfile(target)
  assert not summary['incomplete'] and summary['images'] == 3
  assert sorted(os.path.basename(row['file']) for row in rows) == [
    '0.png',
    '1.png',
    '2.png',
  ]


def test_a_map_for_which_the_disk_is_full_is_named(inspect, tmp_path):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  large = np.zeros((300, 300, 3), np.uint8)
  (tmp_path / 'out').mkdir()
  Image.fromarray(large).save(tmp_path / 'new' / 'large.png')
  _write(tmp_path, 'small.png')
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
  try:
    summary, rows = inspect()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  target = str(tmp_path / 'out/maps/large.png.tiff')
  assert [target in row['error'] for row in rows] == [True, False]
  assert not os.path.exists(target) and rows[0]['score']
  assert not [
    name for name in os.listdir(tmp_path / 'out/maps') if 'draft' in name
  ]


def test_a_table_for_which_the_disk_is_full_is_named(
  inspect, tmp_path, monkeypatch
):
  _write(tmp_path, *(f'{i}.png' for i in range(9)))
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
  try:
    with pytest.raises(OSError, match='predictions.csv'):
      inspect('none', False)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  # The last row is half a row.
  assert not (tmp_path / 'out/predictions.csv').read_text().endswith('\n')
  summary, rows = inspect('none', False)
  assert summary['images'] == len(rows) == 9
  assert all(row['error'] == '' for row in rows)


def test_a_killed_run_goes_on_where_it_ended(
  inspect, inspector, tmp_path, monkeypatch
):
  _write(tmp_path, *(f'{i}.png' for i in range(8)))
  whole, expected = inspect('npy', False)
  shutil.rmtree(tmp_path / 'out')

  seen = []

  def killed(row):
    seen.append(row)
    if len(seen) == 5:
      raise SystemExit('killed')

  with pytest.raises(SystemExit):
    inspect('npy', False, on_row=killed)
  assert _rows(tmp_path) == expected[:5]
  document = json.loads((tmp_path / 'out/predictions.json').read_text())
  assert not document['finished']
  calls = _calls(inspector, monkeypatch)
  summary, rows = inspect('npy', False)
  assert sum(calls) == 3
  for row, before in zip(rows, expected, strict=True):
    assert row['file'] == before['file']
    assert float(row['score']) == pytest.approx(
      float(before['score']), rel=1e-4
    )
  assert summary == whole
  # All is done; a file with other content is inspected again.
  assert inspect('npy', False)[0] == whole and sum(calls) == 3
  Image.fromarray(_images(9)[8]).save(tmp_path / 'new' / '4.png')
  summary, rows = inspect('npy', False)
  assert sum(calls) == 4 and len(rows) == 9 and summary['images'] == 8
  assert rows[-1]['file'].endswith('4.png')


def test_a_table_of_another_command_is_refused(
  inspect, inspector, tmp_path, monkeypatch
):
  _write(tmp_path, '0.png')
  inspect('tiff', False)
  before = (tmp_path / 'out/predictions.csv').read_bytes()
  with pytest.raises(ValueError, match='maps was "tiff", is now "npy"'):
    inspect('npy', False)
  with monkeypatch.context() as patch:
    patch.setattr(inspector, 'step', 99)
    with pytest.raises(ValueError, match='step was 0, is now 99'):
      inspect('tiff', False)
    assert (tmp_path / 'out/predictions.csv').read_bytes() == before
    assert len(inspect('tiff', False, resume=False)[1]) == 1
  (tmp_path / 'out/predictions.json').unlink()
  with pytest.raises(ValueError, match='"not known".*--noresume'):
    inspect('tiff', False)
  inspect('tiff', False, resume=False)
  header, row = (tmp_path / 'out/predictions.csv').read_text().splitlines()
  (tmp_path / 'out/predictions.csv').write_text(f'a,{header}\n1,{row}\n')
  with pytest.raises(ValueError, match='expected the columns file,score'):
    inspect('tiff', False)


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_whole_table(signum, inspect, tmp_path):
  _write(tmp_path, *(f'{i}.png' for i in range(30)))
  handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

  seen = []

  def interrupt(row):
    seen.append(row)
    if len(seen) == 2:
      os.kill(os.getpid(), signum)

  with pytest.raises(preemption.Preempted) as caught:
    inspect('npy', False, on_row=interrupt)
  assert caught.value.code == preemption.STATUS
  rows = _rows(tmp_path)
  # What was inspected by then, and no more than what waited to be written.
  assert 2 <= len(rows) <= 2 + predict._WAITING + 1
  assert len(os.listdir(tmp_path / 'out/maps')) == len(rows)
  assert handlers == [
    signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)
  ]
  summary, rows = inspect('npy', False)
  assert summary['images'] == len(rows) == 30


def test_few_images_wait_to_be_written(inspect, tmp_path, monkeypatch):
  waiting, most, lock = 0, 0, threading.Lock()

  def read(inspector, path, shows, original=predict._read):
    nonlocal waiting, most
    with lock:
      waiting += 1
      most = max(most, waiting)
    return original(inspector, path, shows)

  def written(row):
    nonlocal waiting
    with lock:
      waiting -= 1

  monkeypatch.setattr(predict, '_read', read)
  _write(tmp_path, *(f'{i}.png' for i in range(30)))
  inspect('npy', False, on_row=written)
  # Two batches of three that are read, and those behind the model.
  assert waiting == 0 and most <= 3 * 3 + predict._WAITING + 1


def test_what_waits_is_small(inspector, tmp_path):
  path = str(tmp_path / 'large.png')
  Image.fromarray(np.zeros((2000, 3000, 3), np.uint8)).save(path)
  item = predict._read(inspector, path, True)
  assert item.size == (2000, 3000)
  assert item.image.nbytes + item.shown.nbytes < 1_000_000


def test_new_files_do_not_move_the_outputs_of_older_ones(inspect, tmp_path):
  (tmp_path / 'new' / 'a').mkdir()
  _write(tmp_path, 'a/0.png')
  inspect('tiff', False)
  (tmp_path / 'new' / 'b').mkdir()
  _write(tmp_path, 'b/0.png')
  inspect('tiff', False)
  assert sorted(os.listdir(tmp_path / 'out/maps')) == ['a', 'b']
  for pattern in ('new/*/0.png', 'new/**/*.png', 'new/a/0.png'):
    pattern = str(tmp_path / pattern)
    base = predict._base(pattern, files.list_inputs(pattern).images)
    expected = 'new/a' if 'a/0' in pattern else 'new'
    assert base == str(tmp_path / expected)


def test_one_file_in_two_spellings_is_one(inspect, tmp_path, monkeypatch):
  _write(tmp_path, '0.png', '1.png')
  before, rows = inspect('none', False)
  monkeypatch.chdir(tmp_path)
  again = predict.predict('unused', 'new', 'out', 'none', False)
  assert again['images'] == before['images'] == len(rows) == 2
  assert again['defective'] == before['defective']
  assert len(_rows(tmp_path)) == 2  # Nothing was inspected twice.


def test_a_line_of_json_per_image(inspect, tmp_path):
  _write(tmp_path, '0.png', os.fsdecode(b'caf\xe9.png'))
  (tmp_path / 'new' / 'broken.png').write_text('no picture')
  lines = []
  summary, rows = inspect(
    on_row=lambda row: lines.append(predictions.format_line(row))
  )
  documents = [json.loads(line) for line in lines]
  assert len(documents) == 3 and not any('\n' in line for line in lines)
  by_name = {os.path.basename(d['file']): d for d in documents}
  assert by_name['0.png']['verdict'] in ('good', 'defective')
  assert by_name['broken.png']['score'] is None
  assert 'not an image' in by_name['broken.png']['error']
  assert os.fsdecode(b'caf\xe9.png') in by_name
  assert [list(d) for d in documents] == [list(rows[0])] * 3
