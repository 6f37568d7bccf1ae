"""Every file that the documents link to or name exists."""

import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PAGES = sorted(
  page.relative_to(_ROOT).as_posix()
  for page in (
    _ROOT / 'README.md',
    _ROOT / 'CONTRIBUTING.md',
    *_ROOT.glob('docs/**/*.md'),
  )
)
_LINK = re.compile(r'\]\(([^)\s]+)\)')
_HEADING = re.compile(r'^#+ (.+)$', re.MULTILINE)
_CODE = re.compile(r'^```.*?^```', re.MULTILINE | re.DOTALL)
# A file of ours, named by its path from the root.
_PATH = re.compile(
  r'(?<![\w./-])((?:configs|dmdd_jax|docs|tests|tools)/[\w./-]*\.(?:py|sh|md))\b'
)


def _anchors(text):
  """GitHub's anchors of the headings of a page."""
  headings = _HEADING.findall(_CODE.sub('', text))
  kept = [re.sub(r'[^\w\- ]', '', heading.lower()) for heading in headings]
  return {heading.strip().replace(' ', '-') for heading in kept}


@pytest.mark.parametrize('page', _PAGES)
def test_relative_links_lead_somewhere(page):
  file = _ROOT / page
  wrong = []
  for link in _LINK.findall(_CODE.sub('', file.read_text())):
    if link.startswith(('http://', 'https://')):
      continue
    path, _, anchor = link.partition('#')
    target = file.parent / path if path else file
    anchors = _anchors(target.read_text()) if anchor and target.exists() else ()
    if not target.exists() or (anchor and anchor not in anchors):
      wrong.append(link)
  assert not wrong


@pytest.mark.parametrize('page', _PAGES)
def test_named_files_exist(page):
  named = set(_PATH.findall((_ROOT / page).read_text()))
  assert not [path for path in sorted(named) if not (_ROOT / path).exists()]


def test_a_heading_gets_the_anchor_that_github_gives_it():
  page = (
    '# The `x` of y: 1, 2\n\n```sh\n# No heading.\n```\n## What was run, a-b'
  )
  assert _anchors(page) == {'the-x-of-y-1-2', 'what-was-run-a-b'}
