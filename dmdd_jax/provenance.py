"""What a result came from: config, revision, seeds, versions, device, time."""

from collections.abc import Mapping
import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import jax
import ml_collections

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


@functools.cache
def git_revision() -> str | None:
  """The commit of this checkout, with '+' if it was changed; else None.

  Asked once, and by a training at its start: the checkout may go on meanwhile.
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
  found = {'python': platform.python_version()}
  for package in _PACKAGES:
    found[package] = importlib.metadata.version(package)
  return found


def describe(
  config: ml_collections.ConfigDict,
  meta: Mapping[str, Any],
  *,
  step: int,
  seconds: float,
) -> dict[str, Any]:
  """The part of `results.json` that is no metric.

  Args:
    config: that was evaluated.
    meta: of the checkpoint; the teacher's fingerprint is taken from it.
    step: of the checkpoint.
    seconds: wall time of what made the result.
  """
  device = jax.devices()[0]
  return {
    'category': config.data.category,
    'step': step,
    'seed': config.seed,
    'teacher_fingerprint': meta['teacher_fingerprint'],
    'calibration': meta['calibration'],
    'wall_time_s': round(seconds, 1),
    'finished': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
    'device': f'{jax.device_count()} x {device.device_kind}',
    'platform': device.platform,
    'git_revision': git_revision(),
    'versions': versions(),
    'config': config.to_dict(),
  }
