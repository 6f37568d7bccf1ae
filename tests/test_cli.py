"""How a program of this package starts."""

import os
import subprocess
import sys

import pytest

from dmdd_jax import cli

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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


def test_the_config_file_is_found(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)  # Outside the checkout.
  installed = os.path.join(REPOSITORY, 'configs')
  (tmp_path / 'own.py').touch()
  for name, found in {
    'configs/mvtec.py:screw': f'{installed}/mvtec.py:screw',
    './configs/demo.py': f'{installed}/demo.py',
    'configs/nothing.py': 'configs/nothing.py',
    'other/demo.py': 'other/demo.py',
    '~/own.py': f'{tmp_path}/own.py',
  }.items():
    assert cli.find_config(name) == found
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'demo.py').touch()  # The user's own goes first.
  assert cli.find_config('configs/demo.py') == 'configs/demo.py'


@pytest.mark.parametrize(
  'arguments',
  [['--config', 'configs/demo.py'], ['-config=configs/demo.py']],
)
def test_programs_run_outside_the_checkout(tmp_path, arguments):
  (tmp_path / 'runs').write_text('a file')  # So that it ends at once.
  process = _start(tmp_path, ['-m', 'dmdd_jax.main', *arguments])
  assert process.returncode == 1
  assert 'cannot write to the workdir runs/demo' in process.stderr


def test_a_missing_config_says_where_the_installed_ones_are(tmp_path):
  arguments = ['-m', 'dmdd_jax.main', '--config', 'configs/nothing.py']
  process = _start(tmp_path, arguments)
  assert process.returncode == 1
  assert os.path.join(REPOSITORY, 'configs') in process.stderr


PATHS = """
from dmdd_jax import cli

FOLDER = cli.define_path('folder', None, 'A folder.')
SEVERAL = cli.define_paths('several', 'Several.')

def main(argv):
  print(FOLDER.value, *SEVERAL.value)

cli.run(main)
"""


def test_the_home_is_expanded_in_flags(tmp_path):
  (tmp_path / 'program.py').write_text(PATHS)
  name = os.fsdecode(b'caf\xe9')
  arguments = ['--folder=~/x', '--several', '~/y', '--several', f'~/{name}']
  process = _start(tmp_path, ['program.py', *arguments])
  assert process.returncode == 0, process.stderr
  # What is not UTF-8 is printed by its bytes.
  expected = f'{tmp_path}/x {tmp_path}/y {tmp_path}/{name}\n'
  assert process.stdout == expected
  # The flags are listed as the program's own.
  assert (
    '--folder: A folder.' in _start(tmp_path, ['program.py', '--help']).stdout
  )


def _start(folder, arguments):
  """Runs Python in a folder that is also the home, without this checkout."""
  environment = {**os.environ, 'PYTHONPATH': REPOSITORY, 'HOME': str(folder)}
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=folder,
    env={**environment, 'PYTHONUTF8': '1', 'GLIBC_TUNABLES': ''},
    capture_output=True,
    encoding='utf-8',
    errors='surrogateescape',
    check=False,
  )


def test_a_setting_without_its_configuration_says_what_is_missing():
  argv = ['main', '--mode=evaluate', '--config.data.normal=new']
  for text in ('--config.data.normal', '--config=FILE'):
    assert text in cli.explain_config_error(argv)


INTERRUPTED = """
import os
import signal
from dmdd_jax import cli

def main(argv):
  os.kill(os.getpid(), signal.SIGINT)

cli.run(main)
"""


def test_ctrl_c_is_one_line(tmp_path):
  path = tmp_path / 'program.py'
  path.write_text(INTERRUPTED)
  process = subprocess.run(
    [sys.executable, str(path)], capture_output=True, text=True
  )
  assert process.returncode == 130
  assert process.stderr == 'interrupted: the same command continues\n'
