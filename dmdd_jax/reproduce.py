"""Runs the command of a results.json again, and compares the figures.

Synopsis:

  again = reproduce.rerun(results, 'runs/again')
  for name, (before, after) in reproduce.differences(results, again).items():
    print(name, before, after)
"""

from collections.abc import Mapping, Sequence
import json
import math
import os
import shlex
import subprocess
import sys
from typing import Any

from absl import logging

from dmdd_jax import config as config_lib
from dmdd_jax import storage

# What two runs of one command may differ in, and what says why figures differ.
_OF_THE_RUN = ('command', 'training_command', 'directory', 'wall_time_s')
_OF_THE_RUN += ('finished', 'config')
REASONS = ('git_revision', 'versions', 'device', 'platform')


class ReproduceError(ValueError):
  """The command cannot be run again, or it failed."""


def rerun(results: Mapping[str, Any], workdir: str) -> dict[str, Any]:
  """Trains, and evaluates, one category again in a new folder.

  The commands run where they ran before, if that folder is still there.

  Args:
    results: what stands in the results.json of a category.
    workdir: is made; must not hold anything.

  Returns:
    What stands in the new results.json.

  Raises:
    ReproduceError: the results name no command that can be run again, the
      workdir is not empty, or a command failed; its output is in
      WORKDIR/reproduce.log.
  """
  workdir = storage.absolute(workdir)
  if os.path.isdir(workdir) and os.listdir(workdir):
    raise ReproduceError(f'{workdir} is not empty: name a new --workdir')
  os.makedirs(workdir, exist_ok=True)
  folder = results.get('directory') or ''
  if not os.path.isdir(folder):
    logging.warning('there is no folder %r: the commands run here', folder)
    folder = os.getcwd()
  target = workdir
  for words in commands(results, workdir):
    logging.info('in %s: %s', folder, shlex.join(words))
    log = os.path.join(workdir, 'reproduce.log')
    with open(log, 'a') as file:
      status = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, stdout=file, stderr=file
      ).returncode
    if status:
      raise ReproduceError(f'{words} ended with status {status}; see {log}')
    target = _flag(words, 'output') or target
  path = os.path.join(target, results['category'], 'results.json')
  return json.loads(storage.path(path).read_text())


def commands(results: Mapping[str, Any], workdir: str) -> list[list[str]]:
  """The words of what trained and, if it was another, what evaluated.

  Raises:
    ReproduceError: they are not known, or not those of a command line.
  """
  trained, evaluated = results.get('training_command'), results.get('command')
  if not trained or not evaluated:
    raise ReproduceError(
      'these results have no command: they are of an older version, or not of'
      ' one category'
    )
  texts = [trained] if trained == evaluated else [trained, evaluated]
  parts = []
  for text in texts:
    words = shlex.split(text)
    if _flag(words, 'workdir') is None and '--config' not in text:
      raise ReproduceError(
        f'`{text}` is not of a command line of this package, and cannot be run'
        ' again; name the results.json of the training, in the folder of the'
        ' category'
      )
    words = [*_without(words, 'workdir'), f'--workdir={workdir}']
    if _flag(words, 'output') is not None:
      output = os.path.join(workdir, 'evaluation')
      words = [*_without(words, 'output'), f'--output={output}']
    parts.append(words)
  parts[0].append(f'--config.data.category={results["category"]}')
  return parts


def differences(
  before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float = 0.0
) -> dict[str, tuple[Any, Any]]:
  """The figures that differ, {'at_threshold.image_f1': (before, after)}.

  Args:
    before: what stands in a results.json.
    after: what stands in another one.
    tolerance: up to which two numbers are equal.
  """
  old, new = figures(before), figures(after)
  return {
    name: (old.get(name), new.get(name))
    for name in sorted({*old, *new})
    if not _equal(old.get(name), new.get(name), tolerance)
  }


def figures(results: Mapping[str, Any]) -> dict[str, Any]:
  """What a second run must give again, flat."""
  names = (*_OF_THE_RUN, *REASONS)
  kept = {k: value for k, value in results.items() if k not in names}
  return config_lib.flatten(kept)


def _equal(old: Any, new: Any, tolerance: float) -> bool:
  if isinstance(old, list) and isinstance(new, list):
    return len(old) == len(new) and all(
      _equal(x, y, tolerance) for x, y in zip(old, new)
    )
  numbers = all(isinstance(x, (int, float)) for x in (old, new))
  if not numbers or math.isnan(old) or math.isnan(new):
    return old == new or (numbers and math.isnan(old) and math.isnan(new))
  return abs(old - new) <= tolerance


def _flag(words: Sequence[str], name: str) -> str | None:
  """The value of `--name value` or `--name=value`."""
  for index, word in enumerate(words):
    flag, equals, value = word.lstrip('-').partition('=')
    if word.startswith('-') and flag == name:
      return value if equals else words[index + 1]
  return None


def _without(words: Sequence[str], name: str) -> list[str]:
  """The words without `--name value` and `--name=value`."""
  kept, skip = [], False
  for word in words:
    flag, equals, _ = word.lstrip('-').partition('=')
    if skip or (word.startswith('-') and flag == name):
      skip = not skip and not equals
    else:
      kept.append(word)
  return kept
