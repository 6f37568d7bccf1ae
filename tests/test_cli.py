"""How a program of this package starts."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
import sys
from dmdd_jax import cli

def main(argv):
  cli.use_huge_pages(main)
  print(os.getpid(), os.environ['GLIBC_TUNABLES'], *argv[1:])

cli.run(main)
"""


@pytest.mark.parametrize('flag', ['--help', '--helpshort', '--helpfull'])
def test_help_is_no_error(tmp_path, flag):
  path = tmp_path / 'program.py'
  path.write_text(PROGRAM)
  done = subprocess.run(
    [sys.executable, str(path), flag], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert 'program.py' in done.stdout


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
