"""Files that arrive: slowly, by a new name, and gone again; and a restart."""

import csv
import functools
import json
import os
import signal

import numpy as np
from PIL import Image
import pytest

from dmdd_jax import predict
from dmdd_jax import predictions
from dmdd_jax import watch
from dmdd_jax.data import files
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import score as score_lib


class Clock:
  """Time that goes on while the program sleeps; each second something happens.

  After the last thing SIGTERM comes.
  """

  def __init__(self, *events):
    self.events, self.time = list(events), 0.0

  def now(self):
    return self.time

  def sleep(self, seconds):
    self.time += seconds
    if not self.events:
      os.kill(os.getpid(), signal.SIGTERM)
      return
    event = self.events.pop(0)
    if event is not None:
      event()


class Model:
  """Stands in for the network: the score is the image's brightness."""

  batch_size, step = 2, 7

  def __init__(self):
    self.config = predict.ml_collections.ConfigDict({'data': {'category': 'a'}})
    self.calibration = calibration_lib.Calibration(
      score_lib.Fusion(), 100.0, 0.5, 1.0, 4
    )
    self.inspected = 0

  def resize(self, image):
    return image[:4, :4]

  def inspect(self, images):
    self.inspected += len(images)
    scores = [float(image.mean()) for image in images]
    return [
      predict.Result(s, self.calibration.verdict(s), s, np.zeros((4, 4)))
      for s in scores
    ]


@pytest.fixture
def model(monkeypatch):
  model = Model()
  monkeypatch.setattr(predict, 'load', lambda workdir: model)
  return model


@pytest.fixture
def run(model, tmp_path, monkeypatch):
  """Watches tmp_path/new while events happen; returns names and rows."""
  (tmp_path / 'new').mkdir()
  arrivals = watch.arrivals

  def run(*events, pattern='new', **options):
    clock = Clock(*events)
    timed = functools.partial(arrivals, sleep=clock.sleep, now=clock.now)
    monkeypatch.setattr(watch, 'arrivals', timed)
    lines = []
    summary = predict.predict(
      'unused',
      str(tmp_path / pattern),
      str(tmp_path / 'out'),
      'none',
      False,
      watches=True,
      on_row=lambda row: lines.append(json.loads(predictions.format_line(row))),
      **options,
    )
    with open(summary['table']) as file:
      rows = list(csv.DictReader(file))
    names = [os.path.basename(row['file']) for row in rows]
    return names, lines, summary

  return run


def _content(level=50):
  return np.full((8, 8, 3), level, np.uint8)


def _save(path, level=50):
  return lambda: Image.fromarray(_content(level)).save(path)


QUIET = [None] * 4


def test_a_file_that_is_written_slowly_is_taken_when_it_is_complete(
  run, tmp_path
):
  _save(tmp_path / 'whole.png')()
  content = (tmp_path / 'whole.png').read_bytes()
  target = tmp_path / 'new' / 'a.png'
  half = len(content) // 2

  def write(start, end):
    def event():
      with open(target, 'ab') as file:
        file.write(content[start:end])

    return event

  # A pause of one second is none, and no half of it is seen as a failure.
  pieces = [write(0, 10), None, write(10, half), None, write(half, None)]
  names, lines, summary = run(*pieces, *QUIET)
  assert names == ['a.png'] and not summary['failed']
  assert [line['error'] for line in lines] == ['']
  assert lines[0]['score'] == 50 and lines[0]['verdict'] == 'good'


def test_files_renamed_into_place_are_taken_once(run, model, tmp_path):
  new = tmp_path / 'new'
  events = [
    _save(tmp_path / 'elsewhere.png'),
    lambda: os.rename(tmp_path / 'elsewhere.png', new / 'a.png'),
    _save(new / '.b.png'),  # As rsync writes.
    None,
    None,
    None,
    lambda: os.rename(new / '.b.png', new / 'b.png'),
  ]
  names, _, _ = run(*events, *QUIET, *QUIET)
  assert names == ['a.png', 'b.png'] and model.inspected == 2


