"""The live page in a real browser."""

import csv
import dataclasses
import io

import numpy as np
from PIL import Image
import program_helpers
import pytest
import serve_helpers

from dmdd_jax.serve import feedback
from dmdd_jax.serve import limits as limits_lib
from dmdd_jax.serve import models as serve_models
from dmdd_jax.serve import regions

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
    page.set_default_timeout(20000)
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
    _wait_for_text(page, '#word', 'READY')
    return page

  yield opened
  for page in pages:
    page.close()
  assert not faults


def _upload(page, name, content):
  file = {'name': name, 'mimeType': 'image/png', 'buffer': content}
  page.set_input_files('#file', file)


def _inspect(page, name, content, word):
  """Uploads and waits for the word in the head of the page."""
  _upload(page, name, content)
  _wait_for_text(page, '#word', word)
  _wait_for_text(page, '#name', f'{name} (nut)')


def test_the_page_shows_verdict_map_and_history(open_page):
  page = open_page()
  _inspect(page, 'bad.png', png(100), 'DEFECT')
  assert float(page.inner_text('#score')) == pytest.approx(200 / 255, abs=1e-3)
  # Painted: red over the bright part, and not over the dark one.
  reds = page.evaluate(
    "() => { const c = document.querySelector('#view').getContext('2d');"
    ' const p = c.getImageData(0, 0, 30, 20).data;'
    ' return [[3, 3], [27, 17]].map(([x, y]) =>'
    ' p[4 * (30 * y + x)] - p[4 * (30 * y + x) + 2]); }'
  )
  assert reds[0] > 60 and reds[0] > reds[1]
  _inspect(page, 'fine.png', png(10), 'OK')
  assert page.locator('#list button').count() == 2
  page.locator('#list button').last.focus()
  page.keyboard.press('Enter')
  _wait_for_text(page, '#word', 'DEFECT')
  assert page.inner_text('#sentence').startswith('bad.png: score 0.784')


def _look(page):
  """What tells a state from the others: colour, word and sign."""
  return page.evaluate(
    """() => {
      const state = document.querySelector('#state');
      const style = getComputedStyle(state);
      return [style.backgroundColor + style.backgroundImage,
        document.querySelector('#word').textContent,
        document.querySelector('#sign path').getAttribute('d')];
    }"""
  )


def test_each_state_has_its_colour_word_and_sign(open_page):
  page = open_page()
  looks = [_look(page)]
  for content, word in [
    (png(100), 'DEFECT'),
    (png(10), 'OK'),
    (b'x', 'NOT INSPECTED'),
  ]:
    _upload(page, 'x.png', content)
    _wait_for_text(page, '#word', word)
    looks.append(_look(page))
  for values in zip(*looks, strict=True):
    assert len(set(values)) == 4
  # Across the page, and readable from two metres.
  box = page.locator('#state').bounding_box()
  assert box['y'] < 120 and box['height'] > 200
  size = page.evaluate('getComputedStyle(word).fontSize')
  assert float(size.removesuffix('px')) >= 96


def test_no_verdict_stays_under_an_error(open_page):
  page = open_page()
  _inspect(page, 'bad.png', png(100), 'DEFECT')
  _upload(page, 'broken.png', b'x')
  _wait_for_text(page, '#word', 'NOT INSPECTED')
  assert 'broken.png' in page.inner_text('#sentence')
  assert '415' in page.inner_text('#sentence')
  assert not page.is_visible('#result')
  page.route('**/v1/inspect*', lambda route: route.abort())
  _upload(page, 'fine.png', png(10))
  page.locator('#sentence', has_text='cannot be reached').wait_for()
  assert page.inner_text('#word') == 'NOT INSPECTED'
  assert not page.is_visible('#result')


