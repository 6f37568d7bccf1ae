"""The server: real HTTP, hostile clients, load, and a real browser."""

import asyncio
import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
from PIL import Image
import program_helpers
import pytest

pytest.importorskip('fastapi', reason='the extra serve is not installed')
pytest.importorskip('uvicorn', reason='the extra serve is not installed')
httpx = pytest.importorskip('httpx2', reason='httpx2 is not installed')

from dmdd_jax.serve import app as serve_app  # noqa: E402
from dmdd_jax.serve import batching  # noqa: E402
from dmdd_jax.serve import load  # noqa: E402
from dmdd_jax.serve import models as serve_models  # noqa: E402

SIDE = 16


def make_model(category='nut', seconds=0.0, image_threshold=0.5):
  """The map is the image's brightness in [0, 1], the score its maximum."""

  def run(images):
    time.sleep(seconds)
    if images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
      raise AssertionError(images.shape)
    if (images == 13).all():
      raise RuntimeError('thirteen')
    maps = images.mean(-1).astype(np.float32) / np.float32(255)
    scores = maps.max(axis=(1, 2))
    if (images == 14).all():
      scores[:] = np.nan
    if (images == 15).all():
      maps[:, 0, 0] = np.inf
    return (scores[:0] if (images == 16).all() else scores), maps

  return serve_models.Model(
    category, SIDE, 8, image_threshold, 0.5, run, category
  )


@contextlib.contextmanager
def serving(models=None, **options):
  """Runs a server in a thread; gives its address."""
  import uvicorn

  app = serve_app.create_app(models or [make_model()], **options)
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    address = f'http://127.0.0.1:{listener.getsockname()[1]}'
    server = uvicorn.Server(uvicorn.Config(app, log_level='error'))
    thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]})
    thread.start()
    try:
      deadline = time.monotonic() + 120
      while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
      yield address
    finally:
      server.should_exit = True
      thread.join()


@pytest.fixture(scope='module')
def address():
  limits = serve_app.Limits(bytes=2**18, pixels=10**6, seconds=5.0)
  with serving(limits=limits) as found:
    yield found


