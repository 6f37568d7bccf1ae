"""Fixtures that several files share."""

import os
import shutil

from absl import logging
import program_helpers
import pytest

from dmdd_jax.models import resnet

# The programs that tests start need not start twice, see `cli.use_huge_pages`.
os.environ.setdefault('GLIBC_TUNABLES', '')


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  """The folder of compiled programs, for processes that a test starts."""
  return tmp_path_factory.getbasetemp() / 'compiled'


@pytest.fixture(scope='module')
def compiled_once(cache):
  """See `program_helpers.compiled_once`; a file asks for it as a whole."""
  with program_helpers.compiled_once(cache):
    yield


@pytest.fixture(scope='module')
def small_network():
  """That of killed_main.py, to read its checkpoints."""
  with pytest.MonkeyPatch.context() as patch:
    spec = resnet.Spec((1, 1, 1, 1), bottleneck=False)
    patch.setitem(resnet.SPECS, 'resnet18', spec)
    yield


@pytest.fixture(scope='module')
def four_channels():
  """The network of tests/data/checkpoints, under the name in their configs."""
  with pytest.MonkeyPatch.context() as patch:
    spec = resnet.Spec((1, 1, 1, 1), bottleneck=False, channels=4)
    patch.setitem(resnet.SPECS, 'resnet18', spec)
    yield


@pytest.fixture
def warnings(monkeypatch):
  """The warnings logged, as texts."""
  texts = []
  monkeypatch.setattr(
    logging, 'warning', lambda text, *args: texts.append(text % args)
  )
  return texts


@pytest.fixture(scope='module')
def browser():
  """A real one, without a window and without network."""
  sync_api = pytest.importorskip(
    'playwright.sync_api', reason='playwright is not installed'
  )
  chromium = shutil.which('chromium') or shutil.which('chromium-browser')
  if chromium is None:
    pytest.skip('no chromium is installed')
  arguments = [
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
  ]
  with sync_api.sync_playwright() as playwright:
    found = playwright.chromium.launch(executable_path=chromium, args=arguments)
    yield found
    found.close()