def test_while_an_image_is_inspected_no_verdict_is_shown(open_page):
  page = open_page()
  _inspect(page, 'bad.png', png(100), 'DEFECT')
  waiting = []
  page.route('**/v1/inspect*', lambda route: waiting.append(route))
  _upload(page, 'fine.png', png(10))
  _wait_for_text(page, '#word', 'INSPECTING')
  assert not page.is_visible('#result')
  # Playwright hands over the request in one of its own calls.
  program_helpers.wait_for(lambda: page.evaluate('true') and waiting)
  waiting[0].continue_()
  _wait_for_text(page, '#word', 'OK')


def test_the_sound_is_of_the_state_and_can_be_off(open_page):
  page = open_page()
  page.evaluate(
    """() => {
      window.tones = [];
      const start = OscillatorNode.prototype.start;
      OscillatorNode.prototype.start = function (at) {
        tones.push(this.frequency.value);
        return start.call(this, at);
      };
    }"""
  )
  _inspect(page, 'fine.png', png(10), 'OK')
  assert page.evaluate('tones') == []
  page.check('#sound')
  page.evaluate('tones.length = 0')
  _inspect(page, 'bad.png', png(100), 'DEFECT')
  assert page.evaluate('tones') == [220, 220, 220]
  page.reload()
  assert page.is_checked('#sound')


def test_the_sliders_by_keyboard_move_verdict_and_outline(open_page):
  page = open_page()
  _inspect(page, 'bad.png', png(100), 'DEFECT')
  before = page.evaluate("document.querySelector('#view').toDataURL()")
  page.focus('#image-threshold')
  page.keyboard.press('End')
  assert page.inner_text('#word') == 'OK'
  page.keyboard.press('Home')
  assert page.inner_text('#word') == 'DEFECT'
  page.focus('#pixel-threshold')
  page.keyboard.press('End')
  after = page.evaluate("document.querySelector('#view').toDataURL()")
  assert before != after
  page.click('#reset')
  assert page.evaluate("document.querySelector('#view').toDataURL()") == before


def test_a_moved_threshold_is_marked_on_all_that_it_judges(open_page, tmp_path):
  page = open_page()
  _batch(page, broken=b'x', bad=png(100), fine=png(10))
  _wait_for_text(page, '#word', 'DEFECT')
  page.locator('#list button').nth(1).click()
  _wait_for_text(page, '#name', 'bad.png (nut)')
  assert not page.is_visible('#moved')
  page.focus('#image-threshold')
  page.keyboard.press('End')
  _wait_for_text(page, '#word', 'OK')
  mark = "moved by hand; the server's: 0.500"
  assert mark in page.inner_text('#sentence')
  assert 'moved' in page.get_attribute('#state', 'class')
  notes = page.locator('#list .note').all_inner_texts()
  assert ['moved' in note for note in notes] == [True, True, False]
  assert "nut, verdict: 0.980, the server's is 0.500" in page.inner_text(
    '#moved'
  )
  rows = list(csv.DictReader(io.StringIO(_download(page, '#csv'))))
  assert rows[1]['verdict'] == 'good'
  assert float(rows[1]['threshold']) == pytest.approx(0.98, abs=1e-3)
  assert rows[1]['server_threshold'] == '0.5'
  # An image that is inspected later is judged by it, too, and marked.
  _inspect(page, 'late.png', png(100), 'OK')
  assert mark in page.inner_text('#sentence')
  # What is kept is what the server reads.
  path = tmp_path / 'thresholds.json'
  path.write_text(_download(page, '#keep'))
  model = serve_helpers.make_model()
  (moved,) = serve_models.with_thresholds([model], path)
  assert moved.image_threshold == pytest.approx(0.98, abs=1e-3)
  assert moved.pixel_threshold == model.pixel_threshold
  page.click('#reset')
  _wait_for_text(page, '#word', 'DEFECT')
  assert not page.is_visible('#moved')
  assert 'moved' not in page.inner_text('#list')
  assert 'moved' not in page.inner_text('#sentence')


