"""What every command line of this package shares: errors in one line.

Synopsis, at the begin and the end of a program:

  _OUTPUT = cli.define_path('output', None, 'Results go here.', required=True)

  if __name__ == '__main__':
    cli.run(main)
"""

from collections.abc import Callable, Sequence
import difflib
import io
import itertools
import logging as std_logging
import os
import runpy
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
import ml_collections

# What a user can cause; anything else is a bug and shows its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)
# Flags that name the file of a config.
_CONFIG_FLAGS = ('config', 'options')
# Of a program that Ctrl-C ended, as shells have it.
INTERRUPTED = 130
_HUGE_PAGES = 'glibc.malloc.hugetlb=1'


# A flag belongs to the program that defines it, which `--help` lists.
flags.disclaim_key_flags()


class _PathParser(flags.ArgumentParser):
  """Expands ~, which shells leave as it is in --flag=~/folder."""

  def parse(self, argument: str) -> str:
    return os.path.expanduser(argument)


def define_path(
  name: str, default: str | None, text: str, required: bool = False
) -> flags.FlagHolder:
  """A flag whose value is the path of a file or folder, with ~ expanded."""
  return flags.DEFINE(
    _PathParser(),
    name,
    default,
    text,
    serializer=flags.ArgumentSerializer(),
    required=required,
  )


def define_paths(name: str, text: str) -> flags.FlagHolder:
  """A required flag like that of `define_path`, which may be given again."""
  return flags.DEFINE_multi(
    _PathParser(),
    flags.ArgumentSerializer(),
    name,
    None,
    text,
    required=True,
  )


def run(main: Callable[[list[str]], Any]) -> None:
  """Like `absl.app.run`, but a user's error is one line and exit status 1.

  So is Ctrl-C, with exit status `INTERRUPTED`. `--verbosity=1` shows the
  traceback too.
  """
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_is_ours)
  # A file name that is not UTF-8 is printed by its bytes.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='surrogateescape')

  def guarded(argv: list[str]) -> None:
    try:
      main(argv)
    except USER_ERRORS as error:
      logging.debug('traceback', exc_info=True)
      sys.exit(f'error: {error}')
    except KeyboardInterrupt:
      logging.debug('traceback', exc_info=True)
      print('interrupted: the same command continues', file=sys.stderr)
      sys.exit(INTERRUPTED)

  app.run(guarded, flags_parser=_parse_flags)


