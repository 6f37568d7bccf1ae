"""How a program of this package starts."""

import os
import subprocess
import sys

import pytest

from dmdd_jax import cli

PROGRAM = """
import os
import sys
from dmdd_jax import cli

def main(argv):
  cli.use_huge_pages(main)
  print(os.getpid(), os.environ['GLIBC_TUNABLES'], *argv[1:])

cli.run(main)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc is on Linux')
@pytest.mark.parametrize('given', [None, '', 'glibc.malloc.check=1'])
def test_huge_pages_unless_the_user_has_set_the_variable(tmp_path, given):
  path = tmp_path / 'program.py'
  path.write_text(PROGRAM)
  environment = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  if given is not None:
    environment['GLIBC_TUNABLES'] = given
  process = subprocess.Popen(
    [sys.executable, str(path), 'a b', 'c'],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  printed, logged = process.communicate()
  expected = 'glibc.malloc.hugetlb=1' if given is None else given
  assert printed == f'{process.pid} {expected} a b c\n'
  # One line says so, and how to avoid it.
  assert logged.count("GLIBC_TUNABLES=''") == int(given is None)


def test_a_setting_without_its_configuration_says_what_is_missing():
  argv = ['main', '--mode=evaluate', '--config.data.normal=new']
  for text in ('--config.data.normal', '--config=FILE'):
    assert text in cli.explain_config_error(argv)
