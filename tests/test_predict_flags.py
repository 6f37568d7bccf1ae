"""`--mode predict`: what its flags do, its output and its exit status."""

import json

from absl.testing import flagsaver
import pytest

from dmdd_jax import main
from dmdd_jax import predict

ROW = {'file': 'a.png', 'score': 1.5, 'threshold': float('nan'), 'error': ''}


@pytest.fixture
def run(monkeypatch, capsys):
  """Runs the command with a stand-in; returns its options, stdout, status."""

  def run(failed=(), incomplete=(), **given):
    called = {}

    def stand_in(*arguments, on_row, **options):
      called.update(options, arguments=arguments)
      if on_row is not None:
        on_row(ROW)
        on_row({'file': 'b.png', 'error': 'bad'})
      return {
        'table': 'out/predictions.csv',
        'failed': dict.fromkeys(failed, 'bad'),
        'incomplete': dict.fromkeys(incomplete, 'no ink'),
      }

    monkeypatch.setattr(predict, 'predict', stand_in)
    main.FLAGS.mark_as_parsed()
    status = 0
    with flagsaver.flagsaver(input='new', output='out', **given):
      try:
        main.predict('run')
      except SystemExit as end:
        status = end.code
    return called, capsys.readouterr().out, status

  return run


def test_it_prints_the_table_and_a_failure_is_its_status(run):
  called, printed, status = run()
  assert called['arguments'] == ('run', 'new', 'out', 'tiff', True)
  assert called['resume'] and not called['watches'] and status == 0
  assert printed == 'out/predictions.csv\n'
  _, _, status = run(failed=['a'])
  assert '1 files could not be read, 0 have no map' in status
  _, _, status = run(incomplete=['a', 'b'])
  assert '0 files could not be read, 2 have no map' in status


def test_lines_of_json_are_all_that_it_prints(run):
  called, printed, status = run(jsonl=True, watch=True, resume=False)
  first, second = map(json.loads, printed.splitlines())
  assert first['score'] == 1.5 and first['threshold'] is None
  assert second['error'] == 'bad' and second['score'] is None
  assert called['watches'] and not called['resume']


def test_a_stream_ends_with_status_0(run):
  assert run(failed=['a'], incomplete=['b'], watch=True)[2] == 0
