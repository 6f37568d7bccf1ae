"""Files of a folder as they arrive, each once and only when it is complete.

The folder is looked at once a second, which works on network disks too. A file
is complete when its size and time of change stay the same for two seconds. A
file that was written slowly, copied, or renamed into place is handed out once;
one that changes later is handed out again.

Synopsis:

  for paths in watch.arrivals(lambda: glob.glob('new/*.png')):
    inspect(paths)
"""

from collections.abc import Callable, Iterable, Iterator
import glob
import os
import time

from absl import logging

from dmdd_jax import predictions
from dmdd_jax.data import files
from dmdd_jax.launch import preemption

_POLL_SECONDS = 1.0
_SETTLED_SECONDS = 2.0


def check(pattern: str) -> None:
  """Refuses what no file can arrive in.

  Raises:
    MissingDataError: the folder is not there, or a file is named.
  """
  folder = fixed_folder(pattern)
  if not os.path.isdir(folder) or os.path.isfile(os.path.expanduser(pattern)):
    raise files.MissingDataError(
      f'--input={pattern}: --watch needs a folder, or a glob in one; there is'
      f' no folder {folder!r} to watch'
    )


def fixed_folder(pattern: str) -> str:
  """The folder that a pattern names: itself, or what comes before its glob."""
  pattern = os.path.expanduser(pattern)
  if os.path.isdir(pattern):
    return os.path.abspath(pattern)
  folder = os.path.dirname(pattern)
  while glob.has_magic(folder):
    folder = os.path.dirname(folder)
  return os.path.abspath(folder)


def lister(pattern: str, output: str) -> Callable[[], Iterable[str]]:
  """A function that lists the images of now; none where that is impossible.

  A disk may vanish for a while: that is logged once, and once when it is back.

  Args:
    pattern: see `files.list_inputs`.
    output: where the program writes; it is not looked at.
  """
  vanished = ''

  def look() -> Iterable[str]:
    nonlocal vanished
    try:
      listing = files.look_for(pattern, output)
      fault = next(iter(listing.faults.values()), '')
    except (OSError, ValueError) as error:
      listing, fault = None, str(error)
    if not fault and not os.path.isdir(fixed_folder(pattern)):
      fault = f'{fixed_folder(pattern)} is not there'
    if fault and not vanished:
      logging.error('%s; it is watched again when it is back', fault)
    elif vanished and not fault:
      logging.info('%s is back', pattern)
    vanished = fault
    return listing.images if listing else ()

  return look


def arrivals(
  look: Callable[[], Iterable[str]],
  *,
  sleep: Callable[[float], None] = preemption.sleep,
  now: Callable[[], float] = time.monotonic,
) -> Iterator[list[str]]:
  """Yields the files that have become complete, every second; may be empty.

  Ends when a signal comes, see `preemption.watched`.

  Args:
    look: lists the files of now. One that goes before it is complete is not
      handed out.
    sleep: waits for a number of seconds.
    now: the time in seconds.
  """
  # Of each file there is: its identity, since when, and whether it went out.
  seen: dict[str, tuple[tuple[int, int], float, bool]] = {}
  while not preemption.received():
    present, complete = {}, []
    for path in look():
      try:
        identity = predictions.identity(path)
      except OSError:  # Deleted meanwhile, or a link to what is not there yet.
        continue
      before, since, handed = seen.get(path, (None, now(), False))
      if before != identity:
        since, handed = now(), False
      if not handed and now() - since >= _SETTLED_SECONDS:
        complete.append(path)
        handed = True
      present[path] = identity, since, handed
    seen = present
    yield complete
    sleep(_POLL_SECONDS)