def png(level=100, size=(30, 20)):
  """A file: grey, with a spot of level + 100."""
  pixels = np.full((size[1], size[0], 3), level, np.uint8)
  pixels[: size[1] // 2, : size[0] // 2] += np.uint8(100)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG')
  return file.getvalue()


def post(address, content, path='/v1/inspect', **options):
  return httpx.post(
    address + path, files={'image': ('x.png', content)}, timeout=120, **options
  )


def test_form_and_json_give_the_same_answer(address):
  answer = post(address, png()).json()
  document = {'image': base64.b64encode(png()).decode()}
  again = httpx.post(f'{address}/v1/inspect', json=document, timeout=120)
  assert again.json() == answer
  assert answer['score'] == pytest.approx(200 / 255)
  assert answer['verdict'] == 'defective' and answer['category'] == 'nut'
  assert (answer['height'], answer['width']) == (20, 30)
  shades = Image.open(io.BytesIO(base64.b64decode(answer['map']['data'])))
  low, high = answer['map']['low'], answer['map']['high']
  values = low + np.asarray(shades) / 255 * (high - low)
  assert values.shape == (SIDE, SIDE)
  assert values[2, 2] == pytest.approx(200 / 255, abs=0.01)
  assert values[-2, -2] == pytest.approx(100 / 255, abs=0.01)


def test_the_map_as_floats_or_not_at_all(address):
  answer = post(address, png(), '/v1/inspect?map=float32').json()
  values = np.frombuffer(base64.b64decode(answer['map']['data']), '<f4')
  assert values.reshape(SIDE, SIDE)[-1, -1] == np.float32(100 / 255)
  assert post(address, png(), '/v1/inspect?map=none').json()['map'] is None
  assert post(address, png(), '/v1/inspect?map=tiff').status_code == 422


@pytest.mark.parametrize(
  'content, status, text',
  [
    (b'', 415, 'is none of PNG'),
    (b'no picture', 415, 'is none of PNG'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 415, 'is none of'),
    (png()[:-40], 415, 'cannot be decoded'),
    (load.bomb(2000, 2000), 413, '2000 x 2000'),
    (load.bomb(60000, 60000), 413, 'pixels'),
    (b'\x00' * (2**18 + 1), 413, 'bytes at most'),
    (b'\x00' * 2**20, 413, 'bytes at most'),
  ],
  ids=['empty', 'text', 'eps', 'cut', 'large', 'bomb', 'long', 'longer'],
)
def test_a_file_that_cannot_be_used_is_refused(address, content, status, text):
  answer = post(address, content)
  assert answer.status_code == status, answer.text
  assert text in answer.json()['detail']


@pytest.mark.parametrize(
  'kind, body, status',
  [
    ('text/plain', b'x', 415),
    ('', b'x', 415),
    ('application/json', b'{', 400),
    ('application/json', b'\xff\xfe', 400),
    ('application/json', b'[' * 100_000, 400),
    ('application/json', b'[]', 400),
    ('application/json', b'{"image": 3}', 400),
    ('application/json', b'{"image": "!!"}', 400),
    ('application/json', '{"image": "ä"}'.encode(), 400),
    ('multipart/form-data', b'x', 400),
    ('multipart/form-data; boundary=b', b'nothing of the kind', 400),
    ('multipart/form-data; boundary=b', b'--b\r\nContent-', 400),
    (
      'multipart/form-data; boundary=b',
      b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--b--',
      400,
    ),
  ],
)
def test_a_body_that_cannot_be_used_is_refused(address, kind, body, status):
  answer = httpx.post(
    f'{address}/v1/inspect',
    content=body,
    headers={'content-type': kind},
    timeout=120,
  )
  assert answer.status_code == status, answer.text
  assert isinstance(answer.json()['detail'], str)


def _raw(address, content):
  host, _, port = address.removeprefix('http://').partition(':')
  client = socket.create_connection((host, int(port)), timeout=60)
  client.sendall(
    b'POST /v1/inspect HTTP/1.1\r\nHost: x\r\nContent-Type: application/json'
    b'\r\nContent-Length: 1000\r\n\r\n' + content
  )
  return client


def test_clients_that_break_off_or_dawdle(address):
  for _ in range(20):
    _raw(address, b'{"image": "').close()
  slow = _raw(address, b'{')
  assert b' 408 ' in slow.recv(4096).partition(b'\r\n')[0]
  slow.close()
  assert post(address, png()).status_code == 200
  assert httpx.get(f'{address}/healthz', timeout=60).json()['waiting'] == 0


@pytest.mark.parametrize(
  'level', [13, 14, 15, 16], ids=['raises', 'nan', 'infinite map', 'too few']
)
def test_a_failing_model_does_not_end_the_service(address, level):
  file = io.BytesIO()
  Image.new('RGB', (SIDE, SIDE), (level, level, level)).save(file, 'PNG')
  answer = post(address, file.getvalue())
  assert answer.status_code == 500 and 'see the log' in answer.json()['detail']
  assert post(address, png()).status_code == 200


def test_a_worker_that_has_ended_is_not_healthy(monkeypatch):
  async def ended(self):
    pass

  monkeypatch.setattr(batching.Batcher, 'work', ended)
  with serving() as address:
    answer = httpx.get(f'{address}/healthz', timeout=60)
  assert answer.status_code == 503 and 'log' in answer.json()['detail']


@pytest.mark.parametrize('score', [np.nan, np.inf, -np.inf])
def test_there_is_no_verdict_on_what_is_no_score(score):
  with pytest.raises(ValueError, match='no verdict'):
    make_model().verdict(score)


async def _many(address, contents, connections):
  limits = httpx.Limits(max_connections=connections)
  async with httpx.AsyncClient(timeout=300, limits=limits) as client:
    return await asyncio.gather(
      *(
        client.post(f'{address}/v1/inspect?map=none', files={'image': content})
        for content in contents
      )
    )


def _metric(address, name):
  for line in httpx.get(f'{address}/metrics', timeout=60).text.splitlines():
    if line.startswith(f'{name} '):
      return float(line.split()[-1])
  raise AssertionError(name)


def test_concurrent_requests_share_calls_and_keep_their_answers():
  levels = [index % 120 for index in range(120)]
  models = [make_model(seconds=0.02)]
  with serving(
    models, limits=serve_app.Limits(waiting=200, seconds=600)
  ) as address:
    answers = asyncio.run(_many(address, [png(x) for x in levels], 120))
    calls = _metric(address, 'dmdd_batch_images_count')
    images = _metric(address, 'dmdd_batch_images_sum')
  for level, answer in zip(levels, answers):
    assert answer.status_code == 200
    assert answer.json()['score'] == pytest.approx((level + 100) / 255)
  assert images == 120 and calls < 100


def test_every_request_is_answered_when_too_many_come():
  contents = [png()] * 300
  models = [make_model(seconds=0.05)]
  with serving(
    models, limits=serve_app.Limits(waiting=4, seconds=600)
  ) as address:
    answers = asyncio.run(_many(address, contents, 300))
    found = [answer.status_code for answer in answers]
    assert set(found) == {200, 503} and len(found) == 300
    refused = next(x for x in answers if x.status_code == 503)
    assert refused.headers['retry-after'] == '1'
    assert post(address, png()).status_code == 200


def test_every_one_of_200_good_and_hostile_requests_is_answered():
  requests = load.requests(png(), 200, hostile=True, pause=0.05)
  models = [make_model(seconds=0.01)]
  limits = serve_app.Limits(waiting=150, seconds=2.0)
  with serving(models, limits=limits) as address:
    url = f'{address}/v1/inspect'
    answers = asyncio.run(load.send_all(url, requests, clients=200))
    counted = _metric(address, 'dmdd_request_seconds_count')
    memory = _metric(address, 'process_resident_memory_bytes')
    assert _metric(address, 'dmdd_waiting_requests') == 0
    assert post(address, png()).status_code == 200
  assert len(answers) == 200 <= counted and memory > 0
  allowed = {
    'image': {200},
    'slow': {200},
    'JSON': {200},
    'file cut short': {415},
    'text as an image': {415},
    'wrong content type': {415},
    'bomb': {413},
    'upload that stops': {408},
  }
  found = {}
  for answer in answers:
    found.setdefault(answer.kind, set()).add(answer.status)
  assert found.keys() == allowed.keys()
  for kind, statuses in found.items():
    assert statuses <= allowed[kind] | {503}, (kind, statuses)
  assert 200 in found['image']


def test_a_request_without_an_answer_is_counted():
  with socket.socket() as listener:  # Does not listen.
    listener.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{listener.getsockname()[1]}/v1/inspect'
    requests = load.requests(png(), 3)
    answers = asyncio.run(load.send_all(url, requests, clients=2))
  assert load.summarize(answers) == {
    'answers': {'image': {'none': 3}},
    'unanswered': 3,
    'p50': None,
    'p99': None,
  }
  with pytest.raises(ValueError, match='HOST:PORT'):
    asyncio.run(load.send_all('127.0.0.1:8000', requests, clients=2))


def test_several_categories():
  models = [make_model('nut'), make_model('bolt', image_threshold=None)]
  with serving(models) as address:
    listed = httpx.get(f'{address}/v1/models', timeout=60).json()
    assert [model['category'] for model in listed] == ['nut', 'bolt']
    answer = post(address, png())
    assert answer.status_code == 404
    assert '?category=bolt or ?category=nut' in answer.json()['detail']
    answer = post(address, png(), '/v1/inspect?category=cog')
    assert answer.status_code == 404 and "'cog'" in answer.json()['detail']
    answer = post(address, png(), '/v1/inspect?category=bolt').json()
    assert answer['verdict'] == 'uncalibrated'
    assert answer['image_threshold'] is None


def test_categories_must_differ():
  with pytest.raises(ValueError, match='different categories'):
    serve_app.create_app([make_model(), make_model()])
  with pytest.raises(ValueError, match='at least one'):
    serve_app.create_app([])


def test_the_token_guards_what_is_said_of_images():
  with serving(token='secret') as address:
    assert httpx.get(f'{address}/healthz', timeout=60).status_code == 200
    assert httpx.get(address, timeout=60).status_code == 200
    for header in ({}, {'authorization': 'Bearer wrong'}):
      answer = post(address, png(), headers=header)
      assert answer.status_code == 401 and 'Bearer' in answer.json()['detail']
    for header in ('Bearer secret', 'bearer secret'):
      answer = post(address, png(), headers={'authorization': header})
      assert answer.status_code == 200
    answer = post(address, png(), headers={'authorization': 'secret'})
    assert answer.status_code == 401


def test_a_token_may_have_any_letters():
  header = {b'authorization': 'Bearer schlüssel'.encode()}
  with serving(token='schlüssel') as address:
    assert post(address, png(), headers=header).status_code == 200


def test_other_names_of_the_machine_are_refused():
  with serving(hosts=['127.0.0.1', '::1']) as address:
    port = address.rpartition(':')[2]
    assert httpx.get(f'{address}/healthz', timeout=60).status_code == 200
    for name in (f'[::1]:{port}', '127.0.0.1', '127.0.0.1:1'):
      header = {'host': name}
      answer = httpx.get(f'{address}/healthz', headers=header, timeout=60)
      assert answer.status_code == 200, name
    for name in (
      f'evil.example:{port}',
      'evil.example',
      '',
      '[',
      '127.0.0.1.x',
    ):
      answer = post(address, png(), headers={'host': name})
      assert answer.status_code == 400, name
      assert '--allowed_host' in answer.json()['detail']


def test_metrics_count_verdicts_and_refusals(address):
  post(address, png())
  post(address, b'')
  text = httpx.get(f'{address}/metrics', timeout=60).text
  for part in (
    'dmdd_verdicts_total{category="nut",verdict="defective"}',
    'dmdd_requests_total{status="200"}',
    'dmdd_requests_total{status="415"}',
    'dmdd_waiting_requests 0.0',
  ):
    assert part in text


def test_what_is_running_is_answered_when_the_server_is_stopped():
  code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_serve
from dmdd_jax.serve import app as serve_app
app = serve_app.create_app([test_serve.make_model(seconds=3)])
serve_app.run(app, port=int(sys.argv[1]))
"""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  server = subprocess.Popen(
    [sys.executable, '-c', code, str(port)],
    env={**os.environ, 'PYTHONPATH': program_helpers.REPOSITORY},
  )
  address, answers = f'http://127.0.0.1:{port}', []
  try:
    _wait_until_up(address, server)
    client = threading.Thread(
      target=lambda: answers.append(post(address, png()))
    )
    client.start()
    while httpx.get(f'{address}/healthz', timeout=60).json()['waiting'] == 0:
      time.sleep(0.05)
    server.send_signal(signal.SIGTERM)
    client.join()
    assert answers[0].status_code == 200
    assert server.wait(timeout=120) in (0, -signal.SIGTERM)
  finally:
    server.kill()


def _wait_until_up(address, server):
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline and server.poll() is None:
    with contextlib.suppress(httpx.TransportError):
      if httpx.get(f'{address}/healthz', timeout=60).status_code == 200:
        return
    time.sleep(0.2)
  raise AssertionError('the server did not start')


def test_what_cannot_be_served_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    serve_models.open_model(tmp_path / 'nowhere')


@pytest.mark.parametrize(
  'content', [b'', b'text'], ids=lambda x: x.decode() or 'empty'
)
def test_a_damaged_onnx_file_is_named(tmp_path, content):
  pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
  path = tmp_path / 'damaged.onnx'
  path.write_bytes(content)
  with pytest.raises(ValueError, match='damaged.onnx.*tools/export.py'):
    serve_models.open_model(path)


def test_without_onnxruntime_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'onnxruntime', None)
  path = tmp_path / 'model.onnx'
  path.write_bytes(b'')
  with pytest.raises(ValueError, match=r'model.onnx.*\.\[onnx\]'):
    serve_models.open_model(path)


def test_the_description_is_kept_under_fuzzing(address):
  """Requests drawn from /openapi.json, valid and not."""
  schemathesis = pytest.importorskip(
    'schemathesis', reason='schemathesis is not installed'
  )
  import hypothesis
  from schemathesis import checks

  schema = schemathesis.openapi.from_url(f'{address}/openapi.json')
  chosen = [
    checks.not_a_server_error,
    *(
      getattr(schemathesis.specs.openapi.checks, name)
      for name in (
        'status_code_conformance',
        'content_type_conformance',
        'response_schema_conformance',
      )
    ),
  ]
  operations = [found.ok() for found in schema.get_all_operations()]
  assert {x.path for x in operations} == {
    '/healthz',
    '/metrics',
    '/v1/inspect',
    '/v1/models',
  }
  modes = schemathesis.GenerationMode
  for operation in operations:
    # Only an inspection has parameters and a body that can be wrong.
    wrong = [modes.NEGATIVE] if operation.path == '/v1/inspect' else []
    for mode in (modes.POSITIVE, *wrong):

      @hypothesis.settings(
        max_examples=25,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
      )
      @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
      def check(case):
        case.call_and_validate(base_url=address, checks=chosen)

      check()


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
    [event, base64.b64encode(png()).decode()],
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