def test_deleted_files_and_folders_do_no_harm(run, tmp_path):
  new = tmp_path / 'new'
  (new / 'lot').mkdir()
  events = [
    _save(new / 'gone.png'),
    lambda: os.remove(new / 'gone.png'),
    _save(new / 'lot' / 'a.png'),
    *QUIET,
    lambda: os.remove(new / 'lot' / 'a.png'),
    lambda: os.rmdir(new / 'lot'),
    lambda: os.rmdir(new),
    None,
    lambda: os.mkdir(new),
    _save(new / 'b.png'),
  ]
  names, lines, summary = run(*events, *QUIET)
  assert names == ['a.png', 'b.png'] and len(lines) == 2
  assert summary['images'] == 2 and not summary['failed']


def test_a_file_that_goes_before_it_is_read_is_named(
  run, tmp_path, monkeypatch
):
  target = tmp_path / 'new' / 'a.png'

  def late(inspector, path, shows, original=predict._read):
    os.remove(path)
    return original(inspector, path, shows)

  monkeypatch.setattr(predict, '_read', late)
  names, lines, summary = run(_save(target), *QUIET)
  assert names == [] and list(summary['failed']) == [str(target)]
  assert 'No such file' in lines[0]['error'] and lines[0]['score'] is None


def test_a_restart_inspects_only_what_came_meanwhile(run, model, tmp_path):
  new = tmp_path / 'new'
  run(_save(new / 'a.png'), _save(new / 'b.png', 200), *QUIET)
  assert model.inspected == 2
  _save(new / 'c.png')()
  os.remove(new / 'a.png')
  names, lines, summary = run(*QUIET)
  assert names == ['a.png', 'b.png', 'c.png'] and model.inspected == 3
  assert [os.path.basename(line['file']) for line in lines] == ['c.png']
  assert summary['images'] == 3 and summary['defective'] == 1
  document = json.loads((tmp_path / 'out/predictions.json').read_text())
  assert len(document['predictions']) == 3 and document['finished']


def test_a_file_with_new_content_is_inspected_again(run, tmp_path):
  target = tmp_path / 'new' / 'latest.png'
  events = [_save(target), *QUIET, _save(target, 250), *QUIET]
  names, lines, summary = run(*events)
  assert names == ['latest.png'] * 2
  assert [line['verdict'] for line in lines] == ['good', 'defective']
  assert summary['images'] == summary['defective'] == 1


def test_a_bad_file_is_named_once_and_taken_when_it_is_mended(run, tmp_path):
  target = tmp_path / 'new' / 'a.png'
  events = [lambda: target.write_text('bad'), *QUIET, *QUIET]
  names, lines, summary = run(*events)
  assert names == [] and len(lines) == 1 and len(summary['failed']) == 1
  names, lines, summary = run(*events, _save(target), *QUIET)
  assert names == ['a.png'] and len(lines) == 2 and not summary['failed']


def test_its_own_output_is_not_watched(run, tmp_path):
  names, _, _ = run(_save(tmp_path / 'new/a.png'), *QUIET, pattern='.')
  assert names == ['a.png']


def test_a_glob_is_watched(run, tmp_path):
  for lot in ('x', 'y'):
    (tmp_path / 'new' / lot).mkdir()
  events = [_save(tmp_path / 'new' / name) for name in ('x/a.png', 'y/a.bmp')]
  names, _, _ = run(*events, *QUIET, pattern='new/*/*.png')
  assert names == ['a.png']


@pytest.mark.parametrize('pattern', ['nowhere', 'nowhere/*.png', 'a.png'])
def test_a_folder_that_is_not_there_is_refused(pattern, tmp_path, model):
  (tmp_path / 'a.png').write_text('')
  with pytest.raises(files.MissingDataError, match='--watch needs a folder'):
    predict.predict(
      'unused', str(tmp_path / 'x' / pattern), str(tmp_path), watches=True
    )
  with pytest.raises(files.MissingDataError, match='--watch needs a folder'):
    watch.check(str(tmp_path / 'a.png'))