def use_compilation_cache() -> None:
  """Keeps compiled programs for the next run, in the user's cache folder.

  `JAX_COMPILATION_CACHE_DIR` names another folder.
  """
  import jax  # Takes a second, which `--help` need not.

  if jax.config.jax_compilation_cache_dir is None:
    folder = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    jax.config.update(
      'jax_compilation_cache_dir', os.path.join(folder, 'dmdd_jax', 'xla')
    )
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    # The many small programs of a start too, not only those of a second up.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def use_huge_pages(main: Callable[[list[str]], Any]) -> None:
  """Begins a training program again with glibc's allocations in huge pages.

  XLA asks for a step's memory anew every time, and its page faults take a
  fifth of the step on a CPU. glibc reads GLIBC_TUNABLES only as a program
  starts. If the variable is set, even to '', the program does not restart.

  Args:
    main: the caller. Where it is not the program's own, as in a test, or the
      program came by standard input, nothing is done.
  """
  if sys.platform != 'linux' or 'GLIBC_TUNABLES' in os.environ:
    return
  program = getattr(sys.modules['__main__'], 'main', None)
  if program is not main or sys.argv[0] in ('', '-'):
    return
  logging.info(
    'restarting with GLIBC_TUNABLES=%s, which is faster on CPUs; set'
    " GLIBC_TUNABLES='' to avoid the restart",
    _HUGE_PAGES,
  )
  sys.stdout.flush()
  os.environ['GLIBC_TUNABLES'] = _HUGE_PAGES
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_ours(record: std_logging.LogRecord) -> bool:
  """Keeps other packages' progress out of the log, not their warnings.

  A traceback of theirs is of an error that they raise as well.
  """
  ours = os.path.dirname(os.path.abspath(__file__))
  if record.pathname.startswith(ours):
    return True
  return record.levelno > std_logging.INFO and not record.exc_info


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the flags; one that cannot be used ends the program."""
  argv = _with_found_config(argv)
  try:
    rest = flags.FLAGS(argv)
  except (
    SystemExit
  ):  # absl has printed what --help asked for, and exits with 1.
    sys.exit(0)
  except (*USER_ERRORS, flags.Error, AttributeError, KeyError, TypeError) as e:
    sys.exit(f'error: {explain_config_error(argv) or e}')
  # To absl, a config file that is not there is an error only when it is read.
  if missing := _missing_file(_config_arguments(argv)):
    sys.exit(f'error: {missing}')
  return rest


def explain_config_error(argv: Sequence[str]) -> str | None:
  """Finds what is wrong with `--config` and its overrides in `argv`.

  Returns:
    A message that names the bad override and the legal names beside it, or
    the error of the config file itself; None if all of it is fine.
  """
  given = _config_arguments(argv)
  if not given:
    return None
  if missing := _missing_file(given):
    return missing
  path, _, argument = given[''].partition(':')
  try:
    get_config = runpy.run_path(path)['get_config']
    config = get_config(argument) if argument else get_config()
  except (*USER_ERRORS, KeyError, TypeError) as error:
    return f'--config={given[""]}: {error}'
  for name in given:
    if name and (unknown := unknown_field(config, name)):
      return f'--config.{name}: {unknown}'
  return None


def find_config(name: str) -> str:
  """Where a config file is: as it is named, or among the installed ones.

  Args:
    name: a path with what may follow a colon. ~ is expanded; where there is no
      file configs/NAME.py, the one beside this package is taken.
  """
  path, colon, argument = name.partition(':')
  path = os.path.expanduser(path)
  folder, base = os.path.split(os.path.normpath(path))
  installed = os.path.join(_configs(), base)
  if folder == 'configs' and not os.path.exists(path):
    path = installed if os.path.isfile(installed) else path
  return path + colon + argument


def _configs() -> str:
  """The folder of the configs, in the checkout or as pip installed it."""
  package = os.path.dirname(os.path.abspath(__file__))
  return os.path.join(os.path.dirname(package), 'configs')


def _with_found_config(argv: Sequence[str]) -> list[str]:
  """The arguments, with the config files as `find_config` has them."""
  argv = list(argv)
  for index, word in enumerate(argv):
    if word == '--':
      break
    name, equals, value = word.partition('=')
    if name.lstrip('-') not in _CONFIG_FLAGS or not word.startswith('-'):
      continue
    if equals:
      argv[index] = f'{name}={find_config(value)}'
    elif index + 1 < len(argv):
      argv[index + 1] = find_config(argv[index + 1])
  return argv


def _missing_file(given: dict[str, str]) -> str | None:
  """What to say where the config file of the arguments is not there."""
  if given and '' not in given:
    return (
      f'--config.{next(iter(given))} changes a configuration: name it with'
      ' --config=FILE, say the one of the training'
    )
  path = given.get('', '').partition(':')[0]
  if not given or os.path.isfile(path):
    return None
  return (
    f'--config: there is no file {path!r} (in {os.getcwd()}); those of this'
    f' package are in {_configs()}'
  )


def _config_arguments(argv: Sequence[str]) -> dict[str, str]:
  """{'': file, 'data.root': value, ...} of the --config arguments.

  What comes after `--` is not for this program.
  """
  overrides = {}
  argv = list(itertools.takewhile(lambda word: word != '--', argv))
  for index, word in enumerate(argv):
    name, equals, value = word.lstrip('-').partition('=')
    if not word.startswith('-') or name.split('.')[0] != 'config':
      continue
    if not equals:
      value = argv[index + 1] if index + 1 < len(argv) else ''
    overrides[name[len('config.') :]] = value
  return overrides


def unknown_field(config: ml_collections.ConfigDict, name: str) -> str | None:
  """What to say of a field, 'train.batch_size', that a config has not."""
  node: Any = config
  for key in name.split('.'):
    if not isinstance(node, ml_collections.ConfigDict) or key not in node:
      return _unknown(key, node)
    node = node[key]
  return None


def _unknown(key: str, node: Any) -> str:
  legal = sorted(node) if isinstance(node, ml_collections.ConfigDict) else []
  near = difflib.get_close_matches(key, legal, 1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  return (
    f'there is no field {key!r}.{hint} Legal names here:'
    f' {", ".join(legal) or "(none, this is a value)"}'
  )
