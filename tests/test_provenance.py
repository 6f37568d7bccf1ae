"""Where a result says it came from."""

import subprocess

from dmdd_jax import provenance


def test_the_revision_is_that_of_the_first_question(monkeypatch):
  first = provenance.git_revision()
  monkeypatch.setattr(subprocess, 'run', None)  # The checkout has gone on.
  assert provenance.git_revision() == first
