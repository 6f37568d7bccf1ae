"""A run's folder in a bucket; a local folder stands in for the bucket."""

import contextlib
import errno
import json
import os
import resource

from etils import epath
from etils.epath import backend
import numpy as np
import program_helpers
import pytest

from dmdd_jax import run as run_lib
from dmdd_jax import storage
from dmdd_jax.data import layouts
from dmdd_jax.metrics import results as results_lib
from dmdd_jax.report import overlays
from dmdd_jax.scoring import calibration
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import faults
from dmdd_jax.training import scalars


class FakeBucket:
  """The backend that epath takes for gs://, on a local folder."""

  def __init__(self, folder):
    self._folder = os.fspath(folder)

  def __getattr__(self, name):
    def call(*arguments, **options):
      assert os.fspath(arguments[0]).startswith('gs://'), arguments
      arguments = [
        os.fspath(argument).replace('gs:/', self._folder, 1)
        if str(argument).startswith('gs://')
        else argument
        for argument in arguments
      ]
      return getattr(backend.os_backend, name)(*arguments, **options)

    return call


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """The local folder behind gs://bucket; nothing may be written beside it."""
  monkeypatch.setattr(backend, 'tf_backend', FakeBucket(tmp_path / 'remote'))
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


def test_names_that_are_not_utf8_keep_their_bytes(tmp_path):
  name = os.fsdecode(b'caf\xe9.csv')
  storage.write_text(tmp_path / name, f'file\n{name}\n')
  assert os.listdir(os.fsencode(tmp_path)) == [b'caf\xe9.csv']
  assert (tmp_path / name).read_bytes() == b'file\ncaf\xe9.csv\n'
  document = json.loads(results_lib.format_json({'file': name}))
  assert document == {'file': name}


def test_names_are_absolute_or_remote(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert storage.absolute('gs://bucket/run') == 'gs://bucket/run'
  assert storage.absolute('run') == str(tmp_path / 'run')
  assert os.fspath(storage.path('gs://bucket/run')) == 'gs://bucket/run'
  assert isinstance(storage.path('run'), epath.Path)


@pytest.fixture
def trained(tmp_path):
  """The folder of a trained category, with the network of its archive."""
  program_helpers.unpack_checkpoint('2026-11-28-encoder', tmp_path / 'archive')
  return tmp_path / 'archive' / 'run'


def _files(folder):
  """{path below a folder: bytes} of all its files."""
  paths = (path for path in folder.rglob('*') if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.usefixtures('four_channels')
def test_an_evaluation_writes_the_same_into_a_bucket(bucket, trained, tmp_path):
  root = os.path.dirname(program_helpers.write_data(tmp_path / 'data'))
  for output in ('gs://bucket/run', str(tmp_path / 'local')):
    changes = {'data.root': root, 'eval.batch_size': 4}
    run_lib.evaluate_run(trained, f'{output}/surface', changes=changes)
  remote, local = _files(bucket / 'run'), _files(tmp_path / 'local')
  assert remote.keys() == local.keys()
  assert {'surface/report.html', 'surface/results.json'} <= remote.keys()
  for name in remote:
    if name.endswith(('.png', '.csv')):
      assert remote[name] == local[name], name


def test_a_finished_run_in_a_bucket_gets_its_tables_and_report(bucket):
  config, workdir = program_helpers.tiny_run(''), 'gs://bucket/run'
  results = {'config': run_lib.for_category(config, 'surface').to_dict()}
  results |= {'category': 'surface', 'step': 6, 'pixel_auroc': 0.5}
  fitted = calibration.Calibration(score_lib.Fusion(), 0.5, 0.5, 1.0, 4)
  results['calibration'] = fitted.to_dict()
  text = results_lib.format_json(results)
  storage.write_text(f'{workdir}/surface/results.json', text)
  assert '50' in run_lib.run_categories(config, workdir)
  names = {path.name for path in (bucket / 'run').iterdir()}
  tables = {'results.json', 'results.csv', 'results.md'}
  assert tables | {'surface', 'report.html'} <= names


def test_curves_are_appended_and_read_in_a_bucket(bucket):
  for step in (3, 4):
    scalars.append('gs://bucket/run/a', step, {'train/loss': step / 2})
  curves = {'train/loss': ([3, 4], [1.5, 2.0])}
  assert scalars.read('gs://bucket/run/a') == curves


def test_pictures_take_the_place_of_older_ones(bucket, tmp_path):
  root = program_helpers.write_data(tmp_path / 'data')
  records = layouts.list_mvtec(os.path.dirname(root), 'surface').test
  maps = np.random.default_rng(0).random((len(records), 32, 32), np.float32)
  scores = np.arange(len(records), dtype=np.float32)
  fitted = calibration.Calibration(score_lib.Fusion(), 0.5, 0.5, 1.0, 4)
  folder = 'gs://bucket/run/pictures'
  storage.write_text(f'{folder}/older.png', '')
  assert not overlays.write_overlays(folder, records, maps, scores, fitted, 1)
  written = os.listdir(bucket / 'run/pictures')
  assert len(written) == 4 and 'older.png' not in written


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


@contextlib.contextmanager
def largest_file(size):
  """The system refuses to let a file grow beyond a size, as a full disk does.

  Linux says `File too large`, by the same error as for `No space left`.
  """
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize('write', [storage.write_text, storage.append_text])
def test_a_full_disk_is_an_error_that_names_the_file(write, tmp_path):
  name = str(tmp_path / 'out' / 'a.txt')
  with largest_file(10), pytest.raises(OSError, match='a.txt') as caught:
    write(name, 'x' * 100)
  assert caught.value.errno == errno.EFBIG
  # A library may lose the system's number; its text is kept.
  lost = pytest.raises(OSError, match='a.txt: 3 requested')
  with lost, storage.writing(name):
    raise OSError('3 requested and 1 written')


def test_a_folder_that_cannot_be_written_names_the_file(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='file'):
    storage.write_text(tmp_path / 'file' / 'a.txt', '')


@pytest.mark.parametrize('letter', ['x', 'é', '日'])
def test_a_name_of_any_length_can_be_written(letter, tmp_path):
  size = len(letter.encode())
  longest = letter * (255 // size)
  storage.write_text(tmp_path / longest, 'a')
  names = {
    storage.fit_name(os.path.join('a', stem), '.png.tiff')
    for stem in (longest, longest[:-1] + 'z', longest[:10])
  }
  assert (
    len(names) == 3 and os.path.join('a', longest[:10] + '.png.tiff') in names
  )
  for name in names:
    assert name.endswith('.png.tiff') and os.path.dirname(name) == 'a'
    storage.write_text(tmp_path / name, 'a')


def test_what_fails_is_noted_and_the_rest_goes_on():
  failures = {}

  def fail(error):
    raise error

  storage.attempt(failures, 'a', fail, OSError(28, 'No space left', 'a.png'))
  storage.attempt(failures, 'b', fail, RuntimeError())
  storage.attempt(failures, 'c', fail, error=ValueError('bad'))
  storage.attempt(failures, 'd', str)
  assert failures == {
    'a': "[Errno 28] No space left: 'a.png'",
    'b': 'RuntimeError',
    'c': 'bad',
  }
