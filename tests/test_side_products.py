"""Pictures, maps and pages that fail cost no score and are named."""

import json
import os

import program_helpers
import pytest

from dmdd_jax import evaluate
from dmdd_jax import run as run_lib
from dmdd_jax.report import archive
from dmdd_jax.report import overlays
from dmdd_jax.report import page

pytestmark = pytest.mark.usefixtures('four_channels')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The folder of a trained category, with the network of its archive."""
  folder = tmp_path_factory.mktemp('trained')
  program_helpers.unpack_checkpoint('2026-11-28-encoder', folder)
  return folder / 'run'


@pytest.fixture(scope='module')
def options(tmp_path_factory):
  root = program_helpers.write_data(tmp_path_factory.mktemp('data'))
  changes = {'eval.batch_size': 4, 'eval.pictures': 1}
  return {'changes': {'data.root': os.path.dirname(root), **changes}}


def _fail(error):
  def failing(*arguments, **options):
    raise error

  return failing


def test_results_are_written_first(trained, options, tmp_path, monkeypatch):
  """Whatever fails then is named, and the exit status is 1."""
  full = OSError(28, 'No space left on device', 'there')
  monkeypatch.setattr(overlays, 'overlay', _fail(RuntimeError('no ink')))
  monkeypatch.setattr(archive, '_fill', _fail(full))
  monkeypatch.setattr(page, '_render', _fail(full))
  monkeypatch.setattr(evaluate.map_files, 'write_map', _fail(full))
  with pytest.raises(run_lib.IncompleteError) as caught:
    run_lib.evaluate_run(
      trained, tmp_path / 'out', maps=tmp_path / 'maps', **options
    )
  results = json.loads((tmp_path / 'out/results.json').read_text())
  assert 0 <= results['image_auroc'] <= 1 and results['wall_time_s'] >= 0
  incomplete = results['incomplete']
  kinds = [os.path.basename(name).split('_')[0] for name in incomplete]
  assert kinds.count('defect') == kinds.count('good') == 2
  assert incomplete[str(tmp_path / 'out/report_data.zip')].endswith("'there'")
  tiff = [name for name in incomplete if name.endswith('.tiff')]
  assert len(tiff) == len(list((tmp_path / 'out').glob('scores.csv'))) * 7
  message = str(caught.value)
  assert f'{len(incomplete) + 1} files could not be written' in message
  assert str(tmp_path / 'out') in message


def test_results_without_their_pictures_are_no_finished_run(
  trained, options, tmp_path, monkeypatch
):
  out = tmp_path / 'out'
  with monkeypatch.context() as patch:
    patch.setattr(overlays, 'write_overlays', _fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
      run_lib.evaluate_workdir(trained, out, **options)
  ended = json.loads((out / 'results.json').read_text())
  assert ended['incomplete'] == {'pictures': 'the program ended before'}
  begun = []

  def begin(*arguments):
    begun.append(arguments)
    return None, {}

  monkeypatch.setattr(run_lib, 'train_and_evaluate', begin)
  monkeypatch.setattr(run_lib, 'read_finished', lambda *_: ended)
  config = program_helpers.tiny_run('')
  run_lib._run_category(config, str(out), None, None, None)
  assert len(begun) == 1
  run_lib.evaluate_workdir(trained, out, **options)
  whole = json.loads((out / 'results.json').read_text())
  assert 'incomplete' not in whole
  monkeypatch.setattr(run_lib, 'read_finished', lambda *_: whole)
  assert run_lib._run_category(config, str(out), None, None, None) == whole
  assert len(begun) == 1
