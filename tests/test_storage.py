"""A run's folder on a file system that is not local, played by a local one."""

import os

from etils import epath
from etils.epath import backend
from etils.epath import gpath
import numpy as np
import program_helpers
import pytest
import test_report

from dmdd_jax import run as run_lib
from dmdd_jax import storage
from dmdd_jax.data import layouts
from dmdd_jax.metrics import results as results_lib
from dmdd_jax.report import overlays
from dmdd_jax.report import page
from dmdd_jax.scoring import calibration
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import faults
from dmdd_jax.training import scalars


class FakeBucket:
  """epath's backend for gs://, on a local folder."""

  def __init__(self, folder):
    self._folder = os.fspath(folder)
    self._local = backend._OsPathBackend()

  def __getattr__(self, name):
    def call(path, *arguments, **options):
      path = os.fspath(path)
      assert path.startswith('gs://'), path
      local = path.replace('gs:/', self._folder, 1)
      return getattr(self._local, name)(local, *arguments, **options)

    return call


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """The local folder that is gs://bucket; nothing may be made beside it."""
  fake = FakeBucket(tmp_path / 'remote')
  own = gpath._GPath._backend.fget
  monkeypatch.setattr(
    gpath._GPath,
    '_backend',
    property(lambda path: fake if path._uri_scheme == 'gs' else own(path)),
  )
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  yield tmp_path / 'remote' / 'bucket'
  assert not os.listdir('.')


@pytest.mark.parametrize('where', ['gs://bucket/run', 'run'])
def test_what_is_written_is_whole_or_not_there(where, bucket, monkeypatch):
  folder = bucket.parent
  folder.mkdir()
  if where == 'run':
    monkeypatch.chdir(folder)
  name = os.path.join(where, 'a', 'b.txt')
  storage.write_text(name, 'ä\n')
  assert storage.path(name).read_bytes() == 'ä\n'.encode()
  with pytest.raises(RuntimeError), storage.writing(name) as file:
    file.write(b'half')
    raise RuntimeError
  assert storage.path(name).read_bytes() == 'ä\n'.encode()
  written = [files for *_, files in os.walk(folder) if files]
  assert written == [['b.txt']]
  for text in ('ö', '\n'):
    storage.append_text(f'{name}.log', text)
  assert storage.path(f'{name}.log').read_bytes() == 'ö\n'.encode()
  assert storage.folders(where, 'b.txt') == [os.path.join(where, 'a')]
  assert storage.folders(where, 'c.txt') == []
  assert storage.folders('nowhere', 'b.txt') == []
  monkeypatch.chdir(bucket.parent.parent / 'here')


def test_names_are_absolute_or_remote(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert storage.absolute('gs://bucket/run') == 'gs://bucket/run'
  assert storage.absolute('run') == str(tmp_path / 'run')
  assert os.fspath(storage.path('gs://bucket/run')) == 'gs://bucket/run'
  assert isinstance(storage.path('run'), epath.Path)


def test_tables_and_a_report_of_what_is_there(bucket):
  workdir = 'gs://bucket/run'
  run_lib._make_workdir(workdir)
  rows = {name: test_report.make_category(f'{workdir}/{name}') for name in 'ab'}
  storage.write_texts(workdir, results_lib.format_tables(rows))
  for step in (3, 4):
    scalars.append(f'{workdir}/a', step, {'train/loss': step / 2})
  curves = {'train/loss': ([3, 4], [1.5, 2.0])}
  assert scalars.read(f'{workdir}/a') == curves
  assert page.write(workdir) == f'{workdir}/report.html'
  names = {path.name for path in (bucket / 'run').iterdir()}
  tables = {'results.json', 'results.csv', 'results.md'}
  assert names == {'a', 'b', 'report.html', *tables}


def test_pictures_take_the_place_of_older_ones(bucket, tmp_path):
  root = program_helpers.write_data(tmp_path / 'data')
  records = layouts.list_mvtec(os.path.dirname(root), 'surface').test
  maps = np.random.default_rng(0).random((len(records), 32, 32), np.float32)
  scores = np.arange(len(records), dtype=np.float32)
  fitted = calibration.Calibration(score_lib.Fusion(), 0.5, 0.5, 1.0, 4)
  folder = 'gs://bucket/run/pictures'
  storage.write_text(f'{folder}/older.png', '')
  paths = overlays.write_overlays(folder, records, maps, scores, fitted, 1)
  assert {path.rpartition('/')[2] for path in paths} == set(
    os.listdir(bucket / 'run/pictures')
  )


def test_a_finished_category_and_a_fault(bucket, monkeypatch):
  config, folder = program_helpers.tiny_run(''), 'gs://bucket/run/surface'
  assert run_lib.read_finished(config, folder) is None
  results = {'config': config.to_dict(), 'step': 6}
  storage.write_text(f'{folder}/results.json', results_lib.format_json(results))
  assert run_lib.read_finished(config, folder)['step'] == 6
  # TensorStore, which is not epath, writes checkpoints.
  for name in ('open_manager', 'save', 'close'):
    monkeypatch.setattr(faults.checkpoint, name, lambda *_, **options: None)
  for value in (1.0, 2.0):
    batch = {'image': np.full(3, value)}
    faults.save(folder, 5, None, {}, batch)
  with np.load(bucket / 'run/surface/fault/batch.npz') as file:
    np.testing.assert_array_equal(file['image'], np.full(3, 2.0))
