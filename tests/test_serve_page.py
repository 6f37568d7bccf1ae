"""The live page in a real browser."""

import pytest
import serve_helpers

from dmdd_jax.serve import limits as limits_lib

png = serve_helpers.png


@pytest.fixture(scope='module')
def address():
  limits = limits_lib.Limits(bytes=2**18, pixels=10**6, seconds=5.0)
  with serve_helpers.serving(limits=limits) as running:
    yield running


def _wait_for_text(page, selector, text):
  """Not by wait_for_function: the page's policy forbids its polling by eval."""
  from playwright.sync_api import expect

  expect(page.locator(selector)).to_have_text(text, timeout=60_000)


@pytest.fixture
def open_page(browser, address):
  """Opens the live page; at the end nothing may be in the console."""
  faults, pages = [], []

  def opened(**options):
    page = browser.new_page(**options)
    page.set_default_timeout(60000)
    pages.append(page)
    # The browser itself notes every refused request.
    page.on(
      'console',
      lambda message: (
        message.text.startswith('Failed to load resource')
        or faults.append(message.text)
      ),
    )
    page.on('pageerror', lambda error: faults.append(str(error)))
    page.goto(address)
    _wait_for_text(page, '#message', 'Ready.')
    return page

  yield opened
  for page in pages:
    page.close()
  assert not faults


def _upload(page, name, content):
  file = {'name': name, 'mimeType': 'image/png', 'buffer': content}
  page.set_input_files('#file', file)
  _wait_for_text(page, '#name', f'{name} (nut)')


def test_the_page_shows_verdict_map_and_history(open_page):
  page = open_page()
  _upload(page, 'bad.png', png(100))
  assert page.inner_text('#verdict') == 'defective'
  assert float(page.inner_text('#score')) == pytest.approx(200 / 255, abs=1e-3)
  # Painted: red over the bright part, and not over the dark one.
  reds = page.evaluate(
    "() => { const c = document.querySelector('#view').getContext('2d');"
    ' const p = c.getImageData(0, 0, 30, 20).data;'
    ' return [[3, 3], [27, 17]].map(([x, y]) =>'
    ' p[4 * (30 * y + x)] - p[4 * (30 * y + x) + 2]); }'
  )
  assert reds[0] > 60 and reds[0] > reds[1]
  _upload(page, 'fine.png', png(10))
  assert page.inner_text('#verdict') == 'good'
  assert page.locator('#history button').count() == 2
  page.locator('#history button').last.focus()
  page.keyboard.press('Enter')
  assert page.inner_text('#verdict') == 'defective'


def test_the_sliders_by_keyboard_move_verdict_and_outline(open_page):
  page = open_page()
  _upload(page, 'bad.png', png(100))
  before = page.evaluate("document.querySelector('#view').toDataURL()")
  page.focus('#image-threshold')
  page.keyboard.press('End')
  assert page.inner_text('#verdict') == 'good'
  page.keyboard.press('Home')
  assert page.inner_text('#verdict') == 'defective'
  page.focus('#pixel-threshold')
  page.keyboard.press('End')
  after = page.evaluate("document.querySelector('#view').toDataURL()")
  assert before != after
  page.click('#reset')
  assert page.evaluate("document.querySelector('#view').toDataURL()") == before


@pytest.mark.parametrize('event', ['paste', 'drop'])
def test_paste_and_drop(open_page, event):
  page = open_page()
  page.evaluate(
    """([event, content]) => {
      const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], 'given.png', {type: 'image/png'}));
      const options = {bubbles: true, cancelable: true};
      document.querySelector('#drop').dispatchEvent(event === 'paste'
        ? new ClipboardEvent(event, {...options, clipboardData: data})
        : new DragEvent(event, {...options, dataTransfer: data}));
    }""",
    [event, serve_helpers.base64_of(png())],
  )
  page.wait_for_selector('#result', state='visible')
  assert page.inner_text('#name') == 'given.png (nut)'


def test_a_refused_file_is_said_on_the_page(open_page):
  page = open_page()
  page.set_input_files(
    '#file', {'name': 'x.png', 'mimeType': 'image/png', 'buffer': b'x'}
  )
  page.wait_for_selector('#message.error')
  assert 'Refused (415)' in page.inner_text('#message')
  assert not page.is_visible('#result')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_phone(open_page, scheme):
  page = open_page(viewport={'width': 360, 'height': 740}, color_scheme=scheme)
  _upload(page, 'a rather long name of a file ' * 4, png())
  assert page.evaluate('document.documentElement.scrollWidth') == 360
  color = page.evaluate('getComputedStyle(document.body).backgroundColor')
  red = int(color.removeprefix('rgb(').split(',')[0])
  assert (red < 128) == (scheme == 'dark')
  assert page.get_attribute('#camera', 'capture') == 'environment'
