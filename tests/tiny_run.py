"""A configuration file of a whole run that is small enough for tests."""

import program_helpers


def get_config():
  """Six steps; `--config.data.root` is still to be named."""
  return program_helpers.tiny_run('')