@pytest.mark.parametrize(
  'text, wrong',
  [
    ('{', 'is not JSON'),
    ('[]', 'expected thresholds by category'),
    ('{"bolt": {}}', r"expected thresholds by category, of \['nut'\]"),
    ('{"nut": {"threshold": 1}}', 'expected image_threshold and pixel'),
    ('{"nut": {"image_threshold": "1"}}', 'nut.image_threshold'),
    ('{"nut": {"image_threshold": Infinity}}', 'nut.image_threshold'),
  ],
)
def test_a_wrong_file_of_thresholds_is_refused(tmp_path, text, wrong):
  path = tmp_path / 'thresholds.json'
  path.write_text(text)
  with pytest.raises(ValueError, match=wrong):
    serve_models.with_thresholds([serve_helpers.make_model()], path)


@pytest.mark.parametrize('event', ['paste', 'drop'])
def test_paste_and_drop(open_page, event):
  page = open_page()
  _give(page, event, 'given.png', png(), 'image/png')
  _wait_for_text(page, '#name', 'given.png (nut)')


def _give(page, event, name, content, kind):
  page.evaluate(
    """([event, name, content, type]) => {
      const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], name, {type}));
      const options = {bubbles: true, cancelable: true};
      document.querySelector('#drop').dispatchEvent(event === 'paste'
        ? new ClipboardEvent(event, {...options, clipboardData: data})
        : new DragEvent(event, {...options, dataTransfer: data}));
    }""",
    [event, name, serve_helpers.base64_of(content), kind],
  )


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_phone(open_page, scheme):
  page = open_page(viewport={'width': 360, 'height': 740}, color_scheme=scheme)
  name = 'a_rather_long_name_of_a_file_' * 4
  _inspect(page, name, png(), 'DEFECT')
  assert page.evaluate('document.documentElement.scrollWidth') == 360
  color = page.evaluate('getComputedStyle(document.body).backgroundColor')
  red = int(color.removeprefix('rgb(').split(',')[0])
  assert (red < 128) == (scheme == 'dark')
  assert page.get_attribute('#camera', 'capture') == 'environment'
  head, picture = page.locator('#state'), page.locator('#view')
  assert head.bounding_box()['y'] < picture.bounding_box()['y']


def _batch(page, **files):
  page.set_input_files(
    '#file',
    [
      {'name': f'{name}.png', 'mimeType': 'image/png', 'buffer': content}
      for name, content in files.items()
    ],
  )


def _download(page, button):
  with page.expect_download() as download:
    page.click(button)
  return download.value.path().read_bytes().decode()


def test_a_batch_keeps_a_list_and_a_corrupt_file_does_not_end_it(open_page):
  page = open_page()
  _batch(page, a=png(10), b=b'x', c=png(100), d=png(20))
  _wait_for_text(page, '#word', 'DEFECT')
  counts = '4 images, 2 OK, 1 DEFECT, 1 NOT INSPECTED'
  assert page.inner_text('#sentence') == counts
  rows = page.locator('#list li').all_inner_texts()
  assert [row.split('\n')[0] for row in rows] == [
    'OK',
    'DEFECT',
    'NOT INSPECTED',
    'OK',
  ]
  assert '415' in rows[2] and '0.784' in rows[1]
  assert page.inner_text('#counts') == counts + '.'
  assert 'complete' in page.inner_text('#cut')
  page.select_option('#filter', 'refused')
  assert page.locator('#list li:visible').count() == 1
  page.locator('#list li:visible button').click()
  assert page.inner_text('#word') == 'NOT INSPECTED'
  page.select_option('#filter', 'all')
  page.locator('#list button').nth(1).click()
  _wait_for_text(page, '#name', 'c.png (nut)')
  assert page.inner_text('#sentence').startswith('c.png: score 0.784')


def test_a_batch_without_defects_ends_as_not_inspected(open_page):
  page = open_page()
  _batch(page, a=png(10), b=b'x', c=png(10))
  _wait_for_text(page, '#word', 'NOT INSPECTED')
  assert page.inner_text('#sentence') == '3 images, 2 OK, 1 NOT INSPECTED'


