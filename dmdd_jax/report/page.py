"""A run as one self-contained page: report.html.

The page holds tables, histograms, curves and training curves as they stand.
Its script draws the gallery of test images, image by image as they come near
the screen. Nothing is loaded from anywhere: the page's content policy forbids
it. Jinja2 escapes every text, names of files included.

`page.html` is the template, `page.js` the script, `sections` their content.

Synopsis:

  path = page.write('runs/mvtec')            # from what is on disk
  page.try_write(workdir, category_folders)  # after an evaluation
"""

import base64
from collections.abc import Sequence
import contextlib
import hashlib
import importlib.resources
import os
from typing import Any

from absl import logging
import jinja2
import markupsafe

from dmdd_jax import storage
from dmdd_jax.report import category as category_lib
from dmdd_jax.report import sections

NAME = 'report.html'


def try_write(
  workdir: str | os.PathLike,
  folders: Sequence[str | os.PathLike],
  training: Sequence[str | os.PathLike] | None = None,
) -> dict[str, str]:
  """`write`, where a failure is logged: results are worth more than a page.

  Returns:
    {path: reason} of a page that could not be written, or {}.
  """
  failures: dict[str, str] = {}
  path = os.path.join(workdir, NAME)
  storage.attempt(failures, path, write, workdir, folders, training)
  if not failures:
    logging.info('report in %s', path)
  return failures


def write(
  workdir: str | os.PathLike,
  folders: Sequence[str | os.PathLike] | None = None,
  training: Sequence[str | os.PathLike] | None = None,
) -> str:
  """Writes report.html from the results on disk; returns its path.

  Args:
    workdir: gets the page.
    folders: of the categories' results; by default the workdir itself or the
      folders in it.
    training: the folders with the scalars.jsonl of each category, if they are
      not those of the results.

  Raises:
    FileNotFoundError: there are no results.
    ValueError: a file cannot be read; it is named.
  """
  if folders is None:
    folders = category_lib.find_folders(workdir)
  with contextlib.ExitStack() as stack:
    categories = [
      stack.enter_context(category_lib.read(folder, trained))
      for folder, trained in zip(folders, training or folders, strict=True)
    ]
    text = _render(storage.absolute(workdir), categories)
  path = os.path.join(workdir, NAME)
  storage.write_text(path, text)
  return path


def _finalize(value: Any) -> Any:
  """A value of the page; of names that are not UTF-8, U+FFFD for each byte."""
  if not isinstance(value, str) or value.isascii():
    return value
  text = value.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')
  return type(value)(text)


def _render(workdir: str, categories: Sequence[category_lib.Category]) -> str:
  """The page's text."""
  package = importlib.resources.files('dmdd_jax.report')
  script = (package / 'page.js').read_text('utf-8')
  digest = hashlib.sha256(script.encode()).digest()
  names = [category.name for category in categories]
  environment = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    finalize=_finalize,
  )
  environment.policies['json.dumps_kwargs'] = {'separators': (',', ':')}
  environment.filters['percent'] = sections.percent
  template = (package / 'page.html').read_text('utf-8')
  return environment.from_string(template).render(
    title=names[0] if len(names) == 1 else os.path.basename(workdir),
    # The file is part of the package, not an input.
    script=markupsafe.Markup(script),
    script_hash=base64.b64encode(digest).decode(),
    **sections.context(categories),
  )
