"""Where a result says it came from."""

import types

import pytest

from configs import default
from dmdd_jax import provenance
from dmdd_jax import run as run_lib
from dmdd_jax import trainer as trainer_lib


class FakeTrainer:
  """Trains nothing; the checkout changes meanwhile."""

  state, predictor, meta = None, None, {}
  data = types.SimpleNamespace(dataset=types.SimpleNamespace(test=()))

  def __init__(self, config, workdir):
    pass

  def run(self, profile, progress):
    provenance.git_revision = lambda: 'of the end'

  def close(self):
    pass


@pytest.mark.parametrize('given', [None, 'of the run'])
def test_a_trainings_revision_is_that_of_its_start(
  monkeypatch, tmp_path, given
):
  monkeypatch.setattr(provenance, 'git_revision', lambda: 'of the start')
  monkeypatch.setattr(trainer_lib, 'Trainer', FakeTrainer)
  monkeypatch.setattr(
    run_lib, '_evaluate', lambda *_, revision, **options: revision
  )
  _, revision = run_lib.train_and_evaluate(
    default.get_config(), str(tmp_path), revision=given
  )
  assert revision == (given or 'of the start')


def test_the_revision_names_a_commit_of_this_checkout():
  revision = provenance.git_revision()
  assert revision is None or len(revision.rstrip('+')) == 40