def test_what_was_not_inspected_is_inspected_again(open_page):
  page = open_page()
  page.route('**/v1/inspect*', lambda route: route.abort())
  _batch(page, a=png(10), b=png(20))
  _wait_for_text(page, '#word', 'NOT INSPECTED')
  page.unroute('**/v1/inspect*')
  page.click('#again')
  _wait_for_text(page, '#word', 'OK')
  assert page.inner_text('#counts') == '2 images, 2 OK.'
  assert not page.is_visible('#again')


def test_the_list_as_csv(open_page):
  page = open_page()
  files = {'=1+1,"x"': png(10), 'broken': b'x', 'bad': png(100)}
  _batch(page, **files)
  _wait_for_text(page, '#word', 'DEFECT')
  rows = list(csv.DictReader(io.StringIO(_download(page, '#csv'))))
  assert [row['verdict'] for row in rows] == [
    'good',
    'not inspected',
    'defective',
  ]
  assert rows[0]['image'] == '\'=1+1,"x".png'
  assert float(rows[2]['score']) == pytest.approx(200 / 255)
  assert rows[2]['threshold'] == '0.5' and '415' in rows[1]['error']


def test_files_dropped_while_others_run_wait_for_them(open_page):
  page = open_page()
  waiting = []
  page.route('**/v1/inspect*', lambda route: waiting.append(route))
  _upload(page, 'first.png', png(100))
  _wait_for_text(page, '#word', 'INSPECTING')
  _give(page, 'drop', 'second.png', png(10), 'image/png')
  assert page.locator('#list li').count() == 2
  waiting[0].continue_()
  page.unroute('**/v1/inspect*')
  _wait_for_text(page, '#name', 'second.png (nut)')
  assert page.inner_text('#counts') == '2 images, 1 OK, 1 DEFECT.'


def test_a_list_that_is_cut_says_so(open_page):
  page = open_page()
  page.evaluate(
    """() => {
      window.fetch = async () => { throw new TypeError(); };
      const data = new DataTransfer();
      for (let i = 0; i < 1003; i++) data.items.add(new File(['x'], `${i}`));
      document.dispatchEvent(new DragEvent('drop', {dataTransfer: data}));
    }"""
  )
  _wait_for_text(page, '#word', 'NOT INSPECTED')
  assert 'the 3 oldest rows were dropped' in page.inner_text('#cut')
  assert page.locator('#list li').count() == 1000


def test_regions_are_listed_and_shown_larger(open_page):
  page = open_page()
  _inspect(page, 'bad.png', png(100, (300, 200)), 'DEFECT')
  assert page.inner_text('#regions-head').startswith('1 region at')
  region = page.locator('#regions button')
  # The bright quarter, blurred by a pixel of the map at most.
  text = region.inner_text()
  assert text.startswith('1: 150 × 100 px at 0, 0; area 15000 px; peak 0.78')
  before = page.locator('#view').bounding_box()['width']
  region.click()
  assert page.locator('#view').bounding_box()['width'] == pytest.approx(before)
  page.click('#larger')
  page.click('#larger')
  _wait_for_text(page, '#zoom', '225 %')
  after = page.locator('#view').bounding_box()['width']
  assert after == pytest.approx(2.25 * before, abs=1)
  page.check('#beside')
  assert page.is_visible('#plain')
  # Both pictures are of one size and one place.
  page.evaluate(
    "document.querySelector('#plain').parentElement.scrollTo(30, 20)"
  )
  view = "document.querySelector('#view').parentElement.scrollLeft"
  program_helpers.wait_for(
    lambda: page.evaluate(view) == pytest.approx(30, abs=1)
  )
  # A threshold above all values of the map: no region is left.
  page.focus('#pixel-threshold')
  page.keyboard.press('End')
  assert page.inner_text('#regions-head').startswith('No regions')


