"""What is run again, and what differs; tests/test_api.py really runs it."""

import json
import math

import pytest

from dmdd_jax import provenance
from dmdd_jax import reproduce

TRAIN = (
  'python -m dmdd_jax.main --config configs/mvtec.py:screw,pill --workdir'
  ' runs/mvtec --config.train.batch_size=4'
)
AGAIN = [
  *('python', '-m', 'dmdd_jax.main', '--config', 'configs/mvtec.py:screw,pill'),
  *('--config.train.batch_size=4', '--workdir=/new'),
  '--config.data.category=screw',
]


def _results(**changes):
  results = {
    'command': TRAIN,
    'training_command': TRAIN,
    'category': 'screw',
    'image_auroc': 0.5,
    'au_pro': None,
    'at_threshold': {'image_f1': 0.25},
    'confidence': {'au_pro': [0.1, 0.2]},
    'finished': 'then',
    'versions': {'jax': '1'},
  }
  return results | changes


def test_the_command_of_one_category_in_another_workdir():
  assert reproduce.commands(_results(), '/new') == [AGAIN]
  # A run without --workdir has that of its config.
  command = TRAIN.replace('--workdir runs/mvtec ', '')
  results = _results(command=command, training_command=command)
  assert reproduce.commands(results, '/new') == [AGAIN]


def test_what_evaluated_comes_after_what_trained():
  command = 'python -m dmdd_jax.main --mode evaluate --workdir=runs/mvtec'
  assert reproduce.commands(_results(command=command), '/new') == [
    AGAIN,
    ['python', '-m', 'dmdd_jax.main', '--mode', 'evaluate', '--workdir=/new'],
  ]
  command = 'python tools/evaluate_checkpoint.py --workdir W --output O'
  [_, evaluation] = reproduce.commands(_results(command=command), '/new')
  assert evaluation[2:] == ['--workdir=/new', '--output=/new/evaluation']


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'training_command': None}, 'have no command'),
    ({'command': "python -c 'import dmdd_jax'"}, 'not of a command line'),
  ],
)
def test_what_cannot_be_run_again(changes, message):
  with pytest.raises(reproduce.ReproduceError, match=message):
    reproduce.commands(_results(**changes), '/new')


def test_a_workdir_that_holds_something_is_refused(tmp_path):
  (tmp_path / 'old').write_text('')
  with pytest.raises(reproduce.ReproduceError, match='is not empty'):
    reproduce.rerun(_results(), str(tmp_path))


def test_a_command_that_fails_is_named_with_its_log(tmp_path):
  results = _results(
    training_command='python missing.py --workdir W',
    command='python missing.py --workdir W',
    directory=str(tmp_path),
  )
  with pytest.raises(reproduce.ReproduceError, match='status 2; see .*log'):
    reproduce.rerun(results, str(tmp_path / 'new'))
  assert 'missing.py' in (tmp_path / 'new' / 'reproduce.log').read_text()


def test_figures_that_differ():
  before = _results(nan=math.nan)
  after = _results(
    nan=math.nan,
    command='other',
    finished='now',
    versions={'jax': '2'},
    at_threshold={'image_f1': 0.26},
    confidence={'au_pro': [0.1, 0.2001]},
    au_pro=0.5,
  )
  assert reproduce.differences(before, after) == {
    'at_threshold.image_f1': (0.25, 0.26),
    'au_pro': (None, 0.5),
    'confidence.au_pro': ([0.1, 0.2], [0.1, 0.2001]),
  }
  near = reproduce.differences(before, after, tolerance=0.015)
  assert list(near) == ['au_pro']
  assert reproduce.differences(before, json.loads(json.dumps(before))) == {}


def test_the_command_is_that_of_the_process(monkeypatch):
  words = ['/venv/bin/python3', '-m', 'dmdd_jax.main', '--config', 'a b.py']
  monkeypatch.setattr('sys.orig_argv', [*words, '--category_group=1'])
  assert provenance.command() == "python -m dmdd_jax.main --config 'a b.py'"
  with provenance.command_is('dmdd_jax.train()'):
    assert provenance.command() == 'dmdd_jax.train()'
  assert provenance.command().startswith('python -m')
