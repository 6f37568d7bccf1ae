"""One training per folder: a second process is refused as it starts.

The lock is the file `training.lock` in a category's folder. It holds the host,
the process and the time of the training. It is made so that only one process
can make it (O_EXCL), on a shared file system too. It is removed at the end. If
its process was killed, the next training on that host takes it over. Another
host cannot see whether the process still runs: it refuses, and names the
command that removes the lock.

Several processes of one run share a folder: process 0 holds the lock for all.

Experimental: on gs:// two processes that start in the same second may both
train; a real bucket was never tried.

Synopsis:

  with lock.held('runs/mvtec/screw'):
    ...
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import shlex
import socket
import time
from typing import IO

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

from dmdd_jax import storage

NAME = 'training.lock'
# A process that has just made its lock needs a moment to write into it.
_WAIT_SECONDS, _POLL_SECONDS = 1.0, 0.05


class LockedError(ValueError):
  """Another process trains in the folder."""


@dataclasses.dataclass(frozen=True)
class Owner:
  """The process that holds a lock.

  Attributes:
    host: its machine's name.
    pid: its number there.
    born: boot of the machine and start of the process, '' where the system
      does not say: numbers of processes are used again.
    since: when it took the lock, for people.
  """

  host: str
  pid: int
  born: str
  since: str


@contextlib.contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
  """Holds the lock of a folder; all processes of a run call it together.

  Args:
    workdir: of one category; it exists.

  Raises:
    LockedError: another process trains there. All processes of the run raise.
  """
  path = os.path.join(os.fspath(workdir), NAME)
  mine, refusal = _myself(), None
  first = jax.process_index() == 0
  if first:
    try:
      _acquire(path, mine)
    except LockedError as error:
      refusal = error
  if jax.process_count() > 1:
    refused = np.array(refusal is not None)
    if multihost_utils.broadcast_one_to_all(refused) and not first:
      refusal = LockedError(f'process 0 was refused: see {path}')
  if refusal is not None:
    raise refusal
  try:
    yield
  finally:
    if first:
      _release(path, mine)


def _myself() -> Owner:
  """This process, from now on."""
  now = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
  pid = os.getpid()
  return Owner(socket.gethostname(), pid, _born(pid) or '', now)


def _born(pid: int) -> str | None:
  """Boot of the machine and start of a process; None if it has ended.

  '' where there is no /proc, as on macOS, and the process exists.
  """
  try:
    with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file:
      boot = file.read().strip()
  except OSError:
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      return None
    except PermissionError:  # It is another user's.
      pass
    return ''
  try:
    with open(f'/proc/{pid}/stat', 'rb') as file:
      # The name, in brackets, may hold spaces: state and start follow it.
      fields = file.read().rpartition(b')')[2].split()
  except OSError:
    return None
  if fields[0] in (b'Z', b'X'):  # It has ended, and no one has asked for it.
    return None
  return f'{boot} {fields[19].decode()}'


def _is_over(owner: Owner) -> bool:
  """Whether the process surely runs no more; False for other hosts."""
  return owner.host == socket.gethostname() and _born(owner.pid) != owner.born


def _acquire(path: str, mine: Owner) -> None:
  """Makes the lock, or takes over that of a killed process of this host.

  Raises:
    LockedError: another process holds it.
  """
  if storage.is_remote(path):
    _acquire_remote(path, mine)
    return
  while True:
    try:
      file = open(path, 'x', encoding='utf-8')
    except FileExistsError:
      pass
    else:
      try:
        with file:
          _write(file, mine)
      except OSError:  # A full disk; an empty lock would block the next one.
        with contextlib.suppress(OSError):
          os.unlink(path)
        raise
      return
    try:
      with open(path, 'r+', encoding='utf-8') as file:
        if _take_over(path, file, mine):
          return
    except FileNotFoundError:  # It has just been released.
      continue
    except PermissionError as error:  # Another user's.
      raise LockedError(_refusal(path, _read(path))) from error


def _take_over(path: str, file: IO[str], mine: Owner) -> bool:
  """Writes this process into the lock of one that was killed.

  Of several that try at once on this host, flock lets one after the other in,
  and all but the first see a process that runs.

  Returns:
    False if the file is the lock no more.

  Raises:
    LockedError: the process runs, or is another host's.
  """
  with contextlib.suppress(OSError):  # Some file systems have no flock.
    fcntl.flock(file, fcntl.LOCK_EX)
  owner = _read(path)
  if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
    return False
  if owner is None or not _is_over(owner):
    raise LockedError(_refusal(path, owner))
  logging.warning(
    'process %d, which trained here since %s, has ended without a word: its'
    ' lock %s is taken over',
    *(owner.pid, owner.since, path),
  )
  file.truncate(0)
  _write(file, mine)
  return True


def _acquire_remote(path: str, mine: Owner) -> None:
  """As `_acquire`, on a file system that cannot make a file exclusively."""
  owner = _read(path, wait=False)
  if storage.path(path).exists() and (owner is None or not _is_over(owner)):
    raise LockedError(_refusal(path, owner))
  storage.write_text(path, json.dumps(dataclasses.asdict(mine)))


def _write(file: IO[str], mine: Owner) -> None:
  json.dump(dataclasses.asdict(mine), file)
  file.flush()
  os.fsync(file.fileno())


def _read(path: str, wait: bool = True) -> Owner | None:
  """The holder of a lock; None if the file does not say."""
  deadline = time.monotonic() + (_WAIT_SECONDS if wait else 0.0)
  while True:
    try:
      return Owner(**json.loads(storage.path(path).read_text()))
    except FileNotFoundError:
      return None
    except (OSError, ValueError, TypeError):
      if time.monotonic() >= deadline:
        return None
    time.sleep(_POLL_SECONDS)


def _refusal(path: str, owner: Owner | None) -> str:
  """One line: who trains where, and what to do."""
  folder = os.path.dirname(path)
  remove = f'rm {shlex.quote(path)}'
  if storage.is_remote(path):
    remove = f'gcloud storage {remove}'
  if owner is None:
    return (
      f'another process holds the lock of {folder}, and the lock does not say'
      f' which. Use another --workdir. If nothing trains there: {remove}'
    )
  holder = f'process {owner.pid} on host {owner.host}, since {owner.since},'
  if owner.host == socket.gethostname():
    return (
      f'{holder} trains in {folder}. Wait for its end, stop it (kill'
      f' {owner.pid}), or use another --workdir.'
    )
  return (
    f'{holder} trains in {folder}. Wait for its end, or use another --workdir.'
    f' If that process runs no more, remove its lock: {remove}'
  )


def _release(path: str, mine: Owner) -> None:
  """Removes the lock, unless it is another process's by now."""
  try:
    if _read(path, wait=False) == mine:
      storage.path(path).unlink()
  except OSError as error:  # What was trained is saved already.
    logging.warning('the lock %s could not be removed: %s', path, error)