def test_the_page_finds_the_regions_that_the_server_finds(open_page):
  page = open_page()
  rng = np.random.default_rng(0)
  for _ in range(20):
    values = rng.integers(0, 9, (12, 12)) + rng.random((12, 12)) / 10
    found = page.evaluate(
      """async ([values, level]) => {
        const paint = await import('./paint.js');
        return paint.regions({size: 12, values}, level, 24, 36);
      }""",
      [values.ravel().tolist(), 5.0],
    )
    assert found == [
      dataclasses.asdict(region) for region in regions.find(values, 5.0, 36, 24)
    ]


def test_the_legend_has_the_values_of_the_threshold(open_page):
  page = open_page()
  _inspect(page, 'bad.png', png(100), 'DEFECT')
  assert page.inner_text('#ramp-low') == '0.250'
  assert page.inner_text('#ramp-level') == '0.500'
  assert page.inner_text('#ramp-top') == '1.000'
  last = page.evaluate(
    "[...document.querySelector('#ramp').getContext('2d')"
    '.getImageData(299, 0, 1, 1).data]'
  )
  assert last[0] > 200 and last[1] < 30 and last[3] == 150


def test_a_file_that_the_browser_cannot_show_is_shown_by_the_server(open_page):
  page = open_page()
  pixels = np.zeros((20, 30), np.uint16)
  pixels[:10] = 65535
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'TIFF')
  _inspect(page, 'deep.tif', file.getvalue(), 'DEFECT')
  page.uncheck('#show-map')
  page.uncheck('#show-outline')
  shades = page.evaluate(
    """() => {
      const view = document.querySelector('#view').getContext('2d');
      const {data} = view.getImageData(15, 0, 1, 20);
      return [data[4 * 3], data[4 * 17]];
    }"""
  )
  assert shades[0] > 245 and shades[1] < 10


@pytest.mark.parametrize('event', ['paste', 'drop'])
def test_what_is_no_file_is_said(open_page, event):
  page = open_page()
  _inspect(page, 'bad.png', png(100), 'DEFECT')
  page.evaluate(
    """event => {
      const data = new DataTransfer();
      data.setData('text/plain', 'words');
      document.body.dispatchEvent(event === 'paste'
        ? new ClipboardEvent(event, {bubbles: true, clipboardData: data})
        : new DragEvent(event, {bubbles: true, dataTransfer: data}));
    }""",
    event,
  )
  assert page.inner_text('#word') == 'NOT INSPECTED'
  assert 'is no image file' in page.inner_text('#sentence')
  assert not page.is_visible('#result')


def test_a_pasted_file_that_is_no_image_is_said(open_page):
  page = open_page()
  _give(page, 'paste', 'notes.txt', b'words', 'text/plain')
  _wait_for_text(page, '#word', 'NOT INSPECTED')
  assert 'notes.txt' in page.inner_text('#sentence')


def test_a_token_is_asked_for_in_words(browser):
  with serve_helpers.serving(token='secret') as address:
    page = browser.new_page()
    page.goto(address)
    _wait_for_text(page, '#word', 'NOT INSPECTED')
    assert 'asks for a token' in page.inner_text('#sentence')
    for token, said in [
      ('wrong', 'does not accept this token'),
      ('sécret', 'The token has "é" in it'),
      ('日本', 'The token has "日" in it'),
    ]:
      page.fill('#token', token)
      page.keyboard.press('Enter')
      page.locator('#sentence', has_text=said).wait_for()
    page.fill('#token', 'secret')
    page.keyboard.press('Enter')
    _wait_for_text(page, '#word', 'READY')
    assert not page.is_visible('#login')
    page.close()


