"""Where a result comes from: command, config, revision, versions, device."""

from collections.abc import Iterator, Mapping
import contextlib
import contextvars
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax
import ml_collections

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
# Set by whoever calls this package; None means that the program's own counts.
_COMMAND: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  'command', default=None
)
# A process that launch/groups.py starts is part of the command without it.
_GROUP = '--category_group='


def command() -> str:
  """The command that this process runs, as a shell takes it.

  Python is 'python' in it, whatever it was started by.
  """
  words = (w for w in sys.orig_argv[1:] if not w.startswith(_GROUP))
  return _COMMAND.get() or shlex.join(['python', *words])


@contextlib.contextmanager
def command_is(text: str) -> Iterator[None]:
  """Has `command` return this text, for calls that no command line made."""
  token = _COMMAND.set(text)
  try:
    yield
  finally:
    _COMMAND.reset(token)


def git_revision() -> str | None:
  """The commit of this checkout, with '+' if files differ from it.

  A checkout can change while a program runs: ask as it begins, and keep the
  answer. None outside of a git checkout.
  """
  here = os.path.dirname(os.path.abspath(__file__))

  def git(*arguments: str) -> str:
    return subprocess.run(
      ('git', '-C', here) + arguments,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return None


def versions() -> dict[str, str]:
  """Python's version and those of the packages that decide the numbers."""
  packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {'python': platform.python_version(), **packages}


def describe(
  config: ml_collections.ConfigDict,
  meta: Mapping[str, Any],
  *,
  step: int,
  seconds: float,
  revision: str | None,
) -> dict[str, Any]:
  """The part of `results.json` that is no metric.

  Args:
    config: that was evaluated.
    meta: of the checkpoint; the teacher's fingerprint and the command that
      trained are taken from it. Older checkpoints have no command.
    step: of the checkpoint.
    seconds: wall time of what made the result.
    revision: `git_revision()` as that began.
  """
  device = jax.devices()[0]
  return {
    'command': command(),
    'training_command': meta.get('command'),
    'directory': os.getcwd(),
    'category': config.data.category,
    'step': step,
    'seed': config.seed,
    'teacher_fingerprint': meta['teacher_fingerprint'],
    'calibration': meta['calibration'],
    'wall_time_s': round(seconds, 1),
    'finished': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
    'device': f'{jax.device_count()} x {device.device_kind}',
    'platform': device.platform,
    'git_revision': revision,
    'versions': versions(),
    'config': config.to_dict(),
  }
