"""Where a result says it came from."""

import subprocess

import pytest

from configs import default
from dmdd_jax import provenance
from dmdd_jax import train


def test_a_trainings_revision_is_that_of_its_start(monkeypatch, tmp_path):
  first = provenance.git_revision()
  provenance.git_revision.cache_clear()

  def stop(config):
    raise InterruptedError

  monkeypatch.setattr(train, '_check_fields', stop)
  with pytest.raises(InterruptedError):
    train.Trainer(default.get_config(), str(tmp_path))
  monkeypatch.setattr(subprocess, 'run', None)  # The checkout has gone on.
  assert provenance.git_revision() == first