def test_an_operator_disagrees(browser, tmp_path):
  keep = feedback.open_folder(tmp_path, ['nut'])
  with serve_helpers.serving(keep=keep) as address:
    page = browser.new_page()
    page.goto(address)
    _wait_for_text(page, '#word', 'READY')
    _inspect(page, 'missed.png', png(10), 'OK')
    assert not page.is_visible('#is-good')
    page.select_option('#reason', 'defect missed')
    page.fill('#remark', 'a dent')
    page.click('#is-defective')
    page.locator('#kept', has_text='Kept as nut/test/defective/').wait_for()
    note = page.inner_text('#list .note')
    assert note == 'operator: defective (defect missed: a dent)'
    rows = list(csv.DictReader(io.StringIO(_download(page, '#csv'))))
    assert rows[0]['opinion'] == 'defective'
    page.close()
  (file,) = (tmp_path / 'nut' / 'test' / 'defective').iterdir()
  assert file.read_bytes() == png(10)


def test_without_a_folder_for_opinions_nobody_is_asked(open_page):
  page = open_page()
  _inspect(page, 'fine.png', png(10), 'OK')
  assert not page.is_visible('#feedback')


# A camera whose picture is grey, with a bright spot while `bad` is true.
_CAMERA = """() => {
  window.bad = false;
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [64, 48];
  const context = canvas.getContext('2d');
  setInterval(() => {
    context.fillStyle = '#222';
    context.fillRect(0, 0, 64, 48);
    context.fillStyle = window.bad ? '#fff' : '#222';
    context.fillRect(0, 0, 32, 24);
  }, 20);
  navigator.mediaDevices.getUserMedia = async () => canvas.captureStream();
}"""


def _open_camera(page):
  page.evaluate(_CAMERA)
  page.click('#live')
  page.locator('#station').wait_for()


def test_the_camera_inspects_on_a_key_and_a_click(open_page):
  page = open_page()
  _open_camera(page)
  page.keyboard.press('Space')  # On the button, which has the focus.
  _wait_for_text(page, '#word', 'OK')
  assert page.inner_text('#name').startswith('camera_20')
  page.evaluate('window.bad = true; document.activeElement.blur()')
  page.wait_for_timeout(200)
  page.keyboard.press('Space')
  _wait_for_text(page, '#word', 'DEFECT')
  assert page.locator('#list li').count() == 2
  page.evaluate('window.bad = false')
  page.wait_for_timeout(200)
  page.click('#video')
  _wait_for_text(page, '#word', 'OK')
  page.click('#leave')
  assert not page.is_visible('#station')
  page.keyboard.press('Space')
  assert page.locator('#list li').count() == 3


def test_the_camera_inspects_by_the_clock(open_page):
  page = open_page()
  _open_camera(page)
  page.fill('#interval', '0.2')
  page.check('#timed')
  page.locator('#list li').nth(2).wait_for()
  page.uncheck('#timed')
  _wait_for_text(page, '#word', 'OK')
  count = page.locator('#list li').count()
  page.wait_for_timeout(600)
  assert page.locator('#list li').count() <= count + 1


@pytest.mark.parametrize(
  'script, said',
  [
    (
      """() => {
        navigator.mediaDevices.getUserMedia = async () => {
          throw new DOMException('', 'NotAllowedError');
        };
      }""",
      'was not allowed',
    ),
    (
      "Object.defineProperty(navigator, 'mediaDevices', {value: undefined})",
      'https',
    ),
  ],
  ids=['not allowed', 'no TLS'],
)
def test_a_camera_that_cannot_be_used_is_said(open_page, script, said):
  page = open_page()
  _inspect(page, 'fine.png', png(10), 'OK')
  page.evaluate(script)
  page.click('#live')
  page.locator('#sentence', has_text=said).wait_for()
  assert page.inner_text('#word') == 'NOT INSPECTED'
  assert not page.is_visible('#station') and not page.is_visible('#result')


def test_a_camera_that_was_unplugged_is_said(open_page):
  page = open_page()
  _open_camera(page)
  page.click('#shoot')
  _wait_for_text(page, '#word', 'OK')
  page.evaluate(
    "document.querySelector('#video').srcObject.getTracks()[0].stop()"
  )
  page.click('#shoot')
  _wait_for_text(page, '#word', 'NOT INSPECTED')
  assert 'gives no picture' in page.inner_text('#sentence')
